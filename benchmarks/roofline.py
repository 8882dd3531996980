"""How long GPUs need at least, by the data sheet: for the FLOPs, and for the bytes that the operators move.

The bytes are counted without a GPU: those of every operator of an eager run, each reading its inputs from memory and
writing its outputs to it, and those of the matrix products and convolutions alone, as if all else were fused into them.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

import models
from models import training_form
from models.fusion import fuse_batch_norms
from utils import cli
from utils.accelerators import ACCELERATORS
from utils.text import table

from . import harness, training, work
from .harness import DTYPES
from .limits import PRECISIONS, Roofline
from .operators import Operator, product_bytes, record, total_bytes, without_memory

ARCHS = ("RepMLPNet-T224", "RepMLPNet-B224", "RepMLPNet-D256", "RepMLPNet-L256")
GPUS = ("H200", "H100 80GB HBM3", "A100-SXM4-80GB", "L40S")
STEPS = ("inference", "training", "naive-training")  # the last one is that of the published formulation
COLUMNS = (
    ("network", "arch", "s"),
    ("step", "step", "s"),
    ("batch", "batch_size", "d"),
    ("precision", "dtype", "s"),
    ("TFLOP", "tflop", ".2f"),
    ("GB fused", "gb_fused", ".2f"),
    ("GB eager", "gb_eager", ".2f"),
    ("MB/img", "mb_per_image", ".0f"),
)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    gpus = [accelerator.name for accelerator in ACCELERATORS]
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=models.SPECS, default=ARCHS, metavar="NAME", help="networks")
    parser.add_argument(
        "--step", nargs="+", choices=STEPS, default=STEPS[:2], help="inference is that of the fused form"
    )
    parser.add_argument("--batch-size", type=harness.positive, nargs="+", default=[32, 256], metavar="N", help="images")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="training: bf16 autocast"
    )
    parser.add_argument("--gpu", nargs="+", choices=gpus, default=GPUS, metavar="NAME", help=", ".join(gpus))
    harness.add_json(parser)
    return parser.parse_args(argv)


def build(arch: str, step: str) -> nn.Module:
    """Returns the network of a step, on `meta`: in the training structure, or fused."""
    with torch.device("meta"):
        model = models.create_model(arch)
    return fuse_batch_norms(model) if step == "inference" else model


def count(arch: str, step: str, dtype: str, batch_size: int) -> list[Operator]:
    """Returns the operators of a training step, or of a forward pass as a GPU runs it; `dtype` is fp32 or bf16."""
    if step != "inference":
        return training.recorded_step(arch, training.Form(step == "naive-training", dtype), batch_size)
    network = build(arch, step).to(DTYPES[dtype])
    with without_memory(), torch.no_grad():  # inference mode would hide what some operators are made of
        network.to_empty(device="cuda")
        images = torch.empty(batch_size, 3, *models.default_image_size(arch), dtype=DTYPES[dtype], device="cuda")
        return record(lambda: network(images))


def rows_of(arch: str, step: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields a row for each batch size and precision.

    Its `seconds` are, for each GPU, those for the FLOPs, for the bytes of the products, and for those of all operators.
    """
    passes = 1 if step == "inference" else 3  # a backward pass is two products for each of the forward pass
    for batch_size in args.batch_size:
        shape = batch_size, 3, *models.default_image_size(arch)
        flops = passes * work.count_flops(build(arch, step), shape)
        counted = {dtype: count(arch, step, dtype, batch_size) for dtype in {*map(dtype_of, args.precision)}}
        for precision in args.precision:
            operators = counted[dtype_of(precision)]
            fused, eager = product_bytes(operators), total_bytes(operators)
            seconds = {gpu: least_seconds(gpu, precision, flops, fused, eager) for gpu in args.gpu}
            row = {"arch": arch, "step": step, "batch_size": batch_size, "dtype": precision, "seconds": seconds}
            row |= {"flops": flops, "bytes_fused": fused, "bytes_eager": eager}
            row |= {"tflop": flops / 1e12, "gb_fused": fused / 1e9, "gb_eager": eager / 1e9}
            row |= {"mb_per_image": eager / batch_size / 1e6}
            yield row | {gpu: " / ".join(f"{1e3 * s:.2f}" for s in three.values()) for gpu, three in seconds.items()}


def dtype_of(precision: str) -> str:
    """Returns what the tensors of a precision are held in."""
    return "fp32" if precision == "tf32" else precision


def least_seconds(gpu: str, precision: str, flops: float, fused: float, eager: float) -> dict[str, float]:
    """Returns how long a GPU takes for these FLOPs, and for either of these bytes, at the limits of its data sheet."""
    sheet = next(Roofline.from_data_sheet(accelerator) for accelerator in ACCELERATORS if accelerator.name == gpu)
    return {
        "flops": flops / sheet.peak[precision],
        "fused": fused / sheet.bandwidth,
        "eager": eager / sheet.bandwidth,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Counts every network and prints the table."""
    args = parse(argv)
    training_form.MANY_ON_CPUS = 0  # it counts what a GPU does, on tensors of the CPU
    rows = [row for arch in args.arch for step in args.step for row in rows_of(arch, step, args)]
    print("ms at the limits of the data sheet: for the FLOPs / for the bytes, all fused into the products / eager")
    print(f"\n{table(rows, (*COLUMNS, *((gpu, gpu, 's') for gpu in args.gpu)))}")
    harness.write(args, rows)


if __name__ == "__main__":
    cli.run(main)
