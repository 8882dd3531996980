"""How long a training step takes (forward, loss, backward, optimizer), and how much memory, beside the naive one."""

import argparse
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import models
from configs import load_config, parse_opts
from engine.optimizer import build_optimizer, parameter_groups
from engine.precision import autocast
from utils import cli

from . import harness, memory, work
from .harness import DTYPES, Variant
from .limits import Roofline
from .naive import naive
from .operators import Operator, record, total_bytes, without_memory

LR, WEIGHT_DECAY = 1e-4, 0.05
ADAMW = f"TRAIN.OPTIMIZER.NAME adamw TRAIN.WEIGHT_DECAY {WEIGHT_DECAY}"
CHECKED_IMAGES = 2  # in the comparison of the formulations in float64
EXACT = 1e-9  # the largest relative difference that passes there
# And in a row's own precision, where BatchNorm and a backward pass through the whole depth amplify rounding.
TOLERANCES = {"fp32": 1e-2, "tf32": 5e-2, "bf16": 0.5}
COLUMNS = (
    ("step", "name", "s"),
    ("ms", "milliseconds", ".1f"),
    ("img/s", "images_per_second", ".1f"),
    ("x", "ratio", ".2f"),
    ("GFLOP", "gflop", ".2f"),
    ("MB", "megabytes", ".1f"),
    ("of limit", "fraction", ".2f"),
    ("moved MB/img", "moved", ".0f"),
    ("difference", "difference", ".1e"),
)


@dataclass(frozen=True)
class Form:
    """What a step is made of. The naive form has AdamW as it comes, ours and that of peers the project's own."""

    naive: bool = False
    dtype: str = "fp32"  # bf16 is that of autocast, and weights stay in float32
    checkpointed: bool = False
    mode: str | None = None  # of torch.compile; None is eager
    peer: str = ""  # the name of another network


BASELINE = "naive fp32"
FORMS = {
    BASELINE: Form(naive=True),
    "naive bf16": Form(naive=True, dtype="bf16"),
    "ours fp32": Form(),
    "ours bf16": Form(dtype="bf16"),
    "ours fp32, checkpointed": Form(checkpointed=True),
    "ours bf16, checkpointed": Form(dtype="bf16", checkpointed=True),
}
# Of torch.compile; an empty name is the default mode, reduce-overhead that of CUDA graphs.
MODES = {"cpu": ("",), "cuda": ("", "reduce-overhead")}


def forms_of(args: argparse.Namespace) -> dict[str, Form]:
    """Returns the rows that the command line may choose from, by name."""
    eager = FORMS | {f"{peer} {dtype}": Form(dtype=dtype, peer=peer) for peer in args.peers for dtype in DTYPES}
    compiled = {
        f"{name}, compiled {mode}".rstrip(): replace(form, mode=mode)
        for name, form in eager.items()
        for mode in (MODES[args.device] if args.compile and not form.checkpointed else ())
    }
    return eager | compiled


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = harness.parser(__doc__)
    parser.add_argument("--arch", choices=models.SPECS, default="RepMLPNet-T224", help="the network")
    parser.add_argument("--batch-size", type=harness.positive, default=16, help="images of a step")
    parser.add_argument("--tf32", action="store_true", help="let a GPU round the factors of fp32 products to TF32")
    parser.add_argument("--compile", action="store_true", help="add compiled rows")
    parser.add_argument("--peers", nargs="+", default=[], metavar="NAME", help="add networks of timm; resnet101")
    parser.add_argument(
        "--memory",
        type=harness.positive,
        nargs="*",
        metavar="N",
        help="add each row's peak memory with N images, each in a process of its own; without N those of a step",
    )
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="rows to keep, beside the baseline; 'ours *'")
    return parser.parse_args(argv)


def build_model(arch: str) -> nn.Module:
    """Returns a network in training mode, with the same random weights every time."""
    torch.manual_seed(0)
    return models.create_model(arch).train()


def batch(arch: str, size: int) -> tuple[Tensor, Tensor]:
    """Returns images (N, 3, H, W) and labels (N,), the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, *models.default_image_size(arch), generator=generator)
    return images, torch.randint(1000, (size,), generator=generator)


class Step:
    """The training step of a network on one batch, in one form; all on one device.

    The naive network comes from `naive`, see `step_of`.
    """

    def __init__(self, network: nn.Module, form: Form, images: Tensor, labels: Tensor) -> None:
        if form.checkpointed:
            cast(models.RepMLPNet, network).set_grad_checkpointing()
        self.images, self.labels = images, labels
        self.criterion = nn.CrossEntropyLoss()
        self.autocast_dtype = torch.bfloat16 if form.dtype == "bf16" else None
        self.optimizer: torch.optim.Optimizer
        if form.naive:
            self.optimizer = torch.optim.AdamW(parameter_groups(network, weight_decay=WEIGHT_DECAY), lr=LR)
        else:
            self.optimizer = build_optimizer(network, load_config(None, parse_opts(ADAMW.split())).TRAIN, LR)
        self.network = network
        self.forward = network
        if form.mode is not None:
            self.forward = cast(nn.Module, torch.compile(network, fullgraph=True, mode=form.mode or None))

    def backward(self) -> None:
        """Adds up the gradients of the batch."""
        with autocast(self.images.device, self.autocast_dtype):
            loss = self.criterion(self.forward(self.images), self.labels)
        loss.backward()

    def __call__(self) -> None:
        """Makes one update."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """Returns the gradient of every parameter in float64 on the CPU."""
        self.optimizer.zero_grad(set_to_none=True)
        self.backward()
        found = {name: cast(Tensor, p.grad).double().cpu() for name, p in self.network.named_parameters()}
        self.optimizer.zero_grad(set_to_none=True)
        return found


def step_of(model: nn.Module, form: Form, images: Tensor, labels: Tensor, device: str) -> Step:
    """Returns the step of a copy of a network, on a device."""
    network = (naive(cast(models.RepMLPNet, model)) if form.naive else deepcopy(model)).to(device)
    return Step(network, form, images.to(device), labels.to(device))


def recorded_step(arch: str, form: Form, batch_size: int) -> list[Operator]:
    """Returns the operators of one step, not compiled, as a CPU runs them; nothing is computed."""
    with torch.device("meta"):
        model = models.create_model(arch).train()
        network = naive(cast(models.RepMLPNet, model)) if form.naive else model
    with without_memory():
        images = torch.empty(batch_size, 3, *models.default_image_size(arch))
        labels = torch.empty(batch_size, dtype=torch.long)
        step = Step(network.to_empty(device="cpu"), form, images, labels)
        step()  # the first one makes the optimizer's state
        return record(step)


def gradient_difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """Returns |actual - expected| / |expected|, both as one vector over all parameters; infinite if not finite."""
    assert expected.keys() == actual.keys()
    squares = sum(float((actual[name] - g).square().sum()) for name, g in expected.items())
    norm = sum(float(g.square().sum()) for g in expected.values())
    difference = (squares / norm) ** 0.5
    return difference if difference == difference else float("inf")


def check_formulations(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> float:
    """Returns the difference of our gradients, plain and checkpointed, from the naive ones, all in float64.

    Raises:
        ValueError: it is more than rounding in float64 explains.
    """
    double = deepcopy(model).double()
    data = images[:CHECKED_IMAGES].double(), labels[:CHECKED_IMAGES]
    expected = step_of(double, Form(naive=True), *data, device).gradients()
    differences = []
    for form in (Form(), Form(checkpointed=True)):
        actual = step_of(double, form, *data, device).gradients()
        differences.append(harness.check("our gradient in float64", gradient_difference(expected, actual), EXACT))
    return max(differences)


def peak_memory(arch: str, form: Form, batch_size: int, device: str, threads: int) -> int:
    """Returns the peak memory of two steps, in bytes: weights, optimizer state, activations.

    To be run in a fresh process: what torch itself takes is left out. A compiled row includes its compilation.
    """
    torch.set_num_threads(threads)
    before = memory.in_use(device)
    step = step_of(build_model(arch), form, *batch(arch, batch_size), device)
    for _ in range(2):
        step()
    return memory.peak(device) - before


def weigh(form: Form, batch_sizes: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the entries of a row for its peak memory: `peak_bytes` by batch size, and `peak_mib_N` for the table."""
    arch = form.peer or args.arch
    peaks = {n: memory.in_fresh_process(peak_memory, arch, form, n, args.device, args.threads) for n in batch_sizes}
    return {"peak_bytes": peaks} | {f"peak_mib_{n}": peak / 2**20 for n, peak in peaks.items()}


def build(arch: str, forms: Mapping[str, Form], args: argparse.Namespace) -> dict[Variant, float]:
    """Returns the rows of a network, each with its difference from a float64 gradient: the naive one, or a peer's own.

    Raises:
        ValueError: a row is wrong.
    """
    model, (images, labels) = build_model(arch), batch(arch, args.batch_size)
    reference = Form(naive=arch in models.SPECS)
    expected = step_of(deepcopy(model).double(), reference, images.double(), labels, args.device).gradients()
    # A backward pass is two products for each of the forward pass. Recomputing is no useful work, so it is not counted.
    flops = 3 * work.count_flops(model, tuple(images.shape))
    rows = {}
    for name, form in forms.items():
        step = step_of(model, form, images, labels, args.device)
        difference = gradient_difference(expected, step.gradients())
        harness.check(name, difference, TOLERANCES["tf32" if args.tf32 and form.dtype == "fp32" else form.dtype])
        size, width = images.shape[2:], DTYPES[form.dtype].itemsize
        traffic = work.training_bytes(model, args.batch_size, (size[0], size[1]), width)
        rows[Variant(name, step, flops, traffic, form.dtype)] = difference
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Checks and times every row, and prints the table."""
    args = parse(argv)
    clock = harness.start(args)
    harness.settle_precision(args.tf32)
    for peer in args.peers:
        models.default_image_size(peer)  # an unknown one is to fail at once
    weighed = [] if args.memory is None else args.memory or [args.batch_size]
    forms = forms_of(args)
    forms = {name: forms[name] for name in harness.chosen(forms, args.only, BASELINE)}
    exact = check_formulations(build_model(args.arch), *batch(args.arch, args.batch_size), args.device)
    print(f"{args.arch}, batch {args.batch_size}, AdamW; x: over {BASELINE}; gradients in float64 equal to {exact:.0e}")
    differences: dict[Variant, float] = {}
    for peer in ["", *args.peers]:
        own = {name: form for name, form in forms.items() if form.peer == peer}
        differences |= build(peer or args.arch, own, args) if own else {}
    variants = list(differences)
    dtypes = {dtype: DTYPES[dtype] for dtype in DTYPES if any(v.dtype == dtype for v in variants)}
    limits = Roofline.measure(args.device, dtypes, clock.now, args.min_seconds)
    times = harness.interleave(variants, clock, rounds=args.rounds, min_seconds=args.min_seconds)
    limits = limits.best(Roofline.measure(args.device, dtypes, clock.now, args.min_seconds))
    rows = harness.summarise(variants, times, BASELINE, limits)
    for row, variant in zip(rows, variants, strict=True):
        row |= {"difference": differences[variant], "images_per_second": args.batch_size / row["median"]}
        row |= {"milliseconds": 1e3 * row["median"], "gflop": row["flops"] / 1e9, "megabytes": row["bytes"] / 1e6}
        form = forms[variant.name]
        if form.mode is None:  # what a compiler makes of it only the compiler could count
            operators = recorded_step(form.peer or args.arch, form, args.batch_size)
            row["moved"] = total_bytes(operators) / args.batch_size / 1e6
        row |= weigh(form, weighed, args)
    memory_columns = [(f"MiB at {n}", f"peak_mib_{n}", ".0f") for n in weighed]
    harness.report(args, rows, (*COLUMNS, *memory_columns), clock, limits)


if __name__ == "__main__":
    cli.run(main)
