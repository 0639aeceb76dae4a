"""A scheduler's warning stops the run; the scheduler's handler runs after the run is closed."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from breaking import outcome
from conftest import Compose
from crashes import at_step
from faults import SMALL

from sskd.commands.process import run_command
from sskd.errors import UserError
from sskd.runs.folder import read_config_file
from sskd.runs.names import CONFIG
from sskd.runs.run import Run
from sskd.train import train
from sskd.training.signals import (
    Interrupted,
    StopSignals,
    forward_scheduler_signal,
    raise_on_sigterm,
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCONT, signal.SIGUSR1, signal.SIGUSR2)


class Scheduler:
    """Handles signals as submitit does: a warning requeues the job and ends the process."""

    def __init__(self, warning: signal.Signals, folder: Path) -> None:
        self._folder = folder
        self.requeued_at: list[int] = []
        self.bypassed: list[int] = []
        signal.signal(signal.SIGTERM, self.bypass)
        signal.signal(signal.SIGCONT, self.bypass)
        signal.signal(warning, self.requeue)

    def bypass(self, signum: int, frame: FrameType | None) -> None:
        self.bypassed.append(signum)

    def requeue(self, signum: int, frame: FrameType | None) -> None:
        (saved,) = self._folder.rglob("last.pt")
        config = read_config_file(saved.with_name(CONFIG))
        with Run(saved.parent, config).open():  # a requeued process could open it
            state = torch.load(saved, weights_only=True)
        self.requeued_at.append(state["loader"]["position"])
        os.kill(os.getpid(), signal.SIGTERM)  # SLURM sends it immediately
        raise SystemExit(255)


@pytest.fixture(autouse=True)
def _restore_handlers() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("warning", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_reaches_the_scheduler_after_the_save(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warning: signal.Signals
) -> None:
    train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'undisturbed'}"))
    stopped = composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'stopped'}")
    scheduler = Scheduler(warning, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), warning))
        with pytest.raises(SystemExit), forward_scheduler_signal():
            train(stopped)
    assert scheduler.requeued_at == [3]
    assert scheduler.bypassed == [signal.SIGTERM]
    train(stopped)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


def receive(*signums: int) -> None:
    """Receive signals during a training step, and finish the step."""
    with forward_scheduler_signal(), StopSignals() as signals:
        for signum in signums:
            signal.raise_signal(signum)
        signals.raise_if_received()


@pytest.mark.parametrize("before", [signal.SIGCONT, signal.SIGUSR2])
def test_sigterm_after_a_warning_requeues_nothing(tmp_path: Path, before: signal.Signals) -> None:
    """SLURM sends SIGCONT before SIGTERM. A SIGTERM after a warning cancels the job."""
    scheduler = Scheduler(signal.SIGUSR2, tmp_path)
    with pytest.raises(Interrupted) as stop:
        receive(before, signal.SIGTERM)
    assert stop.value.signum == signal.SIGTERM
    assert scheduler.requeued_at == []
    assert signal.SIGTERM not in scheduler.bypassed


def test_sigcont_stops_nothing(tmp_path: Path) -> None:
    scheduler = Scheduler(signal.SIGUSR2, tmp_path)
    receive(signal.SIGCONT)
    assert scheduler.bypassed == [signal.SIGCONT]


def test_a_job_that_is_not_requeued_is_reported() -> None:
    def refuse(signum: int, frame: FrameType | None) -> None:
        raise RuntimeError("Job not requeued because: timed-out too many times.")

    signal.signal(signal.SIGUSR2, refuse)
    message = (
        "stopped by SIGUSR2; the run is saved, but the job could not be requeued "
        r"\(Job not requeued because: timed"
    )
    with pytest.raises(UserError, match=message):
        receive(signal.SIGUSR2)


def test_a_warning_without_a_handler_is_ignored() -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with StopSignals() as signals:
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
        signal.raise_signal(signal.SIGUSR1)
        assert signals.received is None


def test_interrupted_can_be_pickled() -> None:
    stop = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM)))
    assert (stop.signum, str(stop)) == (signal.SIGTERM, "stopped by SIGTERM")


def test_sigterm_raises_in_a_launcher() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stop, raise_on_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_that_becomes_an_error_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """OmegaConf raises AttributeError if Ctrl-C stops it inside of a list."""

    def main() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            raise AttributeError("a value is missing")

    monkeypatch.setattr(sys, "argv", ["train_student.py"])
    for name in ("wandb", "sskd.commands.threads"):  # with these the process ends at once
        monkeypatch.delitem(sys.modules, name, raising=False)
    handler = signal.default_int_handler  # a background job of a shell ignores it
    signal.signal(signal.SIGINT, handler)
    assert run_command(main) == 130
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is handler
