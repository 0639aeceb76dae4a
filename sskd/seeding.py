"""Random seeds that depend only on what they are used for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch


def seed_from_text(text: str) -> int:
    """Return the first 63 bits of the SHA-256 of ``text``."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def derive_seed(*purpose: int | str) -> int:
    """Return a seed in [0, 2^63) for ``purpose``, for example ``(seed, phase, epoch, "batches")``.

    Each purpose has its own random stream. Skipped work (a reused first phase, the epochs before
    a checkpoint) therefore does not shift the random numbers of later work.
    """
    return seed_from_text(repr(purpose))


def seed_torch(*purpose: int | str) -> None:
    """Seed PyTorch's global generators (weights, dropout) for ``purpose``."""
    torch.manual_seed(derive_seed(*purpose))


def generator_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of PyTorch's global generators on the CPU and on ``device``."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generator_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set PyTorch's global generators to ``states``; another device's state is ignored."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
