"""Random seeds that depend on what they are for, and on nothing else."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def derive_seed(*purpose: int | str) -> int:
    """Return a seed in [0, 2^63) for ``purpose``, such as ``(seed, stage, epoch, "batches")``.

    Each purpose has a stream of its own, so that work which is skipped (a reused first
    phase, the epochs before a checkpoint) shifts nothing that comes after it.
    """
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*purpose: int | str) -> None:
    """Seed PyTorch's own generators (weights, dropout) for ``purpose``."""
    torch.manual_seed(derive_seed(*purpose))


def generator_states() -> dict[str, Any]:
    """Return the states of PyTorch's own generators, for a checkpoint."""
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_generator_states(states: dict[str, Any]) -> None:
    """Set PyTorch's own generators to ``states``; those of absent devices are passed over.

    The states may have been loaded to any device; PyTorch takes them from the CPU.
    """
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
