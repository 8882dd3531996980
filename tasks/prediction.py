"""Classification of images by a trained network, for `tools/predict.py` and as MMPretrain's `inference_model`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, fromarray
from torch import Tensor, nn

import data
from data.class_names import numbered
from data.decode import MODES, decode_image, to_mode
from models import get_model
from models.build import FAMILIES
from models.reparam import input_channels

from .inference import default_device

CLASSIFIERS = tuple(family.network for family in FAMILIES)


def normalization(dataset: str | None, channels: int = 3, dtype: torch.dtype = torch.float32) -> data.Normalize:
    """Returns the normalization of the images of a data set; of those of ImageNet where none is named.

    Raises:
        ValueError: there is no such data set, or it has no statistics for this number of channels.
    """
    name = dataset or "imagenet"
    if not data.is_known(name):
        raise ValueError(f"the network was trained on {name!r}, which is unknown here")
    statistics = data.spec_of(name).statistics(channels)
    if statistics is None:
        raise ValueError(f"{name} has no statistics of {channels} channels")
    return data.Normalize(*statistics, dtype=dtype)


def read_image(path: Path, channels: int = 3) -> Image:
    """Returns the image of a file, with 1, 3 or 4 channels.

    Raises:
        OSError, ValueError: it can't be read.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe or a device may never end
        raise ValueError("is no regular file")
    return decode_image(path.read_bytes(), MODES[channels])


@torch.inference_mode()
def probabilities(model: nn.Module, pixels: Tensor, normalize: data.Normalize) -> Tensor:
    """Classifies images (N, C, H, W) of uint8: returns the probabilities (N, classes), on the CPU.

    Raises:
        ValueError: they are not finite.
    """
    outputs: Tensor = model(normalize(pixels.to(next(model.parameters()).device))).float().softmax(1).cpu()
    if not outputs.isfinite().all():
        raise ValueError("the network's outputs are not finite: these weights do not work in float32")
    return outputs


def inference_model(
    model: str | nn.Module,
    image: str | Path | np.ndarray | Image,
    *,
    pretrained: bool | str | Path = True,
    device: str | torch.device | None = None,
    classes: Sequence[str] | None = None,
    crop: bool = False,
) -> dict[str, Any]:
    """Classifies one image, as MMPretrain's function of that name.

    The image is resized and normalised as in `test.py`: as the network's checkpoint says, else as those of ImageNet. A
    network of one channel gets it in grey. MMPretrain also crops; `crop=True` does the same.

    Args:
        model: a classifier, which is put into evaluation mode, or a name for `get_model`.
        image: a file, an image of Pillow, or an array (H, W, 3) of uint8 in RGB, not in MMPretrain's BGR.
        pretrained: the file of the weights, where `model` is a name.
        device: to compute on; None for that of the model, or where it is a name for the GPU if there is one.
        classes: the names of all classes; None takes those of the checkpoint, or their numbers.
        crop: resize to 256/224 of the size, then crop.

    Returns:
        `pred_class`, the name of the likeliest class; `pred_label`, its number; `pred_score`, its probability; and
        `pred_scores`, the probabilities of all classes, an array (classes,) of float32.

    Raises:
        OSError, ValueError: the image or the weights can't be read, the number of names is wrong, or the outputs
            are not finite.
    """
    if isinstance(model, str):
        model = get_model(model, pretrained, device or default_device())
    elif pretrained is not True:
        raise ValueError("pretrained is for a model given by its name: load the weights by get_model")
    if not isinstance(model, CLASSIFIERS) or not model.num_classes:
        raise ValueError(f"inference_model takes a network of get_model, with a head, not a {type(model).__name__}")
    if not model.global_pool:
        raise ValueError("inference_model takes a network that pools its last map: build it with global_pool='avg'")
    if model.dataset and data.is_known(model.dataset) and data.spec_of(model.dataset).labels != "classes":
        raise ValueError(f"the network was trained on {model.dataset!r}: its outputs are not those of classes")
    weight = next(model.to(device).eval().parameters())
    channels = input_channels(model)
    if channels not in MODES:
        raise ValueError(f"inference_model takes a network for images of 1, 3 or 4 channels, not of {channels}")
    if model.statistics:
        normalize = data.Normalize(*model.statistics, dtype=weight.dtype)
    else:
        normalize = normalization(model.dataset, channels, weight.dtype)
    normalize = normalize.to(weight.device)
    pixels = data.eval_transform(model.img_size, crop=crop)(_as_image(image, channels))
    scores = probabilities(model, pixels[None], normalize)[0]
    if classes is not None and len(classes) != len(scores):
        raise ValueError(f"classes has {len(classes)} names, the network has {len(scores)} classes")
    names, label = classes or numbered(model.class_names, len(scores)), int(scores.argmax())
    return {
        "pred_scores": scores.numpy(),
        "pred_label": label,
        "pred_score": float(scores[label]),
        "pred_class": names[label],
    }


def _as_image(image: str | Path | np.ndarray | Image, channels: int) -> Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an array of an image is (H, W, 3) of uint8, not {image.shape} of {image.dtype}")
        image = fromarray(image)
    if isinstance(image, Image):
        return to_mode(image, MODES[channels])
    if not isinstance(image, str | Path):
        raise ValueError(f"an image is a file, an array or an image of Pillow, not a {type(image).__name__}")
    return read_image(Path(image), channels)
