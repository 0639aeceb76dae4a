"""Random seeds that depend on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def derive_seed(*purpose: int | str) -> int:
    """Return a seed in [0, 2^63) for ``purpose``, such as ``(seed, phase, epoch, "batches")``.

    Each purpose has a stream of its own, so that work which is skipped (a reused first
    phase, the epochs before a checkpoint) shifts nothing that comes after it.
    """
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_torch(*purpose: int | str) -> None:
    """Seed PyTorch's own generators (weights, dropout) for ``purpose``."""
    torch.manual_seed(derive_seed(*purpose))


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of PyTorch's own generators on the CPU and on ``device``."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generator_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set PyTorch's own generators to ``states``, that of another kind of device left out."""
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.cuda.set_rng_state(states["cuda"], device)
