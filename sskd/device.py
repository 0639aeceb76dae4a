"""The device that a run computes on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from sskd.allocator import ask_for_large_pages, keep_freed_memory, trim_heap
from sskd.distributed.environment import local_rank, local_ranks, world_size
from sskd.errors import UserError, one_line
from sskd.turns import shares_process

# Batch sizes of forward passes without gradients: on a CPU the feature maps fit the caches, on a
# GPU the batch keeps it busy.
_INFERENCE_BATCH_SIZE = {"cpu": 64}
_GPU_BATCH_SIZE = 500
# Images whose vectors are copied to the host and written together. A GPU computes 500 in a few
# milliseconds, and each copy and each write has a cost of its own.
_OUTPUTS_AT_ONCE = {"cpu": 64}
_GPU_OUTPUTS_AT_ONCE = 4000

_gpu_claims: list[FileLock] = []  # referenced, because a garbage-collected lock is released


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``: auto, cpu, cuda, cuda:1, mps.

    ``auto`` is a GPU if there is one: of several, the one with the fewest processes of the user,
    so that the jobs of a sweep spread over them, and of several ranks its own.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        name = f"cuda:{_own_gpu()}" if torch.cuda.is_available() else "cpu"
    elif world_size() > 1 and name != "cpu":
        raise UserError(
            f"device={name}: torchrun's processes cannot share one device; use device=auto or "
            "device=cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except torch.OutOfMemoryError as error:
        reason = one_line(error)
        raise UserError(
            f"device={name}: has no free memory ({reason}); use another device"
        ) from None
    except (RuntimeError, AssertionError, NotImplementedError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"device={name}: there is no such device here; use device=auto or device=cpu"
        )
    return device


def tune_device(device: torch.device) -> None:
    """Change the process's settings so that training on ``device`` is faster."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        keep_freed_memory()


def _own_gpu() -> int:
    """Return the GPU of this process: of torchrun's processes, each has one."""
    if world_size() == 1:
        return claim_gpu()
    gpus, processes = torch.cuda.device_count(), local_ranks()
    if processes > gpus:
        raise UserError(
            f"torchrun has started {processes} processes, and this machine has {gpus} GPUs; use "
            f"--nproc_per_node={gpus}, or device=cpu"
        )
    return local_rank()


@functools.cache  # a process stays on its GPU
def claim_gpu() -> int:
    """Claim the visible GPU with the fewest claims and return its index.

    A claim is a lock file that the system releases when its process ends. Each GPU gets a first
    claim before any gets a second.
    """
    count = torch.cuda.device_count()
    if count < 2:
        return 0
    claims = ((index, number) for number in itertools.count() for index in range(count))
    return next(index for index, number in claims if _claim(index, number))


def _claim(index: int, number: int) -> bool:
    folder = Path(tempfile.gettempdir(), f"sskd-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    # An index names different GPUs in processes that see different ones.
    gpu = torch.cuda.get_device_properties(index).uuid
    lock = FileLock(folder / f"{gpu}-{number}", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _gpu_claims.append(lock)
    return True


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of ``peak_memory``; an earlier run of a sweep may have used more."""
    reset_peak_gpu_memory(device)
    trim_heap()
    if device.type == "cpu":
        ask_for_large_pages()  # again, for the memory that is allocated next
    with contextlib.suppress(OSError):  # not on Linux
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def reset_peak_gpu_memory(device: torch.device) -> None:
    """Start a new measurement on an NVIDIA GPU; on another ``device`` this does nothing.

    cuDNN tries its algorithms in the first steps (``torch.backends.cudnn.benchmark``), some with
    workspaces that are larger than what training needs. A new measurement after these steps does
    not count them. It counts a CUDA graph if it starts before the capture.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in MiB since the last reset, or None if it is not reported.

    On a GPU it is the memory that PyTorch allocated there. On a CPU it is the resident memory of
    the process, with the pages of mapped files (``sskd.teachers.outputs``), which other processes
    may share. It is not reported if several jobs share the process.
    """
    if shares_process():
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        return int(found[1]) / 2**10 if found and device.type == "cpu" else None
    return None


def inference_batch_size(device: torch.device) -> int:
    """Return how many images to give a network at once without a backward pass."""
    return _INFERENCE_BATCH_SIZE.get(device.type, _GPU_BATCH_SIZE)


def outputs_at_once(device: torch.device) -> int:
    """Return for how many images to compute vectors before they are copied to the host."""
    return _OUTPUTS_AT_ONCE.get(device.type, _GPU_OUTPUTS_AT_ONCE)


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Split a batch [N, ...] into even parts of at most ``inference_batch_size``."""
    return x.chunk(-(-len(x) // inference_batch_size(x.device)))


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move ``module`` to ``device``, its convolutions channels last in memory, as batches are."""
    module.to(device).to(memory_format=torch.channels_last)
