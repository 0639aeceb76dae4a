"""The evaluation command on runs and on other files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Compose
from faults import SMALL

import sskd.data.cifar
from sskd.evaluate.__main__ import main
from sskd.models import build_model
from sskd.train import train


def test_a_runs_folder_is_evaluated_on_its_own_dataset(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(composed(*SMALL, "method=vanilla"))
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("result.json"))
    capsys.readouterr()
    for checkpoint, top1 in (
        (folder, result.top1.best),
        (folder / "best.pt", result.top1.best),
        (folder / "last.pt", result.top1.last),
        (folder / "model.safetensors", result.top1.last),
    ):
        assert main([str(checkpoint), "--repeats", "0"]) == 0
        assert f"resnet8, digits test set: top-1 {top1:.2f}" in capsys.readouterr().out
    assert main([str(folder), "dataset=digits", "--repeats", "0"]) == 0
    assert main([str(folder), "dataset=cifar10"]) == 1
    assert "was trained on digits, and dataset=cifar10 names" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pth"], "no checkpoint at missing.pth"),
        (["FILE", "--arch", "resnet20"], "holds a resnet8 with 10 classes, not a resnet20"),
        (["OTHER"], "its architecture is not recognised; give its name with --arch NAME"),
        (["FILE", "--arch", "resnet9"], "did you mean 'resnet8'"),
        (["FILE", "dataset=digit"], "did you mean 'digits'"),
        (["FILE", "dataset.fractoin=1"], "did you mean 'dataset.fraction'"),
        (["FILE", "--device", "cuda:99"], "device=cuda:99"),
        (["FILE", "device=cuda"], "'device=cuda' is neither a checkpoint nor a choice of the"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    path = tmp_path / "net.pth"
    torch.save({"state_dict": build_model("resnet8", 10).state_dict(), "acc": 1.0}, path)
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    files = {"FILE": str(path), "OTHER": str(tmp_path / "other.pth")}
    words = [files.get(item, item) for item in arguments]
    if not any(item.startswith("dataset=") for item in words):
        words.append("dataset=digits")
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an interpolation": ({"root": "${oc.env:HOME}"}, "dataset.root is not a setting of a run's"),
    "an interpolation in a list": ({"mean": ["${seed}", 0, 0]}, "dataset.mean is not a setting"),
    "bytes": ({"name": b"data"}, "dataset.name is not a setting of a run's"),
    "a mapping": ({"name": {"a": 1}}, "dataset.name is not a setting of a run's"),
    "terminal control characters": (
        {"\x1b[2Jname": 1},
        "dataset.?[2Jname is not a setting of a run's",
    ),
    "no such dataset": ({"source": "digits,dataset.root=x"}, "names no dataset"),
    "a list for a dataset": ({"source": ["digits"]}, "names no dataset"),
    "a name with a path": ({"name": "../up"}, "dataset.name: may contain only letters"),
    "words of a command line": ({"name": "x' runs=y"}, "dataset.name: may contain only letters"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_untrusted_configuration_is_read_as_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    changes, message = CONFIGS[kind]
    torch.save({"state_dict": build_model("resnet8", 10).state_dict()}, tmp_path / "best.pt")
    dataset = {"source": "digits", **changes}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": dataset}))
    assert main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_an_untrusted_configuration_downloads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("this test must not download")

    monkeypatch.setattr(sskd.data.cifar, "download_and_extract_archive", download)
    torch.save({"state_dict": build_model("resnet8", 100).state_dict()}, tmp_path / "best.pt")
    dataset = {"source": "cifar100", "root": str(tmp_path / "victim"), "download": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"dataset": dataset}))
    assert main([str(tmp_path)]) == 1
    assert "use dataset.download=true on a machine with internet access" in capsys.readouterr().err
    assert not (tmp_path / "victim").exists()
