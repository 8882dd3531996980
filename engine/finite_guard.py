"""Updates with a non-finite loss or gradient: skipped, logged and counted, without waiting for the device."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from .statistics import RunningStatistics

MIN_LOSS_SCALE = 2.0**-10


class FiniteGuard:
    """Counts the updates that the optimizer skipped, and restores the running statistics after each.

    Which ones were skipped is known to the device alone until `check_skipped` reads it. With a loss scale, gradients
    overflow in normal operation, and only a non-finite loss counts.

    Args:
        network: its running statistics are restored.
        cfg: the configuration.
        scaler: the loss scale.
        locate: returns the path of an image of the training set.
        logger: gets a warning for each skipped update.
    """

    def __init__(
        self,
        network: nn.Module,
        cfg: CfgNode,
        scaler: torch.amp.GradScaler,
        locate: Callable[[int], str],
        logger: logging.Logger,
    ) -> None:
        self._scaler, self._limit, self._locate, self._logger = scaler, cfg.TRAIN.MAX_SKIPPED, locate, logger
        self._statistics = RunningStatistics(network)
        device = next(network.parameters()).device
        self._skipped = torch.zeros(cfg.PRINT_FREQ, dtype=torch.bool, device=device)
        self._infinite_loss = torch.zeros(cfg.PRINT_FREQ, dtype=torch.bool, device=device)
        self._updates: list[tuple[int, float, list[Tensor]]] = []

    def before_update(self) -> None:
        """Copies the running statistics."""
        self._before = self._statistics.read()

    def after_update(self, update: int, skipped: Tensor, loss: Tensor, lr: float, images: list[Tensor]) -> None:
        """Records an update, and restores the running statistics if it was skipped.

        Args:
            update: its number.
            skipped: whether the optimizer skipped it, a bool scalar on the device, equal on all processes.
            loss: of this process, a scalar on the device.
            lr: the learning rate.
            images: indices (N,) of the images of each batch.
        """
        self._statistics.write(self._statistics.read().where(~skipped, self._before))
        place = len(self._updates)
        self._skipped[place], self._infinite_loss[place] = skipped, ~loss.isfinite()
        self._updates.append((update, lr, images))

    def check_skipped(self, skipped_before: int) -> int:
        """Logs the updates skipped since the last check; waits for the device.

        Args:
            skipped_before: updates that the run had skipped by the last check.

        Returns:
            Updates that it has skipped by now.

        Raises:
            ValueError: more than TRAIN.MAX_SKIPPED, or the loss scale has collapsed.
        """
        updates, self._updates = self._updates, []
        skipped, infinite_loss = torch.stack((self._skipped, self._infinite_loss)).tolist()
        total, what = skipped_before, ""
        for i, (update, lr, images) in enumerate(updates):
            if not skipped[i] or (self._scaler.is_enabled() and not infinite_loss[i]):
                continue
            total += 1
            names = ", ".join(self._locate(int(index)) for batch in images for index in batch[:4])
            cause = f"loss, on images {names}, ..." if infinite_loss[i] else "gradients"
            what = f"update {update} skipped at learning rate {lr:.3g}: non-finite {cause}"
            self._logger.warning(what)
        if total > self._limit:
            raise ValueError(
                f"{total} updates were skipped, TRAIN.MAX_SKIPPED is {self._limit}; the last: {what}. Lower "
                "TRAIN.BASE_LR, look at the images, or train with AMP off"
            )
        if self._scaler.is_enabled() and self._scaler.get_scale() < MIN_LOSS_SCALE:
            raise ValueError(
                f"the loss scale has collapsed to {self._scaler.get_scale():.1e}: half precision does not suit this "
                "training; use AMP bf16 or off"
            )
        return total
