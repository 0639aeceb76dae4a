"""A process that was suspended while another took its run's folder changes nothing there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import Undisturbed, check_finishes, outcome
from faults import Attempt, Fault
from filelock import SoftFileLease
from stand_in import wait_until
from torch import nn

import sskd.files
import sskd.runs.lock
from sskd.errors import BusyError
from sskd.runs.epoch_line import EpochLine
from sskd.runs.lock import FolderLock
from sskd.runs.result import RunResult, SharedResult
from sskd.runs.run import Run

CONFIG = {"seed": 1}
LATE = "late"


def line(number: int, holder: str) -> EpochLine:
    return EpochLine("train", number, {holder: 1.0})


def network(value: float) -> nn.Module:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, value)
    return layer


def open_run(folder: Path) -> Run:
    run = Run(folder, CONFIG).open()
    run.checkpoints.load(["train"])
    return run


def take_over(folder: Path, runs: list[Run]) -> None:
    """Take the folder as another process does, and train in it; append the run to ``runs``."""
    lease = SoftFileLease(folder / ".lease", lease_duration=sskd.runs.lock.DURATION)
    lease.force_break()
    run = open_run(folder)
    runs.append(run)
    if run.finished(RunResult):
        run.close()
        return
    for epoch in (2, 3):
        run.metrics.log(line(epoch, "new"))
        run.checkpoints.save({"stage": "train", "holder": "new"})
        run.checkpoints.save_best(network(2.0).state_dict(), epoch, 50.0)
    run.announce({"train": 3})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


WRITES: dict[str, Callable[[Run], object]] = {
    "metrics.jsonl": lambda run: run.metrics.log(line(2, LATE)),
    "last.pt": lambda run: run.checkpoints.save({"stage": "train", "holder": LATE}),
    "best.pt": lambda run: run.checkpoints.save_best(network(1.0).state_dict(), 2, 40.0),
    "status.json": lambda run: run.announce({"train": 999}),
    "result.json": lambda run: run.finish(None, SharedResult(stage=LATE)),
    "model.safetensors": lambda run: run.finish(network(1.0), SharedResult(stage=LATE)),
    "failure": lambda run: run.__exit__(ValueError, ValueError(LATE), None),
    "metrics.jsonl again": lambda run: run.checkpoints.load(["train"]),
    "config.yaml": lambda run: run._enter(),
}


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Return a function that schedules an action before the n-th disk access or check from now."""
    left, action, is_running = 0, lambda: None, False

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left, is_running
            # filelock's accesses to its own file do not count.
            if not is_running and getattr(arguments[0], "name", "") != ".lease":
                left -= 1
                if left == 0:
                    is_running = True
                    action()
                    is_running = False
            return function(*arguments, **keywords)

        return call

    def at(number: int, scheduled: Callable[[], None]) -> None:
        nonlocal left, action
        left, action = number, scheduled

    for owner, name in (
        (Path, "open"), (Path, "replace"), (Path, "unlink"), (os, "fsync"), (FolderLock, "check"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return at


@pytest.mark.parametrize("name", WRITES)
def test_a_late_write_changes_nothing(tmp_path: Path, moments: Any, name: str) -> None:
    """The process is suspended at each moment of each kind of write."""
    number, refused, is_done = 0, 0, False
    while not is_done:
        number += 1
        folder = tmp_path / str(number)
        runs: list[Run] = []
        old = open_run(folder)
        old.metrics.log(line(1, "old"))
        old.checkpoints.save({"stage": "train", "holder": "old"})
        expected: dict[str, bytes] = {}

        def take(folder: Path = folder, runs: list[Run] = runs, expected: Any = expected) -> None:
            take_over(folder, runs)
            expected.update(content(folder))

        moments(number, take)
        try:
            WRITES[name](old)
        except BusyError:
            refused += 1
        moments(0, lambda: None)
        is_done = not runs  # the write has fewer moments
        if not is_done:
            left = content(folder)
            if "result.json" in left:  # written before the other process took the folder
                assert json.loads(left["result.json"])["stage"] == LATE
                continue
            # last.pt may have become previous.pt, from which the new holder can resume.
            if "last.pt" not in left:
                left["last.pt"] = left["previous.pt"]
                left["previous.pt"] = expected["previous.pt"]
            assert left == expected, number
            finish_as_third(runs[0])
        old.close()
        for run in runs:
            run.close()
    assert number > 3
    assert refused or name == "failure"  # that reports the error it was given


def finish_as_third(run: Run) -> None:
    """Log another epoch as the new holder, close the run, and finish it as a third process."""
    run.metrics.log(line(4, "new"))
    run.checkpoints.save({"stage": "train", "holder": "new"})
    run.close()
    third = Run(run.folder, CONFIG).open()
    state = third.checkpoints.load(["train"])
    assert state is not None
    assert state["holder"] == "new"
    assert [each.epoch for each in third.metrics.lines] == [1, 2, 3, 4]
    third.finish(None, SharedResult(stage="train"))
    assert json.loads((run.folder / "result.json").read_text()) == {
        "kind": "phase",
        "stage": "train",
        "seconds": None,
        "digest": None,
        "run": {"seed": 1},
    }
    third.close()


def test_temporary_files_of_two_nodes_differ_in_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes in two containers often have the same process id."""
    names = set()

    def write(stream: Any) -> None:
        names.add(stream.name)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    for _ in range(5):
        sskd.files.write_atomically(tmp_path / "last.pt", write)
    assert len(names) == 5


def test_a_suspended_process_ends_busy(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Suspended at a change of files, and continued after another process finished its job."""
    last, statuses = undisturbed.moments("alone"), set()
    for part in (1, 2):
        runs = tmp_path / str(part)
        fault = Fault("suspended", round(last * part / 3), runs)
        suspended = Attempt("alone", runs, fault=fault, log=tmp_path / "suspended.log")
        wait_until(suspended.is_suspended)
        for lease in runs.rglob(".lease"):
            lease.unlink()
        check_finishes(undisturbed, "alone", runs)
        suspended.send(signal.SIGCONT)
        statuses.add(suspended.end(after=60))
        assert not any("Traceback" in text for text in suspended.output), suspended.output
        assert outcome(runs) == undisturbed.outcome("alone")
    assert statuses <= {0, 75}
    assert 75 in statuses


def test_any_reader_of_torch_files_finds_the_run(tmp_path: Path) -> None:
    with open_run(tmp_path) as run:
        run.checkpoints.save({"stage": "train"})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["run"] == CONFIG
