"""The device that a run computes on."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch
from torch import nn

from sskd.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device called ``name``: auto, cpu, cuda, cuda:1, mps.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
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
