"""The device that a run computes on."""

from __future__ import annotations

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
        torch.cuda.reset_peak_memory_stats(device)  # an earlier run of a sweep may have had more
    return device


def place(module: nn.Module, device: torch.device) -> None:
    """Move ``module`` to ``device``, its convolutions channels last in memory, as batches are."""
    module.to(device).to(memory_format=torch.channels_last)
