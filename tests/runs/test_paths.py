"""A path on the command line is relative to the folder in which the command was started."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import SMALL
from hydra.core.hydra_config import HydraConfig
from PIL import Image

import train_student
from sskd.commands.process import run_command
from sskd.files import expanded
from sskd.models import build_model, save_weights

ONE_EPOCH = [*(word for word in SMALL if "epochs" not in word), "schedule.epochs=1"]
CHDIR = "hydra.job.chdir=true"


class FromFolder:
    """Runs a command in this process as if it was started in ``folder``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Any, folder: Path) -> None:
        self._monkeypatch, self._capsys, self.folder = monkeypatch, capsys, folder

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self._monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        self._monkeypatch.setattr(sys, "argv", [train_student.__file__, *words])
        self._monkeypatch.chdir(self.folder)
        try:
            status = run_command(train_student.main)
        except SystemExit as stop:
            status = int(stop.code or 0)
        assert Path.cwd() == self.folder
        captured = self._capsys.readouterr()
        return status, captured.out, captured.err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> FromFolder:
    return FromFolder(monkeypatch, capsys, tmp_path)


def results(folder: Path) -> list[Path]:
    return sorted(folder.rglob("result.json"))


@pytest.mark.parametrize(
    "hydra",
    [
        [CHDIR],
        [CHDIR, "hydra.sweep.dir=elsewhere/sweep", "hydra.sweep.subdir=${hydra.job.num}"],
        ["hydra.sweep.dir=elsewhere/sweep"],
    ],
    ids=["chdir", "chdir to folders of the user", "folders of the user"],
)
def test_a_sweep_finds_its_runs(started: FromFolder, tmp_path: Path, hydra: list[str]) -> None:
    words = ["-m", *ONE_EPOCH, "method=vanilla", "seed=0,1", "runs=results", *hydra]
    status, out, err = started(*words)
    assert (status, err) == (0, "")
    assert "2 of 2 jobs have finished" in out
    assert len(results(tmp_path)) == len(results(tmp_path / "results" / "digits")) == 2
    status, out, _ = started(*words)
    assert (status, out) == (0, "2 jobs, 2 already finished\n2 of 2 jobs have finished\n")
    # Hydra's own folders do not change which run it is.
    status, out, _ = started(*words[: -len(hydra)])
    assert (status, out) == (0, "2 jobs, 2 already finished\n2 of 2 jobs have finished\n")


def test_a_single_run_writes_where_it_was_started(started: FromFolder, tmp_path: Path) -> None:
    words = [*ONE_EPOCH, "method=kd", "runs=results"]
    assert started(*words, CHDIR, "hydra.run.dir=elsewhere/${seed}")[0] == 0
    assert (tmp_path / "elsewhere" / "0").is_dir()
    assert len(results(tmp_path)) == len(results(tmp_path / "results" / "digits")) == 2
    assert "already finished" in started(*words)[1]


def test_paths_of_images_and_checkpoints_are_found(started: FromFolder, tmp_path: Path) -> None:
    for part in ("train", "test"):
        for label in range(2):
            folder = tmp_path / "pets" / part / str(label)
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (32, 32), (label * 200, number, 0)).save(folder / f"{number}.png")
    save_weights(tmp_path / "teacher.safetensors", build_model("resnet8", 2), {})
    words = ["dataset=folder", "dataset.root=pets", "teacher.checkpoint=teacher.safetensors"]
    words += ["arch@teacher=resnet8", "arch@student=resnet8", "method=kd", "schedule.epochs=1"]
    folders = [CHDIR, "hydra.run.dir=elsewhere"]
    status, out, err = started(*words, *folders)
    assert (status, err) == (0, ""), out
    (result,) = results(tmp_path)
    assert json.loads(result.read_text())["dataset"] == "pets"
    assert result.parents[3] == tmp_path / "runs" / "pets" / "distill"
    assert "already finished" in started(*words)[1]
    # The run's identity does not depend on where Hydra ran the job.
    shutil.rmtree(result.parent)
    assert started(*words)[0] == 0
    assert results(tmp_path) == [result]


@pytest.mark.parametrize("path", ["runs", "a/b", "../beside", ".", "/an/absolute", "~/below"])
def test_a_path_is_the_same_after_a_change_of_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    from hydra import compose, initialize_config_dir

    from sskd import CONF

    monkeypatch.chdir(tmp_path)
    expected = expanded(path).absolute()
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("student", return_hydra_config=True)
    composed.hydra.runtime.cwd = str(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", composed)
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    assert expanded(path) == expected
