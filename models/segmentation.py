"""Semantic segmentation: our networks and timm's under the decoders of segmentation-models-pytorch (extra `seg`)."""

from collections.abc import Mapping
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from . import schema
from .build import REGISTRY, canonical_name, changeable, check_changeable, timm_name
from .checkpoints import Checkpoint, load_weights, versions
from .dense import DOWNSAMPLINGS, FULL_RANK, DenseBackbone, dense_backbone
from .inserted_bn import insert_into_blocks
from .layers import ConvNorm
from .reparam import ReparameterizableNetwork, is_reparameterizable
from .repmlp_resnet import OUTPUT_STRIDES
from .stages import StagedNetwork

Size = tuple[int, int]  # height, width in pixels
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
    "output_stride": schema.one_of(*OUTPUT_STRIDES),
    "downsample": schema.one_of(*DOWNSAMPLINGS, None),
    "rank": schema.integer(1, FULL_RANK),
    "auxiliary": schema.boolean,
}


class AuxiliaryHead(nn.Sequential):
    """A second classifier of pixels, for training alone: the FCN head that MMSegmentation's UPerNet and PSPNet have.

    A 3x3 convolution to 256 channels with BatchNorm and ReLU, dropout, and a 1x1 convolution to the classes.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        hidden = nn.Conv2d(in_channels, 256, 3, padding=1, bias=False)
        super().__init__(ConvNorm(hidden, nn.ReLU()), nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, 1))


class SegmentationNetwork(ReparameterizableNetwork):
    """A decoder over all levels of a backbone; gives each pixel its logits.

    Args:
        arch: one of `list_models()` that has levels, or an architecture of timm.
        num_classes: K.
        decoder: a key of `DECODERS`.
        width: channels of the decoder; the published cost belongs to 512.
        in_chans: channels of the image.
        auxiliary: add an `AuxiliaryHead` on the last level but one, which the conversion removes.
        **options: of the architecture, and for our own those of `dense_backbone`: `img_size`, `downsample`, ... With
            `output_stride`, a ResNet's last stages keep the size of their maps, as PSPNet has it.

    `arguments` holds all of these as plain values.

    Raises:
        ValueError: segmentation-models-pytorch is missing, an unknown decoder or architecture, an architecture without
            levels, or one with too few of them for the decoder, or whose stride can't be changed.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int,
        decoder: str = "upernet",
        width: int = 512,
        in_chans: int = 3,
        auxiliary: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"unknown decoder {decoder!r}: choose {' or '.join(DECODERS)}")
        arch = canonical_name(arch)
        library, kind, name = _library(), DECODERS[decoder], timm_name(arch)
        strides = _strides(arch, name, {k: v for k, v in options.items() if k == "output_stride"})
        stride = strides[-1]
        given = {"arch": arch, "num_classes": num_classes, "decoder": decoder, "width": width, "in_chans": in_chans}
        given |= {"auxiliary": True} if auxiliary else {}
        self.arguments: dict[str, Any] = given | {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
        self.num_classes, self._stride = num_classes, stride
        self.model: Any = getattr(library, kind.network)(
            encoder_name=f"tu-{name}",
            encoder_weights=None,
            encoder_depth=strides[0].bit_length() + len(strides) - 2,  # it counts levels, and halvings before the first
            in_channels=in_chans,
            classes=num_classes,
            upsampling=kind.stride or stride,
            **{kind.width: width},
            **options,
        )
        self.model.requires_divisible_input_shape = False  # `forward` pads and crops instead
        channels = self.model.encoder.out_channels[-2]
        self.auxiliary = AuxiliaryHead(channels, num_classes) if auxiliary else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Image (N, in_chans, H, W) -> logits (N, K, H, W).

        In training, the image is of any size that the backbone takes, and with an auxiliary head the result is a pair
        of logits, the second by that head. In evaluation, an image that is larger is cut into windows, whose logits are
        averaged where they overlap.
        """
        height, width = x.shape[-2:]
        window = None if self.training else _largest_image(self.backbone)
        if window and (height > window[0] or width > window[1]):
            return self._forward_windows(x, window)
        x = F.pad(x, (0, -width % self._stride, 0, -height % self._stride))
        features = self.model.encoder(x)
        logits = self.model.segmentation_head(self.model.decoder(features))[..., :height, :width]
        if self.auxiliary is None or not self.training:
            return cast(Tensor, logits)
        auxiliary = F.interpolate(self.auxiliary(features[-2]), x.shape[-2:], mode="bilinear")
        return logits, auxiliary[..., :height, :width]

    def locality_injection(self) -> None:
        """Turns every block, in place, into its deploy structure and removes the auxiliary head."""
        super().locality_injection()
        self.auxiliary = None
        self.arguments.pop("auxiliary", None)

    def _forward_windows(self, x: Tensor, window: Size) -> Tensor:
        """Image (N, in_chans, H, W), larger than the window (h, w) -> logits (N, K, H, W)."""
        total, count = x.new_zeros(len(x), self.num_classes, *x.shape[-2:]), x.new_zeros(x.shape[-2:])
        rows, columns = (window_starts(side, size) for side, size in zip(x.shape[-2:], window, strict=True))
        for top, left in product(rows, columns):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            total[place] += self(x[place])
            count[place] += 1
        return total / count

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the backbone's activations in the backward pass, which saves memory; the decoder keeps its own."""
        backbone: Any = self.backbone
        # timm's extractors of levels pass this on but for one kind.
        network: Any = backbone.model if isinstance(backbone, FeatureGetterNet) else backbone
        network.set_grad_checkpointing(enable)

    def insert_bn(self) -> None:
        """Puts a BatchNorm after every FC3 of the backbone's deploy structure, in place, as `StagedNetwork` does.

        Raises:
            ValueError: the network is in its training structure.
        """
        insert_into_blocks(self)
        self.arguments["insert_bn"] = True

    @property
    def backbone(self) -> nn.Module:
        """The feature extractor below the decoder; of our own architectures a `DenseBackbone`."""
        return cast(nn.Module, self.model.encoder.model)

    @property
    def partition(self) -> Size | None:
        """(height, width) of the backbone's smallest partitions, in pixels of the image; None for one without any."""
        network = self.backbone.model if isinstance(self.backbone, DenseBackbone) else None
        return network.partition if isinstance(network, StagedNetwork) else None

    def load_backbone(self, trained: nn.Module) -> list[str]:
        """Loads the weights of a trained classifier of the same structure; `dense_backbone` changes ours in place.

        A Global Perceptron that was made for maps of another size, or with another reduction, keeps its initial FC1 and
        FC2 (arXiv:2105.01883, Sec. 4.4).

        Returns:
            The names within the backbone that were not loaded.

        Raises:
            ValueError: it has another structure or form.
        """
        backbone, options = self.backbone, self.arguments
        if options.get("insert_bn") and is_reparameterizable(backbone) and not is_reparameterizable(trained):
            insert_into_blocks(trained)
        if is_reparameterizable(trained) != is_reparameterizable(backbone):
            forms = ("training", "deploy") if is_reparameterizable(backbone) else ("deploy", "training")
            raise ValueError(
                "the backbone has the {} structure and the weights the {} structure: build both alike".format(*forms)
            )
        if isinstance(backbone, DenseBackbone):
            replaced = {k: options[k] for k in ("downsample", "rank") if k in options}
            weights = dense_backbone(trained, backbone.out_indices, **replaced).state_dict()
        else:
            weights = _weights_of_levels(backbone, trained)
        own = backbone.state_dict()
        fresh = _other_global_perceptrons(own, weights)
        weights |= {name: own[name] for name in fresh}
        if _shapes(own) != _shapes(weights):
            raise ValueError(f"the weights belong to another structure than this {options['arch']}")
        backbone.load_state_dict(weights)
        return fresh


def _strides(arch: str, name: str, options: dict[str, Any]) -> list[int]:
    """Returns the strides of the levels of an architecture, given by both its names, as `options` change them.

    Raises:
        ValueError: it does not take these options.
    """
    if arch in REGISTRY:
        check_changeable(arch, {option: option for option in options})
    with torch.device("meta"):
        try:
            backbone: Any = timm.create_model(name, features_only=True, **options)
        except (AssertionError, NotImplementedError, TypeError) as error:  # of timm, for a stride or argument it lacks
            if not options:
                raise
            raise ValueError(f"the stride of {arch} can't be changed: {options}") from error
    return list(backbone.feature_info.reduction())


def _largest_image(backbone: nn.Module) -> Size | None:
    """Returns the (height, width) beyond which a backbone takes no image; None where it takes all."""
    if not isinstance(backbone, DenseBackbone):
        return None
    network = cast(StagedNetwork, backbone.model)
    return None if network.takes_multiples else network.img_size


def window_starts(side: int, window: int) -> list[int]:
    """Returns where windows begin that cover a side of an image, each two of them overlapping by a third or more."""
    count = max(0, -(-(side - window) // max(1, 2 * window // 3)))
    return [i * (side - window) // count for i in range(count + 1)] if count else [0]


def _other_global_perceptrons(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of the FC1 and FC2 of Global Perceptrons that have another shape in weights that are given."""
    layers = [name for name in own if ".fc1_fc2." in name]
    differing = [name for name in layers if name in given and given[name].shape != own[name].shape]
    blocks = {name.partition(".fc1_fc2.")[0] for name in differing}
    return [name for name in layers if name.partition(".fc1_fc2.")[0] in blocks]


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}


def describe_segmentation(network: nn.Module, form: str | None, **extra: str | list[str] | None) -> dict[str, Any]:
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


def _weights_of_levels(backbone: nn.Module, trained: nn.Module) -> dict[str, Tensor]:
    """Returns the weights of a network of timm under the names that its extractor of levels has for them.

    An extractor holds some of the network's modules, `stages.0` perhaps as `stages_0`, or the network as `model`.
    Weights of these modules that it has no place for keep their own names.
    """

    def plain(name: str) -> str:
        return name.replace("_", ".")

    given = {plain(name): tensor for name, tensor in trained.state_dict().items()}
    names = {name: plain(name.removeprefix("model.")) for name in backbone.state_dict()}
    modules, sources = {source.split(".")[0] for source in names.values()}, {*names.values()}
    left = {name: tensor for name, tensor in given.items() if name not in sources and name.split(".")[0] in modules}
    return left | {name: given[source] for name, source in names.items() if source in given}


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
