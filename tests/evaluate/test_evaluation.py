"""The report of an evaluation: tables, files, hold-outs, several networks."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import compose_once
from report_runs import put_alone
from torch import Tensor

from sskd.config import read_config
from sskd.data import eval_batches, load_images
from sskd.evaluate import corruptions, evaluation, files
from sskd.evaluate.__main__ import main
from sskd.evaluate.calibration import fit_temperature, measure_calibration
from sskd.evaluate.evaluation import Evaluation, Options, evaluate, split_by_class
from sskd.models import build_model
from sskd.trained import TrainedNetwork
from sskd.training.evaluation import predict

FAST = ("--repeats", "0", "--device", "cpu")
Run = Callable[..., Path]


@cache
def nearest_means(seed: int) -> dict[str, Tensor]:
    """Return the weights of a resnet8 that finds the class whose mean features are the nearest."""
    torch.manual_seed(seed)
    network: Any = build_model("resnet8", 10).eval()
    images = load_images(read_config(compose_once("student", "dataset=digits")).dataset)
    ((x, labels),) = eval_batches(
        images.train.take(torch.arange(150)), images.mean, images.std, batch_size=150
    )
    with torch.no_grad():
        features = network(x).pooled
        means = torch.stack([features[labels == label].mean(0) for label in range(10)])
        # Probabilities that differ, but are below 1.
        scale = 5 / torch.pdist(means).square().mean()
        network.fc.weight.copy_(2 * scale * means)
        network.fc.bias.copy_(-scale * means.square().sum(1))
    return dict(network.state_dict())


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write empty plots, because drawing them takes most of the time."""
    monkeypatch.setattr(files, "plot_files", lambda base, _: {f"{base}-a.png": b""})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that makes the folder of a run on the digits."""

    def make(name: str, seed: int = 0, **dataset: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        torch.save({"state_dict": nearest_means(seed), "acc": 12.5}, folder / "best.pt")
        settings = {"source": "digits", "seed": 0, "holdout": 0.0} | dataset
        (folder / "config.yaml").write_text(yaml.safe_dump({"dataset": settings}))
        return folder

    return make


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([*map(str, words), *FAST]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_the_report_has_every_table(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, run("a"))
    first, *_ = out.splitlines()
    assert re.fullmatch(
        r".*/a/best.pt: resnet8, digits test set: top-1 \d+\.\d\d \(the file states 12.50\)", first
    )
    titles = re.findall(r"^(.+)\n=+$", out, re.M)
    assert titles == [
        *("Accuracy on 30 test images", "Calibration", "Accuracy by class"),
        *("Most frequent confusions", "Cost"),
    ]
    assert "No temperature was fitted, because there are no held-out images." in out
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_the_temperature_is_that_of_the_held_out_images(run: Run) -> None:
    trained = TrainedNetwork(run("a", holdout=0.1))
    found = evaluate(trained, Options(device="cpu", repeats=0)).calibration
    images = trained.images
    assert images.holdout is not None
    held, test = (
        (predict(trained.network, split, images).double(), split.labels)
        for split in (images.holdout, images.test)
    )
    expected = fit_temperature(*held)
    assert expected is not None
    assert found.temperature == pytest.approx(expected)
    assert found.before == measure_calibration(*test)
    assert found.after == measure_calibration(*test, expected)
    assert (found.images, found.fitted_images) == (30, len(images.holdout))
    assert found.fitted_on == "held-out training images (dataset.holdout=0.1)"


@pytest.mark.parametrize("change", ["dataset.holdout=0.2", "dataset.seed=1"])
def test_images_that_were_perhaps_used_are_named(run: Run, change: str) -> None:
    trained = TrainedNetwork(run("a", holdout=0.1), overrides=[change])
    found = evaluate(trained, Options(device="cpu", repeats=0)).calibration
    assert found.fitted_on is not None
    assert found.fitted_on.endswith(", which its training may have used")


def test_a_part_of_the_test_images_fits_the_temperature(run: Run) -> None:
    trained = TrainedNetwork(run("a"))
    whole = evaluate(trained, Options(device="cpu", repeats=0))
    part = evaluate(trained, Options(device="cpu", repeats=0, holdout=0.34))
    found = part.calibration
    assert (found.images, found.fitted_images) == (20, 10)
    assert found.fitted_on == "other test images"
    assert (whole.top1_percent, whole.classes) == (part.top1_percent, part.classes)
    test, logits = (
        trained.images.test,
        predict(trained.network, trained.images.test, trained.images),
    )
    fits = split_by_class(test.labels, 0.34)
    assert found.temperature == fit_temperature(logits[fits], test.labels[fits])
    assert found.before == measure_calibration(logits[~fits], test.labels[~fits])


def test_a_share_of_each_class_is_chosen() -> None:
    labels = torch.tensor([0] * 10 + [1] * 4 + [2])
    chosen = split_by_class(labels, 0.5)
    assert torch.bincount(labels[chosen], minlength=3).tolist() == [5, 2, 0]
    assert torch.equal(chosen, split_by_class(labels, 0.5))
    assert torch.bincount(labels[split_by_class(labels, 0.99)]).tolist() == [9, 3]


def test_the_files_have_every_figure(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, out = run("a"), tmp_path / "out" / "net"
    words = (folder, "--holdout", "0.5", "--out", out)
    report = printed(capsys, *words)
    names = [
        "net.json",
        "net.md",
        *(f"net-{k}.png" for k in ("reliability", "classes", "confusions")),
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == sorted(names)
    (network,) = json.loads((out.parent / "net.json").read_text())["networks"]
    expected = evaluate(TrainedNetwork(folder), Options("cpu", holdout=0.5, repeats=0))
    assert network.pop("subject")["holdout"] == 0.5
    assert network["top5_percent"] is None  # ten classes
    assert network == json.loads(json.dumps(expected.to_json()))
    page = (out.parent / "net.md").read_text()
    for name in names[2:]:
        assert f"]({name})" in page
        assert (out.parent / name).read_bytes().startswith(b"\x89PNG")
    assert f"| {expected.top1_percent:.2f} |" in page
    monkeypatch.setattr(files, "plot_files", lambda *_: {})
    again = printed(capsys, *words)  # the same evaluation may be written again
    assert again.partition("\nwrote")[0] == report.partition("\nwrote")[0]


@pytest.mark.usefixtures("without_plots")
def test_other_files_are_not_replaced(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, out = run("a"), run("b", seed=1), tmp_path / "net"
    (tmp_path / "other.md").write_text("mine")
    (tmp_path / "plot-classes.png").write_text("mine")
    (tmp_path / "both-2-reliability.png").write_text("mine")
    printed(capsys, first, "--out", out)
    before = (tmp_path / "net.json").read_bytes()
    for words, message in (
        ((second, "--out", out), "net.json exists and is not of the same evaluation"),
        ((first, "--holdout", "0.5", "--out", out), "is not of the same evaluation"),
        ((first, "--out", tmp_path / "other"), "other.md exists without other.json"),
        ((first, "--out", tmp_path / "plot"), "plot-classes.png exists without plot.json"),
        ((first, second, "--out", tmp_path / "both"), "both-2-reliability.png exists without"),
        ((first, "--out", tmp_path), "is a folder; name a file in it"),
        ((first, "--out", first / "best.pt" / "net"), "best.pt; name another file with --out"),
    ):
        assert main([*map(str, words), *FAST]) == 1
        out_text, err = capsys.readouterr()
        assert (out_text, err.count("\n")) == ("", 1)
        assert message in err
    assert (tmp_path / "net.json").read_bytes() == before
    assert (tmp_path / "other.md").read_text() == "mine"


@pytest.mark.usefixtures("without_plots")
def test_several_networks_get_a_summary(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    earlier: list[weakref.ref[TrainedNetwork]] = []

    def evaluate_alone(trained: TrainedNetwork, options: Options) -> Evaluation:
        assert all(network() is None for network in earlier), "its images are still in memory"
        earlier.append(weakref.ref(trained))
        return evaluate(trained, options)

    monkeypatch.setattr(evaluation, "evaluate", evaluate_alone)
    for number, name in enumerate(("a", "b")):
        run(f"runs/{name}", number)
        put_alone(tmp_path / "runs", name, [12.5])
    words = (tmp_path / "runs", tmp_path / "runs" / "b", "dataset.fraction=0.5")
    out = printed(capsys, *words, "--out", tmp_path / "both")
    assert re.findall(r"^.*/(\w)/best.pt: resnet8, digits", out, re.M) == ["a", "b"]
    assert out.count("Summary\n=======") == 1
    content = json.loads((tmp_path / "both.json").read_text())
    assert [Path(each["file"]).parent.name for each in content["networks"]] == ["a", "b"]
    assert (tmp_path / "both-2-a.png").is_file()
    assert "## 2: Calibration" in (tmp_path / "both.md").read_text()


def test_corrupted_images_are_evaluated(
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uncorrupted copies give the accuracy on the test set."""
    monkeypatch.setattr(corruptions, "CORRUPTIONS", ("snow", "fog"))
    folder, copies = run("a"), tmp_path / "c"
    copies.mkdir()
    test = TrainedNetwork(folder).images.test
    pixels = np.tile(test.images.permute(0, 2, 3, 1).numpy(), (5, 1, 1, 1))
    for name in ("snow", "fog"):
        np.save(copies / f"{name}.npy", pixels)
    np.save(copies / "labels.npy", np.tile(test.labels.numpy(), 5).astype(np.uint8))
    out = printed(capsys, folder, "--corruptions", copies)
    top1 = re.search(r"top-1 ([\d.]+)", out)
    assert top1 is not None
    rows = re.findall(r"^(\w+) +" + r" +".join([re.escape(top1[1])] * 6) + "$", out, re.M)
    assert rows == ["snow", "fog", "mean"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--holdout", "0.5"], "has dataset.holdout=0.1; omit --holdout"),
        (["--corruptions", "missing"], "--corruptions missing: has no gaussian_noise.npy, "),
    ],
)
def test_a_mistake_is_reported_before_any_measurement(
    run: Run, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main([str(run("a", holdout=0.1)), *words, *FAST]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize("words", [["--holdout", "1"], ["--holdout", "x"], ["--repeats", "-1"]])
def test_a_wrong_option_is_a_wrong_command_line(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["net.pth", *words])
    assert stop.value.code == 2
