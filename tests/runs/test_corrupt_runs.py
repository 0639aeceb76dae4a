"""Corrupt or foreign files in the folder of a run, and links, are reported or not used."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import outcome
from conftest import Compose, KeptRuns, SmallTeacher
from crashes import CrashError, at_step, crash
from damage import change_value
from faults import SMALL

from sskd.config import Config
from sskd.errors import UserError
from sskd.runs.checkpoint_file import load_checkpoint, save_checkpoint
from sskd.runs.run import Run
from sskd.train import train
from sskd.training.state import PhaseCheckpoint

CHANGES = 25
TEACHER_STEPS = 2  # 40 images in a batch of the recipe's 64, twice
SSKD = (*SMALL, "method=sskd", "method.ss_head.epochs=0.7", "checkpoint_minutes=1e-9")
StopRun = Callable[[], tuple[Config, Path]]


@pytest.fixture
def stop_run(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_teacher: SmallTeacher,
    kept_runs: KeptRuns,
) -> StopRun:  # fmt: skip
    """Return a function that crashes SSKD in the second epoch of its shared head phase.

    It returns the configuration and the folder of that phase.
    """

    def stop() -> tuple[Config, Path]:
        def make(runs: Path) -> None:
            small_teacher.put(runs)
            with monkeypatch.context() as patch:
                at_step(patch, 5 + 2, crash)
                with pytest.raises(CrashError):
                    train(composed(*SSKD, f"runs={runs}"))

        kept_runs.put("stopped", make, tmp_path / "runs")
        folders = (tmp_path / "runs").glob("digits/phases/*/*/*/last.pt")
        (folder,) = (path.parent for path in folders)
        return composed(*SSKD), folder

    return stop


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "foreign", "removed"])
def test_a_run_resumes_from_the_previous_checkpoint(
    composed: Compose, tmp_path: Path, capsys: Any, damage: str, stop_run: StopRun,
    small_teacher: SmallTeacher, kept_runs: KeptRuns,
) -> None:  # fmt: skip
    def make(runs: Path) -> None:
        small_teacher.put(runs)
        train(composed(*SSKD, f"runs={runs}"))

    kept_runs.put("undisturbed", make, tmp_path / "undisturbed")
    config, folder = stop_run()
    last, content = folder / "last.pt", (folder / "last.pt").read_bytes()
    middle = len(content) // 2
    if damage == "removed":  # between the two renames
        last.unlink()
    elif damage == "foreign":
        torch.save({"some": "thing"}, last)
    else:
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        last.write_bytes({"cut": content[:-500], "changed": changed, "empty": b""}[damage])
    capsys.readouterr()
    train(config)
    errors = capsys.readouterr().err
    warned = f"warning: {folder}: last.pt is corrupt: " in errors
    assert warned == (damage != "removed")
    if damage == "changed":
        assert "the checksum of " in errors or "cannot be read" in errors
    assert not list((tmp_path / "runs").rglob("previous.pt"))  # a finished run needs none
    assert outcome(tmp_path / "runs") == outcome(tmp_path / "undisturbed")


@pytest.mark.parametrize("damage", ["both", "metrics", "a line short"])
def test_the_error_names_the_folder_of_a_corrupt_run(stop_run: StopRun, damage: str) -> None:
    """The corrupt run may be a first phase, which force=true would not train again."""
    config, folder = stop_run()
    metrics = folder / "metrics.jsonl"
    if damage == "both":
        for name in ("last.pt", "previous.pt"):
            (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    elif damage == "metrics":
        metrics.write_text(metrics.read_text().replace("0.", "1."))
    else:
        metrics.write_text("")
    name = "last.pt" if damage == "both" else "metrics.jsonl"
    with pytest.raises(UserError, match=rf"{folder}: {name} is corrupt: .*; restore the file"):
        train(config)
    shutil.rmtree(folder)
    train(config)


def test_a_run_without_its_best_weights_has_a_result(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        PhaseCheckpoint, "_save_best", lambda self: write_corrupt_best(self.run.folder)
    )
    with pytest.raises(UserError, match=r"no digest of the best epoch's weights; .*teacher\.epoch"):
        train(composed(*SMALL, "method=kd"))
    assert "the best, are lost: best.pt is corrupt: it cannot" in capsys.readouterr().err
    (path,) = (tmp_path / "runs").rglob("result.json")
    digest = json.loads(path.read_text())["digest"]
    assert digest["best"] is None
    assert train(composed(*SMALL, "method=kd", "teacher.epoch=last")).teacher_top1


def write_corrupt_best(folder: Path) -> None:
    (folder / "best.pt").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("content", "how"),
    [({"epoch": 2, "model": {}}, "it is of epoch 2"), ({"epoch": 3}, "it has no weights")],
)
def test_best_weights_of_another_epoch_are_refused(
    tmp_path: Path, capsys: Any, content: dict[str, Any], how: str
) -> None:
    save_checkpoint(tmp_path / "best.pt", content)
    assert Run(tmp_path, {}).checkpoints.load_best(3) is None
    assert f"of epoch 3, the best, are lost: best.pt is corrupt: {how}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        {"position": {"era": 1}},
        {"position": {"epoch": "a"}},
        {"position": 3},
        {"module": {}},
        {"loader": {"position": 10**6}},
    ],
)
def test_a_checkpoint_with_foreign_content_is_refused(
    stop_run: StopRun, content: dict[str, Any]
) -> None:
    config, folder = stop_run()
    state = load_checkpoint(folder / "last.pt")
    assert state["position"]["mid_epoch"]
    if "loader" in content:
        content = {"loader": {**state["loader"], **content["loader"]}}
    save_checkpoint(folder / "last.pt", {**state, **content})
    with pytest.raises(UserError, match=rf"{folder}: its checkpoint is not one of this run"):
        train(config)


def test_a_changed_checkpoint_is_refused_or_resumes(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive's checksums fit, but a value is nonsense; only a one-line error may result."""
    config = composed(*SMALL, "method=kd", "schedule.epochs=2", "checkpoint_minutes=1e-9")
    with monkeypatch.context() as patch:
        at_step(patch, TEACHER_STEPS + 7, crash)
        with pytest.raises(CrashError):
            train(config)
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("previous.pt"))
    shutil.copytree(folder, tmp_path / "undisturbed")
    state, errors = load_checkpoint(folder / "last.pt"), ""
    for number in range(CHANGES):
        chance = random.Random(number)
        key = chance.choice(list(state))
        save_checkpoint(folder / "last.pt", {**state, key: change_value(state[key], chance)})
        try:
            train(config)
        except UserError as error:
            errors += f"{error}\n"
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "undisturbed", folder)
    assert 0 < errors.count("\n") < CHANGES
    assert all(line.isprintable() for line in errors.splitlines())


@pytest.mark.parametrize("phase", [[1], {"a": 1}, 3, "elsewhere"])
def test_a_checkpoint_of_an_unknown_phase_is_corrupt(
    stop_run: StopRun, capsys: Any, phase: Any
) -> None:
    config, folder = stop_run()
    save_checkpoint(folder / "last.pt", {**load_checkpoint(folder / "last.pt"), "stage": phase})
    train(config)
    assert f"warning: {folder}: last.pt is corrupt: it belongs to phase" in capsys.readouterr().err
    assert load_checkpoint(folder / "damaged.pt")["stage"] == phase


def test_a_link_or_a_pipe_in_a_run_folder_is_refused(stop_run: StopRun, tmp_path: Path) -> None:
    config, folder = stop_run()
    elsewhere = tmp_path / "elsewhere"
    (folder / "metrics.jsonl").rename(elsewhere)
    (folder / "metrics.jsonl").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a symbolic link"):
        train(config)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a pipe or a device"):
        train(config)


@pytest.mark.parametrize("model", [{"a": 1}, {1: torch.zeros(1)}, {"a": {}}])
def test_best_weights_that_are_no_tensors_are_lost(
    tmp_path: Path, capsys: Any, model: dict[Any, Any]
) -> None:
    save_checkpoint(tmp_path / "best.pt", {"model": model, "epoch": 1})
    assert Run(tmp_path, {}).checkpoints.load_best(1) is None
    assert "best.pt is corrupt: it has no weights" in capsys.readouterr().err


def test_a_shared_phase_without_times_costs_no_student(composed: Compose, tmp_path: Path) -> None:
    """Its log is not checked by a digest, so a field of it may be missing."""
    words = (*SMALL, "method=sskd", f"runs={tmp_path / 'runs'}", "schedule.epochs=1")
    train(composed(*words))
    (log,) = tmp_path.glob("runs/*/phases/*/ss_head/*/metrics.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train(composed(*words, "method.temperature=3")).seconds
