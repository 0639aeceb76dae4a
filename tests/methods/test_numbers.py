"""Degenerate inputs: losses and weights stay finite, or an error names the lost term."""

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


def assembled(
    composed: Compose, method: str, images: Images, pair: str = "resnet14-resnet8"
) -> tuple[Method, list[Phase]]:
    teacher, student = pair.split("-")
    words = [f"arch@teacher={teacher}", f"arch@student={student}", f"method={method}"]
    built = assemble(composed(*words, *(["method.negatives=5"] * (method == "crd"))), images)
    return built, list(built.phases())


def step_stays_finite(built: Method, phase: Phase, batch: Batch, precision: str) -> None:
    """Take two steps: the second one uses the weights that the first one changed."""
    set_trainable(phase, built)
    optimizer = torch.optim.SGD(phase.trains.parameters(), 0.01, 0.9)
    for _ in range(2):
        metrics = train_step(phase, optimizer, batch, precision)
        lost = {name: value.item() for name, value in metrics.items() if not value.isfinite()}
        assert not lost
    for name, parameter in phase.trains.named_parameters():
        assert parameter.isfinite().all(), name


def constant(images: Images) -> Images:
    """Return ``images`` in which all pixels have the same value."""
    train = images.train
    return replace(images, train=Split(torch.full_like(train.images, 100), train.labels))


def identical(images: Images) -> Images:
    """Return copies of the first of ``images``, with different labels."""
    train = images.train
    return replace(images, train=Split(train.images[:1].expand_as(train.images), train.labels))


def unchanged(images: Images) -> Images:
    return images


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("given", [constant, identical, unchanged])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_identical_images_keep_the_weights_finite(
    composed: Compose, method: str, given: Callable[[Images], Images], precision: str
) -> None:
    images = given(random_images(BATCH, 4, classes=3, size=16))
    built, phases = assembled(composed, method, images)
    for phase in phases:
        loader = Loader(images.train, images.mean, images.std, batch_size=BATCH, views=phase.views)
        step_stays_finite(built, phase, loader.next_batch(), precision)


def silence(network: nn.Module) -> None:
    """Set all convolutions of ``network`` to 0: its features have no variance and no length."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)


@pytest.mark.parametrize("silent", ["student", "teacher", "both"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_constant_features_keep_the_weights_finite(
    composed: Compose, method: str, silent: str
) -> None:
    images = random_images(BATCH, 4, classes=3, size=16)
    built, phases = assembled(composed, method, images)
    for role in ("student", "teacher"):
        if silent in (role, "both") and getattr(built, role, None) is not None:
            silence(getattr(built, role))
    for phase in phases:
        loader = Loader(images.train, images.mean, images.std, batch_size=BATCH, views=phase.views)
        step_stays_finite(built, phase, loader.next_batch(), "fp32")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_last_batch_of_one_keeps_the_weights_finite(composed: Compose, method: str) -> None:
    images = random_images(BATCH + 1, 4, classes=3, size=16)
    built, phases = assembled(composed, method, images)
    for phase in phases:
        loader = Loader(images.train, images.mean, images.std, batch_size=BATCH, views=phase.views)
        loader.next_batch()
        last = loader.next_batch()
        assert len(last.y) == 1
        step_stays_finite(built, phase, last, "fp32")


# Two large ones are left out, which have the blocks of ResNet18 and ResNet50.
@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - {"ResNet34", "ResNet50_224"}))
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
    """Return the folder of the teacher's runs, one for each precision."""
    return tmp_path_factory.mktemp("teachers")


# bf16 has the same exponents, so that one method of each kind of phase is enough.
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        *((method, "fp32") for method in sorted(METHODS)),
        *((method, "bf16") for method in ("kd", "ab", "crd", "ft", "sskd")),
    ],
)
def test_an_overflowing_term_is_named(
    composed: Compose, tmp_path: Path, teachers: Path, method: str, precision: str
) -> None:
    """The learning rate makes the weights so large that the networks' sums overflow."""
    words = (*TAUGHT, f"precision={precision}")
    runs = teachers / precision
    if not runs.exists():  # the teacher is trained at the default learning rate
        unfinished = teachers / f"{precision}.part"
        train(composed(*words, "method=vanilla", f"runs={unfinished}"))
        unfinished.rename(runs)
    shutil.copytree(runs, tmp_path / "runs")
    wild = [f"method={method}", "optimizer.lr=1e6", "batch_size=4"]
    if method == "mlld":  # it has a learning rate of its own
        wild.append("method.distill.lr=1e6")
    with pytest.raises(UserError, match=r"phase \w+, epoch 1: the terms? '\w+'.* not finite, in"):
        train(composed(*words, *wild))
    (folder,) = {
        path.parent for path in tmp_path.rglob("status.json") if "failed" in path.read_text()
    }
    assert not (folder / "result.json").exists()
    assert not (folder / "last.pt").exists()


def test_kept_share_of_a_teacher_always_right_or_wrong() -> None:
    """All rows are kept if all are right, and the floor of the ratio if all are wrong."""
    target = torch.arange(7) % 5
    right = torch.nn.functional.one_hot(target, 5).float()
    for ratio in (0.0, 0.3, 0.75, 1.0):
        assert keep_rows(right, target, ratio).all()
        kept = keep_rows(-right, target, ratio)
        assert kept.sum() == int(7 * ratio)
    rows = torch.arange(7.0, requires_grad=True)
    mean = masked_mean(rows, torch.zeros(7, dtype=torch.bool))
    assert mean == 0
    mean.backward()
    assert rows.grad is not None
    assert (rows.grad == 0).all()


@pytest.mark.parametrize("always", ["right", "wrong"])
def test_sskd_with_a_teacher_always_right_or_wrong(composed: Compose, always: str) -> None:
    """All images are of one of two classes. The teacher always, or never, predicts this class."""
    images = random_images(BATCH, 4, classes=2)
    labels = torch.zeros(BATCH, dtype=torch.long)
    images = replace(images, train=Split(images.train.images, labels))
    built, phases = assembled(composed, "sskd", images)
    factor = 1 if always == "right" else -1
    last = built.teacher.get_submodule("fc").state_dict(keep_vars=False)
    last["weight"].zero_()
    last["bias"].copy_(torch.tensor([5.0, -5.0]) * factor)
    built.tf_ratio = 0.5  # type: ignore[assignment]
    loader = Loader(images.train, images.mean, images.std, batch_size=BATCH, views=built.views)
    batch = loader.next_batch()
    set_trainable(phases[-1], built)
    kept = built.loss(batch).metrics["kept_tf"].item()
    rotated = 3 * BATCH
    assert kept == pytest.approx(100 if always == "right" else 100 * (rotated // 2) / rotated)
    step_stays_finite(built, phases[-1], batch, "fp32")
