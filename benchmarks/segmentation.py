"""What segmentation networks cost, beside the published figures, and how their down-sampling starts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.counts import count
from models.dense import FULL_RANK, Downsampling
from models.layers import ConvNorm
from models.reported import CITYSCAPES, REPORTED
from models.segmentation import SegmentationNetwork
from utils import cli

SIZE = (1024, 2048)
BASELINE = "resnet101c"
# What the paper gives for UPerNet, in G: over RepMLPNet-D256 by the kind of down-sampling, and over ResNet-101.
PUBLISHED = {
    row.changes.get("downsample", row.arch): float(row.multiply_adds) for row in REPORTED if row.source == CITYSCAPES
}
CASES: list[dict[str, Any]] = [
    {},
    {"downsample": "conv3", "rank": 1},
    {"downsample": "conv5", "rank": 1},
    {"downsample": "conv3", "rank": 4},
    {"downsample": "conv5", "rank": 4},
]


def multiply_adds(options: dict[str, Any]) -> tuple[float, float]:
    """Returns the G multiply-adds, for one image, of the whole network and of its backbone, in the deploy structure."""
    with torch.device("meta"):
        network = SegmentationNetwork("RepMLPNet-D256", 19, deploy=True, **options).eval()
    whole, backbone = (count(module, (1, 3, *SIZE)).multiply_adds / 1e9 for module in (network, network.backbone))
    return whole, backbone


@torch.no_grad()
def mmsegmentation_count(arch: str, **options: Any) -> float:
    """Returns the G operations of UPerNet for one image as MMSegmentation counts them.

    A multiply-add of a convolution is one, and so are an added bias, an element of a ReLU and an input of a pooling.
    Synchronised BatchNorm, which it trains with, GELU and resizing are not counted.
    """
    total = 0

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * (module.weight[0].numel() + (module.bias is not None))
        else:
            total += inputs[0].numel()

    with torch.device("meta"):
        network = SegmentationNetwork(arch, 19, **options).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ReLU | nn.MaxPool2d | nn.AdaptiveAvgPool2d):
                module.register_forward_hook(add)
        network(torch.empty(1, 3, *SIZE))
    return total / 1e9


@torch.no_grad()
def start_error(inputs: int, outputs: int, rank: int) -> float:
    """Returns how far a `Downsampling` starts from a fresh 2x2 embedding: |difference| / |output| on white noise."""
    torch.manual_seed(0)
    embedding = ConvNorm(nn.Conv2d(inputs, outputs, 2, stride=2, bias=False), nn.ReLU())
    replaced, noise = Downsampling(embedding, 3, rank), torch.randn(1, inputs, 32, 32)
    expected = embedding.conv(noise)
    return float((replaced.conv(replaced.expand(noise)) - expected).norm() / expected.norm())


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    cli.Parser(description=__doc__).parse_args(argv)
    print("| down-sampling | rank | UPerNet (G) | published (G) | backbone alone (G) |\n|---|---|---|---|---|")
    for options in CASES:
        whole, backbone = multiply_adds(options)
        kind, rank = options.get("downsample", "2x2, as pretrained"), options.get("rank", "")
        published = PUBLISHED.get(kind, "") if rank == 1 else ""
        print(f"| {kind} | {rank} | {whole:.2f} | {published} | {backbone:.2f} |")
    print("\n| UPerNet, as MMSegmentation counts | G | published (G) |\n|---|---|---|")
    print(f"| {BASELINE} | {mmsegmentation_count(BASELINE):.2f} | {PUBLISHED[BASELINE]} |")
    for options in CASES[1:3]:
        kind, operations = options["downsample"], mmsegmentation_count("RepMLPNet-D256", deploy=True, **options)
        print(f"| RepMLPNet-D256 {kind} | {operations:.2f} | {PUBLISHED[kind]} |")
    print("\n| rank | difference to fresh embeddings of 80, 160 and 320 channels |\n|---|---|")
    for rank in range(1, FULL_RANK + 1):
        errors = (start_error(channels, 2 * channels, rank) for channels in (80, 160, 320))
        print(f"| {rank} | {', '.join(f'{error:.2g}' for error in errors)} |")


if __name__ == "__main__":
    cli.run(main)
