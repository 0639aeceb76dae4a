"""A run from its configuration to its result: seeds, reuse, force."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import outcome
from conftest import Compose, with_rate
from crashes import at_step, crash
from faults import SMALL
from image_folders import write_images
from safetensors.torch import load_file

import sskd.runs.status
import sskd.training.evaluation
from sskd.data import eval_batches, load_images
from sskd.errors import UserError
from sskd.models import build_model, load_weights
from sskd.runs.status import SWEEP_VARIABLE, forced_in_this_sweep
from sskd.teachers.find import run_location
from sskd.train import train


def test_the_seed_decides_the_result(composed: Compose, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(composed(*SMALL, "method=vanilla", f"runs={tmp_path / name}", f"seed={seed}"))
    assert outcome(tmp_path / "one") == outcome(tmp_path / "two")
    (first,), (other,) = ((tmp_path / n).rglob("model.safetensors") for n in ("one", "three"))
    assert not torch.equal(load_file(first)["fc.weight"], load_file(other)["fc.weight"])


def test_the_result_agrees_with_a_separate_evaluation(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sskd.training.evaluation, "FEWEST_CLASSES_FOR_TOP5", 10)
    config = composed(*SMALL, "method=kd", "dataset.holdout=0.2")
    result = train(config)
    (folder,) = (path.parent for path in (tmp_path / "runs/digits/distill").rglob("result.json"))
    images = load_images(config.dataset)
    student, teacher = build_model("resnet8", 10), build_model("resnet14", 10)
    load_weights(student, folder / "model.safetensors")
    (best,) = (tmp_path / "runs/digits/scratch/resnet14").rglob("best.pt")
    load_weights(teacher, best)
    right = same = among_five = 0
    divergence = 0.0
    with torch.no_grad():
        for x, y in eval_batches(images.test, images.mean, images.std, 1):
            s = student.eval()(x).logits[0].double().softmax(0)
            t = teacher.eval()(x).logits[0].double().softmax(0)
            right += int(s.argmax() == y[0])
            among_five += int((s > s[y[0]]).sum() < 5)
            same += int(s.argmax() == t.argmax())
            divergence += (t * (t / s).log()).sum().item()
    count = len(images.test)
    assert result.top1.last == pytest.approx(100 * right / count)
    assert result.agreement == pytest.approx(100 * same / count)
    assert result.kl == pytest.approx(divergence / count, rel=1e-3)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert result.top1.best == max(line["test/top1"] for line in metrics)
    assert result.top5 is not None
    assert result.top5.last == pytest.approx(100 * among_five / count)
    assert result.top1.best_epoch
    assert result.top5.best == metrics[result.top1.best_epoch - 1]["test/top5"]
    assert result.holdout_top1 is not None
    assert result.holdout_top1.best == max(line["holdout/top1"] for line in metrics)
    assert result.parameters == sum(p.numel() for p in student.parameters())


def test_a_bank_has_one_row_for_each_training_image(composed: Compose, tmp_path: Path) -> None:
    """Training has visited all 40 images, those with wrong labels too: each row has norm 1."""
    train(composed(*SMALL, "method=crd", "dataset.label_noise=0.3"))
    (path,) = tmp_path.glob("runs/digits/distill/*/crd/*/last.pt")
    module = torch.load(path, weights_only=True)["module"]
    for bank in ("student_memory.bank", "teacher_memory.bank"):
        assert module[bank].shape == (40, 128)
        torch.testing.assert_close(module[bank].norm(dim=1), torch.ones(40))


def test_a_finished_run_is_not_trained_again(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*SMALL, "method=vanilla")
    first = train(config)
    steps = at_step(monkeypatch, -1, crash)
    assert train(config) == first
    assert steps() == 0


def test_force_trains_again_and_keeps_the_old_run(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=vanilla")
    train(config)
    before = outcome(tmp_path / "runs")
    train(composed(*SMALL, "method=vanilla", "force=true"))
    train(composed(*SMALL, "method=vanilla", "force=true"))
    after = outcome(tmp_path / "runs")
    assert len(after) == 3 * len(before)
    assert sorted({path.split("/")[-2][-2:] for path in after if ".old" in path}) == ["-1", "-2"]


def test_each_sweep_forces_a_run_only_once(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alternating jobs of two sweeps do not archive each other's progress."""
    config = composed(*SMALL, "method=vanilla", "force=true", "schedule.epochs=1")
    folder, _ = run_location(config)
    for count, sweep in ((0, "one"), (1, "two"), (1, "one"), (1, "two")):
        monkeypatch.setenv(SWEEP_VARIABLE, sweep)
        train(config)
        assert len(list(folder.parent.glob(".old/*"))) == count

    def stale(*_: Any, **__: Any) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(sskd.runs.status, "read_bounded_text", stale)
    with pytest.raises(OSError, match="Stale"):
        forced_in_this_sweep(folder)


def test_force_archives_nothing_before_the_data_load(composed: Compose, tmp_path: Path) -> None:
    arguments = ["dataset=folder", "arch@student=resnet8", "schedule.epochs=1", "method=vanilla"]
    root = write_images(tmp_path, 0)
    train(composed(*arguments, f"dataset.root={root}"))
    before = outcome(tmp_path / "runs")
    shutil.rmtree(root / "test")
    with pytest.raises(UserError, match="there is no folder"):
        train(composed(*arguments, f"dataset.root={root}", "force=true"))
    assert outcome(tmp_path / "runs") == before


def test_a_loss_that_is_not_finite_stops_the_run(composed: Compose, tmp_path: Path) -> None:
    config = with_rate(composed(*SMALL, "method=vanilla"), 1e30)
    with pytest.raises(UserError, match=r"phase train, epoch \d: the term 'ce' is not finite"):
        train(config)
    assert not list((tmp_path / "runs").rglob("result.json"))


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (1e300, "weights are not finite"),
        (1e38, r"test set: the logits of image 0 of .* are not finite, and those of \d+"),
    ],
)
def test_a_last_step_that_diverges_is_an_error(
    composed: Compose, tmp_path: Path, lr: float, message: str
) -> None:
    """No later step would show it by its loss."""
    words = ("batch_size=1000", "schedule.epochs=1")
    with pytest.raises(UserError, match=rf"phase train, epoch 1: {message}.*; try"):
        train(with_rate(composed(*SMALL, "method=vanilla", *words), lr))
    assert not list((tmp_path / "runs").rglob("last.pt"))
