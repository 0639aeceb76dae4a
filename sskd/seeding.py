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


class OwnGenerators:
    """The states of PyTorch's global generators that one of several jobs of a process has.

    It begins with the present states. On an NVIDIA GPU a state is exchanged as an object, so that a
    CUDA graph draws from the state of the job that captured it, whichever job's turn it is.
    """

    def __init__(self) -> None:
        self._gpus = [each.clone_state() for each in torch.cuda.default_generators]
        self._save_copied()

    def save(self) -> None:
        """Keep the states."""
        self._gpus = [each.graphsafe_get_state() for each in torch.cuda.default_generators]
        self._save_copied()

    def _save_copied(self) -> None:
        self._cpu = torch.get_rng_state()
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Set the states that were kept."""
        for number, generator in enumerate(torch.cuda.default_generators):
            if number == len(self._gpus):  # another job was the first to use a GPU
                self._gpus.append(generator.clone_state())
            generator.graphsafe_set_state(self._gpus[number])
        torch.set_rng_state(self._cpu)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)
