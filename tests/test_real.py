"""Tests with the real CIFAR-100 and a trained teacher, if the environment names them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Compose

from sskd.data import SOURCES, DatasetSettings
from sskd.data.labelled import LabelledImages
from sskd.data.reading import Source
from sskd.evaluate.__main__ import main as evaluate
from sskd.models import build_model, load_weights
from sskd.train import train


def stated_accuracy(teachers: Path) -> float:
    found = re.search(r"float32: \*\*([\d.]+)\*\*", (teachers / "README.md").read_text())
    assert found is not None
    return float(found[1])


def plain_top1(path: Path, split: LabelledImages) -> float:
    """Return the top-1 accuracy in % of a resnet56, without the evaluation of the suite."""
    network = build_model("resnet56", 100).eval()
    load_weights(network, path)
    mean, std = torch.tensor([0.5071, 0.4866, 0.4409]), torch.tensor([0.2675, 0.2565, 0.2761])
    x = (split.images / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        correct = network(x).logits.argmax(1) == split.labels
    return 100 * correct.float().mean().item()


FewTestImages = Callable[[int], Callable[[], LabelledImages]]


@pytest.fixture
def few_test_images(monkeypatch: pytest.MonkeyPatch) -> FewTestImages:
    """Return a function that keeps this many test images, and returns how to get those loaded."""
    source, loaded = SOURCES["cifar100"], []

    def keep(count: int) -> Callable[[], LabelledImages]:
        def load(settings: DatasetSettings) -> Source:
            found = source.load(settings)
            loaded.append(found.test.take(torch.arange(count)))
            return found._replace(test=loaded[-1])

        monkeypatch.setitem(SOURCES, "cifar100", source._replace(load=load))
        return lambda: loaded[-1]

    return keep


def test_the_trained_teacher_has_the_stated_accuracy(
    few_test_images: FewTestImages, cifar100_root: Path, teachers_root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It equals a plain computation, and the stated accuracy within four standard errors."""
    count = 1000
    images = few_test_images(count)
    path = teachers_root / "resnet56_cifar100.pth"
    assert evaluate([str(path), f"dataset.root={cifar100_root}", "--repeats", "0"]) == 0
    output = capsys.readouterr().out
    measured = re.search(r"resnet56, cifar100 test set: top-1 ([\d.]+)", output)
    assert measured is not None, output
    top1, stated = float(measured[1]), stated_accuracy(teachers_root)
    assert top1 == pytest.approx(plain_top1(path, images()), abs=0.02)
    assert abs(top1 - stated) < 4 * (stated * (100 - stated) / count) ** 0.5


def test_a_student_learns_from_the_trained_teacher(
    composed: Compose, few_test_images: FewTestImages, cifar100_root: Path, teachers_root: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """In two short epochs of SSKD on 1 % of the images, all terms become smaller."""
    images = few_test_images(100)
    config = composed(
        "pair=resnet56-resnet20", "arch@student=resnet8", "schedule.epochs=2",
        "schedule.milestones=[]", "dataset.fraction=0.01", "batch_size=32",
        f"dataset.root={cifar100_root}",
        f"teacher.checkpoint={teachers_root / 'resnet56_cifar100.pth'}", "precision=auto",
    )  # fmt: skip
    result = train(config)
    expected = plain_top1(teachers_root / "resnet56_cifar100.pth", images())
    assert result.teacher_top1 == pytest.approx(expected, abs=0.02)
    (path,) = (tmp_path / "runs/cifar100/distill").rglob("metrics.jsonl")
    first, last = [json.loads(line) for line in path.open()][-2:]
    for term in ("ce", "kd", "tf", "ss"):
        assert last[f"loss/{term}"] < first[f"loss/{term}"], term
