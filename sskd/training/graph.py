"""A whole training step as one CUDA graph.

A step of a small network starts hundreds of short kernels, and the host needs longer to start them
than a GPU to compute them. A CUDA graph records them once; a replay starts all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sskd.config import Config
from sskd.data import WHOLE, EpochLoader
from sskd.errors import UserError, one_line
from sskd.methods import Method
from sskd.output import say
from sskd.streams import Fence
from sskd.training.shared_pass import SplitStep, shares_pass, teacher_features
from sskd.training.step import WARMUP_STEPS, Capture, TrainingStep


def build_step(
    config: Config, *, method: Method, loader: EpochLoader, **parts: Any
) -> TrainingStep:
    """Return a training step, as a CUDA graph if ``config.graph`` asks for one and it is possible.

    ``parts`` are the other attributes of a ``TrainingStep``.

    Raises:
        UserError: ``graph=on``, and there is no NVIDIA GPU, or the method or the loader cannot be
            captured.
    """
    parts |= {"method": method, "loader": loader, "precision": config.precision}
    parts |= {"is_compiled": config.compile == "default"}
    reason = _why_not(loader, method)
    if config.graph == "on" and reason:
        raise UserError(f"graph=on: {reason}; use graph=auto")
    if config.graph == "off" or reason:
        if config.graph == "auto" and loader.device.type == "cuda":
            say(f"graph=auto: {reason}; each step starts its kernels one by one")
        return TrainingStep(**parts)
    return GraphedStep(**parts, capture=capture_cuda_graph)


def _why_not(loader: EpochLoader, method: Method) -> str:
    """Return why a step of ``method`` cannot be a CUDA graph; "" if it can."""
    if loader.device.type != "cuda":
        return f"a CUDA graph needs an NVIDIA GPU, and the run computes on '{loader.device.type}'"
    if loader.share != WHOLE:
        return "several processes exchange gradients in each step"
    if not loader.draws_on_device:
        return "the images come from a packed file"
    if not method.capturable:
        return f"class {type(method).__name__} has capturable = False"
    return ""


def capture_cuda_graph(work: Callable[[], None]) -> Callable[[], None]:
    """Record ``work`` as a CUDA graph; return the function that replays it.

    Each replay draws new random numbers from the device's default generator.
    """
    graph = torch.cuda.CUDAGraph()
    # The stream of the steps before: autograd would wait for another one, which cannot be captured.
    stream = torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


@dataclass(kw_only=True)
class GraphedStep(TrainingStep):
    """A training step that is captured once and then replayed.

    The first steps, and the smaller batch at the end of an epoch, are computed as without a graph,
    by the same function. The learning rate is a constant of the graph, so a new one needs a new
    graph.

    Attributes:
        capture: records the work of a step.
    """

    capture: Capture

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replay: Callable[[], None] | None = None
        self._captured_lr = self._lr()

    def run(self, size: int) -> None:
        """Train on the next ``size`` images.

        Raises:
            UserError: the step cannot be captured.
        """
        if self._lr() != self._captured_lr:
            self._replay = None
        if size < self.loader.batch_size or self._taken < WARMUP_STEPS:
            self.compute(size)
        else:
            self._replay = self._replay or self._captured(size)
            self._replay()

    def _captured(self, size: int) -> Callable[[], None]:
        self._captured_lr = self._lr()
        self.optimizer.zero_grad(set_to_none=True)  # the graph has gradients of its own
        features = teacher_features(self, size) if shares_pass(self) else None
        Fence(self.loader.device).wait()  # an error of an earlier step is not one of the capture
        try:
            with _capturable(self.optimizer):
                if features is not None:
                    return SplitStep(self, capture=self.capture, size=size, first=features)
                return self.capture(lambda: self.compute(size))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The end of a capture that has failed raises another error.
            cause = error.__context__ or error
            raise UserError(
                f"phase {self.phase.name}: the step cannot be captured as a CUDA graph "
                f"({one_line(cause)[:200]}); use graph=off"
            ) from error

    def _lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


@contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Set the flag of optimizers that have one; outside of a capture they warn about it."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
