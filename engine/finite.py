"""Numbers that are not finite: their update is skipped, logged, and counted, without waiting for the device."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .statistics import RunningStatistics

MIN_LOSS_SCALE = 2.0**-10


class FiniteGuard:
    """Keeps a training whole when loss or gradients of an update are not finite.

    Whether they are is known to the device alone until the host asks. The fused optimizers leave out an update when a
    tensor says so, as they do for a loss scale, and the running statistics go back to those from before the update.

    Args:
        network: whose running statistics are protected.
        optimizer: in its fused form.
        scaler: the loss scale; where it is on, it decides by itself, and gradients that overflow are its normal work.
        window: updates between two looks.
        limit: so many skipped updates end the run.
        locate: says where an image of the training set lies.
        logger: gets a warning for each skipped update.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        window: int,
        limit: int,
        locate: Callable[[int], str],
        logger: logging.Logger,
    ) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        self._limit, self._locate, self._logger = limit, locate, logger
        self._statistics = RunningStatistics(network)
        device = next(network.parameters()).device
        self._skipped = torch.zeros(window, dtype=torch.bool, device=device)
        self._infinite_loss = torch.zeros(window, dtype=torch.bool, device=device)
        self._updates: list[tuple[int, float, list[Tensor]]] = []

    def before(self) -> Tensor:
        """Returns a copy of all running statistics, to be handed to `step`."""
        return self._statistics.read()

    def step(self, update: int, loss: Tensor, grad_norm: Tensor, statistics: Tensor, images: list[Tensor]) -> None:
        """Steps the optimizer, unless a number is not finite.

        Args:
            update: number of this update.
            loss: of this process's images, a scalar on the device.
            grad_norm: the gradients' norm over all processes, so that all decide alike.
            statistics: what `before` returned.
            images: indices (N,) of the images of each batch.
        """
        skipped = ~grad_norm.isfinite()
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            vars(self._optimizer).update(found_inf=skipped.float(), grad_scale=None)
            self._optimizer.step()
        self._statistics.write(self._statistics.read().where(~skipped, statistics))
        place = len(self._updates)
        self._skipped[place], self._infinite_loss[place] = skipped, ~loss.isfinite()
        self._updates.append((update, self._optimizer.param_groups[0]["lr"], images))

    def look(self, skipped_before: int) -> int:
        """Tells of the updates since the last look that were skipped; waits for the device.

        Args:
            skipped_before: how many the run had skipped by the last look.

        Returns:
            How many it has skipped by now.

        Raises:
            ValueError: more than the limit, or a loss scale so small that half precision can't train this network.
        """
        updates, self._updates = self._updates, []
        skipped, infinite_loss = self._skipped.tolist(), self._infinite_loss.tolist()
        total, what = skipped_before, ""
        for i, (update, lr, images) in enumerate(updates):
            if not skipped[i] or (self._scaler.is_enabled() and not infinite_loss[i]):
                continue
            total += 1
            names = ", ".join(self._locate(int(index)) for batch in images for index in batch[:4])
            cause = f"loss, on images {names}, ..." if infinite_loss[i] else "gradients"
            what = f"update {update} skipped at learning rate {lr:.3g}: not a finite {cause}"
            self._logger.warning(what)
        if total > self._limit:
            raise ValueError(
                f"{total} updates were skipped, TRAIN.MAX_SKIPPED is {self._limit}; the last: {what}. Lower "
                "TRAIN.BASE_LR, look at the images, or train with --amp off"
            )
        if self._scaler.is_enabled() and self._scaler.get_scale() < MIN_LOSS_SCALE:
            raise ValueError(
                f"the loss scale has collapsed to {self._scaler.get_scale():.1e}: half precision does not suit this "
                "training; use --amp bf16 or --amp off"
            )
        return total
