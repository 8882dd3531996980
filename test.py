"""Evaluates weights on one CPU or GPU, or checks that a conversion keeps every answer.

Modes: `train` evaluates training weights, `deploy` evaluates converted ones, `check` converts training weights in
memory and compares both forms on every image. The task is that of the checkpoint.
"""

if __name__ == "__main__":  # the imports below take seconds
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import Override, load_config, parse_opts
from data import known_names
from engine import backends
from engine.classes import ClassMatch
from engine.evaluate import Comparison, compare, evaluate, refuse_nonfinite
from engine.precision import PRECISIONS, autocast
from engine.task import Task
from models import list_models
from models.reparam import to_deploy
from tasks.inference import Loaded, add_checkpoint_options, default_device, load_checkpoint, prepare
from utils import cli
from utils.distributed import RankInfo
from utils.files import check_target, write_json
from utils.text import printable

REMEDY = {
    "train": "evaluate them with mode deploy",
    "check": "give the training weights that they were converted from",
    "deploy": "convert them first: python convert.py TRAIN.pth DEPLOY.pth",
}


def parser() -> cli.Parser:
    """Describes the command line."""
    architectures = cli.listing("architectures", [*list_models(), "any of timm"])
    result = cli.Parser(description=__doc__, epilog=architectures, argument_default=None)
    result.add_argument(
        "data", metavar="DATA", help="folder of the data set or of its test images by class, or digits, or shapes"
    )
    result.add_argument("mode", metavar="MODE", choices=["train", "deploy", "check"], help="train, deploy or check")
    result.add_argument("weights", metavar="WEIGHTS", help="checkpoint")
    add_checkpoint_options(result, fuse=True)
    result.add_argument(
        "-b", "--batch-size", metavar="N", help="images per batch (100; 1 where images keep their size)"
    )
    result.add_argument("-r", "--resolution", metavar="R", help="test size; the architecture's own if absent")
    result.add_argument("-j", "--workers", default="4", metavar="N", help="data loading processes")
    result.add_argument("--dataset", metavar="NAME", help=f"{', '.join(known_names())}; that of the task if absent")
    result.add_argument("--crop", action="store_true", default=None, help="resize to 256/224 of the size, then crop")
    result.add_argument(
        "--classes", metavar="FILE", help="names of the network's outputs, one a line; default: its own"
    )
    result.add_argument(
        "--all-outputs", action="store_true", default=False, help="compare the logits of classes without images too"
    )
    result.add_argument(
        "--real-labels", action="store_true", default=None, help="also count by the ReaL labels of ImageNet"
    )
    result.add_argument("--per-class", action="store_true", default=None, help="also give the accuracy of each class")
    result.add_argument("--amp", choices=list(PRECISIONS), default="off", help="precision of the forward pass")
    result.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="any keys of the configuration")
    result.add_argument(
        "--tolerance", type=float, default=1e-4, help="of mode check, on the relative output difference"
    )
    result.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return result


def load(args: Namespace) -> Loaded:
    """Loads the checkpoint and prints its description.

    Raises:
        ValueError: the file can't be read, the weights do not fit, or they have the other form.
    """
    loaded = load_checkpoint(args.weights, args.arch, args.ema)
    wanted, form = "deploy" if args.mode == "deploy" else "train", loaded.checkpoint.form
    if form not in (wanted, None):
        raise ValueError(
            f"mode {args.mode} needs {wanted} weights, {args.weights} holds {form} weights: {REMEDY[args.mode]}"
        )
    print(printable(f"{loaded.network.arch}: {loaded.checkpoint}"))
    return loaded


def build_task(args: Namespace, task: type[Task], device: torch.device) -> Task:
    """Builds the task of the checkpoint with the settings of the command line."""
    given = {
        ("WEIGHTS", "TASK"): task.name,
        ("WEIGHTS", "EVAL_MODE"): True,
        ("WEIGHTS", "MODEL.RESUME"): args.weights,
        ("DATA", "DATA.DATA_PATH"): args.data,
        ("--dataset", "DATA.DATASET"): args.dataset or task.default_dataset,
        ("-b", "DATA.TEST_BATCH_SIZE"): args.batch_size or (1 if task.whole_images else 100),
        ("-r", "DATA.TEST_SIZE"): args.resolution,
        ("-j", "DATA.NUM_WORKERS"): args.workers,
        ("--crop", "TEST.CROP"): args.crop,
        ("--classes", "TEST.CLASSES"): args.classes,
        ("--all-outputs", "TEST.MASK"): False if args.all_outputs else None,
        ("--real-labels", "TEST.REAL_LABELS"): args.real_labels,
        ("--per-class", "TEST.PER_CLASS"): args.per_class,
        ("--amp", "AMP"): args.amp,
    }
    overrides = [Override(*place, value) for place, value in given.items() if value is not None]
    return task(load_config(None, [*overrides, *parse_opts(args.opts)]), RankInfo(0, 1, 0, device))


def match_classes(task: Task, loaded: Loaded) -> ClassMatch:
    """Finds the output of the network for each class of the test images, and prints how where that needs saying.

    Raises:
        ValueError: the network is for other classes.
    """
    classes = task.match_classes(loaded.checkpoint, loaded.network.num_classes)
    for note in filter(None, (*task.val_source.notes, classes.note)):
        print(note)
    return classes


def check(
    args: Namespace, task: Task, network: nn.Module, loaded: Loaded, classes: ClassMatch
) -> tuple[dict[str, Any], int]:
    """Compares the training structure with the converted one.

    Returns:
        The figures, and the exit status: 1 if the outputs differ by more than the tolerance, else 0.
    """
    if args.fuse and args.amp != "off":
        raise ValueError("mode check compares the network of --fuse in full precision: leave --amp out")
    if task.cfg.TF32:
        raise ValueError("mode check compares in float32, and not rounded to TF32: leave TF32 out")
    device, dtype = task.rank_info.device, PRECISIONS[args.amp]
    converted = prepare(network, device, fuse=True) if args.fuse else to_deploy(network)
    first, second = (task.build_metric(loaded.network.num_classes, classes) for _ in range(2))
    batches = task.eval_loader(loaded.network.image_size)
    result = compare(network, converted, batches, (first, second), task.normalize(), device, autocast(device, dtype))
    return report(result, task, args.tolerance)


def report(result: Comparison, task: Task, tolerance: float) -> tuple[dict[str, Any], int]:
    """Prints a comparison; returns as `check` does."""
    failed = not result.difference <= tolerance
    agreement = "" if result.agreement is None else f"{task.agreement_label} {result.agreement:.3f} %, "
    print(f" * training weights   {result.first}")
    print(f" * injected weights   {result.second}")
    print(f" * {agreement}largest relative logit difference {result.difference:.1e}")
    print(f" * {'FAILED, beyond' if failed else 'passed, within'} the tolerance of {tolerance:.0e}")
    figures = {"agreement": result.agreement, "difference": result.difference, "injected": result.second.as_dict()}
    return result.first.as_dict() | figures, int(failed)


def measure(args: Namespace, task: Task, network: nn.Module, loaded: Loaded, classes: ClassMatch) -> dict[str, Any]:
    """Evaluates one network; prints and returns the figures."""
    device, dtype = task.rank_info.device, PRECISIONS[args.amp]
    if args.fuse:  # a fused network computes in the dtype of its weights
        network, dtype = prepare(network, device, fuse=True, dtype=dtype or torch.float32), None
    normalize = task.normalize(next(network.parameters()).dtype)
    batches = task.eval_loader(loaded.network.image_size)
    metric = task.build_metric(loaded.network.num_classes, classes)
    result = evaluate(network, batches, metric, normalize, device, autocast(device, dtype))
    refuse_nonfinite(result)
    print(f" * {result}")
    for line in result.details(task.val_source.classes):
        print(f"   {line}")
    return result.as_dict()


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates or compares; returns 1 if `check` finds a difference beyond the tolerance."""
    args = parser().parse_args(argv)
    if not args.tolerance > 0:
        raise ValueError("--tolerance must be above 0")
    if args.json:
        read = filter(None, [args.weights, args.data, args.classes])
        check_target(args.json, [*read, *args.opts])  # a key may name a file, such as FACE.PAIRS
    loaded, device = load(args), default_device()
    task = build_task(args, loaded.task, device)
    backends.set_up(task.cfg)
    for line in task.follow(loaded.checkpoint, loaded.network):
        print(line)
    classes = match_classes(task, loaded)
    network = prepare(loaded.network.model, device)
    if args.mode == "check":
        figures, status = check(args, task, network, loaded, classes)
    else:
        figures, status = measure(args, task, network, loaded, classes), 0
    if args.json:
        write_json(args.json, figures)
    return status


if __name__ == "__main__":
    cli.run(main)
