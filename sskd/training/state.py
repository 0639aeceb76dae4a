"""The state of a phase in training, as a checkpoint keeps it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sskd.data import EpochLoader
from sskd.errors import UserError, shortened
from sskd.methods import load_state_without_teacher, state_without_teacher
from sskd.optimizers import load_optimizer
from sskd.runs.run import Run
from sskd.seeding import generator_states, restore_generator_states
from sskd.training.meter import Meter


@dataclass
class TrainingState:
    """The progress of a phase.

    ``epoch`` is the number of finished epochs, ``images`` the number of their training images, and
    ``seconds`` their training time without evaluation. ``mid_epoch`` is true if an epoch has begun
    and not ended; ``epoch_seconds`` is its training time so far. Accuracies are percentages.
    """

    epoch: int = 0
    mid_epoch: bool = False
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    images: int = 0
    best_top1: float = -math.inf
    best_epoch: int = 0

    def end_epoch(self, images: int) -> None:
        """Count the epoch that has trained ``images`` images as finished."""
        self.epoch += 1
        self.mid_epoch = False
        self.seconds += self.epoch_seconds
        self.images += images

    def record_top1(self, top1: float) -> None:
        """Record the accuracy of the running epoch."""
        if top1 > self.best_top1:
            self.best_top1, self.best_epoch = top1, self.epoch + 1


def read_training_state(values: Mapping[str, Any]) -> TrainingState:
    """Return the state with these fields; raise TypeError if one is missing or of another type."""
    state = TrainingState(**values)
    for name, default in vars(TrainingState()).items():
        if type(getattr(state, name)) is not type(default):
            raise TypeError(f"{name} is {getattr(state, name)!r}")
    return state


@dataclass(kw_only=True)
class PhaseCheckpoint:
    """Everything of a phase that a checkpoint saves and restores.

    Attributes:
        run: where the checkpoints are written.
        phase: the phase's name.
        module: the module whose state is saved, without its teacher.
        eval_model: the network that is evaluated, whose weights are saved once more in the
            published layout; None if the phase evaluates none.
        precision: the precision that the phase is trained in.
    """

    run: Run
    phase: str
    module: nn.Module
    eval_model: nn.Module | None
    precision: str
    optimizer: torch.optim.Optimizer
    loader: EpochLoader
    state: TrainingState = field(default_factory=TrainingState)
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self._last_save_time = time.monotonic()
        self._unsaved_best: dict[str, Tensor] | None = None  # that best.pt lacks

    def save(self) -> None:
        """Write ``last.pt``, and then ``best.pt`` if it lacks the best weights so far.

        In the reverse order, a crash could leave best weights from an epoch that is later retrained
        with a different result. ``last.pt`` has them too, and ``restore`` writes ``best.pt`` if a
        crash prevented it.
        """
        self.run.checkpoints.save(self._content())
        self._save_best()
        self._last_save_time = time.monotonic()

    def is_due(self, seconds: float) -> bool:
        """Return whether the last checkpoint is at least ``seconds`` old."""
        return time.monotonic() - self._last_save_time >= seconds

    def keep_if_best(self) -> None:
        """Keep a copy of the weights of the last epoch, if it is the best, for the next ``save``.

        Early in training most epochs are the best so far, and a copy is faster than a file.
        """
        if self.eval_model is not None and self.state.best_epoch == self.state.epoch:
            self._unsaved_best = copy.deepcopy(self.eval_model.state_dict())

    def _save_best(self) -> None:
        if self._unsaved_best is not None:
            state = self.state
            self.run.checkpoints.save_best(self._unsaved_best, state.best_epoch, state.best_top1)
            self._unsaved_best = None

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "stage": self.phase,
            "position": vars(self.state),
            "meter": self.meter.state_dict(),
            "module": state_without_teacher(self.module),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "generators": generator_states(self.loader.device),
            "device": self.loader.device.type,
            "precision": self.precision,
        }
        if self.eval_model is not None:
            content["model"] = self.eval_model.state_dict()
        if self._unsaved_best is not None:
            # Not a dict, in which a reader of the file would find a second network that fits.
            content["best"] = list(self._unsaved_best.values())
        return content

    def restore(self, content: Mapping[str, Any]) -> None:
        """Restore the ``content`` of a checkpoint.

        Raises:
            UserError: the checkpoint belongs to another run, was trained in another precision, or
                was saved in mid-epoch on another kind of device.
        """
        folder = self.run.folder
        with _reject_foreign_checkpoint(folder):
            state, device = read_training_state(content["position"]), str(content["device"])
            # Earlier versions lack it, and their runs are identified by it instead of ``auto``.
            precision = str(content.get("precision", self.precision))
        if precision != self.precision:
            raise UserError(f"{folder}: {self._about_precision(precision, device)}")
        if state.mid_epoch and device != self.loader.device.type:
            raise UserError(
                f"{folder}: stopped mid-epoch on '{device}', whose random state cannot be restored "
                f"on '{self.loader.device.type}'; use device={device}, or start from scratch with "
                "force=true"
            )
        with _reject_foreign_checkpoint(folder):
            load_state_without_teacher(self.module, content["module"])
            load_optimizer(self.optimizer, content["optimizer"])
            if state.mid_epoch:  # each epoch starts with its own seeds
                self.meter.load_state_dict(content["meter"], self.loader.device)
                self.loader.load_state_dict(content["loader"])
                restore_generator_states(content["generators"], self.loader.device)
            self.state = state
            if self.eval_model is not None and "best" in content:
                self._unsaved_best = _state_with(self.eval_model, content["best"])
            elif not state.mid_epoch:  # an earlier version, which saved each best epoch
                self.keep_if_best()
        self._save_best()

    def _about_precision(self, saved: str, device: str) -> str:
        """Return why training in ``saved`` on a kind of ``device`` cannot continue on this one."""
        here = self.loader.device.type
        use = f"device={device}" if device != here else f"a '{device}' device of the same model"
        return (
            f"stopped in {shortened(saved)} on '{device}', but precision=auto is "
            f"'{self.precision}' on this '{here}'; use {use}, or start from scratch with force=true"
        )


def _state_with(network: nn.Module, values: Any) -> dict[str, Tensor]:
    """Return a state of ``network`` with these ``values``; raise an error if they do not fit."""
    other = copy.deepcopy(network)
    other.load_state_dict(dict(zip(other.state_dict(), values, strict=True)))
    return other.state_dict()


@contextmanager
def _reject_foreign_checkpoint(folder: Path) -> Iterator[None]:
    """Report an intact checkpoint that does not belong to this run in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(
            f"{folder}: its checkpoint is not one of this run ({reason}); "
            "start from scratch with force=true"
        ) from error
