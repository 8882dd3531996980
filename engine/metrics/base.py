"""What a metric is: sums on the device while the images pass, reduced over all processes and divided once."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from data import Batch


@dataclass(frozen=True, kw_only=True)
class Result(ABC):
    """The figures of one evaluation; `str()` of it is a line for the log."""

    images: int  # that were evaluated
    nonfinite: int = 0  # images to which an answer of the network is not finite

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Returns the figures by name, plain values."""

    def details(self, classes: Sequence[str]) -> list[str]:
        """Returns further lines for an evaluation that stands alone; `classes` are the names of the classes."""
        return []


class Metric(ABC):
    """Takes in what a network makes of each batch of a process, then computes the figures over all of them."""

    @abstractmethod
    def update(self, outputs: Tensor, batch: Batch) -> None:
        """Takes in the outputs (N, ...) of a batch, on the device; the labels of the batch are on the CPU."""

    @abstractmethod
    def compute(self) -> Result:
        """Returns the figures over all processes; all of them must ask.

        Raises:
            ValueError: there is nothing to evaluate.
        """

    def answers(self, outputs: Tensor) -> Tensor | None:
        """Returns the class that is answered, (N,) or (N, H, W); None where outputs are no logits (N, K, ...)."""
        return outputs.argmax(1)


def on_images(images: int, nonfinite: int) -> str:
    """Returns in words what was counted over, and how many of the images had answers that are not finite."""
    return f"on {images} images" + (f", {nonfinite} of them with answers that are not finite" if nonfinite else "")
