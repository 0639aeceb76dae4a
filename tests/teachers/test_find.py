"""The teacher of a student: found by its run or its file, or reported as missing."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose
from faults import SMALL
from image_folders import write_images
from torch import nn

import sskd.teachers.assembly
from sskd.data import Images
from sskd.errors import UserError
from sskd.methods import build_method
from sskd.models import build_model, weights_digest
from sskd.runs.recipe import teacher_config, training_command
from sskd.teachers.find import run_location
from sskd.train import train


def test_the_method_gets_the_teacher_that_was_found(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def build(
        settings: Any, student: nn.Module, teacher: nn.Module | None, data: Images, **heads: Any
    ) -> Any:
        seen.append(weights_digest(teacher) if teacher else None)
        return build_method(settings, student, teacher, data, **heads)

    monkeypatch.setattr(sskd.teachers.assembly, "build_method", build)
    train(composed(*SMALL, "method=kd"))
    (path,) = tmp_path.glob("runs/digits/scratch/resnet14/*/result.json")
    assert seen[-1] == json.loads(path.read_text())["digest"]["best"]


def test_a_student_of_another_teacher_is_another_run(composed: Compose, tmp_path: Path) -> None:
    train(composed(*SMALL, "method=kd"))
    (path,) = (tmp_path / "runs/digits/scratch/resnet14").rglob("result.json")
    result = json.loads(path.read_text())
    result["digest"]["best"] = "0" * 64
    path.write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"teacher\.digest"):
        train(composed(*SMALL, "method=kd"))


def test_a_half_precision_teacher_is_accepted(composed: Compose, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = build_model("resnet14", 10).state_dict()
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": half}, tmp_path / "half.pth")
    small = [item for item in SMALL if not item.startswith("teacher.train")]
    train(composed(*small, "method=kd", f"teacher.checkpoint={tmp_path / 'half.pth'}"))


def test_settings_of_several_processes_choose_no_other_teacher(composed: Compose) -> None:
    words = (*SMALL, "method=kd")
    found = composed(*words, "sync_batch_norm=true", "gather_batch=true")
    assert run_location(teacher_config(found)) == run_location(teacher_config(composed(*words)))


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("dataset.holdout=0.1", "precision=bf16"),
        ("teacher.seed=3", "teacher.epochs=7"),
        ("schedule=smoke", "teacher.label_noise=0.2"),
        ("dataset=cifar100", "arch@teacher=vgg13"),
        ("teacher.base_lr=0.1", "dataset.root='it is 50% (a,b), é'"),
        ("dataset=folder", "dataset.root='2024'", "dataset.name='7'"),
        ("dataset.fraction=0.5", "teacher.fraction=1.0", "dataset.seed=2"),
    ],
)
def test_the_error_names_the_command_of_a_missing_teacher(
    composed: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: tuple[str, ...],
) -> None:
    write_images(tmp_path, 0).rename(tmp_path / "2024")  # missing data would be reported first
    monkeypatch.chdir(tmp_path)
    small = [item for item in SMALL if not item.startswith("teacher.train")]
    config = composed(*small, *changes, "method=kd")
    with pytest.raises(UserError, match="no finished run of the teacher") as error:
        train(config)
    command = str(error.value).split("`")[1]
    program, script, *overrides = shlex.split(command)
    assert (program, script) == ("python", "train_teacher.py")
    found = composed(*overrides, primary="teacher")
    assert run_location(found) == run_location(teacher_config(config))
    assert training_command(found) == command
