"""Trains a face network with a margin softmax and evaluates it by verification: do two images show the same person?

`DATA/train/<person>/*` is trained on; `DATA/val/<person>/*` holds other people, whose images are paired by a list
(`--pairs`, lines `path path same|different`, of paths below `DATA/val`) or at random, the same in each run. The images
are aligned crops of faces. One process; started again, a run resumes from its latest checkpoint. The weights in a
checkpoint are the network's alone, so that convert.py takes them; the margin softmax is needed for training only.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.utils.data import DataLoader

import data
import models
from engine.checkpoint import CheckpointFolder
from engine.optimizer import build_optimizer
from engine.schedule import build_schedule
from engine.state import restore
from engine.train import Trainer
from engine.verification import NotFinite, Verification, deal_folds, embed, verify
from models.build import check_changeable
from models.checkpoints import build_from, describe, read_checkpoint
from models.reparam import is_reparameterizable
from utils import cli, distributed
from utils.distributed import Process
from utils.files import check_target, write_json
from utils.lock import folder_lock
from utils.log import MetricsWriter, create_logger
from utils.seed import seed_everything
from utils.signals import Stopped, StopRequest

MEAN = STD = (0.5, 0.5, 0.5)  # pixels between -1 and 1, as is the custom for faces
MARGINS = {"arcface": 28.6, "cosface": 0.35}  # in degrees and as a cosine, as their papers set them


def parser() -> cli.Parser:
    """Describes the command line."""
    result = cli.Parser(description=__doc__, argument_default=None)
    result.add_argument("data", metavar="DATA", help="folder with train/<person>/* and val/<person>/*")
    result.add_argument("-a", "--arch", metavar="ARCH", help="RepMLP-FaceRes, or what --eval holds")
    result.add_argument("--embedding", type=int, default=512, metavar="N", help="numbers in an embedding")
    result.add_argument("--channels", type=int, nargs="+", metavar="N", help="of each stage; else the architecture's")
    result.add_argument("--blocks", type=int, nargs="+", metavar="N", help="of each stage; else the architecture's")
    result.add_argument("--loss", choices=list(MARGINS), default="arcface", help="the margin softmax")
    result.add_argument("--margin", type=float, metavar="M", help="degrees (arcface) or cosine (cosface); else its own")
    result.add_argument("--scale", type=float, default=64.0, metavar="S", help="of the cosines before the softmax")
    result.add_argument(
        "--epochs", type=int, default=20, metavar="N", help="epochs, the first of several with rising rate"
    )
    result.add_argument("-b", "--batch-size", type=int, default=128, metavar="N", help="images per update")
    result.add_argument("--lr", type=float, default=0.1, metavar="LR", help="of SGD, falling as a cosine")
    result.add_argument("--weight-decay", type=float, default=5e-4, metavar="W", help="of SGD")
    result.add_argument("--pairs", type=Path, metavar="FILE", help="pairs to verify; else they are drawn")
    result.add_argument("--num-pairs", type=int, default=6000, metavar="N", help="how many to draw")
    result.add_argument("--folds", type=int, default=10, metavar="N", help="parts of the pairs that take turns")
    result.add_argument("-j", "--workers", type=int, default=4, metavar="N", help="data loading processes")
    result.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    result.add_argument(
        "--output", type=Path, default=Path("output"), metavar="DIR", help="writes to DIR/<arch>/<tag>/"
    )
    result.add_argument("--tag", default="face", metavar="NAME", help="name of the run")
    result.add_argument("--eval", type=Path, metavar="FILE", help="only evaluate these weights, in either form")
    result.add_argument("--json", type=Path, metavar="FILE", help="with --eval, also write the figures there")
    return result


def margin_softmax(args: Namespace, classes: int) -> nn.Module:
    """Builds the loss of embeddings (N, E) and labels (N,), with a direction for each class that it learns.

    Raises:
        ValueError: the library that it comes from is not installed.
    """
    try:
        from pytorch_metric_learning.losses import ArcFaceLoss, CosFaceLoss
    except ImportError as error:
        raise ValueError("a margin softmax needs the extra `face`: pip install pytorch-metric-learning") from error
    margin = MARGINS[args.loss] if args.margin is None else args.margin
    loss = {"arcface": ArcFaceLoss, "cosface": CosFaceLoss}[args.loss]
    return loss(num_classes=classes, embedding_size=args.embedding, margin=margin, scale=args.scale)


class Verifier:
    """The pairs of `val`, and what it takes to score them with a network for images of one size."""

    def __init__(self, args: Namespace, size: tuple[int, int], device: torch.device) -> None:
        source = data.FolderSource(args.data, "val", same_classes=False)
        listed = args.pairs is not None
        pairs = data.read_pairs(args.pairs, source) if listed else data.draw_pairs(source.labels, args.num_pairs)
        self._first, self._second, self._same = (torch.from_numpy(part) for part in pairs)
        deal_folds(self._same, args.folds)  # which fails before the training, not after it
        self._loader: DataLoader = data.build_eval_loader(
            source, data.eval_transform(size), batch_size=args.batch_size, num_workers=args.workers
        )
        self._normalize = data.Normalize(MEAN, STD).to(device)
        self._folds, self._device = args.folds, device

    def __call__(self, model: nn.Module) -> Verification:
        """Evaluates a network."""
        embeddings = embed(model, self._loader, self._normalize, self._device)
        return verify(embeddings, self._first, self._second, self._same, self._folds)


def build_model(args: Namespace) -> nn.Module:
    """Builds the network with fresh weights."""
    given = {"channels": args.channels, "blocks": args.blocks}
    parts = {part: value for part, value in given.items() if value is not None}
    check_changeable(args.arch, {f"--{part}": part for part in parts})
    return models.create_model(args.arch, args.embedding, **parts)


def build_trainer(args: Namespace, source: data.ImageSource, process: Process, **parts: Any) -> Trainer:
    """Puts together what takes part in an update; the margin softmax learns beside the network."""
    network, updates = build_model(args).to(process.device), len(source) // args.batch_size
    criterion = margin_softmax(args, len(source.classes)).to(process.device)
    optimizer = build_optimizer(
        nn.ModuleList([network, criterion]), name="sgd", lr=args.lr, weight_decay=args.weight_decay
    )
    schedule = build_schedule(
        optimizer,
        name="cosine",
        total_updates=args.epochs * updates,
        warmup_updates=updates if args.epochs > 1 else 0,
        warmup_lr=0.0,
        min_lr=0.0,
        decay_updates=updates,
        decay_rate=1.0,
        warmup_prefix=True,
    )
    return Trainer(
        network=network,
        forward=network,
        criterion=criterion,
        optimizer=optimizer,
        schedule=schedule,
        normalize=data.Normalize(MEAN, STD).to(process.device),
        process=process,
        images=len(source),
        epochs=args.epochs,
        updates_per_epoch=updates,
        global_batch=args.batch_size,
        seed=args.seed,
        max_unreadable=10,  # both as by default in configs/
        max_skipped=20,
        locate=source.locate,
        **parts,
    )


def train(args: Namespace, process: Process, folder: Path) -> None:
    """Trains, evaluates and saves, epoch by epoch."""
    logger = create_logger(folder)
    seed_everything(args.seed)
    source = data.FolderSource(args.data, "train", same_classes=False)
    size = models.default_image_size(args.arch)
    loader = data.build_train_loader(
        source,
        data.train_transform(size, preset="flip"),
        batch_size=args.batch_size,
        num_workers=args.workers,
        seed=args.seed,
    )
    verifier = Verifier(args, size, process.device)
    trainer = build_trainer(args, source, process, logger=logger, metrics=MetricsWriter(None))
    form = "train" if is_reparameterizable(trainer.network) else None
    meta = describe(args.arch, trainer.network, size, form)
    checkpoints = CheckpointFolder(folder, keep=1, meta=meta, config=json.dumps(vars(args), default=str))
    start, stop = checkpoints.start(logger), StopRequest()
    recorded = restore(trainer, start) if start is not None else 0
    if start is not None:
        checkpoints.complete(start)
    progress, sampler = trainer.progress, cast(data.TrainSampler, loader.sampler)
    trainer.metrics = MetricsWriter(folder, recorded, progress.epoch)
    logger.info(f"{len(source)} images of {len(source.classes)} people; {args.arch}, {args.loss}, output in {folder}")
    for epoch in range(progress.epoch, args.epochs):
        sampler.set_position(epoch, progress.consumed)
        if not trainer.train_epoch(loader, lambda: bool(stop.agreed())):
            checkpoints.save(trainer)
            raise Stopped(stop.number)
        checkpoints.save(trainer, best=evaluate_epoch(trainer, verifier))
    trainer.metrics.close()
    logger.info(f"Best accuracy {progress.best_top1:.3f}; weights in {folder}")


def evaluate_epoch(trainer: Trainer, verifier: Verifier) -> bool:
    """Evaluates the epoch that has ended; says whether it is the best so far."""
    progress = trainer.progress
    epoch, before = progress.epoch - 1, progress.best_top1
    try:
        result = verifier(trainer.network)
    except NotFinite as error:
        trainer.logger.warning(f"Epoch {epoch} eval: {error}")
        trainer.metrics.write("eval", progress.update, {"epoch": epoch, "accuracy": None})
        return False
    progress.best_top1 = max(before, result.accuracy)
    trainer.logger.info(f"Epoch {epoch} eval: {result}")
    trainer.metrics.write("eval", progress.update, {"epoch": epoch, **result.as_dict()})
    return result.accuracy > before


def evaluate(args: Namespace, device: torch.device) -> None:
    """Evaluates the weights that `--eval` names."""
    network = build_from(read_checkpoint(args.eval), args.arch)
    model = network.model.float().to(device)
    result = Verifier(args, to_2tuple(network.image_size), device)(model)
    print(f" * {result}")
    if args.json:
        write_json(args.json, result.as_dict())


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, or evaluates with `--eval`."""
    args = parser().parse_args(argv)
    if args.json and not args.eval:
        raise ValueError("--json belongs to --eval: give both")
    if args.json:
        check_target(args.json, filter(None, [args.eval, args.data, args.pairs]))
    if min(args.epochs, args.batch_size, args.embedding) < 1 or args.workers < 0:
        raise ValueError("--epochs, --batch-size and --embedding must be at least 1, --workers at least 0")
    process = distributed.init()
    try:
        if process.world_size > 1:
            raise ValueError("this program works in one process: start it with python, not with a launcher")
        if args.eval:
            evaluate(args, process.device)
            return
        args.arch = models.canonical_name(args.arch or "RepMLP-FaceRes")
        folder = args.output / args.arch / args.tag
        with folder_lock(folder):
            train(args, process, folder)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    cli.run(main)
