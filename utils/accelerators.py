"""What the usual GPUs can do at most, from the data sheets of their maker."""

from dataclasses import dataclass

GB = 10**9
GIB = 2**30  # the data sheets write GB for the capacity of a memory, too


@dataclass(frozen=True)
class Accelerator:
    """A GPU at its boost clock.

    Attributes:
        name: as CUDA calls the device, without the maker and the family.
        bf16: dense matrix products with inputs in bfloat16 that accumulate in float32, in TFLOP/s.
        fp16: the same in float16.
        tf32: the same in float32 with TF32 allowed.
        fp32: the same in float32.
        bandwidth: of its memory, in bytes/s.
        memory: its size in bytes; a program gets a few per cent less.
    """

    name: str
    bf16: float
    fp16: float
    tf32: float
    fp32: float
    bandwidth: float
    memory: int

    def peak(self, precision: str) -> float:
        """Returns the TFLOP/s of `bf16`, `fp16`, `tf32` or `fp32`."""
        return {"bf16": self.bf16, "fp16": self.fp16, "tf32": self.tf32, "fp32": self.fp32}[precision]


# From NVIDIA's data sheets, and for GeForce and RTX from the appendices of the GA102, AD102 and RTX Blackwell white
# papers. Where a sheet gives tensor cores with sparsity alone, as for Hopper and Blackwell, half of that. GeForce cards
# accumulate in float32 at half of the advertised float16 rate. Volta and Turing have no bfloat16 and no TF32: torch
# computes both in float32 there, and the figures say so.
ACCELERATORS = (
    #            name                          bf16   fp16   tf32   fp32       bandwidth        memory
    Accelerator("GB200", 2500.0, 2500.0, 1250.0, 80.0, 8000 * GB, 186 * GIB),
    Accelerator("B200", 2250.0, 2250.0, 1125.0, 75.0, 7700 * GB, 180 * GIB),
    Accelerator("GH200 480GB", 989.4, 989.4, 494.7, 66.9, 4000 * GB, 96 * GIB),
    Accelerator("H200", 989.4, 989.4, 494.7, 66.9, 4800 * GB, 141 * GIB),
    Accelerator("H200 NVL", 835.5, 835.5, 417.5, 60.0, 4800 * GB, 141 * GIB),
    Accelerator("H100 80GB HBM3", 989.4, 989.4, 494.7, 66.9, 3350 * GB, 80 * GIB),  # SXM
    Accelerator("H100 NVL", 835.5, 835.5, 417.5, 60.0, 3900 * GB, 94 * GIB),
    Accelerator("H100 PCIe", 756.0, 756.0, 378.0, 51.2, 2000 * GB, 80 * GIB),
    Accelerator("A100-SXM4-80GB", 312.0, 312.0, 156.0, 19.5, 2039 * GB, 80 * GIB),
    Accelerator("A100-SXM4-40GB", 312.0, 312.0, 156.0, 19.5, 1555 * GB, 40 * GIB),
    Accelerator("A100 80GB PCIe", 312.0, 312.0, 156.0, 19.5, 1935 * GB, 80 * GIB),
    Accelerator("A100-PCIE-40GB", 312.0, 312.0, 156.0, 19.5, 1555 * GB, 40 * GIB),
    Accelerator("A40", 149.7, 149.7, 74.8, 37.4, 696 * GB, 48 * GIB),
    Accelerator("A30", 165.0, 165.0, 82.0, 10.3, 933 * GB, 24 * GIB),
    Accelerator("A10", 125.0, 125.0, 62.5, 31.2, 600 * GB, 24 * GIB),
    Accelerator("A10G", 70.0, 70.0, 35.0, 35.0, 600 * GB, 24 * GIB),
    Accelerator("L40S", 362.0, 362.0, 183.0, 91.6, 864 * GB, 48 * GIB),
    Accelerator("L40", 181.0, 181.0, 90.5, 90.5, 864 * GB, 48 * GIB),
    Accelerator("L4", 121.0, 121.0, 60.0, 30.3, 300 * GB, 24 * GIB),
    Accelerator("V100-SXM2-32GB", 15.7, 125.0, 15.7, 15.7, 900 * GB, 32 * GIB),
    Accelerator("V100-SXM2-16GB", 15.7, 125.0, 15.7, 15.7, 900 * GB, 16 * GIB),
    Accelerator("V100-PCIE-32GB", 14.0, 112.0, 14.0, 14.0, 900 * GB, 32 * GIB),
    Accelerator("V100-PCIE-16GB", 14.0, 112.0, 14.0, 14.0, 900 * GB, 16 * GIB),
    Accelerator("V100S-PCIE-32GB", 16.4, 130.0, 16.4, 16.4, 1134 * GB, 32 * GIB),
    Accelerator("T4", 8.1, 65.0, 8.1, 8.1, 320 * GB, 16 * GIB),
    Accelerator("RTX 6000 Ada Generation", 364.2, 364.2, 182.1, 91.1, 960 * GB, 48 * GIB),
    Accelerator("RTX A6000", 154.8, 154.8, 77.4, 38.7, 768 * GB, 48 * GIB),
    Accelerator("RTX A5000", 111.1, 111.1, 55.6, 27.8, 768 * GB, 24 * GIB),
    Accelerator("RTX 5090", 209.5, 209.5, 104.8, 104.8, 1792 * GB, 32 * GIB),
    Accelerator("RTX 4090", 165.2, 165.2, 82.6, 82.6, 1008 * GB, 24 * GIB),
    Accelerator("RTX 3090 Ti", 80.0, 80.0, 40.0, 40.0, 1008 * GB, 24 * GIB),
    Accelerator("RTX 3090", 71.0, 71.0, 35.6, 35.6, 936 * GB, 24 * GIB),
)
_MAKER_AND_FAMILY = ("NVIDIA ", "GeForce ", "Tesla ")


def find(device_name: str) -> Accelerator | None:
    """Returns the row of a device by its name in CUDA; None for one that is not listed, a part of one (MIG) included.

    Args:
        device_name: of `torch.cuda.get_device_name`, such as `NVIDIA H100 80GB HBM3` or `Tesla V100-SXM2-32GB`.
    """
    name = device_name
    for prefix in _MAKER_AND_FAMILY:
        name = name.removeprefix(prefix)
    return next((row for row in ACCELERATORS if row.name == name), None)
