"""Random erasing of a batch: one copy of the boxes to the device, one fill."""

import math
import random

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from utils.transfer import send

from .boxes import box_masks

TRIES = 10  # for a box that fits into the image

Box = tuple[int, int, int, int]  # as `box_masks` takes it


class BatchErasing(RandomErasing):
    """timm's RandomErasing, of all images at once.

    The boxes are those that timm draws. What fills them in the modes `rand` and `pixel` is drawn for the whole batch,
    from the same distribution.
    """

    def __call__(self, input: Tensor) -> Tensor:
        """Erases boxes of images (N, C, H, W), in place."""
        count, channels, height, width = input.shape
        boxes = [self._draw(height, width) for _ in range(count)]
        layers = [[box[i] if i < len(box) else (0, 0, 0, 0) for box in boxes] for i in range(self.max_count)]
        masks = box_masks(send(torch.tensor(layers), input.device), height, width)  # (max_count, N, 1, H, W)
        if self.per_pixel:
            return torch.where(masks.any(0), torch.randn_like(input), input, out=input)
        if not self.rand_color:
            return input.masked_fill_(masks.any(0), 0)
        colours = torch.randn(self.max_count, count, channels, 1, 1, dtype=input.dtype, device=input.device)
        for mask, colour in zip(masks, colours, strict=True):  # of several boxes over a pixel, the last one counts
            torch.where(mask, colour, input, out=input)
        return input

    def _draw(self, height: int, width: int) -> list[Box]:
        """Draws the boxes of an image: none, or 1 to `max_count` that share the area among them."""
        if random.random() > self.probability:
            return []
        boxes = []
        count = self.min_count if self.min_count == self.max_count else random.randint(self.min_count, self.max_count)
        for _ in range(count):
            for _ in range(TRIES):
                area = random.uniform(self.min_area, self.max_area) * (height * width) / count
                aspect = math.exp(random.uniform(*self.log_aspect_ratio))
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h < height and w < width:
                    top, left = random.randint(0, height - h), random.randint(0, width - w)
                    boxes.append((top, top + h, left, left + w))
                    break
        return boxes
