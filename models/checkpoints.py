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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import timm
import torch
from torch import Tensor, nn

from . import __version__
from .build import OWN, classifier_name, create_model, default_image_size, own_spec, structure_changes
from .locality import branch_names

StateDict = dict[str, Tensor]

# Where the containers of Swin, timm, MMPretrain and this project keep the weights and their moving average.
WEIGHT_KEYS = ("model", "state_dict")
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
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
    `meta` is what `describe` wrote, empty for a file of another origin. `payload` is the whole container.
    """

    path: Path
    state_dict: StateDict
    form: str | None
    meta: dict[str, Any] = field(default_factory=dict)
    payload: dict[str, Any] = field(default_factory=dict)


def describe(
    arch: str, model: nn.Module, image_size: tuple[int, int], form: str | None, dataset: str | None = None
) -> dict[str, Any]:
    """Returns the metadata that goes with a network's weights; `dataset` says how its images are normalised."""
    return {
        "arch": arch,
        "num_classes": model.num_classes,
        "image_size": list(image_size),
        "form": form,
        "structure": structure_changes(arch, model),
        "versions": versions(),
    } | ({} if dataset is None else {"dataset": dataset})


def versions() -> dict[str, str]:
    """Returns the versions of what weights are made with."""
    return {"repmlpnet": __version__, "torch": str(torch.__version__), "timm": timm.__version__}


def read_checkpoint(path: str | Path, ema: bool = False) -> Checkpoint:
    """Reads a `.pth` or `.safetensors` file: a bare state dict, or one within a container.

    Args:
        path: the file.
        ema: take the moving average of the weights instead of the weights.

    Raises:
        ValueError: no such file, no checkpoint, a damaged one, one that holds more than data, or one without weights.
    """
    path = Path(path)
    payload = _read_payload(path)
    state_dict = {_strip_wrappers(k): v for k, v in _find_weights(path, payload, ema).items()}
    if any(name.startswith("backbone.") for name in state_dict):
        state_dict = {_from_mmpretrain(name): value for name, value in state_dict.items()}
    meta = payload.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    return Checkpoint(path, state_dict, _form(state_dict) or meta.get("form"), meta, payload)


class Network(NamedTuple):
    """A network with the weights of a checkpoint, in evaluation mode, on the CPU, in the dtype of the weights."""

    arch: str
    model: nn.Module
    num_classes: int
    image_size: tuple[int, int]


def build_from(checkpoint: Checkpoint, arch: str | None = None) -> Network:
    """Builds the network that a checkpoint's weights belong to, in the structure that they have, and loads them.

    Args:
        checkpoint: the weights; the number of classes is read off them, and for our own architectures the number of
            input channels and, where the metadata does not give it, the image size too.
        arch: the architecture; None takes the one that the metadata names or that fits.

    Raises:
        ValueError: no architecture is known for the weights, or they do not fit the one that was asked for.
    """
    if "task" in checkpoint.meta:
        raise ValueError(f"{checkpoint.path} is of a {checkpoint.meta['task']} network, not of a classifier")
    weights = checkpoint.state_dict
    arch = arch or checkpoint.meta.get("arch") or next(iter(fitting_architectures(weights)), None)
    if arch is None:
        raise ValueError(f"{checkpoint.path} does not say which architecture it is of, and none fits: name it with -a")
    height, width = checkpoint.meta.get("image_size") or default_image_size(arch)
    size = (height, width)
    head = weights.get(f"{classifier_name(arch)}.weight")
    classes = 0 if head is None else head.shape[:1].numel()
    if head is None and checkpoint.meta.get("num_classes") != 0:
        raise ValueError(f"{checkpoint.path} holds no head ({classifier_name(arch)}.weight) of {arch}")
    options: dict[str, Any] = {"img_size": size}
    if arch in OWN:
        structure = checkpoint.meta.get("structure", {})
        options = OWN[arch].network.built_for(weights, own_spec(arch, structure), size)
        options |= {"deploy": is_deploy(arch, checkpoint.form)} | structure
    model = create_model(arch, classes, **options)
    dtypes = {v.dtype for v in weights.values() if v.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    load_weights(model, checkpoint)
    return Network(arch, model.eval(), classes, options["img_size"])


def is_deploy(arch: str, form: str | None) -> bool:
    """Says whether weights of a form belong into the deploy structure of an architecture, if it has one.

    Those of no form do: a structure without anything to inject is the deploy structure.
    """
    return arch in OWN and form != "train"


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Loads weights strictly: every name and every shape must be the model's.

    Raises:
        ValueError: they differ; the message counts and names the differences, and the architecture that would fit.
    """
    problems = _differences(model.state_dict(), checkpoint.state_dict)
    if problems:
        raise ValueError(f"{checkpoint.path} does not fit the network: {problems}{_better_fit(checkpoint.state_dict)}")
    model.load_state_dict(checkpoint.state_dict)


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


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, syncs it to the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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


def fitting_architectures(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Returns our architectures of which these are the weights, in either form and for any number of classes."""
    form, names = _form(state_dict), []
    for name in OWN:
        with torch.device("meta"):
            own = create_model(name, deploy=is_deploy(name, form)).state_dict()
        head = f"{classifier_name(name)}."
        if own.keys() == state_dict.keys() and all(
            own[k].shape == v.shape for k, v in state_dict.items() if not k.startswith(head)
        ):
            names.append(name)
    return names


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
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what follows says it in one line
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


def _find_weights(path: Path, payload: Mapping[str, Any], ema: bool) -> Mapping[str, Tensor]:
    keys = EMA_KEYS if ema else (*WEIGHT_KEYS, *EMA_KEYS)
    for key in keys:
        if isinstance(payload.get(key), dict):
            return _find_weights(path, payload[key], ema=False)
    if ema:
        raise ValueError(f"{path} holds no moving average of the weights (none of the keys {', '.join(EMA_KEYS)})")
    strays = [k for k, v in payload.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if strays or not payload:
        raise ValueError(f"{path} holds no weights: found {', '.join(map(repr, list(payload)[:5])) or 'nothing'}")
    return payload


def _strip_wrappers(name: str) -> str:
    for prefix in WRAPPERS:
        if name.startswith(prefix):
            return _strip_wrappers(name.removeprefix(prefix))
    return name


def _from_mmpretrain(name: str) -> str:
    for pattern, replacement in MMPRETRAIN_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _form(names: Iterable[str]) -> str | None:
    """Returns the form that names alone tell; an injected layer that never had a BatchNorm looks like any other."""
    if any(name.endswith("fc3.bias") for name in names):
        return "deploy"
    return "train" if any(".fc3_bn." in name or ".repconv" in name for name in names) else None


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


def _better_fit(state_dict: Mapping[str, Tensor]) -> str:
    names = fitting_architectures(state_dict)
    if not names:
        return ""
    classes = state_dict[f"{classifier_name(names[0])}.weight"].shape[:1].numel()
    form = f"{_form(state_dict) or ''} weights".lstrip()
    return f". These are {form} of {' or '.join(names)} with {classes} classes"
