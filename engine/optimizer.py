"""The optimizer and its two weight-decay groups."""

from collections.abc import Sequence

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Splits the trainable parameters: kernels decay; biases and everything of one dimension (norms) do not.

    Names that the model's own `no_weight_decay()` gives do not decay either. The order within a group is that of
    `named_parameters()`, as in the published code, so that its optimizer states load.
    """
    exempt: set[str] = getattr(model, "no_weight_decay", set)()
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() == 1 or name.endswith(".bias") or name in exempt
            (no_decay if plain else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float = 0.9,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Builds AdamW, or SGD with Nesterov momentum, in their fused form.

    Args:
        model: whose parameters are trained.
        name: `adamw` or `sgd`.
        lr: learning rate of one update.
        weight_decay: of the kernels.
        momentum: of SGD.
        betas: of AdamW.
        eps: of AdamW.

    Raises:
        ValueError: an unknown name.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=True)
        if momentum > 0:
            # Zero is what a first step starts from; left to itself, a first step that is skipped leaves noise here.
            for parameter in (p for group in groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    raise ValueError(f"unknown optimizer {name!r}: choose adamw or sgd")
