"""Constructors that can also be called with the arguments of the published code and of MMPretrain.

Sources: `repmlpnet.py` of github.com/DingXiaoH/RepMLP, and `mmpretrain/models/backbones/repmlp.py` of
github.com/open-mmlab/mmpretrain. Names, order and defaults are theirs; what is built is always this project's class.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, SupportsIndex, TypeVar, cast

from timm.layers import to_2tuple

Constructor = TypeVar("Constructor", bound=Callable[..., None])
STAGE_KEYS = {"channels": "channels", "depths": "blocks", "sharesets_nums": "share_sets"}


def also_called_as(**others: Callable[..., Mapping[str, Any]]) -> Callable[[Constructor], Constructor]:
    """Lets an `__init__` be called by other signatures, too.

    A call is read by the first signature that it fits, its own before the others. To fit means that all arguments have
    a place, that the first one has the annotated type, and that integers stand where the signature has them.

    Args:
        **others: functions with the other signatures, by the names that messages give them; each returns the keyword
            arguments of `__init__`.

    Returns:
        A decorator. The decorated `__init__` raises TypeError, naming all signatures, for a call that fits none.
    """

    def decorate(init: Constructor) -> Constructor:
        own = inspect.Signature(list(inspect.signature(init).parameters.values())[1:])
        signatures = {name: inspect.signature(other) for name, other in others.items()}

        @wraps(init)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            if not _fits(own, args, kwargs):
                name = next((name for name, known in signatures.items() if _fits(known, args, kwargs)), None)
                if name is None:
                    raise TypeError(_refusal(type(self).__name__, own, signatures, kwargs))
                args, kwargs = (), dict(others[name](*args, **kwargs))
            init(self, *args, **kwargs)

        return cast(Constructor, wrapper)

    return decorate


def _fits(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return False
    first, *others = signature.parameters.values()
    integers = [bound.arguments[p.name] for p in others if p.annotation is int and p.name in bound.arguments]
    typed = isinstance(bound.arguments.get(first.name, first.default), first.annotation)
    return typed and all(isinstance(value, SupportsIndex) for value in integers)


def _refusal(
    name: str, own: inspect.Signature, others: Mapping[str, inspect.Signature], kwargs: Mapping[str, Any]
) -> str:
    unknown = [word for word in kwargs if not any(word in known.parameters for known in (own, *others.values()))]
    problem = f"{name} has no argument {', '.join(unknown)}" if unknown else f"no {name} takes these arguments together"
    known = [f"({', '.join(own.parameters)})", *(f"{k}'s ({', '.join(v.parameters)})" for k, v in others.items())]
    return f"{problem}: it takes {', or '.join(known)}"


def published_block(
    in_channels: int,
    out_channels: int,
    h: int,
    w: int,
    reparam_conv_k: Sequence[int] | None = None,
    globalperceptron_reduce: int = 4,
    num_sharesets: int = 1,
    deploy: bool = False,
) -> dict[str, Any]:
    """Returns the arguments of a `RepMLPBlock` that is called as the published one.

    Raises:
        ValueError: input and output have different numbers of channels.
    """
    if in_channels != out_channels:
        raise ValueError(f"a RepMLPBlock keeps its channels: in_channels {in_channels}, out_channels {out_channels}")
    return {
        "channels": in_channels,
        "h": h,
        "w": w,
        "share_sets": num_sharesets,
        "branches": tuple(reparam_conv_k or ()),
        "gp_reduction": globalperceptron_reduce,
        "deploy": deploy,
    }


def mmpretrain_block(
    channels: int,
    path_h: int,
    path_w: int,
    reparam_conv_kernels: Sequence[int] | None = None,
    globalperceptron_ratio: int = 4,
    num_sharesets: int = 1,
    deploy: bool = False,
) -> dict[str, Any]:
    """Returns the arguments of a `RepMLPBlock` that is called as MMPretrain's."""
    sizes = channels, channels, path_h, path_w
    return published_block(*sizes, reparam_conv_kernels, globalperceptron_ratio, num_sharesets, deploy)


def published_network(
    base: Any,
    in_channels: int = 3,
    num_class: int = 1000,
    patch_size: int | tuple[int, int] = (4, 4),
    num_blocks: Sequence[int] = (2, 2, 6, 2),
    channels: Sequence[int] = (192, 384, 768, 1536),
    hs: Sequence[int] = (64, 32, 16, 8),
    ws: Sequence[int] = (64, 32, 16, 8),
    sharesets_nums: Sequence[int] = (4, 8, 16, 32),
    reparam_conv_k: Sequence[int] | None = (3,),
    globalperceptron_reduce: int = 4,
    use_checkpoint: bool = False,
    deploy: bool = False,
) -> dict[str, Any]:
    """Returns the arguments of a `RepMLPNet` that is called as the published one.

    `base` is a spec, of which everything is taken that the published arguments do not say.

    Raises:
        ValueError: no network here has these stages: `hs` or `ws` is not halved from stage to stage, or their numbers
            differ, or patches are not square.
    """
    if not len(num_blocks) == len(channels) == len(hs) == len(ws) == len(sharesets_nums):
        raise ValueError("num_blocks, channels, hs, ws and sharesets_nums need one number for each stage")
    for name, sizes in (("hs", hs), ("ws", ws)):
        if any(sizes[0] != size * 2**stage for stage, size in enumerate(sizes)):
            raise ValueError(f"the partitions of a stage are half as large as those before: not {name}={tuple(sizes)}")
    patch = _side(patch_size)
    spec = replace(
        base,
        channels=tuple(channels),
        blocks=tuple(num_blocks),
        share_sets=tuple(sharesets_nums),
        image_size=(hs[0] * patch, ws[0] * patch),
        patch_size=patch,
        branches=tuple(reparam_conv_k or ()),
        gp_reduction=globalperceptron_reduce,
    )
    options = {"num_classes": num_class, "in_chans": in_channels, "use_checkpoint": use_checkpoint, "deploy": deploy}
    return {"spec": spec, **options}


def mmpretrain_network(
    base: Any,
    arch: object,
    img_size: int | tuple[int, int] = 224,
    in_channels: int = 3,
    patch_size: int | tuple[int, int] = 4,
    out_indices: Sequence[int] = (3,),
    reparam_conv_kernels: Sequence[int] | None = (3,),
    globalperceptron_ratio: int = 4,
    deploy: bool = False,
) -> dict[str, Any]:
    """Returns the arguments of a `RepMLPNet` that is called as MMPretrain's: a backbone, without pooling and head.

    Its output is the normalised map of the last stage itself, where MMPretrain returns a tuple of that one map. `base`
    is the spec of the architecture "base", and everything is taken from it that MMPretrain's arguments do not say.

    Raises:
        ValueError: `arch` is neither "b" nor "base", nor a dict of MMPretrain's keys; maps of other stages than the
            last are wanted; or patches are not square.
    """
    if isinstance(arch, str) and arch.lower() in ("b", "base"):
        stages = {part: getattr(base, part) for part in STAGE_KEYS.values()}
    elif isinstance(arch, Mapping) and arch.keys() == STAGE_KEYS.keys():
        stages = {part: tuple(arch[key]) for key, part in STAGE_KEYS.items()}
    else:
        raise ValueError(f"arch is 'b', 'base' or a dict of {', '.join(STAGE_KEYS)}, not {arch!r}")
    spec = replace(
        base,
        **stages,
        image_size=to_2tuple(img_size),
        patch_size=_side(patch_size),
        branches=tuple(reparam_conv_kernels or ()),
        gp_reduction=globalperceptron_ratio,
    )
    last = len(spec.blocks) - 1
    if [index % (last + 1) for index in out_indices] != [last]:
        raise ValueError(
            f"out_indices {tuple(out_indices)}: a RepMLPNet returns the map of its last stage, {last}; for those of "
            "others use timm.create_model(..., features_only=True) or forward_intermediates"
        )
    return {"spec": spec, "num_classes": 0, "in_chans": in_channels, "global_pool": "", "deploy": deploy}


def _side(patch_size: int | tuple[int, int]) -> int:
    height, width = to_2tuple(patch_size)
    if height != width:
        raise ValueError(f"patches are square, not {height}x{width}")
    return int(height)
