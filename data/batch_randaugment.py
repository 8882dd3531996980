"""RandAugment of a batch on the device, with the results that Pillow would have, within rounding."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from yacs.config import CfgNode

from utils.seed import keyed_uniforms
from utils.transfer import send

from .affine import MATRICES
from .batch_operations import CHANNELS, NEED_PIXELS, PIXEL_OPERATIONS, POINT_OPERATIONS, Group, identity, look_up
from .randaugment import (
    GREY,
    PUBLISHED_MAGNITUDES,
    Colour,
    Operation,
    RandAugment,
    cutout_box,
    is_rand_augment,
    rand_augment_of,
)

AUTO, CPU, GPU = "auto", "cpu", "gpu"
AUGMENT_DEVICES = (AUTO, CPU, GPU)
APPLY_TABLES = "apply tables"
WIDTH = 10  # of the numbers that describe an operation: the image's position in the batch, and at most 9 arguments
_STREAM = 2  # makes the draws differ from others with the key (seed, epoch, index)


class Step(NamedTuple):
    """An operation for some images of a batch.

    Attributes:
        kind: of `POINT_OPERATIONS` or `PIXEL_OPERATIONS`, or `APPLY_TABLES`.
        rows: the position in the batch and the arguments of each image.
    """

    kind: str
    rows: list[tuple[float, ...]]


def lower(operation: Operation, height: int, width: int, fill: Colour) -> tuple[str, tuple[float, ...]]:
    """Returns the kind and the arguments of an operation in the form for batches."""
    kind, argument, resample, place = operation
    if argument is None:
        return kind, ()
    if kind == "Cutout":
        return kind, (*cutout_box(int(argument), place, height, width), *GREY)
    if kind in MATRICES:
        return resample.name.capitalize(), (*MATRICES[kind](argument, height, width), *fill)
    return kind, (argument,)


def plan(drawn: Sequence[Sequence[Operation]], height: int, width: int, fill: Colour) -> list[Step]:
    """Groups the operations drawn for each image of a batch by layer and kind.

    Tables are applied at the end, or before an operation that needs the pixels.
    """
    steps, pending = list[Step](), set[int]()
    for layer in zip_longest(*drawn):
        groups = defaultdict[str, list[tuple[float, ...]]](list)
        for position, operation in enumerate(layer):
            if operation is not None:
                kind, arguments = lower(operation, height, width, fill)
                groups[kind].append((position, *arguments))
        needed = {int(position) for kind in groups.keys() & NEED_PIXELS for position, *_ in groups[kind]}
        if pending & needed:
            steps.append(Step(APPLY_TABLES, [(position,) for position in sorted(pending & needed)]))
        steps.extend(Step(kind, rows) for kind, rows in groups.items())
        tabled = {int(position) for kind in groups.keys() & POINT_OPERATIONS for position, *_ in groups[kind]}
        pending = pending - needed | tabled
    return [*steps, Step(APPLY_TABLES, [(position,) for position in sorted(pending)])] if pending else steps


def augment(images: Tensor, drawn: Sequence[Sequence[Operation]], fill: Colour) -> Tensor:
    """Applies to each image of a batch, uint8 (N, 3, H, W), the operations drawn for it; returns new images.

    What to do where is known on the host, and goes to the device in one copy.
    """
    assert images.dtype == torch.uint8
    height, width = images.shape[2:]
    steps = plan(drawn, height, width, fill)
    images = images.clone(memory_format=torch.contiguous_format)  # loaders may order them by pixels
    tables = identity(len(images), images.device)
    if not steps:
        return images
    table = [(*row, *(0,) * (WIDTH - len(row))) for step in steps for row in step.rows]
    numbers = send(torch.tensor(table, dtype=torch.float64), images.device)
    for (kind, rows), part in zip(steps, numbers.split([len(step.rows) for step in steps]), strict=True):
        positions = part[:, 0].long()
        group = Group(images[positions], tables[positions], part[:, 1:])
        if kind in POINT_OPERATIONS:
            made = POINT_OPERATIONS[kind](group).expand_as(group.tables)
            tables[positions] = look_up(made, group.tables)
        elif kind in PIXEL_OPERATIONS:
            images[positions] = PIXEL_OPERATIONS[kind](group)
        else:
            images[positions] = look_up(group.tables, group.images)
            tables[positions] = identity(len(rows), images.device)
    return images


class BatchRandAugment:
    """Applies a policy to batches; what is drawn for an image is a function of (seed, epoch, its index, its repeat)."""

    def __init__(self, policy: RandAugment, seed: int) -> None:
        self.policy = policy
        self.seed = seed

    def draw(self, indices: Tensor, epoch: int, repeats: Tensor | None = None) -> list[list[Operation]]:
        """Returns the operations of each image; `indices` and `repeats` (N,), None for 0, are on the host."""
        key = self.seed, epoch, indices.numpy(), 0 if repeats is None else repeats.numpy(), _STREAM
        numbers = keyed_uniforms(self.policy.numbers, *key)
        return [self.policy.draw(row) for row in numbers.tolist()]

    def __call__(self, images: Tensor, indices: Tensor, *, epoch: int, repeats: Tensor | None = None) -> Tensor:
        """Returns the augmented images, uint8 (N, 3, H, W), as new tensors on the device of `images`.

        Raises ValueError for images that are not in RGB.
        """
        if images.shape[1] != CHANNELS:
            raise ValueError(f"RandAugment is for images of {CHANNELS} channels, these have {images.shape[1]}")
        return augment(images, self.draw(indices, epoch, repeats), self.policy.fill)


def build_rand_augment(cfg: CfgNode, device: torch.device, *, interpolation: str, seed: int) -> BatchRandAugment | None:
    """Returns the RandAugment of the section AUG for batches; None where Pillow applies it, or where there is none.

    DEVICE auto is for batches on a GPU. On a CPU Pillow takes less than a sixth of the time, and data loading processes
    share the work.
    """
    by_batch = cfg.DEVICE == GPU or (cfg.DEVICE == AUTO and device.type != "cpu")
    policy = rand_augment_of(cfg, interpolation) if by_batch else None
    return None if policy is None else BatchRandAugment(policy, seed)


def describe_place(cfg: CfgNode, built: BatchRandAugment | None, device: torch.device) -> str:
    """Returns where the policy of the section AUG is applied, for the log; empty where it has none."""
    policy = cfg.PRESET or cfg.AUTO_AUGMENT
    if policy == "none" or (cfg.PRESET and cfg.PRESET not in PUBLISHED_MAGNITUDES):
        return ""
    if built is not None:
        return f"AUG.DEVICE {cfg.DEVICE}: {policy} on {device}, for whole batches"
    why = "" if cfg.PRESET or is_rand_augment(policy) else ", since only RandAugment has a form for batches"
    return f"AUG.DEVICE {cfg.DEVICE}: {policy} with Pillow on the CPU{why}"
