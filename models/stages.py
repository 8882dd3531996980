"""What networks of several stages have in common: the forward pass, maps of every level, the head, checkpointing."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from .inserted_bn import insert_into_blocks
from .layers import ConvNorm
from .reparam import ReparameterizableNetwork

POOLINGS = ("avg", "")


class StagedNetwork(ReparameterizableNetwork, ABC):
    """Stages that each halve the maps, a norm, pooling and a linear head, with the interface of timm's networks.

    A subclass sets the attributes, and implements how a stage is applied (`_stage`) and what the head is
    (`_make_head`). It overrides which input fits (`_check_size`) where other sizes than `img_size` do, and how stages
    are removed (`_keep`) where they are no children of the network.

    Args:
        drop_rate: of the dropout before the head.
        global_pool: "avg", or "" for a head that classifies every position of the last map.

    Raises:
        ValueError: an unknown `global_pool`.

    Attributes:
        spec: the shape of the network, a frozen dataclass.
        img_size: (height, width) that the network is made for.
        num_classes: outputs of the head; 0 where there is none.
        num_features: channels before the head, also `head_hidden_size`.
        feature_info: of each stage its channels, its stride and the module whose output it is, as timm describes them.
        head_norm: after the last stage.
        classifier: the name of the head within the network.
        takes_multiples: whether inputs may be multiples of `img_size`.
    """

    spec: Any
    img_size: tuple[int, int]
    num_classes: int
    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    head_norm: nn.Module
    classifier = "head"
    takes_multiples = False
    grad_checkpointing = False

    def __init__(self, drop_rate: float, global_pool: str) -> None:
        super().__init__()
        self.drop_rate, self.global_pool = drop_rate, checked_pooling(global_pool)

    @property
    def partition(self) -> tuple[int, int] | None:
        """(height, width) of the smallest partitions, in pixels of the image; None for a network without any.

        Partitions tile an image from its top left; the borders of larger ones, in later stages, are borders of these.
        """
        return None

    def _check_size(self, x: Tensor) -> None:
        """Raises ValueError for an image (N, in_chans, H, W) of a size that does not fit."""
        check_exact_size(x, self.img_size)

    def _apply_head_norm(self, x: Tensor) -> Tensor:
        """Applies the norm after the last stage."""
        x = self.head_norm(x)
        return x

    @abstractmethod
    def _stage(self, stage: int, x: Tensor) -> Tensor:
        """Applies one stage to the map of the stage before, or to the image."""

    def _keep(self, stages: int) -> None:
        """Removes all but the first stages."""
        for info in self.feature_info[stages:]:
            delattr(self, info["module"])

    @abstractmethod
    def _make_head(self, num_classes: int) -> nn.Module:
        """Returns a new head of at least one output."""

    @abstractmethod
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that sort parameters by depth, as timm's layer-wise learning rates need them.

        Args:
            coarse: by stages instead of blocks.
        """

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters of more than one dimension that should not decay: none."""
        return set()

    def replace_embeddings(self, make: Callable[[ConvNorm], nn.Module]) -> None:
        """Replaces the 2x2 embeddings between the stages, each by what `make` returns for it.

        Raises:
            ValueError: the network has none.
        """
        raise ValueError(f"a {type(self).__name__} has no 2x2 embeddings to replace")

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.get_submodule(self.classifier)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head.

        Args:
            num_classes: outputs of the new head; 0 leaves the features.
            global_pool: as in the constructor; None leaves it as it is.

        Raises:
            ValueError: an unknown `global_pool`.
        """
        if global_pool is not None:
            self.global_pool = checked_pooling(global_pool)
        self.num_classes = num_classes
        reference = next(self.parameters())
        head = self._make_head(num_classes) if num_classes > 0 else nn.Identity()
        self.add_module(self.classifier, head.to(reference.device, reference.dtype).train(self.training))

    def insert_bn(self) -> None:
        """Puts a BatchNorm after every FC3 of the deploy structure, in place, to be trained.

        In evaluation mode the network computes the same as before; see `inserted_bn.calibrate` for training mode. The
        result is what `create_model(name, insert_bn=True)` builds; Locality Injection folds the BatchNorms.

        Raises:
            ValueError: the network is in its training structure.
        """
        insert_into_blocks(self)
        self.spec = replace(self.spec, insert_bn=True)

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
        x = self._apply_head_norm(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Returns the maps of the stages; arguments have the names and meanings of timm's networks.

        Args:
            x: image (N, in_chans, H, W).
            indices: which stages, negative ones counted from the end; a number n stands for the last n, None for all.
            norm: apply the final BatchNorm to the last stage's map, the only one that it fits.
            stop_early: leave out the stages after the last one of `indices`.
            output_fmt: NCHW, the only layout there is.
            intermediates_only: return the maps alone.

        Returns:
            The maps (N, C_i, H / stride_i, W / stride_i) in the order of the stages; unless `intermediates_only`, after
            the final map: `forward_features(x)`, or with `stop_early` the last one computed.

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
            final = self._apply_head_norm(x) if ends and (norm or not intermediates_only) else x
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
            self.reset_classifier(0, "")
        return taken

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features (N, C, h, w) -> logits (N, num_classes), or with `pre_logits` the features (N, C) before the head.

        Without pooling they are (N, num_classes, h, w) and (N, C, h, w).
        """
        if self.global_pool:
            x = x.mean((2, 3))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits or not self.num_classes:
            return x
        if not self.global_pool:
            n, _, h, w = x.shape
            x = x.permute(0, 2, 3, 1).flatten(0, 2)
        x = self.get_classifier()(x)
        return x if self.global_pool else x.view(n, h, w, -1).permute(0, 3, 1, 2)

    def extract_feat(self, x: Tensor) -> tuple[Tensor]:
        """The name by which MMPretrain gets what the head takes: image (N, in_chans, H, W) -> ((N, C),)."""
        return (self.forward_head(self.forward_features(x), pre_logits=True),)

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) -> logits, as `forward_head` returns them."""
        return self.forward_head(self.forward_features(x))


def checked_pooling(global_pool: str) -> str:
    """Returns a kind of pooling.

    Raises:
        ValueError: it is unknown.
    """
    if global_pool not in POOLINGS:
        raise ValueError(f"unknown global_pool {global_pool!r}: choose 'avg', or '' for no pooling")
    return global_pool


@contextmanager
def untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Within the context, the BatchNorms of a module update temporary copies of their running statistics.

    Tracking itself stays on, since checkpointing needs the same tensors saved in both passes.
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
    """Applies a module, keeping only its input for the backward pass, which computes its output again.

    Running statistics count a batch once, so that training is the same with and without.
    """
    out: Tensor
    if torch.compiler.is_compiling():
        # A compiled graph updates buffers once, and can't hold contexts. A graph break would run without them.
        with torch._dynamo.error_on_graph_break(True):
            out = checkpoint(module, x, use_reentrant=False)
        return out

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), untracked_statistics(module)

    out = checkpoint(module, x, use_reentrant=False, context_fn=contexts)
    return out


def check_exact_size(x: Tensor, img_size: tuple[int, int]) -> None:
    """Raises ValueError where an input (..., H, W) is not of the size that a network is made for."""
    (height, width), (h, w) = x.shape[-2:], img_size
    if (height, width) != (h, w):
        raise ValueError(
            f"an input of {height}x{width} does not fit a network made for {h}x{w}: resize it to {h}x{w}, or build the "
            f"network with img_size=({height}, {width})"
        )
