"""One training step of a phase, and the modes of the modules during it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sskd.data import WHOLE, Batch, EpochLoader
from sskd.device import reset_peak_gpu_memory
from sskd.methods import Method, Phase
from sskd.precision import autocast, multiplying
from sskd.streams import StepLimit
from sskd.training.data_parallel import average_step
from sskd.training.meter import Meter
from sskd.training.multi_tensor import Batching

# Records a function's work on the device without doing it, and returns a function that does it.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

# In these cuDNN chooses its algorithms, and the optimizer creates its state.
WARMUP_STEPS = 3


def set_trainable(phase: Phase, method: nn.Module) -> None:
    """Set ``phase.trains`` to train with gradients; freeze the rest of ``method`` in eval mode."""
    method.requires_grad_(False).eval()
    phase.trains.requires_grad_(True).train()


def train_step(
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    precision: str,
    *,
    batching: Batching | None = None,
) -> dict[str, Tensor]:
    """Train ``phase`` on one batch.

    Args:
        precision: one of ``sskd.precision.PRECISIONS``; losses are computed in float32.
        batching: does the same small work on many tensors at once.

    Returns:
        Metrics on the device, scalars: ``loss``, each term as ``loss/<term>`` and
        ``weighted/<term>``, and the phase's metrics.
    """
    optimizer.zero_grad(set_to_none=True)
    with multiplying(precision), batching.active() if batching else nullcontext():
        with autocast(precision, batch.x.device):
            terms, metrics = phase.losses(batch)
        weighted = phase.weigh(terms)
        loss = torch.stack(list(weighted.values())).sum()
        loss.backward()
    optimizer.step()
    phase.after_step()
    measured = {"loss": loss}
    measured |= {f"loss/{name}": term for name, term in terms.items()}
    measured |= {f"weighted/{name}": term for name, term in weighted.items()}
    return measured | metrics


@dataclass(kw_only=True)
class TrainingStep:
    """A whole training step, from the choice of the batch to the sums of the metrics.

    Everything that lasts from step to step stays in the same tensors: parameters, buffers, the
    optimizer's state, the order of the epoch, the sums. So a CUDA graph can contain the step
    (``sskd.training.graph``).

    Attributes:
        method: every module that takes part.
        is_compiled: the compiler combines the work on many tensors itself.
    """

    phase: Phase
    method: Method
    optimizer: torch.optim.Optimizer
    loader: EpochLoader
    meter: Meter
    precision: str
    is_compiled: bool = False

    def __post_init__(self) -> None:
        modules = None if self.is_compiled else (self.method, self.phase.trains)
        # DistributedDataParallel averages the gradients of the weights, not of their copies.
        casts = self.precision == "bf16" and self.loader.share == WHOLE
        self._batching = modules and Batching(*modules, casts=casts)
        self._taken = 0
        self._limit = StepLimit(self.loader.device)

    def lasting_tensors(self) -> dict[str, Tensor]:
        """Return all tensors that last from step to step, by name."""
        tensors: dict[str, Any] = dict(
            [*self.method.named_parameters(), *self.method.named_buffers()]
        )
        for number, state in enumerate(self.optimizer.state.values()):
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        tensors |= vars(self.loader) | vars(self.loader.augmenter) | vars(self.meter)
        return {name: each for name, each in tensors.items() if isinstance(each, Tensor)}

    def take(self) -> int:
        """Train on the next batch of the epoch; return the number of its images, on all ranks.

        Other jobs of this process may then work, before it returns.
        """
        size = self.loader.next_size
        self.run(size)
        self.loader.advance()
        images = size * self.loader.share.ranks
        self.meter.count(images)
        self._taken += 1
        if self._taken == WARMUP_STEPS:
            reset_peak_gpu_memory(self.loader.device)
        self._limit.step_started()
        return images

    def run(self, size: int) -> None:
        """Train on the next ``size`` images."""
        self.compute(size)

    def compute(self, size: int) -> None:
        """Do the step's work on the device: nothing here waits for it, or counts on the host."""
        self.train(self.loader.draw(size))

    def train(self, batch: Batch) -> None:
        """Train on ``batch`` and add its metrics."""
        metrics = train_step(
            self.phase, self.optimizer, batch, self.precision, batching=self._batching
        )
        metrics = average_step(self.phase.trains, metrics)
        self.meter.add(metrics, len(batch.y) * self.loader.share.ranks)
