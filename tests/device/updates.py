"""Whole updates of real networks at real batch sizes, recorded without computing them."""

import torch
from torch import nn
from training_parts import optimizer_of

import models
from benchmarks.operators import Operator, record, without_memory
from engine.parallel import NetworkWithLoss
from engine.precision import autocast
from models.segmentation import SegmentationNetwork


def classifier(arch: str, **options: object) -> nn.Module:
    """Returns an architecture on `meta`, in training mode."""
    with torch.device("meta"):
        return models.create_model(arch, num_classes=7, **options).train()


def segmenter(decoder: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return SegmentationNetwork("RepMLPNet-D256", 7, decoder=decoder, **options).train()


def recorded_update(network: nn.Module, batch: int, dtype: torch.dtype | None, size: tuple[int, int]) -> list[Operator]:
    """Returns the operators of one update of a network on `meta`, as a CPU runs them; `dtype` is that of autocast."""
    with without_memory():
        network.to_empty(device="cpu")
        forward, optimizer = NetworkWithLoss(network, nn.CrossEntropyLoss()), optimizer_of(network, "adamw")
        images = torch.empty(batch, 3, *size)
        targets = torch.empty(batch, *(size if isinstance(network, SegmentationNetwork) else ()), dtype=torch.long)

        def update() -> None:
            with autocast(images.device, dtype):
                loss = forward(images, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 5.0, foreach=True)  # as a GPU does by default
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        update()  # the first one makes the optimizer's state
        return record(update)
