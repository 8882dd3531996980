"""Semantic segmentation: our networks and timm's under the decoders of segmentation-models-pytorch (extra `seg`)."""

from types import ModuleType
from typing import Any, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from . import schema
from .build import REGISTRY, canonical_name, changeable, timm_name
from .checkpoints import Checkpoint, load_weights, versions
from .dense import DOWNSAMPLINGS, FULL_RANK, DenseBackbone, dense_backbone
from .inserted_bn import insert_into_blocks
from .reparam import ReparameterizableNetwork, is_reparameterizable

TASK = "segmentation"  # in the metadata of these networks


class Decoder(NamedTuple):
    """A decoder of segmentation-models-pytorch: its class, the argument for its width, and the stride of its output."""

    network: str
    width: str
    stride: int | None  # None for that of the last level


DECODERS = {
    "upernet": Decoder("UPerNet", "decoder_channels", 4),
    "pspnet": Decoder("PSPNet", "psp_out_channels", None),
}


# The arguments of a `SegmentationNetwork` as metadata hold them; parts of a structure are checked where it is built.
ARGUMENTS = {
    "arch": schema.text,
    "num_classes": schema.integer(1, 2**16),
    "decoder": schema.one_of(*DECODERS),
    "width": schema.integer(1, 2**14),
    "in_chans": schema.integer(1, 2**10),
}
OPTIONS = {
    "img_size": schema.sequence(schema.integer(1, 2**13), length=2),
    "drop_path_rate": schema.number,
    "deploy": schema.boolean,
    "downsample": schema.one_of(*DOWNSAMPLINGS, None),
    "rank": schema.integer(1, FULL_RANK),
}


class SegmentationNetwork(ReparameterizableNetwork):
    """A decoder over all levels of a backbone; gives each pixel its logits.

    Args:
        arch: one of `list_models()` that has levels, or an architecture of timm.
        num_classes: K.
        decoder: a key of `DECODERS`.
        width: channels of the decoder; the published cost belongs to 512.
        in_chans: channels of the image.
        **options: of the architecture, and for our own those of `dense_backbone`: `img_size`, `downsample`, ...

    `arguments` holds all of these as plain values.

    Raises:
        ValueError: segmentation-models-pytorch is missing, an unknown decoder or architecture, an architecture without
            levels, or one with too few of them for the decoder.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int,
        decoder: str = "upernet",
        width: int = 512,
        in_chans: int = 3,
        **options: Any,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}: choose {' or '.join(DECODERS)}")
        arch = canonical_name(arch)
        library, kind, name = _library(), DECODERS[decoder], timm_name(arch)
        with torch.device("meta"):
            backbone: Any = timm.create_model(name, features_only=True)
        stride = backbone.feature_info.reduction()[-1]
        given = {"arch": arch, "num_classes": num_classes, "decoder": decoder, "width": width, "in_chans": in_chans}
        self.arguments: dict[str, Any] = given | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        self.num_classes, self._stride = num_classes, stride
        self.model: Any = getattr(library, kind.network)(
            encoder_name=f"tu-{name}",
            encoder_weights=None,
            encoder_depth=stride.bit_length() - 1,  # it counts halvings
            in_channels=in_chans,
            classes=num_classes,
            upsampling=kind.stride or stride,
            **{kind.width: width},
            **options,
        )
        self.model.requires_divisible_input_shape = False  # `forward` pads and crops instead

    def forward(self, x: Tensor) -> Tensor:
        """Image (N, in_chans, H, W), of any size that the backbone takes -> logits (N, K, H, W)."""
        height, width = x.shape[-2:]
        x = self.model(F.pad(x, (0, -width % self._stride, 0, -height % self._stride)))
        return x[..., :height, :width]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the backbone's activations in the backward pass, which saves memory; the decoder keeps its own."""
        backbone: Any = self.backbone
        # timm's extractors of levels pass this on but for one kind.
        network: Any = backbone.model if isinstance(backbone, FeatureGetterNet) else backbone
        network.set_grad_checkpointing(enable)

    def insert_bn(self) -> None:
        """Puts a BatchNorm behind every FC3 of the backbone's deploy structure, in place, as `StagedNetwork` does.

        Raises:
            ValueError: the network is in its training structure.
        """
        insert_into_blocks(self)
        self.arguments["insert_bn"] = True

    @property
    def backbone(self) -> nn.Module:
        """The feature extractor below the decoder; of our own architectures a `DenseBackbone`."""
        return cast(nn.Module, self.model.encoder.model)

    def load_backbone(self, trained: nn.Module) -> None:
        """Loads the weights of a trained classifier of the same structure, which `dense_backbone` changes in place.

        Raises:
            ValueError: it has another structure, or was converted, or the backbone is not one of ours.
        """
        backbone, options = self.backbone, self.arguments
        if not isinstance(backbone, DenseBackbone):
            raise ValueError(
                f"weights for the backbone can be given to our own architectures, not to {options['arch']}"
            )
        if options.get("insert_bn") and not is_reparameterizable(trained):
            insert_into_blocks(trained)
        if not is_reparameterizable(trained):
            raise ValueError("these weights are converted already: start a training from the training weights")
        replaced = {k: options[k] for k in ("downsample", "rank") if k in options}
        weights = dense_backbone(trained, backbone.out_indices, **replaced).state_dict()
        own = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
        if own != {name: tensor.shape for name, tensor in weights.items()}:
            raise ValueError(f"the weights belong to another structure than this {options['arch']}")
        backbone.load_state_dict(weights)


def describe_segmentation(network: nn.Module, form: str | None, **extra: str | None) -> dict[str, Any]:
    """Returns the metadata that goes with the weights of a `SegmentationNetwork`, for `segmentation_from`.

    Args:
        network: the network.
        form: "train", "deploy", or None of a network that has one structure only.
        **extra: further metadata, as of `describe`.
    """
    own = {"task": TASK, "network": network.arguments, "form": form, "versions": versions()}
    return own | {key: value for key, value in extra.items() if value is not None}


def segmentation_from(checkpoint: Checkpoint) -> SegmentationNetwork:
    """Builds the network that a checkpoint is of, in the form that its weights have, and loads them strictly.

    Returns:
        The network in evaluation mode, on the CPU.

    Raises:
        ValueError: it is not a checkpoint of a segmentation network of this project.
    """
    if "network" not in checkpoint.meta:
        raise ValueError(f"{checkpoint.path} is no checkpoint of a segmentation network")
    arguments: dict[str, Any] = checkpoint.meta["network"]
    try:
        check_arguments(arguments)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path} is damaged: {error}") from None
    form = {"deploy": checkpoint.form == "deploy"} if arguments["arch"] in REGISTRY else {}
    network = SegmentationNetwork(**arguments | form)
    load_weights(network, checkpoint)
    return network.eval()


def check_arguments(arguments: Any) -> None:
    """Raises ValueError for metadata that are not the `arguments` of a `SegmentationNetwork`."""
    schema.record(ARGUMENTS, required=True)("meta.network", arguments)
    schema.record(OPTIONS)("meta.network", arguments)
    unknown = arguments.keys() - {*ARGUMENTS, *OPTIONS, *changeable(arguments["arch"])}
    if unknown:
        raise ValueError(f"meta.network has {min(unknown)!r}, which is no argument of {arguments['arch']}")


def _library() -> ModuleType:
    """Imports the decoders.

    Raises:
        ValueError: they are not installed.
    """
    try:
        import segmentation_models_pytorch
    except ModuleNotFoundError as error:
        raise ValueError(
            "segmentation needs the package segmentation-models-pytorch, the extra `seg`: "
            "pip install segmentation-models-pytorch"
        ) from error
    return segmentation_models_pytorch
