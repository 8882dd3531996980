"""Trains, evaluates (`--eval`) or times (`--throughput`) a network; alone, or in many processes by torchrun or srun."""

if __name__ == "__main__":  # the imports below take seconds
    from utils.interrupt import end_on_interrupt

    end_on_interrupt()

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from timm.layers import to_2tuple
from timm.utils import distribute_bn
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

import data
import models
from configs import Derived, changed_settings, derive, dump_config
from configs.command_line import Options, parse
from engine.checkpoint import CheckpointFolder
from engine.ema import ModelEma
from engine.evaluate import evaluate, refuse_nonfinite
from engine.loss import build_loss
from engine.optimizer import build_optimizer
from engine.schedule import build_schedule
from engine.state import read_state, restore
from engine.sync_batch_norm import synchronise_batch_norms
from engine.throughput import throughput
from engine.train import PRECISIONS, Trainer, autocast, data_parallel
from models.build import check_changeable
from models.checkpoints import build_from, describe, load_pretrained, read_checkpoint
from models.fusion import fuse_verified
from models.reparam import is_reparameterizable, to_deploy
from utils import cli, distributed
from utils.distributed import Process
from utils.files import clear_about_space
from utils.lock import first_missing, folder_lock, without_trace
from utils.log import NAME, MetricsWriter, create_logger, log_failure
from utils.seed import seed_everything
from utils.signals import Stopped, StopRequest

EXAMPLES = """  and every architecture of timm

examples:
  python main_repmlp.py --cfg configs/quickstart.yaml
  torchrun --nproc_per_node 8 main_repmlp.py --cfg configs/repmlpnet_t224_100ep.yaml --data-path IMAGENET --tag first
  python main_repmlp.py --eval --resume WEIGHTS.pth --data-path IMAGENET
  python main_repmlp.py --throughput --arch RepMLPNet-T224 --batch-size 16
  python main_repmlp.py --data-path digits --arch RepMLPNet-Digits --opts TRAIN.EPOCHS 20 TRAIN.BASE_LR 0.01
Every key that --opts sets is explained in configs/defaults.py.
"""
ROOM = "make room and start again, the run resumes from its latest checkpoint"


class Task(NamedTuple):
    """What every mode needs: which network, where the images are, how large they go in, which precision, who we are."""

    cfg: CfgNode
    arch: str
    process: Process
    logger: logging.Logger
    folder: Path
    train_size: tuple[int, int]
    test_size: tuple[int, int]
    dtype: torch.dtype | None

    @property
    def dataset(self) -> str:
        """The name of the data set, a key of `data.DATASETS`."""
        return data.resolve_name(self.cfg.DATA.DATASET, self.cfg.DATA.DATA_PATH)

    def source(self, split: str) -> data.ImageSource:
        """Opens the images of `train` or `val`."""
        cfg, process = self.cfg.DATA, self.process
        return data.open_source(
            cfg.DATASET,
            cfg.DATA_PATH,
            split,
            zip_mode=cfg.ZIP_MODE,
            cache_mode=cfg.CACHE_MODE,
            download=cfg.DOWNLOAD,
            rank=process.rank,
            world_size=process.world_size,
        )

    def normalize(self) -> data.Normalize:
        """Builds what turns uint8 images into the network's input, on the device."""
        spec = data.DATASETS[self.dataset]
        return data.Normalize(spec.mean, spec.std).to(self.process.device)

    def eval_batches(self, source: data.ImageSource) -> DataLoader:
        """Shards the images of `val` over the processes, each image once."""
        cfg = self.cfg.DATA
        return data.build_eval_loader(
            source,
            data.eval_transform(self.test_size, crop=self.cfg.TEST.CROP, interpolation=cfg.INTERPOLATION),
            batch_size=cfg.TEST_BATCH_SIZE or cfg.BATCH_SIZE,
            num_workers=cfg.NUM_WORKERS,
            pin_memory=cfg.PIN_MEMORY,
            rank=self.process.rank,
            world_size=self.process.world_size,
        )

    def build_model(self, num_classes: int) -> nn.Module:
        """Builds the network on the device, with fresh weights that are the same on every process."""
        seed_everything(self.cfg.SEED)
        options = structure_options(self.cfg) | {"img_size": self.train_size}
        if self.cfg.MODEL.DROP_PATH:
            options["drop_path_rate"] = self.cfg.MODEL.DROP_PATH
        return self.place(models.create_model(self.arch, num_classes, **options))

    def place(self, model: nn.Module) -> nn.Module:
        """Moves a network to the device, in the memory format that is asked for."""
        model = model.to(self.process.device)
        return model.to(memory_format=torch.channels_last) if self.cfg.CHANNELS_LAST else model

    def num_classes(self, train: data.ImageSource, val: data.ImageSource) -> int:
        """Returns the number of classes to build the network for; ValueError where the images have more."""
        found, wanted = len(train.classes), self.cfg.MODEL.NUM_CLASSES or len(train.classes)
        if found > wanted:
            raise ValueError(f"the data set has {found} classes, but MODEL.NUM_CLASSES is {wanted}")
        if len(val.classes) > wanted:
            raise ValueError(f"val has {len(val.classes)} classes, train {found}: they need the same labels")
        return wanted


def given_structure(cfg: CfgNode) -> dict[str, Any]:
    """Returns the parts of the structure that the configuration does not leave to the architecture."""
    model = cfg.MODEL
    parts = {
        "branches": model.BRANCHES,
        "share_sets": model.SHARE_SETS,
        "global_perceptron": model.GLOBAL_PERCEPTRON,
    }
    return {part: value for part, value in parts.items() if value is not None}


def structure_options(cfg: CfgNode) -> dict[str, Any]:
    """Returns in which parts of its structure the architecture is to be built otherwise.

    Raises:
        ValueError: it has no such part.
    """
    options = given_structure(cfg)
    check_changeable(cfg.MODEL.ARCH, {f"MODEL.{part.upper()}": part for part in options})
    return options


def run_folder(cfg: CfgNode, arch: str | None = None) -> Path:
    """Returns where a run of an architecture writes to; None: of the configured one."""
    return Path(cfg.OUTPUT, arch or models.canonical_name(cfg.MODEL.ARCH), cfg.TAG)


@contextmanager
def prepared(
    options: Options, process: Process, arch: str, train_size: tuple[int, int], *, lock: bool = False
) -> Iterator[Task]:
    """Settles the precision and opens the log of a run with an architecture and a size of training images.

    With `lock` no other run writes to its folder meanwhile. A start that fails leaves no folder behind.
    """
    cfg, folder = options.config, run_folder(options.config, arch)
    with ExitStack() as stack:
        made = distributed.from_main(lambda: first_missing(folder))
        if lock:  # before anything is written, so that a run that is under way stays undisturbed
            distributed.from_main(lambda: stack.enter_context(folder_lock(folder)))
        stack.enter_context(without_trace(folder, made, locked=lock))
        stack.enter_context(clear_about_space(folder, ROOM))
        logger = create_logger(folder, process.rank)
        for notice in options.notices:
            logger.warning(notice)
        if cfg.DETERMINISTIC:
            torch.use_deterministic_algorithms(True)
        amp = ("bf16" if process.device.type == "cuda" else "off") if cfg.AMP == "auto" else cfg.AMP
        logger.info(f"{process.world_size} process(es) on {process.device.type}, amp {amp}, output in {folder}")
        test_size = to_2tuple(cfg.DATA.TEST_SIZE or train_size)
        yield Task(cfg, arch, process, logger, folder, train_size, test_size, PRECISIONS[amp])


def configured(options: Options) -> tuple[str, tuple[int, int]]:
    """Returns the architecture and the size of training images that the configuration asks for."""
    cfg = options.config
    arch = models.canonical_name(cfg.MODEL.ARCH)
    return arch, to_2tuple(cfg.DATA.IMG_SIZE or models.default_image_size(arch))


def evaluate_only(options: Options, process: Process) -> None:
    """Evaluates the checkpoint that `--resume` names, in whichever form it is; the training set is not touched.

    Architecture, image size, classes and form are those of the checkpoint, where the user gives no others.
    """
    cfg = options.config
    checkpoint = read_checkpoint(cfg.MODEL.RESUME, ema=cfg.TEST.EMA)
    arch = cfg.MODEL.ARCH if "MODEL.ARCH" in options.given else None
    size = {"img_size": to_2tuple(cfg.DATA.IMG_SIZE)} if cfg.DATA.IMG_SIZE else {}
    network = build_from(checkpoint, arch, **size, **given_structure(cfg))
    with prepared(options, process, network.arch, network.image_size) as task:
        source = task.source("val")
        classes = len(source.classes)
        if classes != network.num_classes and network.num_classes != cfg.MODEL.NUM_CLASSES:
            raise ValueError(
                f"{checkpoint.path} is for {network.num_classes} classes, {cfg.DATA.DATA_PATH} has {classes}"
            )
        task.logger.info(f"{checkpoint}, {len(source)} images of {classes} classes")
        precision, model = autocast(process.device, task.dtype), task.place(network.model.float())
        result = evaluate(model, task.eval_batches(source), task.normalize(), process.device, precision)
        refuse_nonfinite(result.nonfinite, result.images)
        task.logger.info(f"* {result}")


def measure_throughput(options: Options, process: Process) -> None:
    """Times the network in its training structure, its deploy structure, and fused for inference."""
    with prepared(options, process, *configured(options)) as task:
        cfg = task.cfg
        model = task.build_model(cfg.MODEL.NUM_CLASSES or 1000).eval()
        images = torch.randn(cfg.DATA.BATCH_SIZE, 3, *task.test_size, device=process.device)
        precision = autocast(process.device, task.dtype)
        forms = [("training structure", model, images, precision)]
        if is_reparameterizable(model):
            forms.append(("deploy structure", to_deploy(model), images, precision))
        if isinstance(model, models.RepMLPNet):  # fused, it computes in the dtype of its weights
            dtype = task.dtype or images.dtype
            forms.append(("fused for inference", fuse_verified(model).to(dtype), images.to(dtype), nullcontext()))
        for name, network, inputs, context in forms:
            speed = throughput(compiled(network, cfg), inputs, context)
            task.logger.info(f"{task.arch} {name}, batch {len(images)}, {torch.get_num_threads()} threads: {speed}")


def train_batches(task: Task, source: data.ImageSource) -> tuple[DataLoader, data.TrainSampler]:
    """Shards the images of `train` over the processes; the sampler is set to where in which epoch to begin."""
    cfg, process = task.cfg, task.process
    loader = data.build_train_loader(
        source,
        data.train_transform(
            task.train_size,
            preset=cfg.AUG.PRESET,
            interpolation=cfg.DATA.INTERPOLATION,
            color_jitter=cfg.AUG.COLOR_JITTER,
            auto_augment=cfg.AUG.AUTO_AUGMENT,
        ),
        batch_size=cfg.DATA.BATCH_SIZE,
        num_workers=cfg.DATA.NUM_WORKERS,
        pin_memory=cfg.DATA.PIN_MEMORY,
        seed=cfg.SEED,
        rank=process.rank,
        world_size=process.world_size,
        fixed_shards=cfg.DATA.ZIP_MODE and cfg.DATA.CACHE_MODE == "part",
    )
    assert isinstance(loader.sampler, data.TrainSampler)
    return loader, loader.sampler


def build_mixing(task: Task, num_classes: int) -> data.Mixing | None:
    """Builds what is done to a whole batch: erasing, mixup, CutMix."""
    cfg = task.cfg
    return data.build_mixing(
        num_classes=num_classes,
        batch_size=cfg.DATA.BATCH_SIZE,
        mixup=cfg.AUG.MIXUP,
        cutmix=cfg.AUG.CUTMIX,
        cutmix_minmax=cfg.AUG.CUTMIX_MINMAX,
        prob=cfg.AUG.MIXUP_PROB,
        switch_prob=cfg.AUG.MIXUP_SWITCH_PROB,
        mode=cfg.AUG.MIXUP_MODE,
        label_smoothing=cfg.MODEL.LABEL_SMOOTHING,
        reprob=0.0 if cfg.AUG.PRESET is not None else cfg.AUG.REPROB,
        remode=cfg.AUG.REMODE,
        recount=cfg.AUG.RECOUNT,
        seed=cfg.SEED,
        rank=task.process.rank,
    )


def build_trainer(task: Task, model: nn.Module, derived: Derived, source: data.ImageSource) -> Trainer:
    """Puts together what takes part in an update."""
    cfg, process = task.cfg, task.process
    optimizer = build_optimizer(
        model,
        name=cfg.TRAIN.OPTIMIZER.NAME,
        lr=derived.lr,
        weight_decay=cfg.TRAIN.WEIGHT_DECAY,
        momentum=cfg.TRAIN.OPTIMIZER.MOMENTUM,
        betas=cfg.TRAIN.OPTIMIZER.BETAS,
        eps=cfg.TRAIN.OPTIMIZER.EPS,
    )
    schedule = build_schedule(
        optimizer,
        name=cfg.TRAIN.LR_SCHEDULER.NAME,
        total_updates=derived.total_updates,
        warmup_updates=derived.warmup_updates,
        warmup_lr=derived.warmup_lr,
        min_lr=derived.min_lr,
        decay_updates=derived.decay_updates,
        decay_rate=cfg.TRAIN.LR_SCHEDULER.DECAY_RATE,
        warmup_prefix=cfg.TRAIN.LR_SCHEDULER.WARMUP_PREFIX,
    )
    mixing = build_mixing(task, cast(int, model.num_classes))
    ema = None
    if cfg.TRAIN.EMA_ALPHA > 0:
        ema = ModelEma(
            model,
            alpha=cfg.TRAIN.EMA_ALPHA,
            period=cfg.TRAIN.EMA_UPDATE_PERIOD,
            global_batch=derived.global_batch,
            epochs=cfg.TRAIN.EPOCHS,
            warmup_updates=derived.warmup_updates,
        )
        task.logger.info(
            f"moving average of the weights: decay {ema.decay:.6g}, every {cfg.TRAIN.EMA_UPDATE_PERIOD} updates"
        )
    return Trainer(
        network=model,
        forward=wrap(model, cfg, process),
        criterion=build_loss(mixing is not None and mixing.soft_targets, cfg.MODEL.LABEL_SMOOTHING),
        optimizer=optimizer,
        schedule=schedule,
        normalize=task.normalize(),
        process=process,
        images=len(source),
        epochs=cfg.TRAIN.EPOCHS,
        updates_per_epoch=derived.updates_per_epoch,
        global_batch=derived.global_batch,
        logger=task.logger,
        metrics=MetricsWriter(None),
        mixing=mixing,
        ema=ema,
        dtype=task.dtype,
        accumulation=max(1, cfg.TRAIN.ACCUMULATION_STEPS),
        clip_grad=cfg.TRAIN.CLIP_GRAD,
        print_freq=cfg.PRINT_FREQ,
        seed=cfg.SEED,
        max_unreadable=cfg.DATA.MAX_UNREADABLE,
        max_skipped=cfg.TRAIN.MAX_SKIPPED,
        locate=source.locate,
    )


def compiled(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Compiles a network where asked."""
    return cast(nn.Module, torch.compile(model, mode=cfg.COMPILE_MODE)) if cfg.COMPILE else model


def check_compilation(cfg: CfgNode, process: Process) -> None:
    """Raises ValueError for what a compiled training does not go with on CPUs."""
    if not cfg.COMPILE or process.device.type != "cpu":
        return
    if cfg.CHANNELS_LAST:  # seen with torch 2.15: layouts that its compiler takes for others than they are
        raise ValueError("COMPILE computes wrong gradients with CHANNELS_LAST on CPUs: leave one of them away")
    if cfg.TRAIN.SYNC_BN and cfg.TRAIN.USE_CHECKPOINT and process.world_size > 1:
        raise ValueError(
            "COMPILE can't compute again what TRAIN.SYNC_BN interrupts on CPUs: leave it, TRAIN.SYNC_BN or "
            "TRAIN.USE_CHECKPOINT away"
        )


def wrap(model: nn.Module, cfg: CfgNode, process: Process) -> nn.Module:
    """Compiles a network where asked, and synchronises its gradients wherever there is more than one process.

    Raises:
        ValueError: settings that compilation does not go with.
    """
    check_compilation(cfg, process)
    # A static graph does not go with steps that leave the gradients alone.
    return data_parallel(compiled(model, cfg), process, static_graph=cfg.TRAIN.ACCUMULATION_STEPS <= 1)


def start_or_resume(task: Task, trainer: Trainer, checkpoints: CheckpointFolder) -> int:
    """Resumes from the run's own newest checkpoint, or the one that `--resume` names, or starts at START_EPOCH.

    Returns:
        The number of the last update whose record stays in `metrics.jsonl`.

    Raises:
        ValueError: the checkpoint is damaged, or of another experiment.
    """
    cfg, checkpoint = task.cfg, None
    if cfg.TRAIN.AUTO_RESUME:
        checkpoint = checkpoints.start(task.logger)
    else:
        distributed.from_main(checkpoints.clear_leftovers)
    if checkpoint is not None and cfg.MODEL.RESUME and not checkpoint.path.samefile(cfg.MODEL.RESUME):
        task.logger.warning(f"resuming from this run's own {checkpoint.path} instead of {cfg.MODEL.RESUME}")
    elif checkpoint is None and cfg.MODEL.RESUME:
        checkpoint = read_state(cfg.MODEL.RESUME)
        checkpoints.check_experiment(checkpoint)
    if checkpoint is None:
        trainer.progress.epoch = cfg.TRAIN.START_EPOCH
        trainer.progress.update = cfg.TRAIN.START_EPOCH * trainer.updates_per_epoch
        return trainer.progress.update
    recorded = restore(trainer, checkpoint)
    task.logger.info(f"resuming from {checkpoint.path}, update {trainer.progress.update}")
    changed = changed_settings(checkpoint.payload["config"], cfg) if "saved_as" in checkpoint.payload else []
    if changed:
        task.logger.warning(f"settings that have changed since: {', '.join(changed)}")
    if checkpoint.path.parent == task.folder:
        checkpoints.complete(checkpoint)
    return recorded


def load_pretrained_weights(task: Task, model: nn.Module) -> None:
    """Starts from the weights that `--pretrained` names, and logs which of the network's they leave as they are."""
    checkpoint = read_checkpoint(task.cfg.MODEL.PRETRAINED)
    if checkpoint.path.resolve().parent == task.folder.resolve():
        raise ValueError(f"{checkpoint.path} would be replaced by this run's own: give the run another --tag")
    fresh = load_pretrained(task.arch, model, checkpoint)
    new = f" but for {len(fresh)} tensors, which are new ({fresh[0]} ... {fresh[-1]})" if fresh else ""
    task.logger.info(f"starting from {checkpoint}{new}")


@torch.inference_mode()
def check_size(model: nn.Module, size: tuple[int, int], device: torch.device) -> None:
    """Fails, as the first evaluation would after an epoch, where a network does not take images of a size."""
    model.eval()(torch.zeros(1, 3, *size, device=device))
    model.train()


def evaluate_epoch(task: Task, trainer: Trainer, batches: DataLoader) -> tuple[bool, bool]:
    """Evaluates the epoch that has ended, its weights and their average; says of each whether it is the best so far."""
    progress = trainer.progress

    def top1(network: nn.Module, kind: str) -> float:
        precision = autocast(task.process.device, task.dtype)
        result = evaluate(network, batches, trainer.normalize, task.process.device, precision)
        level = logging.WARNING if result.nonfinite and task.process.is_main else logging.INFO
        task.logger.log(level, f"Epoch {progress.epoch - 1} {kind}: {result}")
        trainer.metrics.write(kind, progress.update, {"epoch": progress.epoch - 1, **result.as_dict()})
        return result.top1

    now, before = top1(trainer.network, "eval"), progress.best_top1
    progress.best_top1 = max(now, before)
    if trainer.ema is None:
        return now > before, False
    now_ema, before_ema = top1(trainer.ema.module, "eval_ema"), progress.best_ema_top1
    progress.best_ema_top1 = max(now_ema, before_ema)
    return now > before, now_ema > before_ema


def train(options: Options, process: Process) -> None:
    """Trains in a folder that no other run writes to."""
    with prepared(options, process, *configured(options), lock=True) as task, ExitStack() as stack:
        fit(task, stack)


def fit(task: Task, stack: ExitStack) -> None:
    """Trains, evaluates, saves and logs, epoch by epoch; the stack closes what is open at its end."""
    cfg, process, logger = task.cfg, task.process, task.logger
    train_source, val_source = task.source("train"), task.source("val")
    train_loader, train_sampler = train_batches(task, train_source)
    val_loader = task.eval_batches(val_source)
    model = task.build_model(task.num_classes(train_source, val_source))
    derived = derive(cfg, world_size=process.world_size, steps_per_epoch=len(train_loader))
    logger.info(f"{len(train_source)} training and {len(val_source)} validation images of {model.num_classes} classes")
    logger.info(f"{task.arch}, {sum(p.numel() for p in model.parameters()):,} parameters; {derived}")
    if task.test_size != task.train_size:
        check_size(model, task.test_size, process.device)
    if cfg.MODEL.PRETRAINED:
        load_pretrained_weights(task, model)
    cast(Any, model).set_grad_checkpointing(cfg.TRAIN.USE_CHECKPOINT)

    if cfg.TRAIN.SYNC_BN and process.world_size > 1:
        model = synchronise_batch_norms(model)
    stop = StopRequest()
    form = "train" if is_reparameterizable(model) else None
    meta = describe(task.arch, model, task.train_size, form, task.dataset)
    checkpoints = CheckpointFolder(task.folder, keep=cfg.KEEP_CHECKPOINTS, meta=meta, config=cfg.dump())
    trainer = build_trainer(task, model, derived, train_source)
    recorded = start_or_resume(task, trainer, checkpoints)
    if process.is_main:
        writer = MetricsWriter(task.folder, recorded, trainer.progress.epoch)
        trainer.metrics = stack.enter_context(closing(writer))
        dump_config(cfg, task.folder / "config.yaml")

    def after_update() -> bool:
        stopping = bool(stop.agreed())
        if stopping or (cfg.SAVE_STEPS and trainer.progress.update % cfg.SAVE_STEPS == 0):
            checkpoints.save(trainer)
        return stopping

    progress = trainer.progress
    if progress.epoch >= cfg.TRAIN.EPOCHS:
        logger.info(f"already complete: {progress.epoch} of {cfg.TRAIN.EPOCHS} epochs are done")
    for epoch in range(progress.epoch, cfg.TRAIN.EPOCHS):
        train_sampler.set_position(epoch, progress.consumed)
        bar = tqdm(train_loader, f"epoch {epoch}", leave=False, disable=None if process.is_main else True)
        if not trainer.train_epoch(bar, after_update):
            logger.info(f"stopping on request, state saved after update {progress.update}")
            raise Stopped(stop.number)
        if process.world_size > 1:
            for network in trainer.networks:
                distribute_bn(network, process.world_size, reduce=True)
        last = epoch + 1 == cfg.TRAIN.EPOCHS
        due = last or (epoch + 1) % cfg.EVAL_FREQ == 0
        best, best_ema = evaluate_epoch(task, trainer, val_loader) if due else (False, False)
        numbered = last or (epoch + 1) % cfg.SAVE_FREQ == 0
        checkpoints.save(trainer, numbered=numbered, best=best, best_ema=best_ema)
    logger.info(
        f"Best Acc@1 {progress.best_top1:.3f}; {len(trainer.unreadable)} unreadable images, "
        f"{progress.skipped} skipped updates; weights in {task.folder}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the mode that the command line asks for."""
    epilog = f"{cli.listing('architectures', models.list_models())}\n{EXAMPLES}"
    options = parse(argv, description=__doc__, epilog=epilog)
    cfg, process = options.config, distributed.init(options.local_rank)
    mode = measure_throughput if cfg.THROUGHPUT_MODE else evaluate_only if cfg.EVAL_MODE else train
    try:
        mode(options, process)
    except Exception as error:
        if not isinstance(error, Stopped):
            log_failure(logging.getLogger(NAME), error)
        raise
    finally:
        distributed.shutdown()


if __name__ == "__main__":
    cli.run(main)
