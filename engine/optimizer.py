"""The optimizer and its two weight-decay groups."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode


class Lamb(torch.optim.AdamW):
    """LAMB (arXiv:1904.00962): a step of Adam whose length, for each kernel, is a share of the kernel's own.

    The updates are those of timm's `Lamb`: weight decay is part of the step, and parameters without decay take plain
    Adam steps. timm's keeps its count of steps apart from its state and can't leave an update out without waiting for
    the device; the fused AdamW beneath this one does both. Gradients are not clipped here: TRAIN.CLIP_GRAD does that.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters, or leaves everything as it was where `found_inf` is 1, as the fused AdamW does."""
        settings = [(group["lr"], group["weight_decay"]) for group in self.param_groups]
        learning = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = {parameter: parameter.clone() for parameter in learning}
        for parameter in learning:
            parameter.zero_()
        for group in self.param_groups:
            group.update(lr=1.0, weight_decay=0.0)
        super().step()  # from zero at a learning rate of 1: the parameters are now the steps of Adam
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        kept = 1.0 if found_inf is None else 1 - found_inf
        for group, (lr, weight_decay) in zip(self.param_groups, settings, strict=True):
            group.update(lr=lr, weight_decay=weight_decay)
            for parameter in (p for p in group["params"] if p in before):
                step = _scaled_step(parameter, before[parameter], weight_decay)
                parameter.copy_(before[parameter] + lr * kept * step)


def _scaled_step(step: Tensor, weight: Tensor, weight_decay: float) -> Tensor:
    """Returns a step of LAMB for a learning rate of 1, from that of Adam: as long as the weight, where that decays."""
    if weight_decay == 0:
        return step
    step = step - weight_decay * weight
    length, own_length = weight.norm(), step.norm()
    return step * torch.where((length > 0) & (own_length > 0), length / own_length, 1.0)


# The state of each optimizer for a parameter, in the parameter's shape except for `step`, a scalar.
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
STATE = {torch.optim.AdamW: _ADAM, Lamb: _ADAM, torch.optim.SGD: {"momentum_buffer"}}


def parameter_groups(*modules: nn.Module, weight_decay: float) -> list[dict]:
    """Splits the trainable parameters: kernels decay; biases, 1-d parameters and `no_weight_decay()` names do not.

    The order within a group is that of `named_parameters()`, as in the published code, so that its optimizer states
    load.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for module in modules:
        exempt: set[str] = getattr(module, "no_weight_decay", set)()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                plain = parameter.dim() == 1 or name.endswith(".bias") or name in exempt
                (no_decay if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def build_optimizer(
    network: nn.Module, cfg: CfgNode, lr: float, criterion: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Builds one of `OPTIMIZERS` in its fused form.

    Args:
        network: to train.
        cfg: the section TRAIN.
        lr: learning rate.
        criterion: its parameters are trained as well.
    """
    modules = [network] if criterion is None else [network, criterion]
    groups = parameter_groups(*modules, weight_decay=cfg.WEIGHT_DECAY)
    return OPTIMIZERS[cfg.OPTIMIZER.NAME](groups, cfg.OPTIMIZER, lr)


def _adamw(groups: list[dict], cfg: CfgNode, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(cfg.BETAS), eps=cfg.EPS, fused=True)


def _lamb(groups: list[dict], cfg: CfgNode, lr: float) -> torch.optim.Optimizer:
    return Lamb(groups, lr=lr, betas=tuple(cfg.BETAS), eps=cfg.EPS, fused=True)


def _sgd(groups: list[dict], cfg: CfgNode, lr: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum."""
    sgd = torch.optim.SGD(groups, lr=lr, momentum=cfg.MOMENTUM, nesterov=cfg.MOMENTUM > 0, fused=True)
    if cfg.MOMENTUM > 0:
        # A first step starts from zero, but torch leaves uninitialised memory here if that step is skipped.
        for parameter in (p for group in groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


OPTIMIZERS: dict[str, Callable[[list[dict], CfgNode, float], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "lamb": _lamb,
    "sgd": _sgd,
}


def state_mismatch(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> str:
    """Returns why a `state_dict()` does not fit an optimizer; empty if it does.

    torch itself only compares the lengths of the groups, and would fail or compute nonsense at the first update.
    """
    own = [len(group["params"]) for group in optimizer.param_groups]
    saved = [len(group["params"]) for group in state["param_groups"]]
    numbers = list(chain.from_iterable(group["params"] for group in state["param_groups"]))
    if own != saved:
        return f"groups of {saved} parameters, not of {own}"
    if len({*numbers}) != len(numbers) or not state["state"].keys() <= {*numbers}:
        return "its parameter numbers are not valid"
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(numbers, parameters, strict=True):
        problem = _moments_mismatch(STATE[type(optimizer)], state["state"].get(number), parameter)
        if problem:
            return f"that of parameter {number} {problem}"
    return ""


def match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives each moment the memory layout of its parameter; moments from a file have that of the run that wrote it.

    The fused optimizers iterate over memory, not over indices: with differing layouts they combine the wrong elements,
    silently on a CPU, with an error on a GPU.
    """
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _moments_mismatch(names: set[str], moments: dict[str, Any] | None, parameter: Tensor) -> str:
    if moments is None:  # no update has reached the parameter
        return ""
    if moments.keys() != names:
        return f"has {', '.join(sorted(moments)) or 'nothing'}, not {', '.join(sorted(names))}"
    for name, moment in moments.items():
        shape = torch.Size() if name == "step" else parameter.shape
        value = torch.as_tensor(moment)
        if value.shape != shape or value.is_complex() or value.dtype is torch.bool or not value.isfinite().all():
            return f"has a {name} of {tuple(value.shape)} {value.dtype}, not finite numbers of {tuple(shape)}"
        if name in ("step", "exp_avg_sq") and value.lt(0).any():
            return f"has a {name} below 0"
    return ""
