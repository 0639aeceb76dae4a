"""The commands for trained networks, on runs of tiny networks on few digits."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SmallTeacher, compose_once
from faults import SMALL
from filelock import FileLock

import sskd.similarity.__main__
import sskd.similarity.measure
import sskd.transfer.__main__
import sskd.transfer.measure
from sskd.config import read_config
from sskd.measuring.selection import choose_networks
from sskd.models import build_model
from sskd.train import train
from sskd.transfer.protocols import PROTOCOLS, LogisticProtocol, SgdProtocol

STUDENTS = (("kd", 0), ("kd", 1), ("vanilla", 0))
PAIR, KD = "resnet14-resnet8", "KD (teacher.fraction=0.03)"
TRANSFER = ("dataset=digits", "dataset.fraction=0.05")
Main = Callable[[list[str]], int]
MAINS: dict[str, Main] = {
    "transfer": sskd.transfer.__main__.main,
    "similarity": sskd.similarity.__main__.main,
}


@pytest.fixture
def runs(small_teacher: SmallTeacher, shared_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of a folder of runs: a resnet14, three resnet8 and one that is unfinished."""
    shared = shared_folder / "measured"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            part = Path(f"{shared}.part")
            small_teacher.put(part)
            for method, seed in STUDENTS:
                words = (*SMALL, f"method={method}", f"seed={seed}", f"runs={part}")
                train(read_config(compose_once("student", *words)))
            part.rename(shared)
    shutil.copytree(shared, tmp_path / "runs")
    unfinished = tmp_path / "runs" / "digits" / "scratch" / "resnet8" / "seed9"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text("seed: 9\n")
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def _short_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the classifiers for three epochs instead of 100, with one strength instead of seven."""
    monkeypatch.setitem(PROTOCOLS, "hsakd", SgdProtocol(epochs=3))
    monkeypatch.setitem(PROTOCOLS, "logistic", LogisticProtocol(strengths=(1.0,)))


@pytest.fixture
def kd_run(runs: Path) -> Path:
    """Return the folder of the student of seed 0."""
    (found,) = runs.glob("digits/distill/resnet14-resnet8/kd/seed0-*")
    return found


@pytest.fixture
def teacher_file(runs: Path) -> Path:
    (found,) = runs.glob("digits/scratch/resnet14/*/best.pt")
    return found


def started(capsys: Any, name: str, *words: object) -> tuple[int, str, str]:
    """Return the status and the output of a command."""
    capsys.readouterr()
    status = MAINS[name]([str(word) for word in words])
    return status, *capsys.readouterr()


def refused(capsys: Any, name: str, *words: object) -> str:
    """Return the error of a command, which is one line."""
    status, _, err = started(capsys, name, *words)
    assert (status, err.count("\n")) == (1, 1), err
    assert err.startswith("error: ")
    return err


def test_a_folder_of_runs_has_its_finished_networks(runs: Path, kd_run: Path) -> None:
    found = choose_networks([str(runs), str(kd_run)], "last", print)
    names = [each.name for each in found]
    assert len(names) == len(set(names)) == 4
    assert sum(name.startswith("distill/resnet14-resnet8/kd/seed") for name in names) == 2
    assert all(each.path.name == "model.safetensors" for each in found)
    (best,) = choose_networks([str(kd_run)], "best", print)
    assert (best.path.name, best.run and best.run.seed) == ("best.pt", 0)
    assert best.name.startswith("distill/resnet14-resnet8/kd/seed0")


def test_a_transfer_is_measured_once(
    runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    out = tmp_path / "out" / "digits"
    first = started(capsys, "transfer", runs, *TRANSFER, "--out", out)
    assert first[0] == 0, first[2]
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == before

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("this was measured before")

    monkeypatch.setattr(sskd.transfer.measure, "compute_features", fail)
    again = started(capsys, "transfer", runs, *TRANSFER)
    assert again[1].count("(measured before)") == 4
    assert first[1].startswith(again[1].replace(" (measured before)", ""))
    with pytest.raises(AssertionError, match="measured before"):
        started(capsys, "transfer", runs, *TRANSFER, "--again")

    lines = list(csv.DictReader(out.with_suffix(".csv").read_text().splitlines()))
    rows = [(line["networks"], line["method"], line["n"]) for line in lines]
    # By their settings first: the teacher has another batch size.
    assert rows == [(PAIR, KD, "2"), ("resnet8", "alone", "1"), ("resnet14", "alone", "1")]
    networks = json.loads(out.with_suffix(".json").read_text())["networks"]
    top1 = [each["top1"]["last"] for each in networks if each["method"] == KD]
    assert float(lines[0]["mean"]) == pytest.approx(sum(top1) / 2, abs=1e-3)
    assert str(tmp_path) not in "".join(path.read_text() for path in out.parent.glob("*.[cjm]*"))
    assert {path.suffix for path in out.parent.iterdir()} == {
        ".md",
        ".csv",
        ".json",
        ".png",
        ".svg",
    }


def test_the_similarity_is_that_of_the_result(kd_run: Path, runs: Path, capsys: Any) -> None:
    """Agreement and divergence are those that the run measured itself, with its last weights."""
    status, out, err = started(capsys, "similarity", runs, "--out", runs.parent / "table")
    assert status == 0, err
    record = json.loads((runs.parent / "table.json").read_text())
    rows = [(each["networks"], each["method"]) for each in record["networks"]]
    assert rows == [(PAIR, KD)] * 2 + [(PAIR, "student alone")]
    result = json.loads((kd_run / "result.json").read_text())
    found = next(each for each in record["networks"] if each["name"].endswith(kd_run.name))
    assert found["values"]["agreement"] == pytest.approx(result["agreement"])
    assert found["values"]["kl"] == pytest.approx(result["kl"], rel=1e-4)
    assert KD in out
    assert "student alone" in out


def test_a_network_is_equal_to_itself(teacher_file: Path, capsys: Any, tmp_path: Path) -> None:
    words = (teacher_file, "--teacher", teacher_file, "--out", tmp_path / "table")
    assert started(capsys, "similarity", *words)[0] == 0
    (network,) = json.loads((tmp_path / "table.json").read_text())["networks"]
    expected = {"agreement": 100, "kl": 0, "cka": 1, "cka_minibatch": 1, "weights": 0}
    assert network["values"] == pytest.approx(expected, abs=1e-5)


def test_a_moved_folder_still_leads_to_its_teacher(runs: Path, capsys: Any) -> None:
    moved = runs.rename(runs.with_name("elsewhere"))
    assert started(capsys, "similarity", moved / "digits/distill")[0] == 0
    shutil.rmtree(moved / "digits/scratch/resnet14")
    assert "name its file with --teacher FILE" in refused(capsys, "similarity", moved)


def test_files_of_one_name_are_not_averaged(teacher_file: Path, kd_run: Path) -> None:
    weights = kd_run / "model.safetensors"
    places = [str(teacher_file), str(kd_run / "best.pt"), str(weights)]
    names = [each.name for each in choose_networks(places, "last", print)]
    top = teacher_file.parents[3]
    assert names == [str(Path(place).relative_to(top)) for place in places[:2]] + [weights.name]
    assert choose_networks([str(weights)], "last", print)[0].name == weights.name


MISTAKES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "no dataset": ("transfer", ("RUNS",), "name one with dataset=NAME"),
    "no network": ("similarity", ("dataset=digits",), "no trained network; name a checkpoint"),
    "no such dataset": ("transfer", ("RUNS", "dataset=digit"), "did you mean 'digits'"),
    "missing data": (
        "transfer",
        ("RUNS", "dataset=stl10", "dataset.root=absent", "dataset.download=false"),
        "set dataset.root=FOLDER to a folder that holds stl10_binary",
    ),
    "other settings": ("transfer", ("RUNS", "dataset=digits", "seed=1"), "neither a trained"),
    "no such place": ("transfer", ("absent", "dataset=digits"), "no such file or folder"),
    "unfinished": ("transfer", ("UNFINISHED", "dataset=digits"), "the run has not finished"),
    "none finished": ("similarity", ("UNFINISHED/..",), "none of its 1 runs has finished"),
    "an empty folder": ("transfer", ("EMPTY", "dataset=digits"), "it holds nothing; name the file"),
    "not a network": (
        "similarity",
        ("OTHER", "--teacher", "TEACHER"),
        "its architecture is not recognised",
    ),
    "other classes": ("similarity", ("FILE", "--teacher", "TEACHER"), "has 7 classes, its teacher"),
    "no teacher": ("similarity", ("FILE",), "is not a run; name its teacher with --teacher FILE"),
    "another teacher": ("similarity", ("KD", "--teacher", "FILE"), "is not the teacher of"),
    "only alone": ("similarity", ("RUNS/digits/scratch",), "was trained without a teacher"),
    "no device": ("transfer", ("RUNS", "dataset=digits", "--device", "cuda:9"), "device=cuda:9"),
    "no folder": ("similarity", ("RUNS", "--out", "FILE/table"), "file.pth; name another file"),
    "a folder as file": ("transfer", ("RUNS", "dataset=digits", "--out", "RUNS"), "is a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    mistake: str, runs: Path, kd_run: Path, teacher_file: Path, capsys: Any, tmp_path: Path
) -> None:
    torch.save({"state_dict": build_model("resnet8", 7).state_dict()}, tmp_path / "file.pth")
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "other.pth")
    places = {
        "RUNS": str(runs),
        "UNFINISHED": str(runs / "digits/scratch/resnet8/seed9"),
        "FILE": str(tmp_path / "file.pth"),
        "OTHER": str(tmp_path / "other.pth"),
        "TEACHER": str(teacher_file),
        "KD": str(kd_run),
        "EMPTY": str(tmp_path / "empty"),
    }
    (tmp_path / "empty").mkdir()
    name, words, message = MISTAKES[mistake]
    if mistake == "none finished":
        shutil.rmtree(next(runs.glob("digits/scratch/resnet8/seed0*")))
    first, *rest = (word.partition("/") for word in words)
    given = ["".join((places.get(a, a), b, c)) for a, b, c in (first, *rest)]
    before = sorted(tmp_path.rglob("*"))
    out = [] if "--out" in words else ["--out", str(tmp_path / "table")]
    assert message in refused(capsys, name, *given, *out)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"about": {"command": "similarity"}}'])
def test_a_file_about_something_else_is_kept(
    content: str, kd_run: Path, capsys: Any, tmp_path: Path
) -> None:
    (tmp_path / "table.json").write_text(content)
    message = refused(capsys, "transfer", kd_run, *TRANSFER, "--out", tmp_path / "table.md")
    assert "table.json: holds something else" in message
    assert "choose another --out PATH" in message
    assert (tmp_path / "table.json").read_text() == content


def test_files_about_other_networks_or_of_the_report_are_kept(
    kd_run: Path, runs: Path, capsys: Any, tmp_path: Path
) -> None:
    out = tmp_path / "table"
    words = ("similarity", kd_run.parent, "--out", out)
    assert started(capsys, *words)[0] == 0
    assert started(capsys, *words)[0] == 0, "the same networks"
    assert "too)" in refused(capsys, "similarity", kd_run, "--out", out)
    message = refused(capsys, *words, "dataset=digits", "dataset.size=64")
    assert "dataset: digits, not digits (size=64)" in message
    (tmp_path / "table.json").unlink()
    assert "table.md: holds something else" in refused(capsys, *words)


def test_a_corrupt_measurement_is_measured_again(kd_run: Path, capsys: Any, tmp_path: Path) -> None:
    words = (kd_run, *TRANSFER, "--protocol", "logistic")
    first = started(capsys, "transfer", *words)
    (kept,) = (tmp_path / ".cache" / "sskd" / "measurements").iterdir()
    intact = kept.read_bytes()
    for content in (b"", intact[:-9], b"[]", intact.replace(b'"seed": 0', b'"seed": 1')):
        kept.write_bytes(content)
        assert started(capsys, "transfer", *words) == first
        assert kept.read_bytes() == intact


def test_networks_of_several_datasets_need_one_name(
    runs: Path, kd_run: Path, teacher_file: Path, capsys: Any, tmp_path: Path
) -> None:
    """A file counts as trained on CIFAR-100."""
    torch.save({"state_dict": build_model("resnet8", 10).state_dict()}, tmp_path / "file.pth")
    message = refused(
        capsys, "similarity", kd_run, tmp_path / "file.pth", "--teacher", teacher_file
    )
    assert "was trained on cifar100" in message
    assert "dataset=NAME" in message
