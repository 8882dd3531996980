"""The work of a network, counted from its shapes: floating-point operations, and the least bytes that it moves."""

from typing import cast

from torch import nn

from models import RepMLPNet
from models.counts import count


def count_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Returns the FLOPs, two for each of the multiply-adds of `models.counts`, in one forward pass.

    Args:
        model: on any device; not changed.
        shape: of the input, (N, 3, H, W).
    """
    return 2 * count(model, shape).multiply_adds


def stage_elements(model: nn.Module, size: tuple[int, int]) -> int:
    """Returns the elements of the maps between the stages for one image of `size`: one map for each resolution.

    Raises:
        ValueError: neither a RepMLPNet nor a timm network that says what its stages are.
    """
    if isinstance(model, RepMLPNet):
        channels, stride = [model.conv_embedding.conv.out_channels], model.conv_embedding.conv.stride[0]
        channels += [cast(nn.Conv2d, embed.conv).out_channels for embed in model.embeds]
        stages = {stride * 2**i: c for i, c in enumerate(channels)}
    elif isinstance(info := getattr(model, "feature_info", None), list):
        stages = {stage["reduction"]: stage["num_chs"] for stage in info}
    else:
        raise ValueError(f"the stages of a {type(model).__name__} are not known")
    return sum(c * (size[0] // reduction) * (size[1] // reduction) for reduction, c in stages.items())


def inference_bytes(model: nn.Module, batch_size: int, size: tuple[int, int], width: int) -> int:
    """Returns the least memory traffic of one forward pass, in bytes.

    The model behind it: every weight is read once, the images are read and the logits written once, and the map of each
    stage is written once and read once. Everything else is assumed to stay in caches, so no real program gets below it.

    Args:
        model: a RepMLPNet, or a timm network.
        batch_size: images.
        size: their height and width.
        width: bytes of an element.
    """
    weights = sum(p.numel() for p in model.parameters())
    classes = int(cast(int, getattr(model, "num_classes", 0)))
    return width * (weights + batch_size * (3 * size[0] * size[1] + 2 * stage_elements(model, size) + classes))


def training_bytes(model: nn.Module, batch_size: int, size: tuple[int, int], width: int) -> int:
    """Returns the least memory traffic of one step with AdamW, in bytes, the weights and all about them in float32.

    Of each weight: read forward and backward, gradient written and read, two moments read and written, weight written,
    which makes 9. The images are read once, the map of each stage and its gradient are written once and read once.

    Args:
        model: a RepMLPNet, or a timm network.
        batch_size: images.
        size: their height and width.
        width: bytes of an element of the maps.
    """
    weights = sum(p.numel() for p in model.parameters())
    images, maps = 3 * size[0] * size[1], 4 * stage_elements(model, size)
    return 9 * weights * 4 + batch_size * (images * 4 + maps * width)
