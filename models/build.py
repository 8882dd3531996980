"""The registry of architectures: ours by their published names, and every name that timm knows."""

import difflib
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import timm
from timm.layers import to_2tuple
from timm.models import PretrainedCfg, register_model
from torch import nn

from . import repmlp_resnet, repmlpnet, resmlp, schema
from .dense import dense_backbone


class Family(NamedTuple):
    """Architectures of one kind.

    Attributes:
        network: the class; called as `network(spec, num_classes=, deploy=, in_chans=, img_size=, drop_path_rate=)`. Its
            `built_for(weights, spec, img_size)` returns the `in_chans` and `img_size` that weights, by name and in
            either form, were made with: the size (height, width) that is given where it fits; of others only square
            ones can be told.
        specs: by name, the shapes that it is built in: frozen dataclasses with an `image_size`
            and a `depth`, the number of blocks.
        classifier: the name of the head within the network.
    """

    network: Any
    specs: Mapping[str, Any]
    classifier: str


FAMILIES = (
    Family(repmlpnet.RepMLPNet, repmlpnet.SPECS, "head"),
    Family(resmlp.ResMLP, resmlp.SPECS, "head"),
    Family(repmlp_resnet.RepMLPResNet, repmlp_resnet.SPECS, "linear"),
)
OWN = {name: family for family in FAMILIES for name in family.specs}
# What a part of a structure may be changed to, by the type of what it is.
PARTS: dict[type, schema.Check] = {
    tuple: schema.sequence(schema.integer(0, 2**16)),
    int: schema.integer(1, 2**16),
    float: schema.number,
    bool: schema.boolean,
    str: schema.text,
}


def list_models() -> list[str]:
    """Returns the names of this project's own architectures; `timm.list_models()` names the others."""
    return list(OWN)


def create_model(name: str, num_classes: int = 1000, deploy: bool = False, **kwargs: Any) -> nn.Module:
    """Builds a network with fresh weights.

    Args:
        name: one of `list_models()`, or any architecture of timm.
        num_classes: outputs of the head.
        deploy: build the deploy structure; only our own architectures have one.
        **kwargs: `in_chans`, `img_size`, `drop_path_rate`, ... as the architecture takes them, and for our own those
            of `changeable(name)`, which change the structure itself: `branches`, `share_sets`, ...

    Raises:
        ValueError: an unknown name (the closest known one is named), or `deploy` for a network without that structure.
    """
    name = canonical_name(name)
    if name in OWN:
        changes = {k: v for k, v in kwargs.items() if k in changeable(name)}
        options = {k: v for k, v in kwargs.items() if k not in changes}
        return OWN[name].network(own_spec(name, changes), num_classes=num_classes, deploy=deploy, **options)
    cfg = _timm_cfg(name)
    if deploy:
        raise ValueError(f"{name} has one structure only: nothing is injected into it, so it has no deploy form")
    if not cfg.fixed_input_size:
        kwargs.pop("img_size", None)  # a network of any input size has no such argument
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def canonical_name(name: str) -> str:
    """Returns our own name of an architecture that is given by the one that timm knows it by; others as they are."""
    return _OWN_NAMES.get(name, name)


def changeable(name: str) -> list[str]:
    """Returns the parts of an architecture's structure that `create_model` takes in place of its own; timm's: none."""
    name = canonical_name(name)
    if name not in OWN:
        _timm_cfg(name)
        return []
    return [f.name for f in fields(OWN[name].specs[name]) if f.name != "image_size"]


def own_spec(name: str, changes: Mapping[str, Any]) -> Any:
    """Returns the shape of one of our own architectures, with parts of it changed; lists stand for tuples.

    Raises:
        ValueError: it has no such part, or the change is of another type, or no network can have it.
    """
    own = OWN[name].specs[name]
    check_changeable(name, {part: part for part in changes})
    for part, value in changes.items():
        PARTS[type(getattr(own, part))](part, value)
    return replace(own, **{k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()})


def check_changeable(name: str, parts: Mapping[str, str]) -> None:
    """Raises ValueError where an architecture lacks a part of `parts`, which are given by how the user spells them."""
    for spelling, part in parts.items():
        if part not in changeable(name):
            raise ValueError(f"{spelling}: {name} has no {part} to change; leave it out")


def structure_changes(name: str, model: nn.Module) -> dict[str, Any]:
    """Returns, in plain values, in which parts a network was built otherwise than `name` stands for."""
    name = canonical_name(name)
    own = {part: getattr(OWN[name].specs[name], part) for part in changeable(name)}
    changes = {part: getattr(model.spec, part) for part in own if getattr(model.spec, part) != own[part]}
    return {part: list(value) if isinstance(value, tuple) else value for part, value in changes.items()}


def default_image_size(name: str) -> tuple[int, int]:
    """Returns the (height, width) that an architecture is made for.

    Raises:
        ValueError: an unknown name.
    """
    name = canonical_name(name)
    if name in OWN:
        return to_2tuple(OWN[name].specs[name].image_size)
    height, width = _timm_cfg(name).input_size[-2:]
    return height, width


def _timm_cfg(name: str) -> PretrainedCfg:
    if not timm.is_model(name):
        raise ValueError(f"unknown architecture {name!r}{_closest(name)}")
    return timm.get_pretrained_cfg(name) or PretrainedCfg()


def _closest(name: str) -> str:
    known = {candidate.lower(): candidate for candidate in [*list_models(), *timm.list_models()]}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {known[close[0]]}?" if close else f"; known are {', '.join(list_models())} and timm's"


def classifier_name(name: str) -> str:
    """Returns the name of an architecture's head within it: `head`, or what timm says (`fc`, `head.fc`, ...).

    Raises:
        ValueError: an unknown architecture.
    """
    name = canonical_name(name)
    return OWN[name].classifier if name in OWN else str(_timm_cfg(name).classifier)


def timm_name(name: str) -> str:
    """Returns the name that timm knows an architecture by: of ours, `RepMLPNet-T224` is `repmlpnet_t224`.

    Raises:
        ValueError: an unknown architecture.
    """
    if name in OWN:
        return name.lower().replace("-", "_")
    _timm_cfg(name)
    return name


_OWN_NAMES = {timm_name(name): name for name in OWN}


def _register_with_timm(name: str) -> None:
    """Makes `timm.create_model("repmlpnet_t224")` build `RepMLPNet-T224`.

    With `features_only=True` it builds a `DenseBackbone` of it, with the options of `dense_backbone`.
    """

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise ValueError(f"{name} comes without weights: pretrained=True has nothing to load")
        timm_only = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
        options = {k: v for k, v in kwargs.items() if k not in timm_only}
        if not options.pop("features_only", False):
            return create_model(name, **options)
        dense = {k: options.pop(k) for k in ("out_indices", "downsample", "rank", "pad") if k in options}
        return dense_backbone(create_model(name, **options), **dense)

    entrypoint.__name__ = entrypoint.__qualname__ = timm_name(name)
    entrypoint.__doc__ = f"{name}, built by `create_model`."
    setattr(sys.modules[__name__], entrypoint.__name__, register_model(entrypoint))


for _name in OWN:
    _register_with_timm(_name)
