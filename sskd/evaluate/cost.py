"""What a network costs: parameters, arithmetic, and the time of a forward pass."""

from __future__ import annotations

import platform
import re
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sskd
from sskd.precision import exact

BATCH_SIZES = (1, 64)
WARM_UP = 3  # forward passes that are not timed
MOST_SECONDS = 10.0  # of the timed passes of a batch size


@dataclass(frozen=True)
class Latency:
    """The time of a forward pass: the median and the quartiles of ``repeats`` passes.

    ``images_per_second`` is the rate at the median.
    """

    batch_size: int
    repeats: int
    median_ms: float
    quartile1_ms: float
    quartile3_ms: float
    images_per_second: float


@dataclass(frozen=True)
class Machine:
    """What a latency depends on, beside the network."""

    device: str
    threads: int
    torch: str
    python: str
    sskd: str


@dataclass(frozen=True)
class Cost:
    """Parameters, arithmetic and latency of a network.

    ``flops`` and ``multiply_adds`` are those of one image; a multiply-add counts as 2 FLOPs.
    """

    parameters: int
    flops: int
    multiply_adds: int
    image_size_pixels: int
    latency: tuple[Latency, ...]
    machine: Machine


def measure_cost(network: nn.Module, image_size: int, device: torch.device, repeats: int) -> Cost:
    """Return the cost of ``network`` (on ``device``) for images [3, image_size, image_size].

    Its latency is measured with ``repeats`` passes, and not at all if that is 0.
    """
    flops = count_flops(network, torch.zeros(1, 3, image_size, image_size, device=device))
    batches = [_noise(size, image_size, device) for size in BATCH_SIZES] if repeats else []
    return Cost(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops=flops,
        multiply_adds=flops // 2,
        image_size_pixels=image_size,
        latency=tuple(measure_latency(network, batch, repeats) for batch in batches),
        machine=describe_machine(device),
    )


@torch.no_grad()  # in inference mode PyTorch hides the products of linear layers from the counter
def count_flops(network: nn.Module, x: Tensor) -> int:
    """Return the FLOPs of a forward pass on ``x``, as PyTorch's counter counts them.

    It counts convolutions and matrix products, with 2 FLOPs for a multiplication and an addition.
    It does not count BatchNorm, activations, pooling and the addition of shortcuts.
    """
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(x)
    return int(counter.get_total_flops())


@torch.inference_mode()
def measure_latency(network: nn.Module, batch: Tensor, repeats: int) -> Latency:
    """Time ``repeats`` forward passes on ``batch`` [B, 3, H, W], in float32 and in eval mode.

    Fewer passes are timed, but at least three, once ``MOST_SECONDS`` are over. A GPU has done its
    work before the clock is read.
    """
    network.eval()
    times: list[float] = []
    with exact(batch.device):
        for _ in range(WARM_UP):
            network(batch)
        while len(times) < repeats and (len(times) < 3 or sum(times) < 1000 * MOST_SECONDS):
            times.append(_milliseconds(network, batch))
    quartile1, median, quartile3 = (
        statistics.quantiles(times, n=4, method="inclusive") if times[1:] else times * 3
    )
    return Latency(
        batch_size=len(batch),
        repeats=len(times),
        median_ms=median,
        quartile1_ms=quartile1,
        quartile3_ms=quartile3,
        images_per_second=1000 * len(batch) / median,
    )


def describe_machine(device: torch.device) -> Machine:
    """Return what ``device`` is, with the number of threads and the versions of the software."""
    on_gpu = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_name(device) if on_gpu else f"{device.type} ({_processor()})",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        python=platform.python_version(),
        sskd=sskd.__version__,
    )


def _milliseconds(network: nn.Module, batch: Tensor) -> float:
    _synchronise(batch.device)
    start = time.perf_counter()
    network(batch)
    _synchronise(batch.device)
    return 1000 * (time.perf_counter() - start)


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def _noise(batch_size: int, image_size: int, device: torch.device) -> Tensor:
    """Return a batch of noise, channels last in memory, as batches of images are."""
    shape = (batch_size, 3, image_size, image_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(device, memory_format=torch.channels_last)


def _processor() -> str:
    """Return the model of the CPU, or its architecture if the system does not report it."""
    with suppress(OSError):  # not on Linux
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if found:
            return " ".join(found[1].split())
    return platform.machine()
