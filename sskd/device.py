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
from torch import nn

from sskd.errors import UserError

_PLACES: list[FileLock] = []  # kept, for a lock that is forgotten is let go


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``: auto, cpu, cuda, cuda:1, mps.

    ``auto`` is a GPU where there is one: of several, the one with the fewest of the user's
    processes, so that the cells of a sweep spread.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = f"cuda:{least_used_gpu()}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"device={name}: there is no such device here; use device=auto or device=cpu"
        )
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return device


@functools.cache  # a process stays where it is
def least_used_gpu() -> int:
    """Return the visible GPU that the fewest processes of the suite have chosen, and choose it.

    A process holds a place on its GPU, a lock that the system frees when it ends: first places
    on all GPUs are taken before a second on any.
    """
    count = torch.cuda.device_count()
    if count < 2:
        return 0
    places = ((index, place) for place in itertools.count() for index in range(count))
    return next(index for index, place in places if _take_place(index, place))


def _take_place(index: int, place: int) -> bool:
    folder = Path(tempfile.gettempdir(), f"sskd-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    # What is visible differs between processes, so that a number alone says too little.
    gpu = torch.cuda.get_device_properties(index).uuid
    lock = FileLock(folder / f"{gpu}-{place}", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _PLACES.append(lock)
    return True


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of ``peak_memory``: an earlier run of a sweep may have had more."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in MiB since ``reset_peak_memory``; None where nothing tells.

    On a GPU what PyTorch allocated there, on a CPU what the whole process kept in memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        return int(found[1]) / 2**10 if found and device.type == "cpu" else None
    return None


def place(module: nn.Module, device: torch.device) -> None:
    """Move ``module`` to ``device``, its convolutions channels last in memory, as batches are."""
    module.to(device).to(memory_format=torch.channels_last)
