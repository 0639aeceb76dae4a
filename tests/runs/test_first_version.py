"""A run that was stopped in mid-epoch by the first version of the suite is resumed."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from conftest import Compose

from sskd.report.__main__ import main as report
from sskd.teachers.find import run_location
from sskd.train import train

# config.yaml, metrics.jsonl, best.pt and last.pt after step 8 of 20, of commit 66610dc; weights
# and momentum are rounded to bfloat16, so that the archive is small.
ARCHIVE = Path(__file__).parent / "first_version" / "stopped.tar.xz"
SETTINGS = ("dataset=digits", "dataset.fraction=0.05", "schedule.epochs=4", "batch_size=16")


def test_a_run_of_the_first_version_resumes(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*SETTINGS, "arch=resnet8", primary="teacher")
    folder, _ = run_location(config)
    folder.mkdir(parents=True)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    train(config)
    assert "resumes in" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    # The first version itself had these losses. From step 9 on it drew other crops.
    assert losses == pytest.approx([2.37721, 2.33152, 2.29741, 2.24246], rel=1e-2)
    assert losses[0] == pytest.approx(2.37721, rel=1e-5)

    networks = ("arch@teacher=resnet8", "arch@student=resnet8", f"teacher.checkpoint={folder}")
    train(composed(*SETTINGS, *networks, "method=kd"))
    assert report([str(tmp_path / "runs")]) == 0
    assert "KD" in capsys.readouterr().out
