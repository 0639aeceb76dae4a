"""The losses of the methods that compare logits, against loops in float64 and their properties."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import Compose
from faults import SMALL
from omegaconf import DictConfig, OmegaConf
from test_later_features import settings_of
from torch import Tensor

from sskd.data import Batch, Images
from sskd.invocation.resolvers import by_pair
from sskd.methods import build_method
from sskd.methods.base import LossOutput, Phase, fault_of_phases
from sskd.methods.ctkd import CTKD, LearnedTemperature, learned_kd_loss, reversal
from sskd.methods.dist import correlation_loss
from sskd.methods.dkd import nckd_rows, other_classes, tckd_rows
from sskd.methods.kd import KD, Logits, kd_loss, softened_kl
from sskd.methods.logits import TRANSFORMS, LogitTransform, standardised
from sskd.methods.ttm import power_sum, ttm_rows
from sskd.models import build_model
from sskd.runs.recipe import diff_from_recipe
from sskd.train import train

IMAGES, CLASSES = 5, 7


def unused(batch: Batch) -> LossOutput:
    raise AssertionError


def logits(classes: int = CLASSES, images: int = IMAGES) -> Logits:
    generator = torch.Generator().manual_seed(classes)
    student, teacher = (3 * torch.randn(images, classes, generator=generator) for _ in range(2))
    return Logits(student, teacher, torch.randint(classes, (images,), generator=generator))


def softmax(row: Tensor, temperature: float = 1) -> list[float]:
    powers = [math.exp(z / temperature) for z in row.double().tolist()]
    return [power / sum(powers) for power in powers]


def divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def is_close(found: Tensor, expected: list[float], tolerance: float = 1e-5) -> None:
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=tolerance, abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_equals_loops(temperature: float) -> None:
    both = logits()
    tckd, nckd = [], []
    for student, teacher, label in zip(*both, strict=True):
        q, p = softmax(student, temperature), softmax(teacher, temperature)
        k = int(label)
        tckd.append(temperature**2 * divergence([p[k], 1 - p[k]], [q[k], 1 - q[k]]))
        rest = [[x / (1 - row[k]) for i, x in enumerate(row) if i != k] for row in (p, q)]
        nckd.append(temperature**2 * divergence(*rest))
    is_close(tckd_rows(both, temperature), tckd)
    is_close(nckd_rows(both, temperature), nckd)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 1000.0])
def test_kd_is_the_sum_of_both_terms_of_dkd(temperature: float) -> None:
    both = logits()
    of_label = (both.teacher / temperature).softmax(1).gather(1, both.labels[:, None])[:, 0]
    found = tckd_rows(both, temperature) + (1 - of_label) * nckd_rows(both, temperature)
    expected = softened_kl(both.student, both.teacher, temperature)
    is_close(found, expected.tolist(), tolerance=1e-4 if temperature < 100 else 2e-3)


def test_dkd_of_two_classes_has_one_term() -> None:
    both = logits(classes=2)
    assert nckd_rows(both, 4.0).tolist() == [0] * IMAGES
    is_close(tckd_rows(both, 4.0), softened_kl(both.student, both.teacher, 4.0).tolist())


def test_all_classes_but_the_label_remain() -> None:
    z = torch.arange(12.0).reshape(3, 4)
    assert other_classes(z, torch.tensor([0, 2, 3])).tolist() == [
        [1, 2, 3], [4, 5, 7], [8, 9, 10],
    ]  # fmt: skip


def test_each_transform_can_be_chosen() -> None:
    assert set(get_args(LogitTransform)) == TRANSFORMS.keys()


def test_standardised_logits_forget_shift_and_scale() -> None:
    z = logits().student
    found = standardised(z)
    for row, result in zip(z.double(), found, strict=True):
        mean = sum(row.tolist()) / CLASSES
        variance = sum((x - mean) ** 2 for x in row.tolist()) / (CLASSES - 1)
        is_close(result, [(x - mean) / (1e-7 + math.sqrt(variance)) for x in row.tolist()])
    torch.testing.assert_close(standardised(50 * z - 3), found, rtol=1e-4, atol=1e-5)
    assert standardised(torch.full((2, 5), 3.0)).tolist() == [[0] * 5] * 2


def test_correlation_equals_loops_and_forgets_shift_and_scale() -> None:
    both = logits()
    rows = []
    for student, teacher in zip(both.student.double(), both.teacher.double(), strict=True):
        a, b = ([x - float(row.mean()) for x in row.tolist()] for row in (student, teacher))
        product = sum(x * y for x, y in zip(a, b, strict=True))
        rows.append(product / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))
    found = correlation_loss(both.student, both.teacher)
    assert found.item() == pytest.approx(1 - sum(rows) / IMAGES, rel=1e-5)
    moved = correlation_loss(2 * both.student + 7, both.teacher)
    assert moved.item() == pytest.approx(found.item(), rel=1e-4)
    assert correlation_loss(both.teacher, both.teacher).item() == pytest.approx(0, abs=1e-6)
    constant = torch.ones(2, 3, requires_grad=True)
    loss = correlation_loss(constant, torch.randn(2, 3))
    loss.backward()
    assert loss.item() == 1
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


def test_ttm_equals_loops() -> None:
    both, temperature = logits(), 10.0
    rows, sums = [], []
    for student, teacher in zip(both.student, both.teacher, strict=True):
        powers = [p ** (1 / temperature) for p in softmax(teacher)]
        transformed = [power / sum(powers) for power in powers]
        rows.append(divergence(transformed, softmax(student)))
        sums.append(sum(powers))
    is_close(ttm_rows(both, temperature), rows)
    is_close(power_sum(both.teacher, temperature), sums)
    even, certain = torch.zeros(1, CLASSES), torch.tensor([[100.0, *[0.0] * (CLASSES - 1)]])
    assert power_sum(even, 2.0).item() == pytest.approx(CLASSES**0.5)
    assert power_sum(certain, 2.0).item() == pytest.approx(1)


def built(composed: Compose, images: Images, method: str) -> KD:
    student, teacher = (build_model("resnet8", images.num_classes) for _ in range(2))
    found = build_method(composed(f"method={method}").method, student, teacher, images)
    assert isinstance(found, KD)
    return found


def test_the_terms_of_dist_equal_numpys(composed: Compose, few_images: Images) -> None:
    both, method = logits(), built(composed, few_images, "dist")
    student, teacher = (
        np.array([softmax(row, method.temperature) for row in each]) for each in both[:2]
    )
    for name, s, t in (("inter", student, teacher), ("intra", student.T, teacher.T)):
        mean = np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(s, t, strict=True)])
        found = method.logit_terms(both)[name].item()
        assert found == pytest.approx(method.temperature**2 * (1 - mean), rel=1e-5)
    assert method.temperature != 1


def test_wttm_weights_the_images(composed: Compose, few_images: Images) -> None:
    both, method = logits(), built(composed, few_images, "wttm")
    weighted = []
    for student, teacher in zip(both.student, both.teacher, strict=True):
        powers = [p ** (1 / method.temperature) for p in softmax(teacher)]
        transformed = [power / sum(powers) for power in powers]
        weighted.append(sum(powers) * divergence(transformed, softmax(student)))
    found = method.logit_terms(both)["wttm"].item()
    assert found == pytest.approx(sum(weighted) / IMAGES, rel=1e-5)


def test_ctkd_trains_its_temperature_against_the_loss(
    composed: Compose, few_images: Images
) -> None:
    both, method = logits(), built(composed, few_images, "ctkd")
    assert isinstance(method, CTKD)
    learned = method.learned_temperature
    slopes: list[Tensor | None] = []
    for progress in (1 / 240, 1.0):
        method.progress.fill_(progress)
        learned.theta.grad = None
        method.logit_terms(both)["kd"].backward()
        slopes.append(learned.theta.grad)
    near = [
        kd_loss(both.student, both.teacher, learned.value.item() + step).item()
        for step in (-0.1, 0.1)
    ]
    early, late = slopes
    assert early is not None
    assert late is not None
    assert late.item() * (near[1] - near[0]) < 0, "the temperature lowers the loss"
    assert abs(early.item()) < 0.1 * abs(late.item()), "the reversal has no warmup"


def test_the_learned_temperature_makes_the_loss_larger() -> None:
    """A step against the reversed gradient raises the loss; without a reversal it lowers it."""
    both = logits()
    losses = []
    for factor in (-1.0, 0.0, 1.0):
        learned = LearnedTemperature(1.0, 20.0)
        optimizer = torch.optim.SGD(learned.parameters(), lr=0.01)
        before = learned_kd_loss(both.student, both.teacher, learned(torch.tensor(factor)))
        before.backward()
        optimizer.step()
        after = learned_kd_loss(both.student, both.teacher, learned(torch.tensor(factor)))
        losses.append((after - before).item())
    assert losses[0] > 0 == losses[1] > losses[2]


def test_the_learned_temperature_has_the_loss_of_kd() -> None:
    both = logits()
    learned = LearnedTemperature(1.0, 20.0)
    temperature = learned(torch.tensor(-1.0))
    assert temperature.item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    found = learned_kd_loss(both.student, both.teacher, temperature)
    expected = kd_loss(both.student, both.teacher, temperature.item())
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_reversal_grows_to_its_whole() -> None:
    found = [reversal(torch.tensor(epoch / 240), 10 / 240).item() for epoch in (0, 5, 10, 240)]
    assert found == pytest.approx([0, -0.5, -1, -1], abs=1e-6)


def test_a_weight_rises_during_the_warmup() -> None:
    progress = torch.tensor(0.0)
    phase = Phase(
        "distill", torch.nn.Linear(1, 1), unused,
        weights={"ce": 1.0, "new": 8.0}, warmup={"new": 20 / 240}, progress=progress,
    )  # fmt: skip
    found = []
    for epoch in (1, 10, 20, 240):
        progress.fill_(epoch / 240)
        weighted = phase.weigh({"ce": torch.tensor(2.0), "new": torch.tensor(3.0)})
        assert weighted["ce"] == 2
        found.append(float(weighted["new"]))
    assert found == pytest.approx([24 / 20, 12, 24, 24])


def test_a_run_has_the_warmup_of_its_epochs(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=dkd", "method.warmup=1")
    train(config)
    (path,) = (tmp_path / "runs/digits/distill").rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.open()]
    rates = [line["weighted/nckd"] / line["loss/nckd"] for line in lines]
    assert rates == pytest.approx([8 * epoch / 3 for epoch in (1, 2, 3)], rel=1e-4)
    assert [line["weighted/ce"] for line in lines] == [line["loss/ce"] for line in lines]


@pytest.mark.parametrize("method", ["dkd", "ls"])
@pytest.mark.parametrize("pair", ["resnet56-resnet20", "vgg13-vgg8", "ResNet50-MobileNetV2"])
def test_a_value_of_the_pair_is_the_recipe(composed: Compose, method: str, pair: str) -> None:
    assert diff_from_recipe(composed(f"method={method}", f"pair={pair}")) == {}
    given = diff_from_recipe(composed(f"method={method}", f"pair={pair}", "method.temperature=9"))
    assert given == {"method.temperature": 9}


@pytest.mark.parametrize(
    ("more", "fault"),
    [({"warmup": {"newer": 0.1}}, r"warmup names \['newer'\], which have no weight"),
     ({"warmup": {"new": 0.1}}, "needs progress=self.progress"),
     ({"views": 4}, r"its views are 4; use Views, such as Views\(4\)")],
)  # fmt: skip
def test_a_wrong_phase_is_a_fault(more: dict[str, Any], fault: str) -> None:
    phase = Phase("distill", torch.nn.Linear(1, 1), unused, weights={"new": 1.0}, **more)
    assert re.search(fault, fault_of_phases([phase]))


def test_a_setting_by_pair() -> None:
    def value(root: str) -> float:
        config = OmegaConf.create(root)
        assert isinstance(config, DictConfig)
        return by_pair(8.0, {"a-b": 2.0, "c": 3.0, "d-c": 1.0}, _root_=config)

    assert value("{teacher: {name: a}, student: {name: b}}") == 2
    assert value("{teacher: {name: b}, student: {name: a}}") == 8
    assert value("{teacher: {name: b}, student: {name: c}}") == 3
    assert value("{teacher: {name: d}, student: {name: c}}") == 1
    assert value("{teacher: null, student: {name: b}}") == 8


@pytest.mark.parametrize(("pair", "beta"), [("resnet56-resnet20", 2.0), ("vgg13-vgg8", 6.0),
                                            ("resnet32x4-resnet8x4", 8.0)])  # fmt: skip
def test_dkds_beta_is_that_of_the_pair(composed: Compose, pair: str, beta: float) -> None:
    assert composed("method=dkd", f"pair={pair}").method.weights.nckd == beta
    given = composed("method=dkd", f"pair={pair}", "method.weights.nckd=3")
    assert given.method.weights.nckd == 3


def test_ls_has_the_settings_of_the_authors_logs() -> None:
    # Temperature and KD's weight in the names of the files in logs/KD of
    # sunshangquan/logit-standardization-KD, such as kd,resnet110,resnet20,4,12.txt.
    # The pairs of the last line have no file: the defaults of --base-temp and --kd-weight in
    # tools/train.py. CE's weight is in mdistiller/engine/cfg.py.
    expected = {
        "ResNet50-MobileNetV2": (3, 1), "resnet110-resnet20": (4, 12),
        "resnet110-resnet32": (2, 9), "resnet32x4-ShuffleV2": (2, 9),
        "resnet32x4-resnet8x4": (2, 9), "resnet32x4-wrn_16_2": (3, 9),
        "resnet32x4-wrn_40_2": (3, 9), "resnet56-resnet20": (2, 9),
        "vgg13-MobileNetV2": (3, 9), "vgg13-vgg8": (3, 9),
        "wrn_40_2-MobileNetV2": (3, 9), "wrn_40_2-resnet8x4": (2, 9),
        "wrn_40_2-wrn_16_2": (2, 9), "wrn_40_2-wrn_40_1": (2, 9),
        "resnet32x4-ShuffleV1": (2, 9), "wrn_40_2-ShuffleV1": (2, 9), "ResNet50-vgg8": (2, 9),
    }  # fmt: skip
    for pair, (temperature, weight) in expected.items():
        settings = settings_of("ls", pair)
        assert settings["temperature"] == temperature
        assert settings["weights"] == {"ce": 0.1, "kd": weight}
        assert settings["logits"] == "standardised"


@pytest.mark.parametrize(
    "pair",
    ["resnet56-resnet20", "resnet32x4-resnet8x4", "vgg13-vgg8", "resnet32x4-ShuffleV1"],
)
def test_skd_has_the_settings_of_the_authors_code(pair: str) -> None:
    # The defaults of the class in Distiller/SKD.py of HyunJunSik/StreamLined. It multiplies both
    # terms by its weight of KD.
    found = settings_of("skd", pair)
    assert (found["temperature"], found["ridge"], found["variant"]) == (4, 0.1, "code")
    assert found["weights"] == {"ce": 0.1, "kd": 0.9, "direction": 0.9}
