"""ReaL labels: for each image of ImageNet's validation set all classes that it shows, which may be none.

Source: Beyer et al., "Are we done with ImageNet?" (arXiv:2006.07159). The labels are those that come with timm.
"""

import torch
from timm.data import RealLabelsImagenet
from torch import Tensor

from .class_names import IMAGENET_CLASSES, are_positions, imagenet_names
from .sources import Source

VALIDATION_IMAGES = 50_000
NO_LABEL = -1


def real_labels(source: Source) -> Tensor:
    """Returns the ReaL labels of the images of a source: int64 (images, most labels of one), padded by `NO_LABEL`.

    Raises:
        ValueError: the classes are not those of ImageNet-1k in their order, or an image has not the name of one of the
            validation set (ILSVRC2012_val_00000001.JPEG ...).
    """
    classes = source.classes
    if len(classes) != IMAGENET_CLASSES or not (classes == imagenet_names() or are_positions(classes)):
        raise ValueError(
            f"ReaL labels are for the validation set of ImageNet with its {IMAGENET_CLASSES} classes, and the test "
            "images have others: leave TEST.REAL_LABELS out"
        )
    known: dict[str, list[int]] = RealLabelsImagenet(range(VALIDATION_IMAGES)).real_labels
    labels = []
    for index in range(len(source)):
        name = source.locate(index).rpartition("/")[2]
        if name not in known:
            raise ValueError(
                f"there is no ReaL label for {source.locate(index)}: the images need the names that they have in the "
                f"validation set of ImageNet, {next(iter(known))} ..."
            )
        labels.append(torch.tensor(known[name], dtype=torch.int64))
    return torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=NO_LABEL)
