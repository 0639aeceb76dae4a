"""The evaluation command on runs and on files from elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Compose
from test_run import SMALL

from sskd import evaluate
from sskd.models import build_model
from train_student import train


def test_a_runs_folder_is_evaluated_on_its_own_dataset(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(composed(*SMALL, "method=vanilla"))
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("result.json"))
    capsys.readouterr()
    for checkpoint, top1 in (
        (folder, result["top1"]["best"]),
        (folder / "best.pt", result["top1"]["best"]),
        (folder / "last.pt", result["top1"]["last"]),
        (folder / "model.safetensors", result["top1"]["last"]),
    ):
        assert evaluate.main([str(checkpoint)]) == 0
        assert f"resnet8, digits test set: top-1 {top1:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["FILE", "--arch", "resnet20"], "holds a resnet8 with 10 classes, not a resnet20"),
        (["FILE", "--arch", "resnet9"], "did you mean 'resnet8'"),
        (["FILE", "dataset=digit"], "did you mean 'digits'"),
        (["FILE", "dataset.fractoin=1"], "did you mean 'dataset.fraction'"),
        (["FILE", "--device", "cuda:99"], "device=cuda:99"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    path = tmp_path / "net.pth"
    torch.save({"state_dict": build_model("resnet8", 10).state_dict(), "acc": 1.0}, path)
    given = [str(path) if item == "FILE" else item for item in arguments]
    if not any(item.startswith("dataset=") for item in given):
        given.append("dataset=digits")
    assert evaluate.main(given) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err
