"""A checkpoint names its run, and another run's is not taken for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from torch import nn

from sskd.errors import UserError
from sskd.runs.checkpoint_file import load_checkpoint, save_checkpoint
from sskd.runs.identity import full_config
from sskd.runs.result import RunResult, Top1
from sskd.runs.run import Run
from sskd.teachers.find import find_teacher, run_location
from sskd.train import train

STUDENT = ("dataset=digits", "method=kd", "arch@teacher=resnet14", "arch@student=resnet8")
OTHERS = {
    "seed": "seed=1",
    "dataset.label_noise": "dataset.label_noise=0.2",
    "dataset.fraction": "dataset.fraction=0.5",
    "method.temperature": "method.temperature=2",
    "method.name": "method=at",
    "optimizer.lr": "optimizer.lr=0.01",
    "student.name": "arch@student=resnet20",
    "precision": "precision=bf16",
}
SAME = ["device=cpu", "compile=off", "checkpoint_minutes=1", "wandb.project=b", "dataset.root=b"]


def stopped(folder: Path, config: dict[str, Any]) -> Path:
    """Leave a run that was stopped in its first epoch, before it had written a line."""
    with Run(folder, config).open() as run:
        run.checkpoints.load(["train"])
        run.checkpoints.save({"stage": "train"})
        run.checkpoints.save_best(nn.Linear(1, 1), 1, 10.0)
    return folder


def put(folder: Path, name: str, other: Path) -> None:
    """Put a checkpoint of another run in the place of this one's."""
    if name == "previous.pt":
        (folder / "last.pt").write_bytes(b"PK")
        shutil.copy(other / "last.pt", folder / name)
    else:
        shutil.copy(other / name, folder / name)


def resumed(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    with Run(folder, config).open() as run:
        return run.checkpoints.load(["train"])


@pytest.mark.parametrize("name", ["last.pt", "previous.pt"])
@pytest.mark.parametrize("key", OTHERS)
def test_another_runs_checkpoint_is_refused(
    composed: Compose, tmp_path: Path, name: str, key: str
) -> None:
    own = full_config(composed(*STUDENT), "digest")
    folder = stopped(tmp_path / "own", own)
    put(
        folder,
        name,
        stopped(tmp_path / "other", full_config(composed(*STUDENT, OTHERS[key]), "digest")),
    )
    with pytest.raises(UserError) as error:
        resumed(folder, own)
    told = str(error.value)
    assert told.startswith(f"{folder / name}: is a checkpoint of another run: ")
    assert f"{key} (" in told
    assert "\n" not in told


@pytest.mark.parametrize("digest", ["another", None])
def test_a_checkpoint_of_another_teacher_is_refused(
    composed: Compose, tmp_path: Path, digest: str | None
) -> None:
    config = composed(*STUDENT)
    folder = stopped(tmp_path / "own", full_config(config, "digest"))
    put(folder, "last.pt", stopped(tmp_path / "other", full_config(config, digest)))
    with pytest.raises(UserError, match=r"another run: teacher\.digest \("):
        resumed(folder, full_config(config, "digest"))


@pytest.mark.parametrize("key", ["seed", "teacher", "views", "schedule"])
def test_a_shared_phases_checkpoint_is_its_own(tmp_path: Path, key: str) -> None:
    settings = {"phase": "ss_head", "seed": 0, "views": 4, "teacher": {"name": "a", "digest": "b"}}
    settings |= {"schedule": {"epochs": 60, "milestones": [30]}}
    other = settings | {key: {"digest": "c"} if key == "teacher" else 7}
    folder = stopped(tmp_path / "own", settings)
    put(folder, "last.pt", stopped(tmp_path / "other", other))
    with pytest.raises(UserError, match=f"another run: .*{key}"):
        resumed(folder, settings)


@pytest.mark.parametrize("word", SAME)
def test_what_does_not_decide_the_result_does_not_count(
    composed: Compose, tmp_path: Path, word: str
) -> None:
    folder = stopped(tmp_path / "own", full_config(composed(*STUDENT)))
    assert resumed(folder, full_config(composed(*STUDENT, word, f"runs={tmp_path / 'b'}")))


@pytest.mark.parametrize("name", ["last.pt", "previous.pt"])
def test_a_checkpoint_of_a_version_without_names_resumes(
    composed: Compose, tmp_path: Path, name: str
) -> None:
    own = full_config(composed(*STUDENT))
    folder = stopped(tmp_path, own)
    state = load_checkpoint(folder / "last.pt")
    del state["run"]
    (folder / "last.pt").unlink()
    save_checkpoint(folder / name, state)
    assert resumed(folder, own)


def test_another_runs_best_epoch_is_not_taken(
    composed: Compose, tmp_path: Path, capsys: Any
) -> None:
    own = full_config(composed(*STUDENT))
    folder = stopped(tmp_path / "own", own)
    assert Run(folder, own).checkpoints.load_best(1) is not None
    put(folder, "best.pt", stopped(tmp_path / "other", full_config(composed(*STUDENT, "seed=1"))))
    assert Run(folder, own).checkpoints.load_best(1) is None
    assert (
        "best.pt is corrupt: it is of another run: seed (1 there, 0 here)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("odd", [3, [1], "name", None, nn.Linear(1, 1).weight.data, {"a": {1: []}}])
def test_an_odd_name_is_damage_or_another_run(tmp_path: Path, odd: Any) -> None:
    folder = stopped(tmp_path, {"seed": 1})
    save_checkpoint(folder / "last.pt", {**load_checkpoint(folder / "last.pt"), "run": odd})
    with pytest.raises(UserError, match=r"it names no run|another run"):
        resumed(folder, {"seed": 1})


# ---- a result ----

RESULT = RunResult(kind="distill", top1=Top1(last=70.0))


def finished(folder: Path, config: dict[str, Any]) -> Path:
    with Run(folder, config).open() as run:
        run.finish(nn.Linear(1, 1), RESULT)
    return folder


@pytest.mark.parametrize("key", OTHERS)
def test_another_runs_result_is_refused(composed: Compose, tmp_path: Path, key: str) -> None:
    own = full_config(composed(*STUDENT), "digest")
    folder = finished(tmp_path / "own", own)
    other = finished(tmp_path / "other", full_config(composed(*STUDENT, OTHERS[key]), "digest"))
    found = Run(folder, own).finished(RunResult)
    assert found is not None
    assert found.top1.last == 70.0
    for name in ("result.json", "model.safetensors"):
        shutil.copy(other / name, folder / name)
    with pytest.raises(UserError, match=rf"result of another run: .*{key} \(") as caught:
        Run(folder, own).finished(RunResult)
    assert str(caught.value).startswith(f"{folder / 'result.json'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", SAME)
def test_the_result_of_the_same_run_elsewhere_is_taken(
    composed: Compose, tmp_path: Path, word: str
) -> None:
    folder = finished(tmp_path, full_config(composed(*STUDENT), "digest"))
    assert Run(folder, full_config(composed(*STUDENT, word), "digest")).finished(RunResult)


def test_a_result_of_a_version_that_named_no_run_is_taken(
    composed: Compose, tmp_path: Path
) -> None:
    own = full_config(composed(*STUDENT), "digest")
    folder = finished(tmp_path, own)
    (folder / "result.json").write_text(json.dumps(RESULT.to_json()))
    assert Run(folder, own).finished(RunResult) == RESULT
    (folder / "result.json").write_text(json.dumps(RESULT.to_json() | {"run": "resnet8"}))
    with pytest.raises(UserError, match="it names no run"):
        Run(folder, own).finished(RunResult)


def test_another_runs_result_and_weights_are_no_teacher(composed: Compose, tmp_path: Path) -> None:
    words = ("dataset=digits", "dataset.fraction=0.05", "schedule.epochs=1", "device=cpu")
    folders = []
    for more in ((), ("seed=1",)):
        config = composed(*words, "arch=resnet8", *more, primary="teacher")
        train(config)
        folders.append(run_location(config)[0])
    student = composed(
        *words, "arch@teacher=resnet8", "arch@student=resnet8", "method=kd", "teacher.fraction=0.05"
    )
    assert find_teacher(student) is not None
    for name in ("result.json", "model.safetensors", "best.pt"):
        shutil.copy(folders[1] / name, folders[0] / name)
    with pytest.raises(UserError, match=r"result of another run: seed \(1 there, 0 here\)"):
        find_teacher(student)
