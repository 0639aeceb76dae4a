"""Training steps by a CUDA graph and the steps that it replaces: results, and tensors that move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from benchmarks.gpu.differences import difference_of_losses, relative
from benchmarks.gpu.steps import Taken, losses_of, new_step, scale_rate, weights_of
from benchmarks.gpu.worker import Values
from benchmarks.workload import Case
from sskd.training.step import WARMUP_STEPS, TrainingStep

STEPS = 40  # more than an epoch


def compare_graph(case: Case, phase: str) -> Values:
    """Compare steps by a CUDA graph with the same steps without it, over a change of the rate.

    On a CPU both are the same.
    """
    with deterministic_cudnn():
        expected, _ = train(replace(case, graph="off"), phase)
        found, moved = train(replace(case, graph="auto"), phase)
    losses = max(map(difference_of_losses, found.losses, expected.losses))
    return {"losses": losses, "weights": relative(found.update, expected.update), "moved": moved}


def train(case: Case, phase: str) -> tuple[Taken, list[str]]:
    """Take some dozens of steps; return them and the names of the tensors that moved."""
    step = new_step(case, phase)
    torch.manual_seed(0)
    before, losses = weights_of(step), []
    known: dict[str, int] = {}
    for number in range(STEPS):
        if number == WARMUP_STEPS:
            known = places(step)
        if number == STEPS // 2:
            losses.append(losses_of(step))
            scale_rate(step, 0.1)
        if step.loader.position == step.loader.steps:
            step.loader.begin_epoch(1)
        step.take()
    taken = Taken([*losses, losses_of(step)], weights_of(step) - before)
    now = places(step)
    return taken, [name for name, place in known.items() if now[name] != place]


@contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """Let cuDNN compute the same bits again inside the ``with`` block."""
    backend = torch.backends.cudnn
    before = backend.deterministic, backend.benchmark
    backend.deterministic, backend.benchmark = True, False
    try:
        yield
    finally:
        backend.deterministic, backend.benchmark = before


def places(step: TrainingStep) -> dict[str, int]:
    """Return the addresses of all tensors that last from step to step, by name."""
    return {name: tensor.data_ptr() for name, tensor in step.lasting_tensors().items()}
