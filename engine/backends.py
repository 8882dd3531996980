"""What torch's backends may do in this process: TF32, determinism, the choice of convolutions, how GPU memory grows."""

import os

import torch
from yacs.config import CfgNode

# The second name is the older one; torch reads both.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_up(cfg: CfgNode) -> None:
    """Applies the settings of a run; before anything uses a GPU, since memory and cuBLAS are set up once."""
    if cfg.EXPANDABLE_SEGMENTS and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if cfg.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
        torch.use_deterministic_algorithms(True)
    set_tf32(cfg.TF32)
    torch.backends.cudnn.benchmark = _chooses_convolutions(cfg)


def set_tf32(allowed: bool) -> None:
    """Sets whether a GPU may round the factors of float32 products and convolutions to TF32, 10 bits of mantissa.

    By the older of torch's two interfaces, which must not be mixed: the newer one, `fp32_precision`, follows it, but
    not the other way round.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def describe(cfg: CfgNode) -> str:
    """Returns what `set_up` has set for a GPU, in one line."""
    chooses = "on" if _chooses_convolutions(cfg) else "off"
    overruled = ", by DETERMINISTIC" if cfg.CUDNN_BENCHMARK and cfg.DETERMINISTIC else ""
    memory = next((f"{name} {os.environ[name]}" for name in ALLOCATOR_VARIABLES if name in os.environ), "default")
    return f"TF32 {'on' if cfg.TF32 else 'off'}, cuDNN benchmark {chooses}{overruled}, allocator: {memory}"


def _chooses_convolutions(cfg: CfgNode) -> bool:
    return bool(cfg.CUDNN_BENCHMARK) and not cfg.DETERMINISTIC
