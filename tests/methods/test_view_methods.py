"""MLLD and CRLD, which compare two views, and SKD: losses against float64, and edge cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Compose, random_images
from torch import Tensor, nn

from sskd.data import Batch
from sskd.methods import METHODS, Method, Networks
from sskd.methods.low_confidence import share_up_to_median
from sskd.methods.mlld import code_terms, paper_terms
from sskd.methods.skd import direction_differences, mahalanobis_length
from sskd.methods.two_views import View, split_views
from sskd.models import Features, partial_features
from sskd.schedule import PhaseSettings, Schedule
from sskd.training.phase_settings import phase_schedule

IMAGES, CLASSES = 5, 7
TEMPERATURES = [4.0, 3.0, 5.0, 2.0, 6.0]
Array = np.ndarray[Any, np.dtype[np.float64]]
SCHEDULE = PhaseSettings(lr=None, epochs=1.0, milestones=[])
SETTINGS: dict[str, dict[str, Any]] = {
    "mlld": {"temperatures": TEMPERATURES, "variant": "code", "distill": SCHEDULE},
    "crld": {"temperature": 4.0, "tau_w": 0.9, "tau_s": 0.2},
    "skd": {"temperature": 4.0, "ridge": 0.1, "variant": "code"},
}
CASES = [("mlld", {}), ("mlld", {"variant": "paper"}), ("mlld", {"logits": "standardised"}),
         ("crld", {}), ("skd", {}), ("skd", {"variant": "paper"})]  # fmt: skip


class Table(nn.Module):
    """A network whose logits are its parameter, one row for each image, whatever the images are.

    Row k of its table is that of images that consist of the number k.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Features:
        rows = x[:, 0, 0, 0].long()
        self.seen.append(rows)
        return partial_features({"logits": self.logits[rows]})


def draw(seed: int, images: int = 2 * IMAGES, classes: int = CLASSES) -> Tensor:
    return 3 * torch.randn(images, classes, generator=torch.Generator().manual_seed(seed))


def method_of(name: str, student: Tensor, teacher: Tensor, **changed: Any) -> Method:
    kind = METHODS[name]
    networks = Networks(Table(student), Table(teacher), random_images(2, 2))
    weights = dict.fromkeys(kind.terms, 1.0)
    return kind(networks, weights=weights, **{**SETTINGS[name], **changed})


def batch_of(rows: int, views: int, classes: int) -> Batch:
    x = torch.arange(rows).float().view(-1, 1, 1, 1).expand(rows, 3, 2, 2)
    places = torch.arange(rows // views)
    return Batch(x, places % classes, places, torch.arange(rows))


def terms_of(name: str, student: Tensor, teacher: Tensor, **changed: Any) -> dict[str, float]:
    method = method_of(name, student, teacher, **changed)
    output = method.loss(batch_of(len(student), method.views.count, student.shape[1]))
    return {key: term.item() for key, term in output.terms.items()}


def softmax(logits: Tensor, temperature: float = 1) -> Array:
    powers = np.exp(logits.double().numpy() / temperature)
    softened: Array = powers / powers.sum(1, keepdims=True)
    return softened


def divergences(student: Tensor, teacher: Tensor, temperature: float = 4) -> Array:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    rows: Array = temperature**2 * (p * np.log(p / q)).sum(1)
    return rows


def gram(student: Array, teacher: Array) -> float:
    """Return the sum over all pairs of rows of the squared difference of their products."""
    total = 0.0
    for i in range(len(student)):
        for j in range(len(student)):
            total += (student[i] @ student[j] - teacher[i] @ teacher[j]) ** 2
    return total / len(student)


def entropy(logits: Tensor, labels: Tensor) -> float:
    return float(-np.log(softmax(logits)[np.arange(len(labels)), labels.numpy()]).mean())


def levels(student: Tensor, teacher: Tensor) -> dict[str, float]:
    pairs = [(softmax(student, t), softmax(teacher, t)) for t in TEMPERATURES]
    return {
        "instance": sum(divergences(student, teacher, t).mean() for t in TEMPERATURES),
        "batch": sum(gram(s, t) for s, t in pairs),
        "classes": sum(gram(s.T, t.T) for s, t in pairs),
    }


def test_the_views_of_an_image_are_next_to_each_other() -> None:
    weak, strong = split_views(torch.arange(8).view(4, 2))
    assert weak.tolist() == [[0, 1], [4, 5]]
    assert strong.tolist() == [[2, 3], [6, 7]]
    images = torch.rand(6, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert split_views(images)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["mlld", "crld"])
def test_the_student_computes_each_view_on_its_own(name: str) -> None:
    method = method_of(name, draw(1), draw(2))
    batch = batch_of(2 * IMAGES, 2, CLASSES)
    output = method.loss(batch)
    assert isinstance(method.student, Table)
    assert [rows.tolist() for rows in method.student.seen] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    ce = entropy(draw(1)[::2], batch.y) + entropy(draw(1)[1::2], batch.y)
    assert output.terms["ce"].item() == pytest.approx(ce, rel=1e-5)


@pytest.mark.parametrize("values", [[3], [1, 2], [4, 1, 3], [2, 2, 2, 1], [0.1, 0.1, 0.7, 0.9, 2]])
def test_the_share_is_that_of_numpys_percentile(values: list[float]) -> None:
    found = share_up_to_median(torch.tensor(values, dtype=torch.float32))
    given = np.array(values, dtype=np.float32)
    assert found.item() == pytest.approx((given <= np.percentile(given, 50)).mean())


def test_mlld_by_the_paper_equals_loops() -> None:
    found = terms_of("mlld", draw(1), draw(2), variant="paper")
    weak, strong = levels(draw(1)[::2], draw(2)[::2]), levels(draw(1)[1::2], draw(2)[1::2])
    for name in weak:
        assert found[name] == pytest.approx(weak[name] + strong[name], rel=1e-4)


def test_mlld_by_the_code_equals_loops() -> None:
    found = terms_of("mlld", draw(1), draw(2))
    (student, teacher), (other, its_teacher) = (
        (draw(1)[place::2], draw(2)[place::2]) for place in (0, 1)
    )
    weak = levels(student, teacher)
    sums = softmax(teacher).sum(0)
    images, classes = 3 / 5, (sums <= np.percentile(sums, 50)).mean()
    added = sum(divergences(other, its_teacher, t).mean() for t in (4, 3, 5))
    added += sum(divergences(student, teacher, t).mean() for t in (2, 6))
    assert found["instance"] == pytest.approx(images * weak["instance"] + added, rel=1e-5)
    assert found["batch"] == pytest.approx(images * weak["batch"], rel=1e-4)
    assert found["classes"] == pytest.approx(classes * weak["classes"], rel=1e-4)


def test_standardised_logits_change_the_instance_level_alone() -> None:
    raw = terms_of("mlld", draw(1), draw(2), variant="paper")
    found = terms_of("mlld", draw(1), draw(2), variant="paper", logits="standardised")
    assert {name for name in raw if found[name] != raw[name]} == {"instance"}


@pytest.mark.parametrize("terms", [code_terms, paper_terms])
def test_mlld_of_equal_networks_is_zero(
    terms: Callable[[View, View, list[float]], dict[str, Tensor]],
) -> None:
    weak, strong = (View(*[draw(seed)] * 4) for seed in (1, 2))
    assert all(abs(term.item()) < 1e-6 for term in terms(weak, strong, TEMPERATURES).values())


@pytest.mark.parametrize("sure", [0.0, 0.6, 1.0])
def test_crld_equals_loops(sure: float) -> None:
    student, teacher = draw(1), draw(2)
    found = terms_of("crld", student, teacher, tau_w=sure, tau_s=0.8 * sure)
    (s, other_s), (t, other_t) = ((each[::2], each[1::2]) for each in (student, teacher))
    within = divergences(s, t) + divergences(other_s, other_t)
    across = divergences(other_s, t) + divergences(s, other_t)
    of_weak, of_strong = softmax(t).max(1) >= sure, softmax(other_t).max(1) >= 0.8 * sure
    assert 0 < of_weak.sum() < IMAGES or sure != 0.6
    assert found["within"] == pytest.approx((within * of_weak).mean(), rel=1e-5)
    assert found["across"] == pytest.approx((across * of_strong).mean(), rel=1e-5)


def test_a_teacher_as_sure_as_the_threshold_counts() -> None:
    even = torch.zeros(4, 2)
    assert terms_of("crld", draw(1, 4, 2), even, tau_w=0.5, tau_s=0.6)["within"] > 0
    assert terms_of("crld", draw(1, 4, 2), even, tau_w=0.5, tau_s=0.6)["across"] == 0


def exact_length(rows: Tensor, ridge: float) -> Tensor:
    """Return the mean Mahalanobis length in float64, by the inverse of the covariance."""
    inverse = torch.linalg.inv(torch.cov(rows.T) + ridge * torch.eye(len(rows)).double())
    return torch.einsum("bi,ij,bj->b", rows, inverse, rows).sqrt().mean()


def exact_differences(student: Tensor, teacher: Tensor) -> Tensor:
    one, other = F.normalize(student.double()), F.normalize(teacher.double())
    return one @ one.T - other @ other.T


@pytest.mark.parametrize("ridge", [10.0, 0.1, 1e-3])
@pytest.mark.parametrize(("variant", "scale"), [("code", CLASSES), ("paper", 1)])
def test_skd_equals_float64(variant: str, scale: int, ridge: float) -> None:
    student, teacher = draw(1, 64), draw(2, 64)
    found = terms_of("skd", student, teacher, variant=variant, ridge=ridge)
    sums = softmax(teacher).sum(0)
    images, classes = 1 / 2, (sums <= np.percentile(sums, 50)).mean()
    if variant == "paper":
        images = classes = 1
    expected = exact_length(exact_differences(student, teacher) / scale, ridge)
    assert found["direction"] == pytest.approx(classes * expected.item(), rel=1e-4)
    assert found["kd"] == pytest.approx(images * divergences(student, teacher).mean(), rel=1e-5)


def test_the_gradient_of_the_length_equals_that_of_float64() -> None:
    rows = exact_differences(draw(1, 16), draw(2, 16)).requires_grad_()
    (expected,) = torch.autograd.grad(exact_length(rows, 0.1), rows)
    single = rows.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(mahalanobis_length(single, 0.1), single)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)


def test_the_smallest_ridge_is_enough_for_a_large_batch_in_which_directions_coincide() -> None:
    student = draw(1, 256) + 50
    teacher = draw(2, 4).repeat(64, 1) + 0.01 * draw(3, 256)
    rows = direction_differences(student, teacher)
    expected = exact_length(exact_differences(student, teacher), 1e-4)
    assert mahalanobis_length(rows, 1e-4).item() == pytest.approx(expected.item(), rel=1e-2)


def test_with_a_large_ridge_the_length_is_that_of_euclid() -> None:
    rows = draw(1, 8, 8)
    found = mahalanobis_length(rows, 1e6) * 1e3
    assert found.item() == pytest.approx(rows.norm(dim=1).mean().item(), rel=1e-4)


def test_the_directions_forget_the_lengths_of_the_logits() -> None:
    lengths = torch.rand(2 * IMAGES, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    found = [terms_of("skd", each, draw(2)) for each in (draw(1), lengths * draw(1))]
    assert found[0]["direction"] == pytest.approx(found[1]["direction"], rel=1e-4)
    assert found[0]["kd"] != pytest.approx(found[1]["kd"], rel=1e-3)


@pytest.mark.parametrize(("name", "changed"), CASES)
@pytest.mark.parametrize(("images", "classes"), [(1, 2), (1, CLASSES), (3, 2)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_losses_and_gradients_are_finite(
    name: str, changed: dict[str, Any], images: int, classes: int, scale: float
) -> None:
    rows = METHODS[name].views.count * images
    for teacher in (draw(1, rows, classes), draw(2, rows, classes)):
        method = method_of(name, scale * draw(1, rows, classes), scale * teacher, **changed)
        output = method.loss(batch_of(rows, method.views.count, classes))
        torch.stack(list(output.terms.values())).sum().backward()
        assert all(term.isfinite() for term in output.terms.values())
        assert isinstance(method.student, Table)
        assert method.student.logits.grad is not None
        assert method.student.logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("pair", "epochs", "lr"),
    [("vgg13-vgg8", 480, 0.025), ("vgg13-MobileNetV2", 480, 0.01),
     ("wrn_40_2-ShuffleV1", 480, 0.01), ("resnet32x4-ShuffleV2", 960, 0.01),
     ("wrn_40_2-MobileNetV2", 480, 0.005), ("wrn_40_2-ShuffleV2", 480, 0.01)],
)  # fmt: skip
def test_mlld_has_the_published_schedule(
    composed: Compose, pair: str, epochs: int, lr: float
) -> None:
    teacher, student = pair.split("-")
    config = composed("method=mlld", f"arch@teacher={teacher}", f"arch@student={student}")
    assert config.schedule.epochs == 240
    (phase,) = method_of("mlld", draw(1), draw(2), distill=config.method.distill).phases()
    assert phase_schedule(phase, config) == Schedule(epochs, lr, (150, 180, 210))
