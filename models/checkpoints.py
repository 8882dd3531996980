"""Checkpoints of every supported origin: read, described, built into networks and loaded strictly."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from . import schema
from .build import (
    REGISTRY,
    canonical_name,
    check_changeable,
    classifier_name,
    create_model,
    default_image_size,
    first_conv_name,
    own_spec,
    structure_changes,
)
from .containers import find_weights, metadata
from .files import read_payload
from .identify import (
    Identity,
    fitting_architectures,
    form_of,
    identify,
    inserted_bn_names,
    is_deploy,
    remedy,
    structure_of,
)
from .locality import branch_names
from .reparam import ReparameterizableNetwork
from .version import __version__

# The dtypes of weights in files; others, such as float8, need a scale that is not part of the tensor.
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Former names of architectures, which files may still give.
RENAMED = {"ResMLP-B24-224": "ResMLP-B24-P8-224"}
# Names of classes: more, or longer ones, are not saved.
CLASS_NAMES = schema.texts(most=2**20, longest=2**10, in_all=2**24)
# What `describe` writes.
META = schema.record(
    {
        "arch": schema.text,
        "num_classes": schema.integer(0, 2**24),
        "image_size": schema.sequence(schema.integer(1, 2**13), length=2),
        "form": schema.one_of("train", "deploy", None),
        "structure": schema.mapping(str, schema.anything),
        "task": schema.text,
        "dataset": schema.text,
        "in_chans": schema.integer(1, 2**10),
        "mean": schema.sequence(schema.number),
        "std": schema.sequence(schema.positive),
        "metric": schema.text,
        "class_names": CLASS_NAMES,
        "weights": schema.one_of("model", "ema"),
    }
)


# The metadata about the images that weights are made for: their data set, the names of its classes in the order of the
# outputs (of the first ones, or of all, as `storable_names` returns them), their channels, and the mean and standard
# deviation of the pixels of each, on a scale of 0 to 1, by which they are normalised.
IMAGES = ("dataset", "class_names", "in_chans", "mean", "std")


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the published names, with the metadata of their file.

    Attributes:
        path: of the file.
        state_dict: the weights.
        form: "train" or "deploy", by the names of the weights or else by the metadata; None where neither shows it, as
            for networks that have one structure only.
        meta: what `describe` wrote, empty for a file of another origin.
        payload: the whole container.
        averaged: whether these are the moving average of the weights, where the file has both.
        adapted: how the weights differ from those of the file, for the log; empty where they do not.
    """

    path: Path
    state_dict: dict[str, Tensor]
    form: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    payload: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False
    adapted: str = ""

    def __str__(self) -> str:
        form = {"train": "training ", "deploy": "deploy ", None: ""}[self.form]
        return f"{'averaged ' * self.averaged}{form}weights from {self.path}{self.adapted}"


def describe(
    arch: str, model: nn.Module, image_size: tuple[int, int], form: str | None, **extra: Any
) -> dict[str, Any]:
    """Returns the metadata that goes with the weights of a classifier.

    Args:
        arch: the architecture, by either name.
        model: the network.
        image_size: (height, width) of its images.
        form: "train", "deploy", or None of a network that has one structure only.
        **extra: further metadata, those of None left out: `task`, `metric`, and those of `IMAGES`.
    """
    own = {
        "arch": canonical_name(arch),
        "num_classes": model.num_classes,
        "image_size": list(image_size),
        "form": form,
        "structure": structure_changes(arch, model),
        "versions": versions(),
    }
    return own | {key: value for key, value in extra.items() if value is not None}


def storable_names(names: Iterable[str]) -> list[str] | None:
    """Returns class names as metadata hold them; None for more, or longer ones, than `CLASS_NAMES` accepts."""
    listed = list(names)
    try:
        CLASS_NAMES("class_names", listed)
    except ValueError:
        return None
    return listed


def versions() -> dict[str, str]:
    """Returns the versions of what weights are made with."""
    return {"repmlpnet": __version__, "torch": str(torch.__version__), "timm": timm.__version__}


def read_checkpoint(path: str | Path, ema: bool | None = None) -> Checkpoint:
    """Reads a `.pth` or `.safetensors` file: a bare state dict, or one within a container.

    Args:
        path: the file.
        ema: whether to take the moving average of the weights instead of the weights; None takes the average from a
            file that was chosen by it, as its metadata say, or that holds nothing else.

    Raises:
        ValueError: no such file, no checkpoint, a damaged one, one that holds more than data, one whose metadata have
            wrong types, or one without weights.
    """
    path = Path(path)
    payload = read_payload(path)
    try:
        META("meta", metadata(payload))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or of another program: {error}") from None
    return take_weights(path, payload, ema)


def output_names(checkpoint: Checkpoint, outputs: int) -> list[str] | None:
    """Returns the names of a network's outputs, or of the first of them; None where its checkpoint names none.

    Raises:
        ValueError: there are more names than outputs.
    """
    names: list[str] | None = checkpoint.meta.get("class_names")
    if names is not None and len(names) > outputs:
        raise ValueError(f"{checkpoint.path} is damaged: it names {len(names)} classes and has {outputs} outputs")
    return names


def take_weights(path: Path, payload: dict[str, Any], ema: bool | None) -> Checkpoint:
    """Finds the weights, or their average, in what `read_checkpoint` has read; arguments and errors as there."""
    state_dict, averaged = find_weights(path, payload, ema)
    meta = metadata(payload)
    if meta.get("arch") in RENAMED:
        meta = meta | {"arch": RENAMED[meta["arch"]]}
    return Checkpoint(path, state_dict, form_of(state_dict) or meta.get("form"), meta, payload, averaged)


class Network(NamedTuple):
    """A network with the weights of a checkpoint, in evaluation mode, on the CPU, in the dtype of the weights."""

    arch: str
    model: nn.Module
    num_classes: int
    image_size: tuple[int, int]
    in_chans: int = 3


def build_from(checkpoint: Checkpoint, arch: str | None = None, **changes: Any) -> Network:
    """Builds the network that a checkpoint's weights belong to, in the structure that they have, and loads them.

    Args:
        checkpoint: the weights; the number of classes is that of the head, and for our own architectures the number of
            input channels and, where the metadata do not give it, the image size follow from the shapes too.
        arch: the architecture; None takes the one that the metadata name or that fits.
        **changes: `img_size` and parts of the structure, in place of what metadata and weights say.

    Raises:
        ValueError: no architecture is known for the weights, or they do not fit the given one.
    """
    if "network" in checkpoint.meta:
        raise ValueError(f"{checkpoint.path} is of a segmentation network, not of a classifier")
    weights = checkpoint.state_dict
    arch = arch or checkpoint.meta.get("arch") or next(iter(fitting_architectures(weights)), None)
    if arch is None:
        raise ValueError(
            f"{checkpoint.path} does not say which architecture it is of, and none fits: name the architecture"
        )
    arch = canonical_name(arch)
    head = weights.get(f"{classifier_name(arch)}.weight")
    classes = checkpoint.meta.get("num_classes", 1000) if head is None else head.shape[:1].numel()
    options = _build_options(checkpoint, arch, changes)
    if arch in REGISTRY:
        _try_out(checkpoint, arch, classes, options)
    model = create_model(arch, classes, **options)
    dtypes = {v.dtype for v in weights.values() if v.is_floating_point()}
    if len(dtypes) == 1 and dtypes <= {*FLOAT_DTYPES}:
        model.to(dtypes.pop())
    load_weights(model, checkpoint)
    if isinstance(model, ReparameterizableNetwork):
        model.dataset, model.class_names = checkpoint.meta.get("dataset"), output_names(checkpoint, classes)
        model.statistics = statistics_in(checkpoint, options["in_chans"])
    return Network(arch, model.eval(), classes, options["img_size"], options.get("in_chans", 3))


def statistics_in(checkpoint: Checkpoint, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Returns mean and standard deviation of each channel, by which images are normalised; None if it is not known.

    Raises:
        ValueError: they are for another number of channels than the network.
    """
    mean, std = (tuple(checkpoint.meta.get(key, ())) for key in ("mean", "std"))
    if not mean and not std:
        return None
    if not len(mean) == len(std) == in_chans:
        raise ValueError(
            f"{checkpoint.path} is damaged: it normalises images of {len(mean)} and {len(std)} channels, its network "
            f"takes {in_chans}"
        )
    return mean, std


def _build_options(checkpoint: Checkpoint, arch: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with which `create_model` builds what a checkpoint's weights were made with."""
    changed = {k: v for k, v in changes.items() if k != "img_size"}
    structure: dict[str, Any] = checkpoint.meta.get("structure", {}) | structure_of(checkpoint.state_dict) | changed
    height, width = changes.get("img_size") or checkpoint.meta.get("image_size") or default_image_size(arch)
    options: dict[str, Any] = {"img_size": (height, width)}
    with _structure_errors(checkpoint):
        check_changeable(arch, {part: part for part in structure})
        if arch not in REGISTRY:
            in_chans = checkpoint.meta.get("in_chans", 3)
            return options if in_chans == 3 else options | {"in_chans": in_chans}
        spec = own_spec(arch, structure)
    if spec.depth > len(checkpoint.state_dict):  # before as many blocks are built
        raise ValueError(f"{checkpoint.path} names more blocks than it holds tensors")
    made: dict[str, Any] = REGISTRY[arch].network.built_for(checkpoint.state_dict, spec, (height, width))
    options = made | options if "img_size" in changes else made
    return {**options, "deploy": is_deploy(arch, checkpoint.form), **structure}


def _try_out(checkpoint: Checkpoint, arch: str, classes: int, options: Mapping[str, Any]) -> None:
    """Raises ValueError where weights do not fit; allocates nothing, since the sizes come from a file."""
    with torch.device("meta"), _structure_errors(checkpoint):
        model = create_model(arch, classes, **options)
    form = "deploy" if options["deploy"] else "train"
    inserted = form == "train" and options.get("insert_bn", False)
    check_fit(model, checkpoint, Identity(arch, options["img_size"], classes, form, inserted))


@contextmanager
def _structure_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Names the file in errors of a structure that can't be built."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: its structure, or the one asked for, can't be built: {error}") from error


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads weights strictly; raises ValueError as `check_weights`."""
    check_weights(model, checkpoint)
    model.load_state_dict(checkpoint.state_dict)


def check_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Checks that names and shapes are the model's, values finite and of the same kind of dtype.

    Raises:
        ValueError: they differ; the message counts and names the differences, and describes the file and the network.
    """
    check_fit(model, checkpoint)
    problems = unusable_values(model.state_dict(), checkpoint.state_dict)
    if problems:
        raise ValueError(f"{checkpoint.path} can't be used: {problems}")


def check_fit(model: nn.Module, checkpoint: Checkpoint, identity: Identity | None = None) -> None:
    """Raises ValueError, with a remedy where there is one, if names or shapes differ from the model's.

    `identity` is the model's; None finds it by names and shapes.
    """
    problems = _differences(model.state_dict(), checkpoint.state_dict)
    if problems:
        identity = identity or next(iter(identify(model.state_dict())), None)
        raise ValueError(f"{checkpoint.path} does not fit the network: {problems}{_mismatch(checkpoint, identity)}")


def unusable_values(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Describes the tensors that hold values of another kind than the model's, or NaN or infinity; empty for none."""
    other_kind = [k for k, v in own.items() if _kind(given[k].dtype) != _kind(v.dtype)]
    if other_kind:
        name = other_kind[0]
        return f"{len(other_kind)} tensors hold {given[name].dtype} in place of {own[name].dtype} ({name}, ...)"
    not_finite = [k for k, v in given.items() if v.is_floating_point() and not v.isfinite().all()]
    return f"{len(not_finite)} tensors hold NaN or infinite values ({not_finite[0]}, ...)" if not_finite else ""


def _kind(dtype: torch.dtype) -> str:
    if dtype in FLOAT_DTYPES:
        return "float"
    return "integer" if dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) else str(dtype)


def adapt_input(arch: str, checkpoint: Checkpoint, in_chans: int) -> Checkpoint:
    """Returns weights for images of this number of channels, made of weights for RGB as timm makes them.

    For one channel, the first kernel is summed over its channels: a grey image gives what it gives as RGB, normalised
    alike. For others, its channels are repeated and scaled by 3 / in_chans. Weights for other channels than RGB, and
    those of other architectures, are returned as they are.
    """
    name = f"{first_conv_name(arch)}.weight"
    kernel = checkpoint.state_dict.get(name)
    if in_chans == 3 or kernel is None or kernel.dim() != 4 or kernel.shape[1] != 3:
        return checkpoint
    weights = checkpoint.state_dict | {name: adapt_input_conv(in_chans, kernel)}
    how = "the sum of" if in_chans == 1 else "repeated from"
    adapted = f", for {in_chans} channel{'s' * (in_chans > 1)} ({name} is {how} that for 3)"
    meta = {key: value for key, value in checkpoint.meta.items() if key not in IMAGES} | {"in_chans": in_chans}
    return replace(checkpoint, state_dict=weights, meta=meta, adapted=adapted)


def load_pretrained(arch: str, model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Loads weights to start a training from.

    A head for another number of classes keeps its initial weights. So do the branches of `LocalityLinear` layers where
    the weights have none at all, as those of timm's ResMLP, except the scale of their BatchNorms, which becomes 0: new
    branches do not change the output until they are trained. So do BatchNorms inserted after FC3, which are the
    identity at first, where the weights have none.

    Returns:
        The names that were not loaded: none, those of the head, those of the branches, those of inserted BatchNorms.

    Raises:
        ValueError: anything else differs.
    """
    own = model.state_dict()
    prefix = f"{classifier_name(arch)}."
    head = [k for k in own if k.startswith(prefix) and k in checkpoint.state_dict]
    fresh = [] if all(own[k].shape == checkpoint.state_dict[k].shape for k in head) else head
    branches = branch_names(model)
    if not any(k in checkpoint.state_dict for k in branches):
        fresh = fresh + branches
    inserted = inserted_bn_names(own)
    if not any(k in checkpoint.state_dict for k in inserted):
        fresh = fresh + inserted
    kept = {k: torch.zeros_like(own[k]) if k in branches and k.endswith("bn.weight") else own[k] for k in fresh}
    load_weights(model, Checkpoint(checkpoint.path, checkpoint.state_dict | kept, checkpoint.form))
    return fresh


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Describes how names and shapes of two state dicts differ; empty where they do not."""
    missing = [k for k in own if k not in given]
    unexpected = [k for k in given if k not in own]
    shapes = [
        f"{k} {tuple(given[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in given and own[k].shape != given[k].shape
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(
        f"{len(names)} tensors {what} ({names[0]}{', ...' * (len(names) > 1)})" for what, names in groups if names
    )


def _mismatch(checkpoint: Checkpoint, network: Identity | None) -> str:
    """Describes weights and a network that do not fit each other, as far as they are known; begins with a stop."""
    files = _identify_file(checkpoint)
    if not files:
        return ""
    if network is None:
        return f". These are {' or '.join(map(str, files))}"
    file = next((candidate for candidate in files if candidate.arch == network.arch), files[0])
    return f". These are {file}; the network takes {network}{remedy(file, network)}"


def _identify_file(checkpoint: Checkpoint) -> list[Identity]:
    meta = checkpoint.meta
    if {"arch", "image_size", "num_classes"} <= meta.keys():
        height, width = meta["image_size"]
        arch, inserted = canonical_name(meta["arch"]), bool(structure_of(checkpoint.state_dict))
        return [Identity(arch, (height, width), meta["num_classes"], checkpoint.form, inserted)]
    return identify(checkpoint.state_dict)
