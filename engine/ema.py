"""The moving average of the weights, as the published recipes define it."""

from timm.utils import ModelEmaV3
from torch import nn
from yacs.config import CfgNode

from .plan import TrainingPlan, ema_weight


class ModelEma:
    """An average of all weights and BatchNorm statistics, updated every few updates; a copy during the warm-up.

    Args:
        network: not wrapped.
        cfg: the section TRAIN.
        plan: of the training.
    """

    def __init__(self, network: nn.Module, cfg: CfgNode, plan: TrainingPlan) -> None:
        self._period = cfg.EMA_UPDATE_PERIOD
        self.decay = 1 - min(1.0, ema_weight(cfg, plan.global_batch))
        self._average = ModelEmaV3(network, decay=self.decay, update_after_step=plan.warmup_updates, foreach=True)
        self.module: nn.Module = self._average.module  # in evaluation mode

    def update(self, network: nn.Module, update: int) -> None:
        """Averages in the weights that `network` has after update number `update`."""
        if update % self._period == 0:
            self._average.update(network, step=update)
