"""The training loop of every phase of every run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch import nn

from sskd.config import Config
from sskd.data import Images
from sskd.distributed import ranks
from sskd.errors import Interrupted
from sskd.methods import Method, Phase
from sskd.optimizers import build_optimizer, set_learning_rate
from sskd.runs.epoch_line import EpochLine
from sskd.runs.run import Run
from sskd.seeding import derive_seed, seed_torch
from sskd.streams import own_stream
from sskd.training.acceleration import compile_loss
from sskd.training.data_parallel import parallel
from sskd.training.graph import build_step
from sskd.training.not_finite import FiniteCheck
from sskd.training.phase_settings import (
    departures_note,
    phase_loader,
    phase_optimizer,
    phase_schedule,
)
from sskd.training.progress import Progress
from sskd.training.signals import StopSignals
from sskd.training.state import PhaseCheckpoint, TrainingState
from sskd.training.step import set_trainable


@dataclass(kw_only=True)
class Trainer:
    """Trains one phase.

    Attributes:
        phase: the parameters to train, and the losses.
        method: every module that takes part; all but ``phase.trains`` is frozen in eval mode.
        checkpointed: the module whose state the checkpoints carry.
        images: the data, on the device of the networks.
        run: receives the metrics and the checkpoints.
        config: the run's configuration.
        eval_model: the network whose accuracy is measured after each epoch, if any.
    """

    phase: Phase
    method: Method
    checkpointed: nn.Module
    images: Images
    run: Run
    config: Config
    eval_model: nn.Module | None = None

    def __post_init__(self) -> None:
        images = self.images
        self.schedule = phase_schedule(self.phase, self.config)
        self.loader = phase_loader(self.phase, images, self.config)
        settings = phase_optimizer(self.phase, self.config)
        self.optimizer = build_optimizer(settings, self.phase.trains.parameters(), self.schedule.lr)
        self.checkpoint = PhaseCheckpoint(
            run=self.run,
            phase=self.phase.name,
            module=self.checkpointed,
            eval_model=self.eval_model,
            precision=self.config.precision,
            optimizer=self.optimizer,
            loader=self.loader,
        )
        self.step = build_step(
            self.config,
            method=self.method,
            loader=self.loader,
            phase=parallel(compile_loss(self.phase, self.config)),
            optimizer=self.optimizer,
            meter=self.checkpoint.meter,
        )
        self._finite = FiniteCheck(self.phase, self.method, images, self.config, where=self._where)

    def train(self, resume: Mapping[str, Any] | None = None) -> TrainingState:
        """Train to the end of the phase, from its start or from a checkpoint of it.

        Raises:
            UserError: a loss is not finite; the message names the phase, the epoch and the term.
            Interrupted: a signal stopped the run; the current step was finished and saved.
        """
        if resume is not None:
            self.checkpoint.restore(resume)
        state, epochs, size = self.checkpoint.state, self.schedule.epochs, self.loader.samples
        done = state.images + (self.checkpoint.meter.images if state.mid_epoch else 0)
        self.progress = Progress(self.phase.name, epochs, size, done=done, metrics=self._metrics)
        verb = "starts" if resume is None else "resumes"
        own = departures_note(self.phase, self.config)
        self.progress.line(f"{verb} in {self.run.folder}, {state.epoch}/{epochs} epochs{own}")
        try:
            with closing(self.loader), StopSignals() as signals, own_stream(self.loader.device):
                while state.epoch < epochs:
                    self._train_epoch(state, signals)
        finally:
            self.progress.close()
        return state

    def _train_epoch(self, state: TrainingState, signals: StopSignals) -> None:
        if not state.mid_epoch:
            purpose = (self.config.seed, self.phase.name, state.epoch)
            self.loader.begin_epoch(derive_seed(*purpose, "batches"))
            seed_torch(*purpose, "model")
            self.checkpoint.meter.reset()
            state.epoch_seconds = 0.0
        self.method.progress.fill_((state.epoch + 1) / self.schedule.epochs)
        set_learning_rate(self.optimizer, self.schedule.lr_at(state.epoch))
        set_trainable(self.phase, self.method)
        started = time.monotonic() - state.epoch_seconds
        while self.loader.position < self.loader.steps:
            _seed_step(self.config.seed, self.phase.name, state.epoch, self.loader.position)
            self.progress.advance(self.step.take())
            due = self.checkpoint.is_due(60 * self.config.checkpoint_minutes)
            if _must_save(signals, due=due) and self.loader.position < self.loader.steps:
                state.mid_epoch = True
                state.epoch_seconds = time.monotonic() - started
                self._finite.checked_metrics(self.checkpoint.meter, self.loader.position)
                self.checkpoint.save()
                _raise_if_stopped(signals)
        self._end_epoch(started, signals)

    def _end_epoch(self, started: float, signals: StopSignals) -> None:
        state, meter = self.checkpoint.state, self.checkpoint.meter
        metrics = self._finite.checked_metrics(meter, self.loader.position)  # waits for the device
        state.epoch_seconds = time.monotonic() - started
        if self.eval_model is not None:
            accuracies = self._finite.evaluate(self.eval_model)
            state.record_top1(accuracies["test/top1"])
            metrics |= accuracies | {"best/top1": state.best_top1}
        state.end_epoch(meter.images)
        lr = self.optimizer.param_groups[0]["lr"]
        metrics = {"lr": lr, **metrics, **_timing(meter.images, state.epoch_seconds)}
        line = EpochLine(self.phase.name, state.epoch, metrics, datetime.now(UTC))
        self.run.metrics.log(line)
        self.checkpoint.keep_if_best()
        shortest = min(self.config.checkpoint_seconds, 60 * self.config.checkpoint_minutes)
        due = state.epoch == self.schedule.epochs or self.checkpoint.is_due(shortest)
        if save := _must_save(signals, due=due):
            self.checkpoint.save()
        self.progress.epoch(line)
        if save:  # otherwise the next step notices a signal, and is saved
            _raise_if_stopped(signals)

    def _metrics(self) -> dict[str, float]:
        return self._finite.shown_metrics(self.checkpoint.meter, self.loader.position)

    def _where(self) -> str:
        epoch = self.checkpoint.state.epoch + 1
        return f"{self.run.folder}: phase {self.phase.name}, epoch {epoch}"


def _must_save(signals: StopSignals, *, due: bool) -> bool:
    """Return whether all ranks save now: the first one is ``due``, or one of them got a signal."""
    return any(ranks.largest(due and ranks.is_first(), signals.received or 0))


def _raise_if_stopped(signals: StopSignals) -> None:
    """Raise Interrupted on all ranks if one of them got a signal, such as during the save."""
    (signum,) = ranks.largest(signals.received or 0)
    if signum:
        raise Interrupted(signum)


def _seed_step(seed: int, phase: str, epoch: int, step: int) -> None:
    """Seed the generators of one of several ranks for a step.

    A checkpoint has the states of one rank, and another number of ranks may resume from it.
    """
    if ranks.count() > 1:
        seed_torch(seed, phase, epoch, "model", step, ranks.rank())


def _timing(images: int, seconds: float) -> dict[str, float]:
    """Return the rate and the duration of an epoch, for its line of metrics."""
    return {
        "images_per_second": round(images / max(seconds, 1e-9), 2),
        "seconds": round(seconds, 3),
    }
