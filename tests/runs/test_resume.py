"""A run that was stopped resumes and has the result of an undisturbed one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from breaking import outcome
from conftest import Compose, SmallTeacher
from crashes import CrashError, at_step, crash
from faults import SMALL
from safetensors.torch import load_file

import sskd.files
import sskd.models.checkpoints
import sskd.runs.checkpoint_file
import sskd.tracking.opening
import sskd.tracking.tracker
import sskd.training.preview
import sskd.training.state
from sskd.errors import UserError
from sskd.models import build_model, load_weights
from sskd.runs.checkpoints import Checkpoints
from sskd.runs.epoch_line import EpochLine
from sskd.runs.metrics_log import MetricsLog
from sskd.runs.status import read_status
from sskd.train import train
from sskd.training.progress import Progress
from sskd.training.signals import Interrupted, StopSignals
from sskd.training.state import TrainingState

# Every kind of phase and of state. tests/methods resumes each method in mid-epoch.
KINDS = ["vanilla", "kd", "ab", "ft", "crd", "sskd", "ctkd"]


@pytest.mark.parametrize("method", KINDS)
def test_a_crash_at_any_step_changes_no_result(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str,
    small_teacher: SmallTeacher,
) -> None:  # fmt: skip
    """The teacher crashes too, but only with KD: with the other methods it is the same run."""
    if method not in ("vanilla", "kd"):
        small_teacher.put(tmp_path / "undisturbed", tmp_path / "broken")
    undisturbed = composed(*SMALL, f"method={method}", f"runs={tmp_path / 'undisturbed'}")
    with monkeypatch.context() as patch:
        steps = at_step(patch, -1, crash)
        train(undisturbed)
    expected = outcome(tmp_path / "undisturbed")
    assert len(expected) >= 4
    (weights,) = tmp_path.glob("undisturbed/digits/*/*resnet8/**/model.safetensors")
    assert set(load_file(weights)) == set(build_model("resnet8", 10).state_dict())

    # A checkpoint after every step, and a crash every few steps, in every phase.
    broken = composed(
        *SMALL, f"method={method}", f"runs={tmp_path / 'broken'}", "checkpoint_minutes=1e-9"
    )
    crashes = 0
    while True:
        with monkeypatch.context() as patch:
            at_step(patch, 4, crash)
            try:
                train(broken)
                break
            except CrashError:
                crashes += 1
    assert crashes >= steps() // 4
    assert outcome(tmp_path / "broken") == expected


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'undisturbed'}"))
    stopped = composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'stopped'}")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(Interrupted) as stop:
            train(stopped)
    assert stop.value.signum == signum
    (saved,) = (tmp_path / "stopped").rglob("last.pt")
    assert torch.load(saved, weights_only=True)["loader"]["position"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(stopped)
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")


def test_a_signal_after_the_result_leaves_a_run_finished(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a signal can come while the process waits for W&B's server."""

    def stop(*_: Any) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(sskd.tracking.opening.NoTracker, "__exit__", stop)
    with pytest.raises(Interrupted):
        train(composed(*SMALL, "method=vanilla", "schedule.epochs=1"))
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("result.json"))
    assert read_status(folder).state == "finished"


def test_a_second_interrupt_raises_at_once() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_crash_at_any_write_loses_nothing(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crash before the first write or line, then before the second after a restart, and so on."""
    arguments = [*SMALL, "schedule.epochs=2", "method=sskd"]
    train(composed(*arguments, f"runs={tmp_path / 'undisturbed'}"))
    writes_left = 0

    def crashing(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal writes_left
            writes_left -= 1
            if writes_left == 0:
                raise CrashError
            return write(*arguments, **keywords)

        return call

    for module in (
        sskd.files,
        sskd.runs.checkpoint_file,
        sskd.training.preview,
        sskd.models.checkpoints,
    ):
        monkeypatch.setattr(module, "write_atomically", crashing(sskd.files.write_atomically))
    monkeypatch.setattr(MetricsLog, "log", crashing(MetricsLog.log))
    broken = composed(*arguments, f"runs={tmp_path / 'broken'}")
    crashes = 0
    while True:
        writes_left = crashes + 1
        try:
            train(broken)
            break
        except CrashError:
            crashes += 1
    assert crashes > 10
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "undisturbed")


def test_a_line_without_its_checkpoint_is_logged_once(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'undisturbed'}"))
    broken = composed(*SMALL, "method=vanilla", f"runs={tmp_path / 'broken'}")
    original = Checkpoints.save
    with monkeypatch.context() as patch:
        calls = iter([original, lambda *_: crash()])
        patch.setattr(Checkpoints, "save", lambda self, state: next(calls)(self, state))
        with pytest.raises(CrashError):
            train(broken)
    (path,) = (tmp_path / "broken").rglob("metrics.jsonl")
    assert len(path.read_text().splitlines()) == 2  # the checkpoint counts one
    train(broken)
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "undisturbed")


def test_lost_best_weights_are_written_on_resume(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies after the checkpoint of a best epoch and before ``best.pt``."""
    config = composed(*SMALL, "method=vanilla")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save_best", lambda *_: crash())
        with pytest.raises(CrashError):
            train(config)
    (last,) = (tmp_path / "runs").rglob("last.pt")
    assert not (last.parent / "best.pt").exists()
    first_epoch = torch.load(last, weights_only=True)["model"]
    with monkeypatch.context() as patch:
        at_step(patch, 1, crash)
        with pytest.raises(CrashError):
            train(config)
    best = torch.load(last.parent / "best.pt", weights_only=True)
    assert best["epoch"] == 1
    assert all(torch.equal(best["model"][name], value) for name, value in first_epoch.items())


def test_another_device_resumes_only_between_epochs(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*SMALL, "method=vanilla", "checkpoint_minutes=1e-9")
    for step, in_mid_epoch in ((7, True), (2, False)):
        with monkeypatch.context() as patch:
            at_step(patch, step, crash)
            with pytest.raises(CrashError):
                train(config)
        (path,) = (tmp_path / "runs").rglob("last.pt")
        state = torch.load(path, weights_only=True)
        moved = {"device": "cuda", "position": {**state["position"], "mid_epoch": in_mid_epoch}}
        torch.save(state | moved, path)
        if in_mid_epoch:
            with pytest.raises(
                UserError, match=r"mid-epoch on 'cuda', .* cannot be restored on 'cpu'"
            ):
                train(config)
            torch.save(state, path)
    assert train(config).epoch == 3


class Clock:
    """The clock of the checkpoints, on which each epoch takes six seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.saved: list[int] = []  # the epochs that ended with a checkpoint
        log, save = MetricsLog.log, Checkpoints.save

        def timed_log(metrics: MetricsLog, line: EpochLine) -> None:
            self.now += 6
            log(metrics, line)

        def noted_save(checkpoints: Checkpoints, state: dict[str, Any]) -> None:
            self.saved.append(state["position"]["epoch"])
            save(checkpoints, state)

        monkeypatch.setattr(MetricsLog, "log", timed_log)
        monkeypatch.setattr(Checkpoints, "save", noted_save)
        monkeypatch.setattr(
            sskd.training.state, "time", SimpleNamespace(monotonic=lambda: self.now)
        )


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [("0", [1, 2, 3, 4, 5, 6, 7]), ("12", [2, 4, 6, 7]), ("15", [3, 6, 7]), ("1e9", [7])],
)
def test_short_epochs_share_a_checkpoint(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, seconds: str, expected: list[int]
) -> None:
    clock = Clock(monkeypatch)
    words = (*SMALL, "batch_size=40", "method=vanilla", "schedule.epochs=7")
    train(composed(*words, f"checkpoint_seconds={seconds}"))
    assert clock.saved == expected


def test_epochs_without_a_checkpoint_are_computed_again(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The run ends in its sixth epoch, before the checkpoint that would end it."""
    words = (*SMALL, "batch_size=20", "method=vanilla", "schedule.epochs=7")
    reported: list[tuple[int, float]] = []
    monkeypatch.setattr(
        sskd.tracking.tracker.Tracker,
        "log",
        lambda _, line: reported.append((line.epoch, line.metrics["loss"])),
    )
    train(composed(*words, f"runs={tmp_path / 'undisturbed'}"))
    expected = [*reported]
    reported.clear()
    broken = composed(*words, f"runs={tmp_path / 'broken'}", "checkpoint_seconds=15")
    clock = Clock(monkeypatch)
    with monkeypatch.context() as patch:
        at_step(patch, 5 * 2 + 1, crash)
        with pytest.raises(CrashError):
            train(broken)
    (path,) = (tmp_path / "broken").rglob("metrics.jsonl")
    assert len(path.read_text().splitlines()) == 5
    assert clock.saved == [3]
    assert reported == expected[:3]  # what W&B has, no crash takes back
    reported.clear()
    train(broken)
    assert "3/7 epochs" in capsys.readouterr().out
    assert reported == expected
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize("crashes", ["never", "before best.pt"])
def test_best_weights_wait_for_the_next_checkpoint(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashes: str
) -> None:
    """The second epoch is the best, and the third ends with a checkpoint."""
    record = TrainingState.record_top1
    monkeypatch.setattr(
        TrainingState,
        "record_top1",
        lambda self, _: record(self, [20.0, 30.0, 10.0, 10.0][self.epoch]),
    )
    words = (*SMALL, "batch_size=20", "method=vanilla", "schedule.epochs=4")
    train(composed(*words, f"runs={tmp_path / 'undisturbed'}"))
    late = composed(*words, f"runs={tmp_path / 'late'}", "checkpoint_seconds=15")
    Clock(monkeypatch)
    with monkeypatch.context() as patch:
        if crashes == "never":
            at_step(patch, 3 * 2 + 1, crash)
        else:
            patch.setattr(Checkpoints, "save_best", lambda *_: crash())
        with pytest.raises(CrashError):
            train(late)
    (last,) = (tmp_path / "late").rglob("last.pt")
    assert load_weights(build_model("resnet8", 10), last).state  # it has one network, not two
    assert last.with_name("best.pt").exists() == (crashes == "never")
    train(late)
    assert torch.load(last.with_name("best.pt"), weights_only=True)["epoch"] == 2
    assert outcome(tmp_path / "late") == outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize("moment", ["in the last step", "after the epoch"])
def test_a_signal_saves_an_epoch_without_a_checkpoint(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    config = composed(*SMALL, "method=vanilla", "checkpoint_seconds=1e9")
    with monkeypatch.context() as patch:
        if moment == "in the last step":
            at_step(patch, 5, lambda: signal.raise_signal(signal.SIGTERM))
        else:  # it was decided that the epoch needs no checkpoint
            patch.setattr(Progress, "epoch", lambda *_: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(config)
    (saved,) = (tmp_path / "runs").rglob("last.pt")
    position = torch.load(saved, weights_only=True)["position"]
    assert (position["epoch"], position["mid_epoch"]) == (1, moment == "after the epoch")


@pytest.mark.parametrize("method", ["crd", "ft"])
def test_bf16_trains_and_resumes(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # A processor without instructions for bf16 is slow, so the teacher has another precision.
    teacher = ("arch@teacher=resnet8", "teacher.precision=fp32")
    arguments = [*SMALL, *teacher, "schedule.epochs=2", f"method={method}", "precision=bf16"]
    result = train(composed(*arguments, f"runs={tmp_path / 'undisturbed'}"))
    assert result.precision == "bf16"
    with monkeypatch.context() as patch:
        at_step(patch, 2 + 7, crash)  # the teacher has two steps, and a first phase five
        with pytest.raises(CrashError):
            train(composed(*arguments, f"runs={tmp_path / 'broken'}"))
    train(composed(*arguments, f"runs={tmp_path / 'broken'}"))
    assert outcome(tmp_path / "broken") == outcome(tmp_path / "undisturbed")
    (path,) = (tmp_path / "undisturbed/digits/distill").rglob("model.safetensors")
    assert load_file(path)["fc.weight"].dtype == torch.float32
