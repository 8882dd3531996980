"""The moving average of the weights, as the published recipes define it."""

from timm.utils import ModelEmaV3
from torch import nn


class ModelEma:
    """An average of all weights and BatchNorm statistics, taken every few updates; during the warm-up it is a copy.

    Args:
        model: the network, not wrapped.
        alpha: weight of the newest value for a global batch of one image in a run of one epoch (`TRAIN.EMA_ALPHA`);
            scaled, as published, by global_batch / epochs * period and at most 1.
        period: updates between two averages.
        global_batch: images in one update.
        epochs: length of the run.
        warmup_updates: length of the warm-up.
    """

    def __init__(
        self, model: nn.Module, *, alpha: float, period: int, global_batch: int, epochs: int, warmup_updates: int
    ) -> None:
        self.decay = 1 - min(1.0, alpha * global_batch / epochs * period)
        self._period = period
        self._average = ModelEmaV3(model, decay=self.decay, update_after_step=warmup_updates, foreach=True)

    @property
    def module(self) -> nn.Module:
        """The averaged network, in evaluation mode."""
        return self._average.module

    def update(self, model: nn.Module, update: int) -> None:
        """Takes in the weights that `model` has after update number `update`."""
        if update % self._period == 0:
            self._average.update(model, step=update)
