"""Containers of weights: those of Swin, timm, MMPretrain and this project, read to the published names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from . import schema

# Where the containers of Swin, timm, MMPretrain and this project keep the weights and their moving average.
WEIGHT_KEYS = ("model", "state_dict")
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
NESTING = 4  # how deep containers may lie in containers
# Prefixes that DistributedDataParallel and torch.compile put before every name.
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


def metadata(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a container; of a bare state dict, which may have a tensor of that name, none."""
    meta = payload.get("meta", {})
    return {} if isinstance(meta, Tensor) else meta


def find_weights(path: Path, payload: Mapping[str, Any], ema: bool | None) -> tuple[dict[str, Tensor], bool]:
    """Finds the weights in a container.

    Args:
        path: of the file, for messages.
        payload: the container.
        ema: whether to take their moving average; None takes it from a file that was chosen by it, as its metadata say,
            or that holds nothing else.

    Returns:
        The weights under the published names, and whether they are the average.

    Raises:
        ValueError: there are none.
    """
    if ema is None:
        ema = True if metadata(payload).get("weights") == "ema" else None
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
    return _published_names(path, payload), averaged


def _published_names(path: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state_dict = {_strip_wrappers(name): value for name, value in weights.items()}
    if any(name.startswith("backbone.") for name in state_dict):
        state_dict = {_from_mmpretrain(name): value for name, value in state_dict.items()}
    if len(state_dict) < len(weights):
        raise ValueError(f"{path} holds several tensors whose names differ in a prefix only")
    return state_dict


def _strip_wrappers(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.removeprefix(next(filter(name.startswith, WRAPPERS)))
    return name


def _from_mmpretrain(name: str) -> str:
    for pattern, replacement in MMPRETRAIN_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
