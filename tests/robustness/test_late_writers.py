"""A process that stood still while another took its run's folder changes nothing there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import Undisturbed, ends_undisturbed, outcome
from faults import Attempt, Fault
from filelock import SoftFileLease
from stand_in import wait_until
from torch import nn

import sskd.files
import sskd.runs.lock
from sskd.errors import BusyError
from sskd.runs.lock import FolderLock
from sskd.runs.result import RunResult, SharedResult
from sskd.runs.run import Run

CONFIG = {"seed": 1}
LATE = "late"


def line(number: int, holder: str) -> dict[str, Any]:
    return {"stage": "train", "epoch": number, "holder": holder}


def network(value: float) -> nn.Module:
    made = nn.Linear(1, 1)
    nn.init.constant_(made.weight, value)
    return made


def opened(folder: Path) -> Run:
    run = Run(folder, CONFIG).open()
    run.checkpoints.load(["train"])
    return run


def taken_over(folder: Path, runs: list[Run]) -> None:
    """Do what another process does that takes the folder, and works in it."""
    lease = SoftFileLease(folder / ".lease", lease_duration=sskd.runs.lock.DURATION)
    lease.force_break()
    run = opened(folder)
    runs.append(run)
    if run.finished(RunResult):
        run.close()
        return
    for epoch in (2, 3):
        run.metrics.log(line(epoch, "new"))
        run.checkpoints.save({"stage": "train", "holder": "new"})
        run.checkpoints.save_best(network(2.0), epoch, 50.0)
    run.announce({"train": 3})


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


WRITES: dict[str, Callable[[Run], object]] = {
    "metrics.jsonl": lambda run: run.metrics.log(line(2, LATE)),
    "last.pt": lambda run: run.checkpoints.save({"stage": "train", "holder": LATE}),
    "best.pt": lambda run: run.checkpoints.save_best(network(1.0), 2, 40.0),
    "status.json": lambda run: run.announce({"train": 999}),
    "result.json": lambda run: run.finish(None, SharedResult(stage=LATE)),
    "model.safetensors": lambda run: run.finish(network(1.0), SharedResult(stage=LATE)),
    "failure": lambda run: run.__exit__(ValueError, ValueError(LATE), None),
    "metrics.jsonl again": lambda run: run.checkpoints.load(["train"]),
    "config.yaml": lambda run: run._enter(),
}


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Return a function: do an action before the n-th access to the disk from now, or check."""
    left, action, busy = 0, lambda: None, False

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            nonlocal left, busy
            if not busy and getattr(given[0], "name", "") != ".lease":  # filelock's own
                left -= 1
                if left == 0:
                    busy = True
                    action()
                    busy = False
            return function(*given, **named)

        return call

    def at(number: int, what: Callable[[], None]) -> None:
        nonlocal left, action
        left, action = number, what

    for owner, name in (
        (Path, "open"), (Path, "replace"), (Path, "unlink"), (os, "fsync"), (FolderLock, "check"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return at


@pytest.mark.parametrize("name", WRITES)
def test_what_comes_late_does_not_get_in(tmp_path: Path, moments: Any, name: str) -> None:
    """Whatever the process was about to do when it stood still: each moment of each write."""
    number, refused, ended = 0, 0, False
    while not ended:
        number += 1
        folder = tmp_path / str(number)
        runs: list[Run] = []
        old = opened(folder)
        old.metrics.log(line(1, "old"))
        old.checkpoints.save({"stage": "train", "holder": "old"})
        found: dict[str, bytes] = {}

        def take(folder: Path = folder, runs: list[Run] = runs, found: Any = found) -> None:
            taken_over(folder, runs)
            found.update(content(folder))

        moments(number, take)
        try:
            WRITES[name](old)
        except BusyError:
            refused += 1
        moments(0, lambda: None)
        ended = not runs  # the write has fewer moments
        if not ended:
            kept = content(folder)
            if "result.json" in kept:  # before the other one came
                assert json.loads(kept["result.json"])["holder"] == LATE
                continue
            # Its state may move to previous.pt, where the new holder finds it again.
            if "last.pt" not in kept:
                kept["last.pt"] = kept["previous.pt"]
                kept["previous.pt"] = found["previous.pt"]
            assert kept == found, number
            goes_on(runs[0])
        old.close()
        for run in runs:
            run.close()
    assert number > 3
    assert refused or name == "failure"  # whose own error counts


def goes_on(run: Run) -> None:
    """Let the new holder go on, stop, and be followed by a third."""
    run.metrics.log(line(4, "new"))
    run.checkpoints.save({"stage": "train", "holder": "new"})
    run.close()
    third = Run(run.folder, CONFIG).open()
    state = third.checkpoints.load(["train"])
    assert state is not None
    assert state["holder"] == "new"
    assert [figures["epoch"] for figures in third.metrics.lines] == [1, 2, 3, 4]
    third.finish(None, SharedResult(stage="train"))
    assert json.loads((run.folder / "result.json").read_text()) == {
        "kind": "phase",
        "stage": "train",
        "seconds": None,
        "digest": None,
        "run": {"seed": 1},
    }
    third.close()


def test_two_nodes_prepare_no_file_of_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of two containers often have one number."""
    names = set()

    def write(stream: Any) -> None:
        names.add(stream.name)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    for _ in range(5):
        sskd.files.write_atomically(tmp_path / "last.pt", write)
    assert len(names) == 5


def test_a_process_that_was_stopped_ends_busy(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Stopped at moments at which it changes files, and continued when its cell is finished."""
    last, statuses = undisturbed.moments("alone"), set()
    for part in (1, 2):
        runs = tmp_path / str(part)
        fault = Fault("stands still", round(last * part / 3), runs)
        stopped = Attempt("alone", runs, fault=fault, log=tmp_path / "stopped.log")
        wait_until(stopped.is_stopped)
        for lease in runs.rglob(".lease"):
            lease.unlink()
        ends_undisturbed(undisturbed, "alone", runs)
        stopped.send(signal.SIGCONT)
        statuses.add(stopped.end(after=60))
        assert not any("Traceback" in told for told in stopped.told), stopped.told
        assert outcome(runs) == undisturbed.outcome("alone")
    assert statuses <= {0, 75}
    assert 75 in statuses


def test_a_checkpoint_names_its_run_for_any_reader(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.checkpoints.save({"stage": "train"})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["run"] == CONFIG
