"""Evaluates weights on one CPU or GPU, or checks that a conversion keeps every answer.

Modes: `train` evaluates training weights, `deploy` evaluates converted ones, `check` takes training weights, converts
them in memory and compares both forms on every image.
"""

if __name__ == "__main__":  # the imports below take seconds
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch.utils.data import DataLoader

import data
import models
from engine.evaluate import Comparison, compare, evaluate, refuse_nonfinite
from engine.train import PRECISIONS, autocast
from models.checkpoints import Network, build_from, read_checkpoint
from models.fusion import fuse_verified
from models.reparam import to_deploy
from utils import cli
from utils.files import check_target, write_json
from utils.text import printable

REMEDY = {
    "train": "evaluate them with mode deploy",
    "check": "give the training weights that they were converted from",
    "deploy": "convert them first: python convert.py TRAIN.pth DEPLOY.pth",
}


def parser() -> cli.Parser:
    """Describes the command line."""
    architectures = cli.listing("architectures", [*models.list_models(), "any of timm"])
    result = cli.Parser(description=__doc__, epilog=architectures, argument_default=None)
    result.add_argument("data", metavar="DATA", help="folder with val/<class>/*, or digits, or shapes")
    result.add_argument("mode", metavar="MODE", choices=["train", "deploy", "check"], help="train, deploy or check")
    result.add_argument("weights", metavar="WEIGHTS", help="checkpoint")
    result.add_argument("-a", "--arch", metavar="ARCH", help="architecture, where the checkpoint does not tell")
    result.add_argument("-b", "--batch-size", type=int, default=100, metavar="N", help="images per batch")
    result.add_argument(
        "-r", "--resolution", type=cli.side, metavar="R", help="test size; the architecture's own if absent"
    )
    result.add_argument("-j", "--workers", type=int, default=4, metavar="N", help="data loading processes")
    result.add_argument("--dataset", default="imagenet", help="imagenet (any image folder), cf100, digits, shapes")
    result.add_argument("--crop", action="store_true", default=False, help="resize to 256/224 of the size, then crop")
    result.add_argument("--fuse", action="store_true", default=False, help="fold every BatchNorm, for speed")
    cli.add_ema_option(result)
    result.add_argument("--amp", choices=list(PRECISIONS), default="off", help="precision of the forward pass")
    result.add_argument("--tolerance", type=float, default=1e-4, help="of mode check, on the relative logit difference")
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return result


def load(path: str, mode: str, arch: str | None, ema: bool | None) -> Network:
    """Builds the network, loads the weights and prints which they are.

    Raises:
        ValueError: no readable checkpoint, weights of another network, or weights in the other form.
    """
    checkpoint = read_checkpoint(path, ema=ema)
    wanted = "deploy" if mode == "deploy" else "train"
    if checkpoint.form not in (wanted, None):
        raise ValueError(f"mode {mode} needs {wanted} weights, {path} holds {checkpoint.form} weights: {REMEDY[mode]}")
    network = build_from(checkpoint, arch)
    print(printable(f"{network.arch}: {checkpoint}"))
    return network


def batches(args: Namespace, size: tuple[int, int], num_classes: int) -> DataLoader:
    """Opens the validation images.

    Raises:
        ValueError: they are missing, or of another number of classes than the network's.
    """
    source = data.open_source(args.dataset, args.data, "val")
    if len(source.classes) != num_classes:
        raise ValueError(f"{args.data} has {len(source.classes)} classes, the network {num_classes}")
    return data.build_eval_loader(
        source,
        data.eval_transform(size, crop=args.crop),
        batch_size=args.batch_size,
        num_workers=args.workers,
        pin_memory=True,
    )


def report(result: Comparison, tolerance: float) -> tuple[dict[str, Any], int]:
    """Prints a comparison; returns its figures, and 1 where the logits differ by more than the tolerance, else 0."""
    failed = not result.difference <= tolerance
    print(f" * training weights   {result.first}")
    print(f" * injected weights   {result.second}")
    print(f" * top-1 agreement {result.agreement:.3f} %, largest relative logit difference {result.difference:.1e}")
    print(f" * {'FAILED, beyond' if failed else 'passed, within'} the tolerance of {tolerance:.0e}")
    figures = {"agreement": result.agreement, "difference": result.difference, "injected": result.second.as_dict()}
    return result.first.as_dict() | figures, int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates or compares; returns 1 where `check` finds a difference beyond the tolerance."""
    args = parser().parse_args(argv)
    if args.batch_size < 1 or args.workers < 0 or not args.tolerance > 0:
        raise ValueError("-b must be at least 1, -j at least 0 and --tolerance above 0")
    if args.json:
        check_target(args.json, [args.weights, args.data])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load(args.weights, args.mode, args.arch, args.ema)
    model = network.model.float().to(device)
    loader = batches(args, to_2tuple(args.resolution or network.image_size), network.num_classes)
    spec = data.DATASETS[data.resolve_name(args.dataset, args.data)]
    dtype = PRECISIONS[args.amp]
    if args.mode == "check":
        if args.fuse and dtype:
            raise ValueError("mode check compares in full precision what --fuse makes: leave --amp away")
        normalize = data.Normalize(spec.mean, spec.std).to(device)
        prepare = fuse_verified if args.fuse else to_deploy
        result = compare(model, prepare(model), loader, normalize, device, autocast(device, dtype))
        figures, status = report(result, args.tolerance)
    else:
        if args.fuse:  # a fused network computes in the dtype of its weights
            model, dtype = fuse_verified(model).to(dtype or torch.float32), None
        normalize = data.Normalize(spec.mean, spec.std, dtype=next(model.parameters()).dtype).to(device)
        evaluation = evaluate(model, loader, normalize, device, autocast(device, dtype))
        refuse_nonfinite(evaluation.nonfinite, evaluation.images)
        print(f" * {evaluation}")
        figures, status = evaluation.as_dict(), 0
    if args.json:
        write_json(args.json, figures)
    return status


if __name__ == "__main__":
    cli.run(main)
