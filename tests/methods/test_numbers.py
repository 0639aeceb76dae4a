"""Inputs that losses stumble over: what comes out is finite, or an error that names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Compose, random_images
from torch import nn

from sskd.data import Batch, Images, Loader, Split
from sskd.errors import UserError
from sskd.methods import METHODS, Method, Phase
from sskd.methods.sskd import keep_rows, masked_mean
from sskd.models import ARCHITECTURES, build_model
from sskd.teachers.assembly import assemble
from sskd.train import train
from sskd.training.step import set_trainable, train_step

BATCH = 6


def stages(
    composed: Compose, method: str, images: Images, pair: str = "resnet14-resnet8"
) -> tuple[Method, list[Phase]]:
    teacher, student = pair.split("-")
    words = [f"arch@teacher={teacher}", f"arch@student={student}", f"method={method}"]
    built = assemble(composed(*words, *(["method.negatives=5"] * (method == "crd"))), images)
    return built, list(built.phases())


def step_stays_finite(built: Method, stage: Phase, batch: Batch, precision: str) -> None:
    """Take two steps: the second shows what the first has made of the weights."""
    set_trainable(stage, built)
    optimizer = torch.optim.SGD(stage.trains.parameters(), 0.01, 0.9)
    for _ in range(2):
        figures = train_step(stage, optimizer, batch, precision)
        told = {name: value.item() for name, value in figures.items() if not value.isfinite()}
        assert not told
    for name, parameter in stage.trains.named_parameters():
        assert parameter.isfinite().all(), name


def flat(images: Images) -> Images:
    """Return ``images`` with every pixel the same."""
    train = images.train
    return replace(images, train=Split(torch.full_like(train.images, 100), train.labels))


def alike(images: Images) -> Images:
    """Return ``images``, all of them the first one; their labels differ."""
    train = images.train
    return replace(images, train=Split(train.images[:1].expand_as(train.images), train.labels))


def as_it_is(images: Images) -> Images:
    return images


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("given", [flat, alike, as_it_is])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_images_that_cannot_be_told_apart(
    composed: Compose, method: str, given: Callable[[Images], Images], precision: str
) -> None:
    images = given(random_images(BATCH, 4, classes=3))
    built, each = stages(composed, method, images)
    for stage in each:
        loader = Loader(images.train, images.mean, images.std, BATCH, stage.views)
        step_stays_finite(built, stage, loader.next_batch(), precision)


def silence(network: nn.Module) -> None:
    """Let every convolution of ``network`` give nothing: features of no variance, and no length."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)


@pytest.mark.parametrize("silent", ["student", "teacher", "both"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_features_of_no_variance(composed: Compose, method: str, silent: str) -> None:
    images = random_images(BATCH, 4, classes=3)
    built, each = stages(composed, method, images)
    for role in ("student", "teacher"):
        if silent in (role, "both") and getattr(built, role, None) is not None:
            silence(getattr(built, role))
    for stage in each:
        loader = Loader(images.train, images.mean, images.std, BATCH, stage.views)
        step_stays_finite(built, stage, loader.next_batch(), "fp32")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_single_image_in_the_last_step(composed: Compose, method: str) -> None:
    images = random_images(BATCH + 1, 4, classes=3)
    built, each = stages(composed, method, images)
    for stage in each:
        loader = Loader(images.train, images.mean, images.std, BATCH, stage.views)
        loader.next_batch()
        last = loader.next_batch()
        assert len(last.y) == 1
        step_stays_finite(built, stage, last, "fp32")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_network_trains_on_a_single_image(name: str) -> None:
    network = build_model(name, 3).train()
    features = network(torch.randn(1, 3, 32, 32))
    features.logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


TAUGHT = (
    "dataset=digits", "dataset.fraction=0.02", "batch_size=16", "arch@teacher=resnet8",
    "arch@student=resnet8", "teacher.train=true", "teacher.fraction=0.02", "schedule.epochs=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the teacher's runs, one of each precision."""
    return tmp_path_factory.mktemp("teachers")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_loss_that_overflows_is_named(
    composed: Compose, tmp_path: Path, teachers: Path, method: str, precision: str
) -> None:
    """The learning rate takes the weights beyond what the networks' sums can hold."""
    words = (*TAUGHT, f"precision={precision}")
    runs = teachers / precision
    if not runs.exists():  # the teacher learns with the usual rate
        unfinished = teachers / f"{precision}.part"
        train(composed(*words, "method=vanilla", f"runs={unfinished}"))
        unfinished.rename(runs)
    shutil.copytree(runs, tmp_path / "runs")
    wild = [f"method={method}", "optimizer.lr=1e6", "batch_size=4"]
    with pytest.raises(UserError, match=r"stage \w+, epoch 1: the terms? '\w+'.* not finite, in"):
        train(composed(*words, *wild))
    (folder,) = {
        path.parent for path in tmp_path.rglob("status.json") if "failed" in path.read_text()
    }
    assert not (folder / "result.json").exists()
    assert not (folder / "last.pt").exists()


def test_a_teacher_that_is_always_right_or_always_wrong() -> None:
    """Selective transfer keeps every row of the one, and the floor of its share of the other's."""
    target = torch.arange(7) % 5
    right = torch.nn.functional.one_hot(target, 5).float()
    for ratio in (0.0, 0.3, 0.75, 1.0):
        assert keep_rows(right, target, ratio).all()
        kept = keep_rows(-right, target, ratio)
        assert kept.sum() == int(7 * ratio)
    rows = torch.arange(7.0, requires_grad=True)
    nothing = masked_mean(rows, torch.zeros(7, dtype=torch.bool))
    assert nothing == 0
    nothing.backward()
    assert rows.grad is not None
    assert (rows.grad == 0).all()


@pytest.mark.parametrize("always", ["right", "wrong"])
def test_sskd_learns_from_a_teacher_that_is_always(composed: Compose, always: str) -> None:
    """All images are of one class of two, which the teacher names always or never."""
    images = random_images(BATCH, 4, classes=2)
    labels = torch.zeros(BATCH, dtype=torch.long)
    images = replace(images, train=Split(images.train.images, labels))
    built, each = stages(composed, "sskd", images)
    sign = 1 if always == "right" else -1
    last = built.teacher.get_submodule("fc").state_dict(keep_vars=False)
    last["weight"].zero_()
    last["bias"].copy_(torch.tensor([5.0, -5.0]) * sign)
    built.tf_ratio = 0.5  # type: ignore[assignment]
    loader = Loader(images.train, images.mean, images.std, BATCH, built.views)
    batch = loader.next_batch()
    set_trainable(each[-1], built)
    kept = built.loss(batch).metrics["kept_tf"].item()
    rotated = 3 * BATCH
    assert kept == pytest.approx(100 if always == "right" else 100 * (rotated // 2) / rotated)
    step_stays_finite(built, each[-1], batch, "fp32")
