"""The one training loop, of every phase of every run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from sskd.config import Config
from sskd.data import Batch, Images, Loader
from sskd.errors import UserError
from sskd.methods import Phase, load_state_without_teacher, state_without_teacher
from sskd.optimizers import build_optimizer, load_optimizer
from sskd.runs.run import Run
from sskd.schedule import Schedule
from sskd.seeding import (
    derive_seed,
    generator_states,
    restore_generator_states,
    seed_torch,
)
from sskd.training.acceleration import compile_loss
from sskd.training.evaluation import NotFiniteError, accuracy, predict
from sskd.training.meter import Meter
from sskd.training.not_finite import advise, first_lost, is_sound
from sskd.training.progress import Progress
from sskd.training.signals import StopSignals
from sskd.training.step import set_trainable, train_step


@dataclass
class TrainingState:
    """Where a phase stands and what it has reached; part of a checkpoint.

    Epochs are finished ones; seconds are those of training, without evaluation.
    """

    epoch: int = 0
    mid_epoch: bool = False
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    images: int = 0
    best_top1: float = -math.inf
    best_epoch: int = 0


def read_training_state(values: Mapping[str, Any]) -> TrainingState:
    """Return the position that a checkpoint tells; raise TypeError where it tells none."""
    position = TrainingState(**values)
    for name, value in vars(TrainingState()).items():
        if type(getattr(position, name)) is not type(value):
            raise TypeError(f"{name} is {getattr(position, name)!r}")
    return position


def phase_schedule(phase: Phase, config: Config) -> Schedule:
    """Return the schedule of ``phase`` in a run of ``config``."""
    own = config.schedule
    whole = Schedule.from_shares(own.epochs, config.optimizer.lr, own.milestones, own.gamma)
    return whole if phase.schedule is None else whole.phase(phase.schedule)


@dataclass
class Trainer:
    """One phase in training.

    Attributes:
        phase: what is trained, and on which losses.
        method: every module that takes part; all but ``phase.trains`` is frozen in eval mode.
        saved_module: whose state the checkpoints carry.
        images: the data, on the device of the networks.
        run: where figures and checkpoints go.
        config: the run's configuration.
        evaluated: the network whose accuracy is measured after each epoch, if any.
        track: called with each epoch's figures.
    """

    phase: Phase
    method: nn.Module
    checkpointed: nn.Module
    images: Images
    run: Run
    config: Config
    eval_model: nn.Module | None = None
    on_epoch_end: Callable[[dict[str, Any]], None] = lambda line: None
    state: TrainingState = field(default_factory=TrainingState)
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        self._device = self.images.train.images.device
        self._fast = compile_loss(self.phase, self.config)
        self.schedule = phase_schedule(self.phase, self.config)
        images, size, views = self.images, self.config.batch_size, self.phase.views
        self.loader = Loader(images.train, images.mean, images.std, size, views)
        self.optimizer = build_optimizer(
            self.config.optimizer, self.phase.trains.parameters(), self.schedule.lr
        )
        self._saved = time.monotonic()

    def train(self, resume: Mapping[str, Any] | None = None) -> TrainingState:
        """Train to the end of the phase, from its beginning or on from a checkpoint of it.

        Raises:
            UserError: a loss is not finite; it names the phase, the epoch and the term.
            Interrupted: SIGTERM or SIGINT came; the running step was finished and saved.
        """
        if resume is not None:
            self._restore(resume)
        epochs, size = self.schedule.epochs, len(self.images.train)
        done = self.state.images + (self.meter.images if self.state.mid_epoch else 0)
        self.progress = Progress(self.phase.name, epochs, size, done, self._finite_metrics)
        started = "goes on" if resume is not None else "starts"
        self.progress.line(f"{started} in {self.run.folder}, {self.state.epoch}/{epochs} epochs")
        try:
            with StopSignals() as signals:
                while self.state.epoch < epochs:
                    self._end_epoch(self._train_epoch(signals))
                    signals.raise_if_received()
        finally:
            self.progress.close()
        return self.state

    def _train_epoch(self, signals: StopSignals) -> dict[str, float]:
        position = self.state
        if not position.mid_epoch:
            purpose = (self.config.seed, self.phase.name, position.epoch)
            self.loader.begin_epoch(derive_seed(*purpose, "batches"))
            seed_torch(*purpose, "model")
            self.meter, position.epoch_seconds = Meter(), 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(position.epoch)
        set_trainable(self.phase, self.method)
        started = time.monotonic() - position.epoch_seconds
        while self.loader.position < self.loader.steps:
            self._step(self.loader.next_batch())
            if self._is_time_to_save(signals):
                position.mid_epoch = True
                position.epoch_seconds = time.monotonic() - started
                self._checked_metrics()
                self._save()
                signals.raise_if_received()
        figures = self._checked_metrics()  # waits for the device: the time is the whole epoch's
        position.epoch_seconds = time.monotonic() - started
        return figures

    def _step(self, batch: Batch) -> None:
        figures = train_step(self._fast, self.optimizer, batch, self.config.precision)
        self.meter.add(figures, len(batch.y))
        self.progress.advance(len(batch.y))

    def _is_time_to_save(self, signals: StopSignals) -> bool:
        due = time.monotonic() - self._saved > 60 * self.config.checkpoint_minutes
        in_mid_epoch = self.loader.position < self.loader.steps
        return in_mid_epoch and (due or signals.received is not None)

    def _end_epoch(self, figures: Mapping[str, float]) -> None:
        position, accuracies = self.state, self._evaluate()
        position.epoch += 1
        position.mid_epoch = False
        position.seconds += position.epoch_seconds
        position.images += self.meter.images
        rate = self.meter.images / max(position.epoch_seconds, 1e-9)
        line = {
            "stage": self.phase.name,
            "epoch": position.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            **figures,
            **accuracies,
            "images_per_second": round(rate, 2),
            "seconds": round(position.epoch_seconds, 3),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.run.log(line)
        self._save()
        self._save_if_best()
        self.on_epoch_end(line)
        self.progress.epoch(position.epoch, line)

    def _evaluate(self) -> dict[str, float]:
        """Return the accuracies at the end of the epoch that is about to be counted."""
        if self.eval_model is None:
            return {}
        position, images, figures = self.state, self.images, {}
        for name, split in (("test", images.test), ("holdout", images.holdout)):
            if split is not None:
                try:
                    logits = predict(self.eval_model, split, images, f"{name} set")
                except NotFiniteError as error:
                    raise self._not_finite(str(error)) from None
                figures[f"{name}/top1"] = accuracy(logits, split.labels)
        if figures["test/top1"] > position.best_top1:
            position.best_top1, position.best_epoch = figures["test/top1"], position.epoch + 1
        return figures | {"best/top1": position.best_top1}

    def _save_if_best(self) -> None:
        """Write ``best.pt``, after the checkpoint that says so: a restart makes up for it.

        The other way round an epoch that was lost, and repeats differently on a GPU, could
        leave its weights as the best.
        """
        position = self.state
        if self.eval_model is not None and position.best_epoch == position.epoch:
            self.run.save_best(self.eval_model, position.best_epoch, position.best_top1)

    def _finite_metrics(self) -> dict[str, float]:
        """Return the epoch's figures so far, without the non-finite terms of weight 0.

        Raises UserError for the first term that was lost, in the first step in which it was.
        """
        figures = self.meter.read()
        told, terms = first_lost(self.meter, figures, self.loader.position)
        if told:
            self._refuse_lost_teacher()
            raise self._not_finite(told, terms)
        return {name: value for name, value in figures.items() if math.isfinite(value)}

    def _refuse_lost_teacher(self) -> None:
        """Raise UserError if it is the teacher that is not finite, which no setting can fix."""
        if isinstance(teacher := getattr(self.method, "teacher", None), nn.Module):
            of = f"{self._where()}: a term is not finite: the teacher, test set"
            try:
                predict(teacher, self.images.test, self.images, of)
            except NotFiniteError as error:
                raise UserError(f"{error}; take another teacher") from None

    def _checked_metrics(self) -> dict[str, float]:
        """Return the figures so far; nothing that has gone astray is worth going on from."""
        figures = self._finite_metrics()
        # The last step may have lost the weights; its loss was computed before.
        if not is_sound(self.phase.trains):
            raise self._not_finite("weights are not finite")
        return figures

    def _not_finite(self, what: str, terms: Sequence[str] = ()) -> UserError:
        return UserError(f"{self._where()}: {what}; {advise(self.config, self.phase, terms)}")

    def _where(self) -> str:
        return f"{self.run.folder}: phase {self.phase.name}, epoch {self.state.epoch + 1}"

    def _save(self) -> None:
        state = {
            "stage": self.phase.name,
            "position": vars(self.state),
            "meter": self.meter.state_dict(),
            "module": state_without_teacher(self.checkpointed),
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "generators": generator_states(self._device),
            "device": self._device.type,
        }
        if self.eval_model is not None:
            state["model"] = self.eval_model.state_dict()
        self.run.save(state)
        self._saved = time.monotonic()

    def _restore(self, state: Mapping[str, Any]) -> None:
        with self._reject_foreign_checkpoint():
            position, device = read_training_state(state["position"]), str(state["device"])
        if position.mid_epoch and device != self._device.type:
            raise UserError(
                f"{self.run.folder}: stands in mid-epoch, where random numbers of "
                f"'{device}' cannot go on on '{self._device.type}'; "
                f"use device={device}, or start afresh with force=true"
            )
        with self._reject_foreign_checkpoint():
            load_state_without_teacher(self.checkpointed, state["module"])
            load_optimizer(self.optimizer, state["optimizer"])
            if position.mid_epoch:  # every epoch begins with seeds of its own
                self.meter.load_state_dict(state["meter"], self._device)
                self.loader.load_state_dict(state["loader"])
                restore_generator_states(state["generators"], self._device)
        self.state = position
        if not position.mid_epoch:
            self._save_if_best()

    @contextmanager
    def _reject_foreign_checkpoint(self) -> Iterator[None]:
        """Tell in a line that a checkpoint which is whole is another program's."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            raise UserError(
                f"{self.run.folder}: its checkpoint is not one of this run ({told}); "
                "start afresh with force=true"
            ) from error
