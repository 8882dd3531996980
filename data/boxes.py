"""Rectangles in the images of a batch."""

import torch
from torch import Tensor


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Returns which pixels lie in which box, on the device of the boxes.

    Args:
        boxes: (..., 4), the first and the last row, and the first and the last column, both ends of them exclusive.
        height: of the images, in pixels.
        width: likewise.

    Returns:
        bool (..., 1, H, W).
    """
    top, bottom, left, right = boxes[..., None, None, None].unbind(-4)
    rows = torch.arange(height, device=boxes.device)[:, None]
    columns = torch.arange(width, device=boxes.device)
    return ((rows >= top) & (rows < bottom)) & ((columns >= left) & (columns < right))
