"""The interface of a metric: sums on the device, reduced over all processes and divided once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from data import Batch


@dataclass(frozen=True, kw_only=True)
class Result(ABC):
    """The figures of one evaluation; `str()` is one line for the log."""

    images: int
    nonfinite: int = 0  # images with an output that is not finite

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name, plain values."""

    def details(self, classes: Sequence[str]) -> list[str]:
        """Returns further lines for `test.py`; `classes` are the names of the classes."""
        return []


class Metric(ABC):
    """Accumulates the outputs of each batch of a process, then computes the figures over all processes."""

    def begin(self, network: nn.Module) -> None:  # noqa: B027 - most metrics need the outputs alone
        """Takes from the network what the figures depend on besides its outputs; called once, before `update`."""

    @abstractmethod
    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Accumulates the outputs (N, ...) of a batch, on the device; the labels of the batch are on the CPU."""

    @abstractmethod
    def compute(self) -> Result:
        """Returns the figures over all processes; a collective operation.

        Raises:
            ValueError: there is nothing to evaluate.
        """

    def predictions(self, outputs: Tensor) -> Tensor | None:
        """Returns the predicted classes, (N,) or (N, H, W); None if the outputs are not logits (N, K, ...)."""
        return outputs.argmax(1)


def on_images(images: int, nonfinite: int) -> str:
    """Returns the number of images in words, and of those whose outputs are not finite."""
    return f"on {images} images" + (f", {nonfinite} of them with non-finite outputs" if nonfinite else "")
