"""A few updates of a training under torch's profiler: a trace, what the GPU's memory held, the costly operators."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from utils import distributed
from utils.memory import clear_about_memory

from .run import Run, open_log, run_folder
from .train import build_network, build_trainer, ways_to_need_less

# Updates: the first ones allocate, tune and compile; the profiler's own start is slow, and is left out too.
WAIT, WARMUP, ACTIVE = 3, 2, 3
MEMORY_EVENTS = 100_000  # of the allocator, in the snapshot, each with the Python code behind it; earlier ones are lost
ROWS = 20  # of the table


def profile_training(run: Run) -> None:
    """Trains for a few updates, of which it writes and prints a profile; the training itself is not saved.

    Every process writes `rank<r>.pt.trace.json.gz`, for TensorBoard, Perfetto and chrome://tracing, and on a GPU
    `rank<r>.memory.pickle`, for https://pytorch.org/memory_viz, to a new folder `profile<n>` in that of the run.
    """
    cfg, task, rank = run.cfg, run.task, run.rank_info.rank
    with open_log(run, task.arch) as logger:
        if cfg.MODEL.RESUME:
            logger.warning("MODEL.RESUME is ignored: a profile is of a new training")
        loader = task.train_loader()
        network, _ = build_network(run, None, logger)
        trainer = build_trainer(run, network, loader, logger)
        cuda = run.rank_info.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        profiler = profile(
            activities=activities, schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE), record_shapes=True
        )
        updates = trainer.progress.update + WAIT + WARMUP + ACTIVE

        def after_update() -> bool:
            done = trainer.progress.update == updates
            if not done:
                profiler.step()
            return done

        if cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")
        with clear_about_memory(ways_to_need_less(run)), profiler:
            loader.set_position(trainer.progress.epoch)
            while trainer.train_epoch(loader, after_update):
                loader.set_position(trainer.progress.epoch)
            if cuda:  # the trace ends with what the device still has to do
                torch.cuda.synchronize(run.rank_info.device)
        folder = distributed.broadcast_from_rank0(lambda: _new_folder(run_folder(cfg, task.arch)))
        profiler.export_chrome_trace(str(folder / f"rank{rank}.pt.trace.json.gz"))
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"rank{rank}.memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        if run.rank_info.is_main:
            by = "self_device_time_total" if cuda else "self_cpu_time_total"
            print(profiler.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=60))
        distributed.barrier()
        logger.info(f"profile of updates {updates - ACTIVE} to {updates - 1} in {folder}")


def _new_folder(parent: Path) -> Path:
    """Makes `profile0`, or the first of the following names that is free."""
    number = 0
    while (folder := parent / f"profile{number}").exists():
        number += 1
    folder.mkdir()
    return folder
