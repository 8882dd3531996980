"""The rows of a table of specs as variants of a network: their names in timm, how they are changed, and built."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg
from torch import nn

from . import schema
from .dense import dense_backbone

# What a part of a structure may be changed to, by the type of its own value.
PARTS: dict[type, schema.Check] = {
    tuple: schema.sequence(schema.integer(0, 2**16)),
    int: schema.integer(1, 2**16),
    float: schema.number,
    bool: schema.boolean,
    str: schema.text,
}
# Mean and standard deviation of the channels of small data sets.
CIFAR10 = {"mean": (0.49139968, 0.48215841, 0.44653091), "std": (0.24703223, 0.24348513, 0.26158784)}
CIFAR100 = {
    "mean": (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
    "std": (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
}
DIGITS = {"mean": (0.305855,) * 3, "std": (0.376279,) * 3}
SHAPES = {"mean": (0.500748, 0.501421, 0.502679), "std": (0.290556, 0.293015, 0.292761)}
# Options of `dense_backbone` that timm does not know.
DENSE_OPTIONS = ("downsample", "rank", "pad")


def variant_name(name: str) -> str:
    """Returns the name of a variant in timm: `RepMLPNet-T224` is `repmlpnet_t224`."""
    return name.lower().replace("-", "_")


def variant_cfg(spec: Any, **kwargs: Any) -> dict[str, Any]:
    """Returns the `pretrained_cfg` of a variant without weights; images are prepared as for the published accuracies.

    Args:
        spec: a frozen dataclass with an `image_size`.
        **kwargs: further fields, and those that differ: `first_conv`, `classifier`, `mean`, `std`, ...
    """
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, *to_2tuple(spec.image_size)),
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "mit",
        **kwargs,
    }


def parts_of(spec: Any) -> list[str]:
    """Returns the parts of a spec that can be changed: all but `image_size`, which `img_size` is for."""
    return [f.name for f in fields(spec) if f.name != "image_size"]


def changed_spec(spec: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a spec with some of its parts changed; lists stand for tuples, one integer for the same in every stage.

    Raises:
        ValueError: a change has another type than the part, or no network can have it.
    """
    changes = {part: _fitted(value, getattr(spec, part)) for part, value in changes.items()}
    for part, value in changes.items():
        PARTS[type(getattr(spec, part))](part, value)
    return replace(spec, **{k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()})


def _fitted(value: Any, own: Any) -> Any:
    """Turns one integer into one for each stage, and a list of one into an integer, where a spec has that instead."""
    if isinstance(value, int) and isinstance(own, tuple):
        return [value] * len(own)
    return value[0] if type(own) is int and isinstance(value, list | tuple) and len(value) == 1 else value


def build_variant(
    network: Callable[..., nn.Module], name: str, spec: Any, pretrained: bool = False, **kwargs: Any
) -> Any:
    """Builds a variant of a network with fresh weights, with all that timm's own models carry.

    Args:
        network: the class; called as `network(spec, **kwargs)`.
        name: of the variant, `RepMLPNet-T224`.
        spec: of the variant.
        pretrained: there are no weights; must be false.
        **kwargs: arguments of the class, parts of the spec in place of its own, and what timm's `build_model_with_cfg`
            takes. With `features_only=True` also `out_indices`, `downsample`, `rank` and `pad` of `dense_backbone`.

    Returns:
        The network; with `features_only=True`, a `DenseBackbone` of it.

    Raises:
        ValueError: `pretrained` is true, or the network can't be built so.
    """
    if pretrained:
        raise ValueError(f"{name} comes without weights: pretrained=True has nothing to load")
    changes = {part: kwargs.pop(part) for part in parts_of(spec) if part in kwargs}
    features: dict[str, Any] = {"feature_cls": dense_backbone, "out_indices": None}
    if kwargs.get("features_only"):
        features |= {option: kwargs.pop(option) for option in DENSE_OPTIONS if option in kwargs}
    variant, build = variant_name(name), partial(network, changed_spec(spec, changes))
    return build_model_with_cfg(build, variant, pretrained=False, feature_cfg=features, **kwargs)
