"""A few training steps on a device and on the CPU: their results, and where the host waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.differences import difference_of_losses, relative
from benchmarks.gpu.steps import Taken, losses_of, new_step, scale_rate, weights_of
from benchmarks.gpu.worker import Values, describe
from benchmarks.workload import Case

STEPS = 3
SLOWER = 0.01  # at this share of the learning rate, so that training amplifies less


def compare_with_cpu(case: Case, phase: str) -> Values:
    """Compare a few steps on the device with those in float32 on the CPU."""
    expected = steps_on_cpu(replace(case, device="cpu", precision="fp32", graph="off"), phase)
    found = take_steps(replace(case, graph="off"), phase)
    losses = max(map(difference_of_losses, found.losses, expected.losses))
    weights = relative(found.update, expected.update)
    return {"losses": losses, "weights": weights, "wait": found.wait}


@lru_cache(maxsize=4)  # for the other precisions
def steps_on_cpu(case: Case, phase: str) -> Taken:
    """Return the steps that others are compared with."""
    return take_steps(case, phase)


def take_steps(case: Case, phase: str) -> Taken:
    """Take a few steps; if one waits, repeat them and let them wait."""
    try:
        return _take_steps(case, phase, may_wait=False)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return replace(_take_steps(case, phase, may_wait=True), wait=describe(error))


def _take_steps(case: Case, phase: str, *, may_wait: bool) -> Taken:
    with patch("sskd.methods.crd.draw_negatives", same_negatives):
        step = new_step(case, phase)
        scale_rate(step, SLOWER)
        before, losses = weights_of(step), []
        for number in range(STEPS):
            # In the first step libraries and the optimizer set themselves up.
            with no_waiting(step.loader.device, allowed=may_wait or number == 0):
                step.take()
            losses.append(losses_of(step))
            step.meter.reset()
    return Taken(losses, weights_of(step) - before)


@contextmanager
def no_waiting(device: torch.device, *, allowed: bool) -> Iterator[None]:
    """Raise RuntimeError inside the ``with`` block if the host waits for the GPU."""
    if device.type != "cuda" or allowed:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same_negatives(labels: Tensor, classes: Tensor, count: int) -> Tensor:
    """Choose CRD's negatives, on any device the same, by integers instead of random numbers."""
    images = torch.arange(len(labels), device=labels.device)
    shifts = torch.arange(len(classes), device=labels.device)[:, None]
    keys = ((images * 40_503 + shifts * 7_919) % 65_521).float()  # a prime: no two images tie
    keys.masked_fill_(labels == classes[:, None], torch.inf)
    return keys.topk(count, largest=False).indices
