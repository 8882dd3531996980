"""The registry of architectures: ours by their published names, and every name that timm knows."""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import timm
from timm.models import PretrainedCfg
from torch import nn

from . import mobilefacenet, pure_mlp, repmlp_resnet, repmlpnet, resmlp
from .variants import build_variant, changed_spec, parts_of, variant_name


class Family(NamedTuple):
    """Architectures of one kind.

    Attributes:
        network: the class; called as `network(spec, num_classes=, in_chans=, img_size=, drop_path_rate=, deploy=,
            drop_rate=, global_pool=)`. Its `built_for(weights, spec, img_size)` returns the `in_chans` and `img_size`
            that weights, by name and in either form, were made with: the given size (height, width) where it fits,
            else a square one, since weights do not determine others.
        specs: by name, the shapes that it is built in: frozen dataclasses with an `image_size` and a `depth`, the
            number of blocks. For each, the module of the class registers a function with timm.
    """

    network: Any
    specs: Mapping[str, Any]


FAMILIES = (
    Family(repmlpnet.RepMLPNet, repmlpnet.SPECS),
    Family(resmlp.ResMLP, resmlp.SPECS),
    Family(repmlp_resnet.RepMLPResNet, repmlp_resnet.SPECS),
    Family(pure_mlp.PureMLP, pure_mlp.SPECS),
    Family(mobilefacenet.MobileFaceNet, mobilefacenet.SPECS),
)
REGISTRY = {name: family for family in FAMILIES for name in family.specs}
_PUBLISHED_NAMES = {variant_name(name): name for name in REGISTRY}


def list_models() -> list[str]:
    """Returns the names of this project's own architectures; `timm.list_models()` names the others."""
    return list(REGISTRY)


def create_model(name: str, num_classes: int = 1000, deploy: bool = False, **kwargs: Any) -> nn.Module:
    """Builds a network with fresh weights.

    Args:
        name: one of `list_models()`, or any architecture of timm.
        num_classes: outputs of the head.
        deploy: build the deploy structure; only our own architectures have one.
        **kwargs: `in_chans`, `img_size`, `drop_rate`, `drop_path_rate`, ... as the architecture takes them, and for our
            own those of `changeable(name)`, which change the structure itself: `branches`, `share_sets`, ...

    Raises:
        ValueError: an unknown name (the closest known one is named), or `deploy` for a network without that structure.
    """
    name = canonical_name(name)
    if name in REGISTRY:
        family = REGISTRY[name]
        options = {"num_classes": num_classes, "deploy": deploy, **kwargs}
        return cast(nn.Module, build_variant(family.network, name, family.specs[name], **options))
    cfg = _timm_cfg(name)
    if deploy:
        raise ValueError(f"{name} has no deploy form: nothing in it can be re-parameterised")
    if not cfg.fixed_input_size:
        kwargs.pop("img_size", None)  # a network of any input size has no such argument
    return timm.create_model(name, num_classes=num_classes, **kwargs)


def canonical_name(name: str) -> str:
    """Returns the published name of one of our architectures that is given by its name in timm; others unchanged."""
    return _PUBLISHED_NAMES.get(name, name)


def timm_name(name: str) -> str:
    """Returns the name of an architecture in timm: of ours, `RepMLPNet-T224` is `repmlpnet_t224`.

    Raises:
        ValueError: an unknown architecture.
    """
    if name in REGISTRY:
        return variant_name(name)
    _timm_cfg(name)
    return name


def changeable(name: str) -> list[str]:
    """Returns the parts of an architecture's structure that `create_model` takes in place of its own; timm's: none."""
    name = canonical_name(name)
    if name not in REGISTRY:
        _timm_cfg(name)
        return []
    return parts_of(REGISTRY[name].specs[name])


def own_spec(name: str, changes: Mapping[str, Any]) -> Any:
    """Returns the spec of one of our own architectures, with parts of it changed; lists stand for tuples.

    Raises:
        ValueError: it has no such part, or the change is of another type, or no network can have it.
    """
    check_changeable(name, {part: part for part in changes})
    return changed_spec(REGISTRY[name].specs[name], changes)


def check_changeable(name: str, parts: Mapping[str, str]) -> None:
    """Raises ValueError where an architecture lacks a part; `parts` maps the user's spelling of each to its name."""
    for spelling, part in parts.items():
        if part not in changeable(name):
            raise ValueError(f"{spelling}: {name} has no {part} to change; leave it out")


def structure_changes(name: str, model: nn.Module) -> dict[str, Any]:
    """Returns, in plain values, the parts of a network's structure that differ from those of the architecture."""
    name = canonical_name(name)
    own = {part: getattr(REGISTRY[name].specs[name], part) for part in changeable(name)}
    changes = {part: getattr(model.spec, part) for part in own if getattr(model.spec, part) != own[part]}
    return {part: list(value) if isinstance(value, tuple) else value for part, value in changes.items()}


def default_image_size(name: str) -> tuple[int, int]:
    """Returns the (height, width) that an architecture is made for.

    Raises:
        ValueError: an unknown name.
    """
    _, height, width = _timm_cfg(timm_name(canonical_name(name))).input_size
    return height, width


def classifier_name(name: str) -> str:
    """Returns the name of an architecture's head within it: `head`, `fc`, `head.fc`, ...

    Raises:
        ValueError: an unknown architecture.
    """
    return str(_timm_cfg(timm_name(canonical_name(name))).classifier)


def first_conv_name(name: str) -> str:
    """Returns the name of an architecture's first convolution within it, the first one of several; may be empty.

    Raises:
        ValueError: an unknown architecture.
    """
    names = _timm_cfg(timm_name(canonical_name(name))).first_conv or ""
    return names if isinstance(names, str) else names[0]


def _timm_cfg(name: str) -> PretrainedCfg:
    if not timm.is_model(name):
        raise ValueError(f"unknown architecture {name!r}{_closest(name)}")
    return timm.get_pretrained_cfg(name) or PretrainedCfg()


def _closest(name: str) -> str:
    own, given = list_models(), _words(name)
    more_precise = [known for known in own if given < _words(known)]
    if more_precise and len(given) > 1:
        return f"; did you mean {' or '.join(more_precise)}?"
    known = {candidate.lower(): candidate for candidate in [*own, *timm.list_models()]}
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean {known[close[0]]}?" if close else f"; known are {', '.join(own)} and timm's"


def _words(name: str) -> set[str]:
    """Returns the parts of a name, published or of timm: `RepMLPNet-T224` has two."""
    return set(variant_name(name).split("_"))
