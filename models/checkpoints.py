"""Weights of every supported origin: recognised, renamed, loaded strictly, and written atomically.

Reading never runs code from a file: tensors and plain containers are all that is accepted. The published training
checkpoints also hold a pickled yacs configuration, which is read as a plain mapping.
"""

import json
import os
import re
import secrets
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import timm
import torch
from torch import Tensor, nn

from . import __version__, schema
from .build import (
    OWN,
    canonical_name,
    check_changeable,
    classifier_name,
    create_model,
    default_image_size,
    own_spec,
    structure_changes,
)
from .identify import Identity, fitting_architectures, form_of, identify, is_deploy
from .locality import branch_names

StateDict = dict[str, Tensor]

# Where the containers of Swin, timm, MMPretrain and this project keep the weights and their moving average.
WEIGHT_KEYS = ("model", "state_dict")
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
NESTING = 4  # containers of containers that hold the weights
# Files hold weights in these dtypes; others, such as float8, need a scale that they do not name.
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# What `describe` writes.
META = schema.record(
    {
        "arch": schema.text,
        "num_classes": schema.integer(0, 2**24),
        "image_size": schema.sequence(schema.integer(1, 2**13), length=2),
        "form": schema.one_of("train", "deploy", None),
        "structure": schema.mapping(str, schema.anything),
        "dataset": schema.text,
        "task": schema.text,
        "weights": schema.one_of("model", "ema"),
    }
)
# How a zipped checkpoint begins.
ZIP_START = b"PK\3\4"
# Prefixes that wrappers put before every name.
WRAPPERS = ("module.", "_orig_mod.")
# MMPretrain's names for the published ones.
MMPRETRAIN_NAMES = (
    (r"^backbone\.patch_embed\.projection\.", "conv_embedding.conv."),
    (r"^backbone\.patch_embed\.norm\.", "conv_embedding.bn."),
    (r"^backbone\.downsample_layers\.", "embeds."),
    (r"^backbone\.final_norm\.", "head_norm."),
    (r"^backbone\.stages\.", "stages."),
    (r"\.gp\.conv([12])\.conv\.", r".gp.fc\1."),
    (r"^(stages\.\d+\.\d+)\.norm([12])\.", r"\1.prebn\2."),
    (r"^head\.fc\.", "head."),
)


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the published names, with what the file says of them.

    `form` is "train" or "deploy" by the structure that the names show or else the metadata tells. It is None where
    nothing was re-parameterised, and of a network that has the same names where it was.
    `meta` is what `describe` wrote, empty for a file of another origin. `payload` is the whole container. `averaged`
    says whether these are the moving average of the weights, where the file has both.
    """

    path: Path
    state_dict: StateDict
    form: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    payload: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False

    def __str__(self) -> str:
        form = {"train": "training ", "deploy": "deploy ", None: ""}[self.form]
        return f"{'averaged ' * self.averaged}{form}weights from {self.path}"


def describe(
    arch: str, model: nn.Module, image_size: tuple[int, int], form: str | None, dataset: str | None = None
) -> dict[str, Any]:
    """Returns the metadata that goes with a network's weights; `dataset` says how its images are normalised."""
    return {
        "arch": canonical_name(arch),
        "num_classes": model.num_classes,
        "image_size": list(image_size),
        "form": form,
        "structure": structure_changes(arch, model),
        "versions": versions(),
    } | ({} if dataset is None else {"dataset": dataset})


def versions() -> dict[str, str]:
    """Returns the versions of what weights are made with."""
    return {"repmlpnet": __version__, "torch": str(torch.__version__), "timm": timm.__version__}


def read_checkpoint(path: str | Path, ema: bool | None = None) -> Checkpoint:
    """Reads a `.pth` or `.safetensors` file: a bare state dict, or one within a container.

    Args:
        path: the file.
        ema: whether to take the moving average of the weights instead of the weights; None takes the average from a
            file that was chosen by it, as its metadata says, or that holds nothing else.

    Raises:
        ValueError: no such file, no checkpoint, a damaged one, one that holds more than data, one whose metadata have
            wrong types, or one without weights.
    """
    path = Path(path)
    payload = _read_payload(path)
    try:
        META("meta", _meta(payload))
    except ValueError as error:
        raise ValueError(f"{path} is damaged or of another program: {error}") from None
    return take_weights(path, payload, ema)


def take_weights(path: Path, payload: dict[str, Any], ema: bool | None) -> Checkpoint:
    """Finds the weights, or their average, in what `read_checkpoint` has read; arguments and errors as there."""
    found, averaged = _find_weights(path, payload, ema)
    state_dict = {_strip_wrappers(name): value for name, value in found.items()}
    if any(name.startswith("backbone.") for name in state_dict):
        state_dict = {_from_mmpretrain(name): value for name, value in state_dict.items()}
    if len(state_dict) < len(found):
        raise ValueError(f"{path} holds several tensors of one name, told apart by a prefix only")
    meta = _meta(payload)
    return Checkpoint(path, state_dict, form_of(state_dict) or meta.get("form"), meta, payload, averaged)


class Network(NamedTuple):
    """A network with the weights of a checkpoint, in evaluation mode, on the CPU, in the dtype of the weights."""

    arch: str
    model: nn.Module
    num_classes: int
    image_size: tuple[int, int]


def build_from(checkpoint: Checkpoint, arch: str | None = None, **changes: Any) -> Network:
    """Builds the network that a checkpoint's weights belong to, in the structure that they have, and loads them.

    Args:
        checkpoint: the weights; the number of classes is read off them, and for our own architectures the number of
            input channels and, where the metadata does not give it, the image size too.
        arch: the architecture; None takes the one that the metadata names or that fits.
        **changes: `img_size` and parts of the structure, in place of what the metadata says or the weights tell.

    Raises:
        ValueError: no architecture is known for the weights, or they do not fit the one that was asked for.
    """
    if "task" in checkpoint.meta:
        raise ValueError(f"{checkpoint.path} is of a {checkpoint.meta['task']} network, not of a classifier")
    weights = checkpoint.state_dict
    arch = arch or checkpoint.meta.get("arch") or next(iter(fitting_architectures(weights)), None)
    if arch is None:
        raise ValueError(f"{checkpoint.path} does not say which architecture it is of, and none fits: name it with -a")
    arch = canonical_name(arch)
    head = weights.get(f"{classifier_name(arch)}.weight")
    classes = checkpoint.meta.get("num_classes", 1000) if head is None else head.shape[:1].numel()
    options = _build_options(checkpoint, arch, changes)
    if arch in OWN:
        _try_out(checkpoint, arch, classes, options)
    model = create_model(arch, classes, **options)
    dtypes = {v.dtype for v in weights.values() if v.is_floating_point()}
    if len(dtypes) == 1 and dtypes <= {*FLOAT_DTYPES}:
        model.to(dtypes.pop())
    load_weights(model, checkpoint)
    return Network(arch, model.eval(), classes, options["img_size"])


def _build_options(checkpoint: Checkpoint, arch: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments with which `create_model` builds what a checkpoint's weights were made with."""
    structure = checkpoint.meta.get("structure", {}) | {k: v for k, v in changes.items() if k != "img_size"}
    height, width = changes.get("img_size") or checkpoint.meta.get("image_size") or default_image_size(arch)
    options: dict[str, Any] = {"img_size": (height, width)}
    with _structure_errors(checkpoint):
        check_changeable(arch, {part: part for part in structure})
        if arch not in OWN:
            return options
        spec = own_spec(arch, structure)
    if spec.depth > len(checkpoint.state_dict):  # before as many blocks are built
        raise ValueError(f"{checkpoint.path} names more blocks than it holds tensors")
    made = OWN[arch].network.built_for(checkpoint.state_dict, spec, (height, width))
    options = made | options if "img_size" in changes else made
    return options | {"deploy": is_deploy(arch, checkpoint.form)} | structure


def _try_out(checkpoint: Checkpoint, arch: str, classes: int, options: Mapping[str, Any]) -> None:
    """Builds a network without memory first, for sizes come from a file; ValueError where the weights do not fit."""
    with torch.device("meta"), _structure_errors(checkpoint):
        model = create_model(arch, classes, **options)
    form = "deploy" if options["deploy"] else "train"
    check_fit(model, checkpoint, Identity(arch, options["img_size"], classes, form))


@contextmanager
def _structure_errors(checkpoint: Checkpoint) -> Iterator[None]:
    """Names the file where a structure that it or the user asks for can't be built."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: its structure, or the one asked for, can't be built: {error}") from error


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads weights strictly: every name and every shape must be the model's, every value a finite number of its kind.

    Raises:
        ValueError: they differ; the message counts and names the differences, and says what the file holds and what
            the network is.
    """
    check_fit(model, checkpoint)
    problems = unusable_values(model.state_dict(), checkpoint.state_dict)
    if problems:
        raise ValueError(f"{checkpoint.path} can't be used: {problems}")
    model.load_state_dict(checkpoint.state_dict)


def check_fit(model: nn.Module, checkpoint: Checkpoint, identity: Identity | None = None) -> None:
    """Raises ValueError, with the remedy, where names or shapes are not the model's.

    `identity` is the model's where it is known; otherwise its names and shapes tell it, if they can.
    """
    problems = _differences(model.state_dict(), checkpoint.state_dict)
    if problems:
        identity = identity or next(iter(identify(model.state_dict())), None)
        raise ValueError(f"{checkpoint.path} does not fit the network: {problems}{_mismatch(checkpoint, identity)}")


def unusable_values(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Returns which tensors of the same names hold values of another kind or none that are finite; empty for none."""
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


def load_pretrained(arch: str, model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Loads weights to start a training from.

    A head for another number of classes stays as it was initialised. So do the branches of `LocalityLinear` layers
    where the weights have none at all, as those of timm's ResMLP, but for the scale of their BatchNorms, which becomes
    0: new branches change no answer until they are trained.

    Returns:
        The names that were not loaded: none, those of the head, those of the branches.

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
    kept = {k: torch.zeros_like(own[k]) if k in branches and k.endswith("bn.weight") else own[k] for k in fresh}
    load_weights(model, Checkpoint(checkpoint.path, checkpoint.state_dict | kept, checkpoint.form))
    return fresh


def write_checkpoint(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Writes a container of plain tensors and plain values; a reader sees the old file or the whole new one.

    A `.safetensors` file takes the weights (key `model`) and the metadata (key `meta`) alone.

    Raises:
        OSError: the disk is full or the folder can't be written; an older file of that name is intact.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        tensors = {k: v.contiguous() for k, v in payload["model"].items()}
        content = save(tensors, metadata={"meta": json.dumps(payload.get("meta", {}))})
        write_atomically(path, lambda file: file.write(content))
    else:
        write_atomically(path, lambda file: torch.save(dict(payload), file))


def link_checkpoint(existing: Path, path: Path) -> None:
    """Gives a checkpoint a second name; a file of that name is replaced at once.

    Raises:
        OSError: the file system knows no hard links, or takes no more.
    """
    temporary = _temporary(path)
    os.link(existing, temporary)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, syncs it to the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            try:
                write(file)
            except RuntimeError as error:  # what torch.save makes of a disk that takes no more
                raise OSError(f"{path} could not be written, is the disk full? {error}") from error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read_payload(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}: {'that is a folder' if path.is_dir() else 'no such file'}")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("meta", "{}"))
                return {"model": {k: file.get_tensor(k) for k in file.keys()}, "meta": meta}  # noqa: SIM118
        _check_sums(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            warnings.simplefilter("ignore")  # what follows says in one line what is wrong
            payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        raise ValueError(f"{path} is damaged or no checkpoint that can be read safely: {_reason(error)}") from error
    if not isinstance(payload, dict):
        raise ValueError(f"{path} holds no weights but a {type(payload).__name__}")
    return payload


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if re.search("unsupported (global|class)", text, re.IGNORECASE):
        return "it holds Python objects, and loading those could run code"
    if not text or "weights_only" in text:  # there torch advises to trust the file
        return "its content is not that of a checkpoint"
    return text.split("\n")[0]


def _check_sums(path: Path) -> None:
    """Raises ValueError where a byte of a zipped checkpoint is not as it was written, which `torch.load` overlooks."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the check sum of {damaged} is wrong")
    else:
        with path.open("rb") as file:
            if file.read(len(ZIP_START)) == ZIP_START:
                raise ValueError("its end is missing")


def _meta(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a container; of a bare state dict, which may have a tensor of that name, none."""
    meta = payload.get("meta", {})
    return {} if isinstance(meta, Tensor) else meta


def _find_weights(path: Path, payload: Mapping[str, Any], ema: bool | None) -> tuple[Mapping[str, Tensor], bool]:
    """Returns the weights in a container, and whether they are the average."""
    if ema is None:
        ema = True if _meta(payload).get("weights") == "ema" else None
    keys = {None: (*WEIGHT_KEYS, *EMA_KEYS), True: EMA_KEYS, False: WEIGHT_KEYS}[ema]
    averaged = False
    for _ in range(NESTING):
        key = next((key for key in keys if isinstance(payload.get(key), dict)), None)
        if key is None:
            break
        payload, averaged, keys = payload[key], averaged or key in EMA_KEYS, (*WEIGHT_KEYS, *EMA_KEYS)
    if ema and not averaged:
        raise ValueError(f"{path} holds no moving average of the weights (none of the keys {', '.join(EMA_KEYS)})")
    if not payload or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in payload.items()):
        raise ValueError(f"{path} holds no weights: found {', '.join(map(repr, list(payload)[:5])) or 'nothing'}")
    for name, value in payload.items():
        try:
            schema.tensor(name, value)
        except ValueError as error:
            raise ValueError(f"{path} holds no usable weights: {error}") from None
    return payload, averaged


def _strip_wrappers(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.removeprefix(next(filter(name.startswith, WRAPPERS)))
    return name


def _from_mmpretrain(name: str) -> str:
    for pattern, replacement in MMPRETRAIN_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Returns a sentence on how two state dicts differ, empty where they fit."""
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
    """Returns a sentence on what weights and a network are that do not fit each other, as far as that is known."""
    files = _identify_file(checkpoint)
    if not files:
        return ""
    if network is None:
        return f". These are {' or '.join(map(str, files))}"
    file = next((candidate for candidate in files if candidate.arch == network.arch), files[0])
    return f". These are {file}; the network takes {network}{_remedy(file, network)}"


def _identify_file(checkpoint: Checkpoint) -> list[Identity]:
    meta = checkpoint.meta
    if {"arch", "image_size", "num_classes"} <= meta.keys():
        height, width = meta["image_size"]
        return [Identity(canonical_name(meta["arch"]), (height, width), meta["num_classes"], checkpoint.form)]
    return identify(checkpoint.state_dict)


def _remedy(file: Identity, network: Identity) -> str:
    if file.arch != network.arch:
        return f": give --arch {file.arch}"
    if file.form != network.form:
        converted = "give the training weights that they were converted from"
        return f": {converted if file.form == 'deploy' else 'convert them first (convert.py)'}"
    if file.image_size != network.image_size:
        height, width = file.image_size
        return f": give --opts DATA.IMG_SIZE {height if height == width else f'{height},{width}'}"
    if file.num_classes != network.num_classes:
        return f": give data of {file.num_classes} classes, or --opts MODEL.NUM_CLASSES {file.num_classes}"
    return ""
