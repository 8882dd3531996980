"""What networks of several stages have in common: the forward pass, maps of every level, checkpointing."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .reparam import ReparameterizableNetwork


class StagedNetwork(ReparameterizableNetwork, ABC):
    """Stages that each halve the maps, a norm, pooling, a linear head; what timm's users expect of such a network.

    A subclass sets the attributes, and says how a stage is applied (`_stage`) and removed (`_keep`), which input
    fits (`_check_size`), and where the head is (`get_classifier`, `reset_classifier`).

    Attributes:
        img_size: (height, width) that the network is made for.
        num_features: channels before the head, also `head_hidden_size`.
        feature_info: of each stage what timm wants to know: channels, stride, the module whose output it is.
        head_norm: behind the last stage.
    """

    img_size: tuple[int, int]
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    head_norm: nn.Module
    grad_checkpointing = False

    @abstractmethod
    def _check_size(self, x: Tensor) -> None:
        """Raises ValueError for an image (N, in_chans, H, W) of a size that does not fit."""

    @abstractmethod
    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Applies one stage to what the stage before gave, or to the image."""

    @abstractmethod
    def _keep(self, stages: int) -> None:
        """Removes all but the first stages."""

    @abstractmethod
    def get_classifier(self) -> nn.Module:
        """Returns the head."""

    @abstractmethod
    def reset_classifier(self, num_classes: int) -> None:
        """Puts in a new head of `num_classes` outputs; 0 leaves the pooled features."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes every block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def _run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Applies blocks one after the other."""
        for block in blocks:
            x = checkpointed(block, x) if self.grad_checkpointing and self.training else block(x)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) -> normalised features (N, C, H / stride, W / stride).

        Raises:
            ValueError: H or W does not fit the network.
        """
        self._check_size(x)
        for stage in range(len(self.feature_info)):
            x = self._stage(stage, x)
        return self.head_norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns what the stages give, under the names and with the meaning that timm's networks have for it.

        Args:
            x: image (N, in_chans, H, W).
            indices: which stages, negative ones counted from the end; a number n stands for the last n, None for all.
            norm: put the last stage's map through the final BatchNorm, which fits no other.
            stop_early: leave out the stages behind the last one that is asked for.
            output_fmt: NCHW, the only layout there is.
            intermediates_only: return the maps alone.

        Returns:
            The maps (N, C_i, H / stride_i, W / stride_i) in the order of the stages; unless `intermediates_only`, after
            the map that the network ends with: `forward_features(x)`, or with `stop_early` the last one computed.

        Raises:
            ValueError: another layout, or as `forward_features`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"the maps of a {type(self).__name__} are NCHW, not {output_fmt}")
        self._check_size(x)
        taken, last_taken = feature_take_indices(len(self.feature_info), indices)
        features, final = [], x
        for stage in range(last_taken + 1 if stop_early else len(self.feature_info)):
            x = self._stage(stage, x)
            ends = stage + 1 == len(self.feature_info)
            final = self.head_norm(x) if ends and (norm or not intermediates_only) else x
            if stage in taken:
                features.append(final if norm else x)
        return features if intermediates_only else (final, features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes, in place, what `forward_intermediates` does not need for some of the stages, as timm's networks do.

        Args:
            indices: as there.
            prune_norm: remove the final BatchNorm even where the last stage stays.
            prune_head: remove the head even where the last stage stays.

        Returns:
            The stages that `indices` stand for, none of them negative.
        """
        taken, last = feature_take_indices(len(self.feature_info), indices)
        cut = last + 1 < len(self.feature_info)
        self._keep(last + 1)
        self.feature_info = self.feature_info[: last + 1]
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.head_norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0)
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (N, C, h, w) -> logits (N, num_classes), or pooled features (N, C) before the head."""
        x = x.mean((2, 3))
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) -> logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


@contextmanager
def untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, the BatchNorms of a module normalise as ever, but keep their running statistics in copies to throw away.

    They are not told to stop tracking, since checkpointing wants the same tensors saved in both passes.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    buffers = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)


def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
    """Applies a module, keeping only its input for the backward pass, where it is computed once more.

    Running statistics take in a batch once, not twice, so that training is the same with and without.
    """
    if torch.compiler.is_compiling():
        # A graph writes to buffers once, and has no place for contexts. Outside of one there is none: better an error.
        with torch._dynamo.error_on_graph_break(True):
            return checkpoint(module, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), untracked_statistics(module)

    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)
