"""ResMLP, timm's, with local branches beside the layer that mixes tokens.

Sources: Touvron et al., "ResMLP: Feedforward networks for image classification with data-efficient training"
(arXiv:2105.03404); Ding et al., "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022
(arXiv:2112.11081), which applies Locality Injection to it. The deploy structure has timm's names and shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from torch import Tensor

from .locality import add_local_branches
from .reparam import ReparameterizableNetwork
from .repmlpnet import input_of
from .stages import check_exact_size, checked_pooling, checkpointed
from .variants import CIFAR100, SHAPES, build_variant, variant_cfg


@dataclass(frozen=True)
class ResMLPSpec:
    """The shape of one network."""

    image_size: int | tuple[int, int]
    patch_size: int
    width: int  # channels
    depth: int  # blocks
    mlp_ratio: int = 4  # hidden channels of the channel MLP over `width`
    layer_scale: float = 0.1  # of every block, at first; the original code's for the depth (timm begins with 1e-4)
    branches: tuple[int, ...] = (1, 3)  # kernel sizes of the local convolutions


# fmt: off
SPECS: dict[str, ResMLPSpec] = {
    #                              image patch width depth
    "ResMLP-S12-224":     ResMLPSpec(224, 16, 384, 12),
    "ResMLP-S24-224":     ResMLPSpec(224, 16, 384, 24, layer_scale=1e-5),
    # The RepMLPNet paper compares with patches of 16 pixels; the published weights are of patches of 8.
    "ResMLP-B24-P16-224": ResMLPSpec(224, 16, 768, 24, layer_scale=1e-6),
    "ResMLP-B24-P8-224":  ResMLPSpec(224,  8, 768, 24, layer_scale=1e-6),
    # The CIFAR-100 network of the RepMLPNet paper: 16x16 tokens.
    "ResMLP-C100":        ResMLPSpec( 32,  2, 256, 12),
    # Small enough for a CPU.
    "ResMLP-Shapes":      ResMLPSpec( 32,  2,  96,  4),
}
# fmt: on


class ResMLP(ReparameterizableNetwork, MlpMixer):
    """Patch embedding, blocks of one linear layer over tokens and an MLP over channels, linear head.

    Args:
        spec: a row of `SPECS`.
        num_classes: outputs of the head; 0 leaves the pooled features.
        in_chans: channels of the input image.
        img_size: height and width of the images; the spec's own where None.
        drop_path_rate: of every block.
        deploy: build the structure that `locality_injection` leaves, which is timm's.
        drop_rate: of the dropout before the head.
        global_pool: "avg", or "" for a head that classifies every token.

    Raises:
        ValueError: `img_size` is no multiple of the patch size, or an unknown `global_pool`.
    """

    def __init__(
        self,
        spec: ResMLPSpec,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        deploy: bool = False,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        height, width = to_2tuple(spec.image_size if img_size is None else img_size)
        patch = spec.patch_size
        if height % patch or width % patch or min(height, width) <= 0:
            raise ValueError(f"img_size {height}x{width} must be a positive multiple of the patch size {patch}")
        super().__init__(
            num_classes=num_classes,
            img_size=cast(Any, (height, width)),  # timm takes more than its annotations say
            in_chans=in_chans,
            patch_size=patch,
            num_blocks=spec.depth,
            embed_dim=spec.width,
            mlp_ratio=spec.mlp_ratio,
            block_layer=cast(Any, partial(ResBlock, init_values=spec.layer_scale)),
            norm_layer=Affine,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            global_pool=checked_pooling(global_pool),
        )
        self.spec, self.img_size = spec, (height, width)
        if spec.branches and not deploy:
            add_local_branches(self, (height // patch, width // patch), spec.branches, scale=1.0)

    @staticmethod
    def built_for(weights: Mapping[str, Tensor], spec: ResMLPSpec, img_size: tuple[int, int]) -> dict[str, Any]:
        """Returns the `in_chans` and `img_size` that weights were made with, see `Family`."""
        names = "stem.proj.weight", "blocks.0.linear_tokens.weight"
        return input_of(weights, *names, spec.patch_size, img_size)

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that should not decay though they have more than one dimension: those of `Affine`."""
        affine = {name for name, module in self.named_modules() if isinstance(module, Affine)}
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[0] in affine}

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W) -> normalised tokens (N, h * w, C).

        Raises:
            ValueError: H and W are not those of `img_size`.
        """
        check_exact_size(x, self.img_size)
        x = self.stem(x)
        for block in self.blocks:  # timm's own checkpointing would count a batch twice in the running statistics
            x = checkpointed(block, x) if self.grad_checkpointing and self.training else block(x)
        x = self.norm(x)
        return x


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    return variant_cfg(
        SPECS[name],
        first_conv="stem.proj",
        classifier="head",
        origin_url="https://github.com/facebookresearch/deit",
        paper_name="ResMLP: Feedforward networks for image classification with data-efficient training",
        paper_ids="arXiv:2105.03404",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "resmlp_s12_224": _cfg("ResMLP-S12-224"),
        "resmlp_s24_224": _cfg("ResMLP-S24-224"),
        "resmlp_b24_p16_224": _cfg("ResMLP-B24-P16-224"),
        "resmlp_b24_p8_224": _cfg("ResMLP-B24-P8-224"),
        "resmlp_c100": _cfg("ResMLP-C100", **CIFAR100),
        "resmlp_shapes": _cfg("ResMLP-Shapes", **SHAPES),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> ResMLP:
    return cast(ResMLP, build_variant(ResMLP, name, SPECS[name], pretrained, **kwargs))


@register_model
def resmlp_s12_224(pretrained: bool = False, **kwargs: Any) -> ResMLP:
    """ResMLP-S12 with local branches."""
    return _create("ResMLP-S12-224", pretrained, **kwargs)


@register_model
def resmlp_s24_224(pretrained: bool = False, **kwargs: Any) -> ResMLP:
    """ResMLP-S24 with local branches."""
    return _create("ResMLP-S24-224", pretrained, **kwargs)


@register_model
def resmlp_b24_p16_224(pretrained: bool = False, **kwargs: Any) -> ResMLP:
    """ResMLP-B24 with patches of 16 pixels and local branches."""
    return _create("ResMLP-B24-P16-224", pretrained, **kwargs)


@register_model
def resmlp_b24_p8_224(pretrained: bool = False, **kwargs: Any) -> ResMLP:
    """ResMLP-B24 with patches of 8 pixels and local branches."""
    return _create("ResMLP-B24-P8-224", pretrained, **kwargs)


@register_model
def resmlp_c100(pretrained: bool = False, **kwargs: Any) -> ResMLP:
    """ResMLP for CIFAR-100, of the RepMLPNet paper."""
    return _create("ResMLP-C100", pretrained, **kwargs)


@register_model
def resmlp_shapes(pretrained: bool = False, **kwargs: Any) -> ResMLP:
    """ResMLP for the rendered shapes."""
    return _create("ResMLP-Shapes", pretrained, **kwargs)
