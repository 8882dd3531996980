"""Images per second of a forward pass."""

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from logging import Logger

import torch
from torch import Tensor, nn

from models.folding import count_batch_norms, fold_verified
from models.fusion import fuse_verified, is_fusible
from models.reparam import is_reparameterizable, to_deploy
from utils.memory import clear_about_memory

from .compilation import compile_network
from .precision import autocast
from .run import Run, open_log
from .task import Size


@clear_about_memory("lower DATA.BATCH_SIZE")
def measure_throughput(run: Run) -> None:
    """Times a network with fresh weights: in training structure, in deploy structure, and without BatchNorms.

    RepMLPNet and RepMLP-ResNet are fused for inference; in other networks, BatchNorms are folded into convolutions.
    """
    cfg, task, device = run.cfg, run.task, run.rank_info.device
    with open_log(run, task.arch) as logger:
        if cfg.MODEL.RESUME:
            logger.warning("MODEL.RESUME is ignored: speed is measured with fresh weights")
        pretrained = task.read_pretrained()
        network = run.place(task.build_network(task.num_outputs(), pretrained)).eval()
        size = task.test_size(task.train_size) or task.train_size
        images = torch.randn(cfg.DATA.BATCH_SIZE, task.channels, *size, device=device)
        precision = autocast(device, run.dtype)
        structure = "deploy structure" if task.is_converted(pretrained) else "training structure"
        forms = [(structure, network, images, precision)]
        if is_reparameterizable(network):
            forms.append(("deploy structure", to_deploy(network), images, precision))
        if is_fusible(network):  # fused, it computes in the dtype of its weights
            dtype = run.dtype or images.dtype
            forms.append(("fused for inference", fuse_verified(network).to(dtype), images.to(dtype), nullcontext()))
        elif count_batch_norms(forms[-1][1]):
            forms += [(*form, images, precision) for form in _folded(*forms[-1][:2], size, logger)]
        for name, form, inputs, context in forms:
            timed = compile_network(form, cfg) if cfg.COMPILE is True else form
            speed = throughput(timed, inputs, context)
            logger.info(f"{task.arch} {name}, batch {len(images)}, {torch.get_num_threads()} threads: {speed}")


def _folded(name: str, network: nn.Module, size: Size, logger: Logger) -> list[tuple[str, nn.Module]]:
    """Returns the name and network of the form with folded BatchNorms, or nothing, and logs why."""
    try:
        folded = fold_verified(network, size)
    except ValueError as error:
        logger.warning(f"{error}; it is timed as it is")
        return []
    before, after = count_batch_norms(network), count_batch_norms(folded)
    if before == after:
        logger.info(f"none of the {before} BatchNorms reads a convolution alone: they can't be folded")
        return []
    return [(f"{name}, {before - after} of {before} BatchNorms folded", folded)]


@dataclass(frozen=True)
class Throughput:
    """Median over the timed batches, with the fastest and the slowest."""

    images_per_second: float
    slowest: float
    fastest: float

    def __str__(self) -> str:
        return f"{self.images_per_second:.1f} img/s (slowest {self.slowest:.1f}, fastest {self.fastest:.1f})"


@torch.inference_mode()
def throughput(
    model: nn.Module, images: Tensor, autocast: AbstractContextManager, warmup: int = 3, repeats: int = 10
) -> Throughput:
    """Times single forward passes.

    Args:
        model: in evaluation mode, on the device of `images`.
        images: (N, C, H, W).
        autocast: precision of the forward pass.
        warmup: untimed passes, for caches, autotuning and compilation.
        repeats: timed passes.
    """

    def seconds() -> float:
        start = time.perf_counter()
        with autocast:
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start

    for _ in range(warmup):
        seconds()
    rates = [len(images) / seconds() for _ in range(repeats)]
    return Throughput(statistics.median(rates), min(rates), max(rates))
