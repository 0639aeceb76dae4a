"""The share of the device's matrix-product rate that a training step reaches.

The FLOPs are those of matrix products and convolutions, by the direct algorithm. The rate is that
of square matrix products in the precision of the step, measured on the same device. Everything else
in a step (BatchNorm, ReLU, data, launches) takes time but adds no FLOPs, and so lowers the share.
So do the products that a bf16 or tf32 step computes in float32. The step must be eager, because a
compiled one runs operations that the counter does not see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import seconds_per_step
from sskd.precision import tf32

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"cpu": (512, 1024, 2048)}  # rows of the square matrices
GPU_SIZES = (2048, 4096, 8192)
SECONDS = 0.3  # spent on each size
MIN_CALLS = 3


def flop_share(
    step: Callable[[], object], seconds: float, device: torch.device, precision: str
) -> float:
    """Return the FLOP/s of ``step``, which takes ``seconds``, over the matrix-product rate."""
    with tf32(convolutions=False, products=precision == "tf32"):
        rate = matrix_rate(device, DTYPES[precision])
    return count_flops(step) / seconds / rate


def count_flops(step: Callable[[], object]) -> int:
    """Run ``step`` once and return its FLOPs, two for a multiplication with its addition.

    PyTorch's formula for the backward pass of a grouped convolution counts the gradient of the
    weight as if there were no groups. The pairs that the benchmarks measure by default have no
    grouped convolutions; do not trust the share of MobileNetV2 and the ShuffleNets.
    """
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def matrix_rate(
    device: torch.device, dtype: torch.dtype, sizes: Sequence[int] | None = None
) -> float:
    """Return the best FLOP/s of square matrix products over ``sizes``.

    On a CPU it uses the current number of threads, on a GPU the current setting of TF32. Nothing
    else may run on the device meanwhile.
    """
    return max(_rate(device, dtype, n) for n in sizes or SIZES.get(device.type, GPU_SIZES))


def _rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Return the FLOP/s of the fastest of several products: other work only ever slows one."""
    left, right, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(seconds) < MIN_CALLS or time.perf_counter() < end:
        # Into an allocated tensor: mapping new pages would take a CPU time.
        seconds.append(seconds_per_step(lambda: torch.mm(left, right, out=out), device))
    return 2 * size**3 / min(seconds)
