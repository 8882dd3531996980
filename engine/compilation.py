"""Whether the network is compiled for training, and the trial that a compiler has to pass before the first update."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from utils import distributed
from utils.distributed import RankInfo
from utils.seed import keyed_rng

from .precision import PRECISIONS, autocast

AUTO = "auto"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")

# Whether a compiled update was measured to be faster than an eager one, by kind of device (`kind_of`) and precision (a
# key of `PRECISIONS`); COMPILE auto compiles where this says so, and nowhere else. An entry needs the command and its
# result in docs/performance.md: `python -m benchmarks.training --compile --device cuda`, where the compiled row is
# faster by more than the rounds differ, and a training whose loss is that of the eager one. No GPU was measured yet.
GAINS: dict[tuple[str, str], bool] = {
    ("cpu", "off"): False,
    ("cpu", "bf16"): False,
}

# With CUDA graphs, a first pass warms up, a second one records, and a third one replays.
TRIAL_PASSES = 3


def kind_of(device: torch.device) -> str:
    """Returns what decides whether compilation gains: `cpu`, or `cuda 9.0`, with the compute capability."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def compile_network(network: nn.Module, cfg: CfgNode) -> nn.Module:
    """Compiles a network in the mode COMPILE_MODE."""
    return cast(nn.Module, torch.compile(network, mode=cfg.COMPILE_MODE))


def compile_for_training(
    network: nn.Module,
    cfg: CfgNode,
    rank_info: RankInfo,
    precision: str,
    shape: tuple[int, int, int, int],
    logger: logging.Logger,
) -> nn.Module:
    """Compiles a network as COMPILE says, and logs what that is; a collective operation.

    The compiler is tried before anything else uses the network, so that a failure shows here and not within an update.
    The trial leaves nothing behind: no gradient, statistic or random number.

    Args:
        network: on the device, in training mode; not yet wrapped for several processes.
        cfg: the configuration.
        rank_info: of this process.
        precision: of the forward pass, a key of `PRECISIONS`.
        shape: of a training batch, (N, C, H, W).
        logger: gets a line.

    Returns:
        The compiled network; with COMPILE auto the given one where no gain is known, or where the compiler fails in
        any process.

    Raises:
        ValueError: COMPILE is true, and does not work with another setting, or the compiler fails in any process.
    """
    if cfg.COMPILE == AUTO:
        reason = _why_not(cfg, rank_info, precision)
        if reason:
            logger.info(f"COMPILE auto: not compiled, {reason}")
            return network
    elif not cfg.COMPILE:
        return network
    _check(cfg, rank_info)
    compiled = compile_network(network, cfg)
    if _synchronises(cfg, rank_info):  # in a trial, the other processes would wait for one whose compiler fails
        logger.info(f"COMPILE true: compiles in the first update, mode {cfg.COMPILE_MODE}")
        return compiled
    failures = distributed.gather_objects(_try_out(compiled, network, precision, shape))
    failed = [f"rank {rank}: {failure}" for rank, failure in enumerate(failures) if failure]
    if failed and cfg.COMPILE != AUTO:
        raise ValueError(f"COMPILE true: the compiler failed ({failed[0]}); mend the compiler, or set COMPILE false")
    if failed or rank_info.world_size > 1:
        # Within DistributedDataParallel another graph is compiled, cut where gradients can be sent early.
        torch.compiler.reset()
    if failed:
        logger.warning(f"COMPILE auto: not compiled, the compiler failed ({failed[0]})")
        return network
    logger.info(f"COMPILE {str(cfg.COMPILE).lower()}: compiled, mode {cfg.COMPILE_MODE}")
    return compiled


def _synchronises(cfg: CfgNode, rank_info: RankInfo) -> bool:
    """Returns whether the processes wait for each other in a forward pass."""
    return bool(cfg.TRAIN.SYNC_BN) and rank_info.world_size > 1


def _why_not(cfg: CfgNode, rank_info: RankInfo, precision: str) -> str:
    """Returns why COMPILE auto does not try the compiler; empty if it does."""
    kind = kind_of(rank_info.device)
    gains = GAINS.get((kind, precision))
    if not gains:
        shown = "was no faster" if gains is False else "has not been measured"
        return f"it {shown} on {kind} with AMP {precision}"
    return "TRAIN.SYNC_BN leaves no way to try the compiler first" if _synchronises(cfg, rank_info) else ""


def _check(cfg: CfgNode, rank_info: RankInfo) -> None:
    """Raises ValueError for settings that do not work with compilation on CPUs."""
    if rank_info.device.type == "cpu" and _synchronises(cfg, rank_info) and cfg.TRAIN.USE_CHECKPOINT:
        raise ValueError(
            "COMPILE does not work with both TRAIN.SYNC_BN and TRAIN.USE_CHECKPOINT on CPUs: turn one of the three off"
        )


def _try_out(compiled: nn.Module, network: nn.Module, precision: str, shape: tuple[int, int, int, int]) -> str:
    """Runs forward and backward passes without effect; returns why the compiler failed, in one line, or nothing."""
    weight = next(network.parameters())
    device, images = weight.device, torch.zeros(shape, dtype=weight.dtype, device=weight.device)
    try:
        with without_effect(network), keyed_rng(0), torch.random.fork_rng([device] if images.is_cuda else []):
            for _ in range(TRIAL_PASSES):
                with autocast(device, PRECISIONS[precision]):
                    outputs = compiled(images)
                _total(outputs).backward()
                network.zero_grad(set_to_none=True)  # a CUDA graph writes them to the same memory every time
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ImportError) as error:  # what compilers raise has no narrower type in common
        return _one_line(error)
    return ""


def _total(outputs: Any) -> Tensor:
    """Returns the sum of a tensor, or of each of a tuple."""
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([tensor.float().sum() for tensor in tensors]).sum()


def _one_line(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


@contextmanager
def without_effect(module: nn.Module) -> Iterator[None]:
    """At the end, restores the buffers of a module and drops its gradients."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        module.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)
