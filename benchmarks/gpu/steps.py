"""The training steps that are compared: how they start, and what is read of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.gpu.differences import CPU
from benchmarks.workload import Case, loader_of, noise, training_step
from sskd.data import Images
from sskd.training.step import TrainingStep

IMAGES = 2000  # an epoch has a smaller last batch


@dataclass(frozen=True)
class Taken:
    """The losses of each step, the update of all weights, and where a step waited for the GPU."""

    losses: list[dict[str, float]]
    update: Tensor
    wait: str = ""


@cache
def images_of(count: int) -> Images:
    """Return ``count`` images of noise on the CPU, in each process the same."""
    torch.manual_seed(0)
    return noise(count, CPU)


def new_step(case: Case, phase: str) -> TrainingStep:
    """Return the step of a new method, at the start of an epoch."""
    images = images_of(case.images)
    return training_step(case.config, images, loader_of(case, images.to(case.device)), phase)


def scale_rate(step: TrainingStep, factor: float) -> None:
    """Multiply the learning rate."""
    for group in step.optimizer.param_groups:
        group["lr"] *= factor


def weights_of(step: TrainingStep) -> Tensor:
    """Return all trained weights as a vector on the CPU."""
    weights = [each.detach().flatten() for each in step.phase.trains.parameters()]
    return torch.cat(weights).to(CPU, torch.float64)


def losses_of(step: TrainingStep) -> dict[str, float]:
    """Return the losses since the last reset of the meter."""
    return {key: value for key, value in step.meter.read().items() if key.startswith("loss")}
