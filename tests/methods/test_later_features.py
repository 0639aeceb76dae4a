"""LumiNet, ReviewKD and OFD: their losses against loops in float64, and their properties."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

import sskd.invocation.resolvers  # noqa: F401  ${by_pair:...}
from sskd import CONF
from sskd.methods.luminet import luminet_loss, perception

Row = list[float]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def settings_of(method: str, pair: str) -> dict[str, Any]:
    """Return the settings in ``conf/method`` for a pair, without composing a whole run."""
    teacher, student = pair.split("-")
    networks = {"teacher": {"name": teacher}, "student": {"name": student}}
    settings = OmegaConf.load(CONF / "method" / f"{method}.yaml")
    root: Any = OmegaConf.to_container(
        OmegaConf.create({**networks, "method": settings}), resolve=True
    )
    return dict(root["method"])


def softmax(row: Row) -> Row:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def perceived(logits: Tensor, temperature: float) -> list[Row]:
    columns = []
    for column in logits.double().T.tolist():
        mean = fmean(column)
        variance = fmean((value - mean) ** 2 for value in column)
        columns.append([(z - mean) / math.sqrt(variance + 1e-5) / temperature for z in column])
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 8.0])
def test_luminet_equals_loops(temperature: float) -> None:
    student, teacher = (3 * random(5, 7, seed=seed) + 2 for seed in (1, 2))
    rows = []
    both = (perceived(logits, temperature) for logits in (teacher, student))
    for p, q in (map(softmax, pair) for pair in zip(*both, strict=True)):
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = luminet_loss(student, teacher, temperature)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(fmean(rows), rel=1e-5)


def test_luminet_sees_no_scale_and_no_offset_of_a_class() -> None:
    student, teacher = random(6, 4, seed=1), random(6, 4, seed=2)
    changed = teacher * torch.tensor([2.0, 3.0, 5.0, 7.0]) + torch.tensor([1.0, -2.0, 4.0, 0.0])
    assert luminet_loss(student, changed, 4).item() == pytest.approx(
        luminet_loss(student, teacher, 4).item(), rel=1e-3
    )
    assert luminet_loss(changed, changed, 4).item() == 0
    assert luminet_loss(student, teacher.flip(1), 4) != luminet_loss(student, teacher, 4)


def test_equal_logits_of_a_class_give_zeros_and_a_finite_gradient() -> None:
    logits = random(4, 3)
    logits[:, 1] = 7
    assert perception(logits)[:, 1].tolist() == [0, 0, 0, 0]
    one_image = random(1, 3).requires_grad_()
    loss = luminet_loss(one_image, random(1, 3, seed=1), 4)
    loss.backward()
    assert loss.item() == 0
    assert one_image.grad is not None
    assert one_image.grad.isfinite().all()


def test_luminet_has_the_authors_settings_of_a_pair() -> None:
    expected = {  # CE's weight, alpha, T
        "resnet56-resnet20": (2, 31, 4), "resnet32x4-resnet8x4": (2, 33, 4),
        "vgg13-vgg8": (1, 70, 8), "wrn_40_2-wrn_40_1": (1, 75, 8),
        "vgg13-MobileNetV2": (2, 70, 8), "ResNet50-MobileNetV2": (2, 70, 8),
        "wrn_40_2-ShuffleV1": (2, 35, 4),
    }  # fmt: skip
    for pair, (ce, alpha, temperature) in expected.items():
        settings = settings_of("luminet", pair)
        assert settings["weights"] == {"ce": ce, "luminet": alpha**2}
        assert settings["temperature"] == temperature
