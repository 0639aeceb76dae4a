"""The device that a run computes on."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from sskd.errors import UserError

# mallopt(3): M_MMAP_MAX, no block outside the heap; M_TRIM_THRESHOLD and M_TOP_PAD, in bytes.
_MALLOC_OPTIONS = {-4: 0, -1: 2**31 - 1, -2: 2**26}
_HEAP = 3 * 2**29  # bytes, less than M_TRIM_THRESHOLD, so that they stay the heap's
_LARGE_PAGE = 2**21  # bytes
_MADV_HUGEPAGE = 14  # madvise(2)

_INFERENCE_BATCH = {"cpu": 64}

_gpu_claims: list[FileLock] = []  # kept, for a lock that is forgotten is let go


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``: auto, cpu, cuda, cuda:1, mps.

    ``auto`` is a GPU where there is one: of several, the one with the fewest of the user's
    processes, so that the cells of a sweep spread.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = f"cuda:{claim_gpu()}" if torch.cuda.is_available() else "cpu"
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
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def best_precision(device: str) -> str:
    """Return ``bf16`` if the device of that name multiplies in it, else ``fp32``."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "bf16" if _HAS_BF16.get(device.partition(":")[0], lambda: False)() else "fp32"


def _cpu_has_bf16() -> bool:
    tell = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.10 and later have it
    known: Mapping[str, Any] = tell()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


_HAS_BF16: dict[str, Callable[[], bool]] = {
    "cpu": _cpu_has_bf16,
    "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
}


@functools.cache
def _keep_freed_memory() -> None:
    """Let the C library keep the memory of tensors that are freed, for those of the next step.

    By default glibc gives large blocks back to the system, which hands them out again filled
    with zeros, page by page: a tenth of a step of SSKD (benchmarks/LOG.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC_OPTIONS.items():
            set_option(option, value)
    _ask_for_large_pages()


def _ask_for_large_pages() -> None:
    """Let the heap that tensors will take stand on pages of 2 MiB, where Linux has such.

    A step of SSKD or KD then takes some 5 % less (benchmarks/LOG.md). Nothing is taken before it
    is used.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        allocate, advise = library.malloc, library.madvise
        allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if block := allocate(_HEAP):
            first = -(-block // _LARGE_PAGE) * _LARGE_PAGE
            advise(first, _HEAP - _LARGE_PAGE, _MADV_HUGEPAGE)
            library.free(block)


@functools.cache  # a process stays where it is
def claim_gpu() -> int:
    """Return the visible GPU that the fewest processes of the suite have chosen, and choose it.

    A process holds a place on its GPU, a lock that the system frees when it ends: first places
    on all GPUs are taken before a second on any.
    """
    count = torch.cuda.device_count()
    if count < 2:
        return 0
    places = ((index, place) for place in itertools.count() for index in range(count))
    return next(index for index, to_device in places if _claim(index, to_device))


def _claim(index: int, place: int) -> bool:
    folder = Path(tempfile.gettempdir(), f"sskd-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    # What is visible differs between processes, so that a number alone says too little.
    gpu = torch.cuda.get_device_properties(index).uuid
    lock = FileLock(folder / f"{gpu}-{place}", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    _gpu_claims.append(lock)
    return True


def reset_peak_memory(device: torch.device) -> None:
    """Begin a new measurement of ``peak_memory``: an earlier run of a sweep may have had more."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # what is kept though it is free
    if device.type == "cpu":
        _ask_for_large_pages()  # for what comes in the place of what was trimmed
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in MiB since ``reset_peak_memory``; None where nothing tells.

    On a GPU what PyTorch allocated there, on a CPU what the whole process kept in memory, with the
    pages that it read of a mapped file (``sskd.teachers.outputs``), which other processes may
    share.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        return int(found[1]) / 2**10 if found and device.type == "cpu" else None
    return None


def inference_batch_size(device: torch.device) -> int:
    """Return how many images to give a network at once when nothing is learnt.

    As many maps as a CPU's caches hold; on a GPU enough to keep it busy.
    """
    return _INFERENCE_BATCH.get(device.type, 500)


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Split a batch [N, ...] into even parts of at most ``inference_batch_size``."""
    return x.chunk(-(-len(x) // inference_batch_size(x.device)))


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move ``module`` to ``device``, its convolutions channels last in memory, as batches are."""
    module.to(device).to(memory_format=torch.channels_last)
