"""Semantic segmentation on Cityscapes: `train`, `eval`, and `convert` to the deploy structure, verified."""

import json
import logging
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timm.utils import distribute_bn
from torch import nn
from torch.utils.data import DataLoader

import data
from convert import verify
from data.segmentation import (
    IGNORED,
    CityscapesSource,
    MaskedDataset,
    segmentation_eval_transform,
    segmentation_train_transform,
)
from engine.checkpoint import CheckpointFolder
from engine.evaluate import refuse_nonfinite
from engine.optimizer import build_optimizer
from engine.schedule import build_schedule
from engine.segmentation import SegmentationEvaluation, evaluate_segmentation
from engine.state import restore
from engine.sync_batch_norm import synchronise_batch_norms
from engine.train import PRECISIONS, Trainer, autocast, data_parallel
from models.build import OWN, canonical_name, default_image_size, structure_changes
from models.checkpoints import build_from, read_checkpoint, write_checkpoint
from models.dense import DOWNSAMPLINGS, FULL_RANK
from models.reparam import is_reparameterizable, to_deploy
from models.segmentation import DECODERS, SegmentationNetwork, describe_segmentation, segmentation_from
from utils import cli, distributed
from utils.distributed import Process
from utils.lock import folder_lock
from utils.log import MetricsWriter, create_logger
from utils.seed import seed_everything
from utils.signals import Stopped, StopRequest

MIOU_TOLERANCE = 0.01  # percent: what rounding may change where two classes are equally likely


def parser() -> cli.Parser:
    """Describes the command line."""
    result = cli.Parser(description=__doc__)
    modes = result.add_subparsers(dest="mode", metavar="MODE", required=True, help="train, eval or convert")
    training = _add_mode(modes, "train", train, "train, and evaluate after every so many epochs")
    _add_network_options(training)
    _add_training_options(training)
    evaluation = _add_mode(modes, "eval", evaluate_only, "evaluate weights of either form")
    conversion = _add_mode(modes, "convert", convert, "inject, verify, compare the mIoU of both forms, write")
    for mode in (evaluation, conversion):
        mode.add_argument("weights", type=Path, metavar="WEIGHTS", help="checkpoint of a training")
    conversion.add_argument("save", type=Path, metavar="DEPLOY", help="where to write")
    return result


def _add_mode(modes: Any, name: str, run: Any, text: str) -> ArgumentParser:
    mode = modes.add_parser(name, description=text)
    mode.set_defaults(run=run)
    mode.add_argument("data", metavar="CITYSCAPES", help="folder with leftImg8bit/ and gtFine/")
    mode.add_argument("-j", "--workers", type=int, default=4, metavar="N", help="data loading processes")
    mode.add_argument("--test-batch-size", type=int, default=1, metavar="N", help="images per process, all of one size")
    mode.add_argument("--amp", choices=list(PRECISIONS), default="off", help="precision of the forward pass")
    return mode


def _add_network_options(mode: ArgumentParser) -> None:
    group = mode.add_argument_group("network")
    group.add_argument("-a", "--arch", metavar="ARCH", help="backbone; RepMLPNet-D256, or what --pretrained holds")
    group.add_argument("--pretrained", type=Path, metavar="FILE", help="classifier to start the backbone from")
    group.add_argument(
        "--img-size", type=int, nargs=2, metavar=("H", "W"), help="that a backbone of one size is made for"
    )
    group.add_argument("--decoder", choices=list(DECODERS), default="upernet", help="what reads the backbone's levels")
    group.add_argument("--width", type=int, default=512, metavar="C", help="channels of the decoder")
    group.add_argument("--downsample", choices=list(DOWNSAMPLINGS), help="replace the 2x2 embeddings of the backbone")
    group.add_argument("--rank", type=int, default=FULL_RANK, help="of --downsample: 4 starts exactly, 1 costs least")


def _add_training_options(mode: ArgumentParser) -> None:
    group = mode.add_argument_group("training")
    group.add_argument("--batch-size", type=int, default=2, metavar="N", help="images per process, at least 2")
    group.add_argument("--crop", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"), help="size in training")
    group.add_argument("--epochs", type=int, default=215, metavar="N", help="over the training images")
    group.add_argument("--warmup-epochs", type=float, default=4, metavar="N", help="of the learning rate")
    group.add_argument("--eval-epochs", type=int, default=5, metavar="N", help="evaluate every so many epochs")
    group.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw", help="kind of the updates")
    group.add_argument("--lr", type=float, default=1e-4, help="learning rate of an update, whatever the batch")
    group.add_argument("--weight-decay", type=float, default=0.05, help="of kernels")
    group.add_argument("--drop-path", type=float, default=0.0, help="of the backbone's last unit")
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm over the images of all processes")
    group.add_argument("--seed", type=int, default=0, help="of every random draw")
    group.add_argument("--output", type=Path, default=Path("output/segmentation"), metavar="DIR", help="run's folder")


def check(args: Namespace) -> None:
    """Raises ValueError for options of a training that make no sense."""
    if args.batch_size < 2:
        raise ValueError("--batch-size must be at least 2: the decoders normalise over the images of a batch")
    if min(args.epochs, args.eval_epochs, args.width, *args.crop) < 1:
        raise ValueError("--epochs, --eval-epochs, --width and --crop must be at least 1")
    if not 0 <= args.warmup_epochs < args.epochs or not 0 <= args.drop_path < 1:
        raise ValueError("--warmup-epochs must be at least 0 and below --epochs, --drop-path at least 0 and below 1")
    if args.rank != FULL_RANK and not args.downsample:
        raise ValueError("--rank belongs to --downsample: give both")
    if args.img_size and args.pretrained:
        raise ValueError("--pretrained weights are made for one image size: leave --img-size away")


def build_network(args: Namespace) -> SegmentationNetwork:
    """Builds the network, the backbone with fresh or with pretrained weights and in the structure that these have.

    Raises:
        ValueError: the weights do not fit, or an option does not fit the architecture.
    """
    trained = build_from(read_checkpoint(args.pretrained), args.arch) if args.pretrained else None
    arch = trained.arch if trained else canonical_name(args.arch or "RepMLPNet-D256")
    if arch not in OWN and (trained or args.downsample or args.img_size):
        raise ValueError(f"--pretrained, --downsample and --img-size are for our own architectures, not for {arch}")
    options: dict[str, Any] = {"drop_path_rate": args.drop_path} if args.drop_path else {}
    if args.img_size:
        options["img_size"] = tuple(args.img_size)
    if args.downsample:
        options |= {"downsample": args.downsample, "rank": args.rank}
    if trained:
        options |= {"img_size": trained.image_size} | structure_changes(arch, trained.model)
    seed_everything(args.seed)
    network = SegmentationNetwork(arch, len(data.segmentation.CITYSCAPES), args.decoder, args.width, **options)
    if trained:
        network.load_backbone(trained.model)
    return network


def eval_batches(args: Namespace, process: Process) -> DataLoader:
    """Shards the images of `val`, as they are, over the processes."""
    return data.build_eval_loader(
        CityscapesSource(args.data, "val"),
        segmentation_eval_transform(),
        batch_size=args.test_batch_size,
        num_workers=args.workers,
        pin_memory=True,
        rank=process.rank,
        world_size=process.world_size,
        dataset=MaskedDataset,
    )


def normalize(process: Process) -> data.Normalize:
    """Builds what turns uint8 images into the network's input: ImageNet's, for that is where backbones come from."""
    spec = data.DATASETS["imagenet"]
    return data.Normalize(spec.mean, spec.std).to(process.device)


def evaluate(network: nn.Module, args: Namespace, process: Process, batches: DataLoader) -> SegmentationEvaluation:
    """Evaluates a network on the whole images of `val`."""
    precision = autocast(process.device, PRECISIONS[args.amp])
    classes = len(data.segmentation.CITYSCAPES)
    return evaluate_segmentation(network, batches, normalize(process), process.device, precision, classes)


def build_trainer(args: Namespace, process: Process, network: nn.Module, loader: DataLoader) -> Trainer:
    """Puts together what takes part in an update."""
    dataset, updates = loader.dataset, len(loader)
    assert isinstance(dataset, MaskedDataset)
    optimizer = build_optimizer(network, name=args.optimizer, lr=args.lr, weight_decay=args.weight_decay)
    schedule = build_schedule(
        optimizer,
        name="cosine",
        total_updates=args.epochs * updates,
        warmup_updates=round(args.warmup_epochs * updates),
        warmup_lr=0.0,
        min_lr=0.0,
        decay_updates=1,
        decay_rate=1.0,
    )
    return Trainer(
        network=network,
        forward=data_parallel(network, process, static_graph=True),
        criterion=nn.CrossEntropyLoss(ignore_index=IGNORED),
        optimizer=optimizer,
        schedule=schedule,
        normalize=normalize(process),
        process=process,
        images=len(dataset),
        epochs=args.epochs,
        updates_per_epoch=updates,
        global_batch=args.batch_size * process.world_size,
        logger=create_logger(args.output, process.rank),
        metrics=MetricsWriter(None),
        dtype=PRECISIONS[args.amp],
        seed=args.seed,
        max_unreadable=10,  # both as by default in configs/
        max_skipped=20,
        locate=dataset.source.locate,
    )


def train_batches(args: Namespace, process: Process) -> tuple[DataLoader, data.TrainSampler]:
    """Shards random parts of the images of `train` over the processes."""
    loader = data.build_train_loader(
        CityscapesSource(args.data, "train"),
        segmentation_train_transform((args.crop[0], args.crop[1])),
        batch_size=args.batch_size,
        num_workers=args.workers,
        pin_memory=True,
        seed=args.seed,
        rank=process.rank,
        world_size=process.world_size,
        dataset=MaskedDataset,
    )
    assert isinstance(loader.sampler, data.TrainSampler)
    return loader, loader.sampler


def start(trainer: Trainer, checkpoints: CheckpointFolder) -> int:
    """Resumes from the run's newest checkpoint, if there is one; returns the updates that are recorded."""
    checkpoint = checkpoints.start(trainer.logger)
    if checkpoint is None:
        return 0
    recorded = restore(trainer, checkpoint)
    checkpoints.complete(checkpoint)
    return recorded


def train(args: Namespace, process: Process) -> None:
    """Trains, evaluates, saves and logs, epoch by epoch; started again, resumes.

    Raises:
        ValueError: an option that makes no sense.
    """
    check(args)
    (loader, sampler), val_loader = train_batches(args, process), eval_batches(args, process)
    network: nn.Module = build_network(args).to(process.device)
    form = "train" if is_reparameterizable(network) else None
    meta = describe_segmentation(network, form)
    if args.sync_bn and process.world_size > 1:
        network = synchronise_batch_norms(network)
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    stop, trainer = StopRequest(), build_trainer(args, process, network, loader)
    checkpoints = CheckpointFolder(args.output, keep=0, meta=meta, config=json.dumps(settings, default=str))
    recorded, progress = start(trainer, checkpoints), trainer.progress
    if process.is_main:
        trainer.metrics = MetricsWriter(args.output, recorded, progress.epoch)
    trainer.logger.info(f"{progress.update} of {args.epochs * len(loader)} updates done, {len(loader)} each epoch")
    for epoch in range(progress.epoch, args.epochs):
        sampler.set_position(epoch, progress.consumed)
        if not trainer.train_epoch(loader, lambda: bool(stop.agreed())):
            checkpoints.save(trainer)
            raise Stopped(stop.number)
        if process.world_size > 1:
            distribute_bn(network, process.world_size, reduce=True)
        due = epoch + 1 == args.epochs or (epoch + 1) % args.eval_epochs == 0
        checkpoints.save(trainer, best=due and evaluate_epoch(args, trainer, val_loader))
    trainer.metrics.close()
    trainer.logger.info(f"best mIoU {progress.best_top1:.3f}; weights in {args.output}")


def evaluate_epoch(args: Namespace, trainer: Trainer, batches: DataLoader) -> bool:
    """Evaluates the epoch that has ended; says whether it is the best so far."""
    progress = trainer.progress
    result = evaluate(trainer.network, args, trainer.process, batches)
    level = logging.WARNING if result.nonfinite and trainer.process.is_main else logging.INFO
    trainer.logger.log(level, f"Epoch {progress.epoch - 1}: {result}")
    trainer.metrics.write("eval", progress.update, {"epoch": progress.epoch - 1, **result.as_dict()})
    # What a run calls its best top-1 is the figure that it selects by: here the mIoU.
    best = result.miou > progress.best_top1
    progress.best_top1 = max(result.miou, progress.best_top1)
    return best


def evaluate_only(args: Namespace, process: Process) -> None:
    """Evaluates weights of either form, and prints the figure of every class."""
    network = segmentation_from(read_checkpoint(args.weights)).to(process.device)
    result = evaluate(network, args, process, eval_batches(args, process))
    refuse_nonfinite(result.nonfinite, result.images)
    if process.is_main:
        print(f" * {result}")
        for name, iou in zip(data.segmentation.CITYSCAPES, result.iou, strict=True):
            print(f"   {name:<14}" + ("absent" if iou is None else f"{iou:.2f}"))


def convert(args: Namespace, process: Process) -> None:
    """Injects the backbone, verifies the network in float64, compares the mIoU of both forms, and writes.

    Raises:
        ValueError: the forms do not answer alike, so that nothing was written; or the weights are converted already.
    """
    if process.world_size > 1:
        raise ValueError("mode convert runs in one process")
    if args.save.exists() and args.save.samefile(args.weights):
        raise ValueError(f"{args.save} would be overwritten by its own conversion: give another name to write to")
    network = segmentation_from(read_checkpoint(args.weights))
    deploy = to_deploy(network)
    options = network.arguments
    difference = verify(network, deploy, tuple(options.get("img_size") or default_image_size(options["arch"])))
    batches = eval_batches(args, process)
    before, after = (evaluate(n.to(process.device), args, process, batches) for n in (network, deploy))
    refuse_nonfinite(before.nonfinite + after.nonfinite, before.images + after.images)
    print(f" * training structure  {before}\n * deploy structure    {after}")
    if not abs(after.miou - before.miou) <= MIOU_TOLERANCE:
        raise ValueError(f"the mIoU has changed from {before.miou:.3f} to {after.miou:.3f}, and nothing was written")
    write_checkpoint(args.save, {"model": deploy.cpu().state_dict(), "meta": describe_segmentation(deploy, "deploy")})
    print(f" * largest relative logit difference {difference:.1e}; written to {args.save}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the mode that the command line asks for."""
    args = parser().parse_args(argv)
    process = distributed.init()
    try:
        with ExitStack() as stack:
            if args.run is train:
                distributed.from_main(lambda: stack.enter_context(folder_lock(args.output)))
            args.run(args, process)
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    cli.run(main)
