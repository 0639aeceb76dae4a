"""A checkpoint or a result names its run, and no other run accepts it."""

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
    """Write a run that was stopped in its first epoch, without metrics; return its folder."""
    with Run(folder, config).open() as run:
        run.checkpoints.load(["train"])
        run.checkpoints.save({"stage": "train"})
        run.checkpoints.save_best(nn.Linear(1, 1).state_dict(), 1, 10.0)
    return folder


def replace(folder: Path, name: str, other: Path) -> None:
    """Replace the checkpoint ``name`` in ``folder`` by the one of another run."""
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
    config = full_config(composed(*STUDENT), "digest")
    folder = stopped(tmp_path / "own", config)
    replace(
        folder,
        name,
        stopped(tmp_path / "other", full_config(composed(*STUDENT, OTHERS[key]), "digest")),
    )
    with pytest.raises(UserError) as error:
        resumed(folder, config)
    message = str(error.value)
    assert message.startswith(f"{folder / name}: is a checkpoint of another run: ")
    assert f"{key} (" in message
    assert "\n" not in message


@pytest.mark.parametrize("digest", ["another", None])
def test_a_checkpoint_of_another_teacher_is_refused(
    composed: Compose, tmp_path: Path, digest: str | None
) -> None:
    config = composed(*STUDENT)
    folder = stopped(tmp_path / "own", full_config(config, "digest"))
    replace(folder, "last.pt", stopped(tmp_path / "other", full_config(config, digest)))
    with pytest.raises(UserError, match=r"another run: teacher\.digest \("):
        resumed(folder, full_config(config, "digest"))


@pytest.mark.parametrize("key", ["seed", "teacher", "views", "schedule"])
def test_another_shared_phases_checkpoint_is_refused(tmp_path: Path, key: str) -> None:
    settings = {"phase": "ss_head", "seed": 0, "views": 4, "teacher": {"name": "a", "digest": "b"}}
    settings |= {"schedule": {"epochs": 60, "milestones": [30]}}
    other = settings | {key: {"digest": "c"} if key == "teacher" else 7}
    folder = stopped(tmp_path / "own", settings)
    replace(folder, "last.pt", stopped(tmp_path / "other", other))
    with pytest.raises(UserError, match=f"another run: .*{key}"):
        resumed(folder, settings)


@pytest.mark.parametrize("word", SAME)
def test_settings_that_keep_the_result_do_not_count(
    composed: Compose, tmp_path: Path, word: str
) -> None:
    folder = stopped(tmp_path / "own", full_config(composed(*STUDENT)))
    assert resumed(folder, full_config(composed(*STUDENT, word, f"runs={tmp_path / 'b'}")))


@pytest.mark.parametrize("name", ["last.pt", "previous.pt"])
def test_a_checkpoint_that_names_no_run_resumes(
    composed: Compose, tmp_path: Path, name: str
) -> None:
    config = full_config(composed(*STUDENT))
    folder = stopped(tmp_path, config)
    state = load_checkpoint(folder / "last.pt")
    del state["run"]
    (folder / "last.pt").unlink()
    save_checkpoint(folder / name, state)
    assert resumed(folder, config)


def test_another_runs_best_weights_are_not_used(
    composed: Compose, tmp_path: Path, capsys: Any
) -> None:
    config = full_config(composed(*STUDENT))
    folder = stopped(tmp_path / "own", config)
    assert Run(folder, config).checkpoints.load_best(1) is not None
    replace(
        folder, "best.pt", stopped(tmp_path / "other", full_config(composed(*STUDENT, "seed=1")))
    )
    assert Run(folder, config).checkpoints.load_best(1) is None
    assert (
        "best.pt is corrupt: it is of another run: seed (1 there, 0 here)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "named", [3, [1], "name", None, nn.Linear(1, 1).weight.data, {"a": {1: []}}]
)
def test_a_malformed_run_in_a_checkpoint_is_refused(tmp_path: Path, named: Any) -> None:
    folder = stopped(tmp_path, {"seed": 1})
    save_checkpoint(folder / "last.pt", {**load_checkpoint(folder / "last.pt"), "run": named})
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
    config = full_config(composed(*STUDENT), "digest")
    folder = finished(tmp_path / "own", config)
    other = finished(tmp_path / "other", full_config(composed(*STUDENT, OTHERS[key]), "digest"))
    found = Run(folder, config).finished(RunResult)
    assert found is not None
    assert found.top1.last == 70.0
    for name in ("result.json", "model.safetensors"):
        shutil.copy(other / name, folder / name)
    with pytest.raises(UserError, match=rf"result of another run: .*{key} \(") as caught:
        Run(folder, config).finished(RunResult)
    assert str(caught.value).startswith(f"{folder / 'result.json'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", SAME)
def test_a_result_from_other_circumstances_is_used(
    composed: Compose, tmp_path: Path, word: str
) -> None:
    folder = finished(tmp_path, full_config(composed(*STUDENT), "digest"))
    assert Run(folder, full_config(composed(*STUDENT, word), "digest")).finished(RunResult)


def test_a_result_that_names_no_run_is_used(composed: Compose, tmp_path: Path) -> None:
    config = full_config(composed(*STUDENT), "digest")
    folder = finished(tmp_path, config)
    (folder / "result.json").write_text(json.dumps(RESULT.to_json()))
    assert Run(folder, config).finished(RunResult) == RESULT
    for run in ("resnet8", None):
        (folder / "result.json").write_text(json.dumps(RESULT.to_json() | {"run": run}))
        with pytest.raises(UserError, match="'run' is not an object"):
            Run(folder, config).finished(RunResult)


def test_a_teacher_with_another_runs_result_is_refused(composed: Compose, tmp_path: Path) -> None:
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
