"""Mixup and CutMix of a batch with itself in reverse order, without a wait for the device."""

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor

from utils.transfer import send

from .boxes import box_masks


class BatchMixup(Mixup):
    """timm's Mixup, whose modes `elem` and `pair` treat all images at once.

    The draws and, for finite pixels, the results are those of timm, bit for bit. timm itself mixes image after image
    and makes the tensor of their shares on the device, for which the host waits. Its mode `batch` does not wait.
    """

    def _mix_elem(self, x: Tensor) -> Tensor:
        return self._mix(x, self._draw(len(x), x.shape))

    def _mix_pair(self, x: Tensor) -> Tensor:
        drawn = self._draw(len(x) // 2, x.shape)
        return self._mix(x, np.concatenate((drawn, drawn[::-1])))

    def _draw(self, count: int, shape: torch.Size) -> np.ndarray:
        """Draws for `count` images of (..., H, W) what `_mix` takes."""
        shares, with_cutmix = self._params_per_elem(count)
        pixels, boxes = np.where(with_cutmix, 1, shares), np.zeros((count, 4))
        for i in np.flatnonzero(with_cutmix & (shares != 1)):
            boxes[i], shares[i] = cutmix_bbox_and_lam(
                shape, shares[i], ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam
            )
        return np.column_stack((shares, pixels, boxes)).astype(np.float32)

    def _mix(self, x: Tensor, drawn: np.ndarray) -> Tensor:
        """Mixes images (N, C, H, W) in place; returns their own shares in the targets, (N, 1).

        `drawn` is (N, 6): the own share in the target, that in the pixels outside the box, and the box, in which the
        own share is 0.
        """
        shares, pixels, *_ = columns = send(torch.from_numpy(drawn), x.device).unbind(1)
        boxed = box_masks(torch.stack(columns[2:], 1), *x.shape[-2:])
        own = pixels.view(-1, 1, 1, 1).where(~boxed, 0)
        others = x.flip(0).mul_(1 - own)
        x.mul_(own).add_(others)
        return shares.to(x.dtype)[:, None]
