"""Every method with its real configuration: gradients, frozen modules, learning, state."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from conftest import Compose, random_images
from torch import nn

from sskd.checks.device import check_device
from sskd.checks.methods import (
    check_overfits,
    check_phases,
    check_resume,
    check_single_image,
    check_state,
    check_teacher_outputs,
)
from sskd.checks.samples import first_batch, fitted_teacher
from sskd.data import Images
from sskd.errors import UserError
from sskd.methods import METHODS, LossOutput, Method, Phase, build_method
from sskd.models import build_model
from sskd.training.phase_settings import phase_schedule

# Networks of one family, of two with equally many stages, and with different numbers of stages.
# test_pairs.py has the shapes of all pairs; here, the leaves of the graph depend on the family.
PAIRS = ["wrn_16_2-wrn_16_1", "resnet8x4-ShuffleV2", "vgg8-MobileNetV2", "resnet14-vgg8"]
# These compare the networks stage by stage.
OF_EQUAL_STAGES = {"at", "vid", "ab", "nst", "hsakd", "reviewkd", "ofd"}
OF_EQUAL_STAGES_PAIRS = [*PAIRS[:3], "vgg11-vgg8"]
# FSP needs the same channels at every level of both networks.
FSP_PAIRS = ["resnet14-resnet8", "vgg11-vgg8"]
# Their losses see nothing but logits, whatever the networks are.
OF_LOGITS = {"dkd", "ls", "dist", "ttm", "wttm", "ctkd", "luminet", "mlld", "crld", "skd"}
# Their first phases take all steps of the check, which small images make four times as fast.
OF_MANY_STEPS = {"ab", "fsp", "ft", "hsakd", "sskd"}


def pairs_of(method: str) -> list[str]:
    if method in OF_LOGITS:
        return ["resnet14-resnet8", "vgg8-MobileNetV2"]
    if method == "fsp":
        return FSP_PAIRS
    return OF_EQUAL_STAGES_PAIRS if method in OF_EQUAL_STAGES else PAIRS


CASES = [(method, pair) for method in sorted(METHODS) for pair in pairs_of(method)]
# The pairs for ImageNet, with methods that read every stage, and its pre-activation.
CASES += [("at", "ResNet34-ResNet18"), ("ofd", "ResNet50_224-MobileNetV1")]


def make(composed: Compose, method: str, pair: str, images: Images, *overrides: str) -> Method:
    teacher, student = pair.split("-")
    config = composed(
        f"arch@teacher={teacher}", f"arch@student={student}", f"method={method}", *overrides
    )
    networks = (
        copy.deepcopy(network(student, images.num_classes)),
        copy.deepcopy(network(teacher, images.num_classes))
        if METHODS[method].needs_teacher
        else None,
    )
    torch.manual_seed(0)
    return build_method(config.method, *networks, images)


@cache
def network(name: str, classes: int) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, classes)


@pytest.mark.parametrize(("method", "pair"), CASES)
def test_every_phase_of_every_pair(composed: Compose, method: str, pair: str) -> None:
    count = 2 if method != "rkd" else 3  # of two images, every relative distance is 1
    images = random_images(count, 4)
    built = make(composed, method, pair, images)
    check_phases(built, images)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_overfits_one_batch(composed: Compose, method: str) -> None:
    size = 16 if method in OF_MANY_STEPS else 32
    images = random_images(8, 4, size=size)
    built = make(composed, method, "resnet14-resnet8", images)
    if built.teacher is not None:
        built.teacher.load_state_dict(fitted_teacher("resnet14", 8, size).state_dict())
    check_overfits(built, images)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_last_phase_alone_evaluates(composed: Compose, few_images: Images, method: str) -> None:
    built = make(composed, method, "resnet14-resnet8", few_images)
    *first, last = built.phases()
    assert last.name == built.evaluated_phase
    assert all(phase.name != built.evaluated_phase for phase in first)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_state_round_trips(composed: Compose, few_images: Images, method: str) -> None:
    check_state(lambda: make(composed, method, "resnet14-resnet8", few_images))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_resumed_phase_has_the_same_bits(
    composed: Compose, few_images: Images, method: str
) -> None:
    check_resume(lambda: make(composed, method, "resnet14-resnet8", few_images), few_images)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_teacher_outputs_suffice(composed: Compose, few_images: Images, method: str) -> None:
    check_teacher_outputs(make(composed, method, "resnet14-resnet8", few_images), few_images)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_last_batch_of_one_image(composed: Compose, few_images: Images, method: str) -> None:
    check_single_image(make(composed, method, "resnet14-resnet8", few_images), few_images)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_cuda_graph_can_contain_a_step(
    composed: Compose, few_images: Images, method: str
) -> None:
    check_device(make(composed, method, "resnet14-resnet8", few_images), few_images)


def test_the_teacher_head_is_the_same_for_all_students(
    composed: Compose, few_images: Images
) -> None:
    small = make(composed, "sskd", "resnet14-resnet8", few_images)
    torch.manual_seed(7)
    one = build_method(composed("method=sskd").method, small.student, small.teacher, few_images)
    torch.manual_seed(7)
    wide = build_model("wrn_16_2", few_images.num_classes)
    torch.manual_seed(7)
    other = build_method(composed("method=sskd").method, wide, small.teacher, few_images)
    for name, tensor in one.get_submodule("teacher_head").state_dict().items():
        assert torch.equal(tensor, other.get_submodule("teacher_head").state_dict()[name])


def test_sskd_terms_equal_loops(composed: Compose, few_images: Images) -> None:
    """The four terms are computed again, view by view, with gathered rows instead of masks."""
    built = make(composed, "sskd", "resnet14-resnet8", few_images, "method.tf_ratio=0.5")
    built.eval()
    batch = first_batch(few_images, next(iter(built.phases())), 8)
    with torch.no_grad():
        found = built.loss(batch).terms
        views = batch.x.view(8, 4, 3, 32, 32)
        student = [built.student(views[:, view]) for view in range(4)]
        teacher = [built.teacher(views[:, view]) for view in range(4)]
        heads = [built.get_submodule(name) for name in ("student_head", "teacher_head")]
        matrices = []
        for features, head in zip((student, teacher), heads, strict=True):
            projected = [nn.functional.normalize(head(each.pooled)) for each in features]
            rows = [projected[v][i] @ projected[0].T for i in range(8) for v in (1, 2, 3)]
            matrices.append(torch.stack(rows).double())
        logits = [
            torch.stack([f[v].logits[i] for i in range(8) for v in (1, 2, 3)]).double()
            for f in (student, teacher)
        ]

    def selected(pair: list[torch.Tensor], truth: list[int], ratio: float, t: float) -> float:
        ranks = [int((row > row[column]).sum()) for row, column in zip(pair[1], truth, strict=True)]
        wrong = sorted((rank, i) for i, rank in enumerate(ranks) if rank)
        keep = [i for i, rank in enumerate(ranks) if rank == 0]
        keep += [i for _, i in wrong[: int(ratio * len(wrong))]]
        s, p = (pair[0][keep] / t).softmax(1), (pair[1][keep] / t).softmax(1)
        return (t * t * (p * (p / s).log()).sum(1)).mean().item()

    positives = [i for i in range(8) for _ in range(3)]
    labels = [batch.y.tolist()[i] for i in positives]
    assert found["tf"].item() == pytest.approx(selected(logits, labels, 0.5, 4.0), rel=1e-3)
    assert found["ss"].item() == pytest.approx(selected(matrices, positives, 0.75, 0.5), rel=1e-3)
    ce = -student[0].logits.double().log_softmax(1)[range(8), batch.y].mean().item()
    assert found["ce"].item() == pytest.approx(ce, rel=1e-4)
    p, s = ((f[0].logits.double() / 4).softmax(1) for f in (teacher, student))
    kd = 16 * (p * (p / s).log()).sum(1).mean().item()
    assert found["kd"].item() == pytest.approx(kd, rel=1e-3)


@pytest.mark.parametrize("weights", [{"ce": 1.0}, {"ce": 1.0, "kd": 1.0, "tf": 1.0}])
def test_terms_and_weights_must_have_the_same_names(
    weights: dict[str, float],
) -> None:
    phase = Phase("distill", nn.Linear(1, 1), lambda batch: LossOutput({}, {}), weights)
    with pytest.raises(ValueError, match=r"the terms are .* the weights"):
        phase.weigh({"ce": torch.ones(()), "kd": torch.ones(())})


def test_a_weight_of_an_unknown_term_is_refused(composed: Compose) -> None:
    with pytest.raises(UserError, match=r"method\.weights\.crd: no such setting"):
        composed("method=kd", "+method.weights.crd=1")


# Weights of the methods' terms in the CRD benchmark's published commands (beta in its scripts).
PUBLISHED_WEIGHTS = {
    "fitnet": 100, "at": 1000, "sp": 3000, "vid": 1, "rkd": 1, "pkt": 30000, "ft": 200,
    "crd": 0.8, "cc": 0.02, "nst": 50,
}  # fmt: skip


WEIGHTINGS = {(): (0.1, 0.9), ("weighting=crd_benchmark",): (1, 0), ("weighting=common",): (1, 1)}


@pytest.mark.parametrize("method", sorted({*PUBLISHED_WEIGHTS, "ab", "fsp"}))
def test_the_weighting_sets_ce_and_kd(composed: Compose, few_images: Images, method: str) -> None:
    term = {method: PUBLISHED_WEIGHTS[method]} if method in PUBLISHED_WEIGHTS else {}
    for words, (ce, kd) in WEIGHTINGS.items():
        built = make(composed, method, "resnet14-resnet8", few_images, *words)
        assert list(built.phases())[-1].weights == {"ce": ce, "kd": kd, **term}
    words = ("weighting=crd_benchmark", "method.weights.kd=0.25")
    built = make(composed, method, "resnet14-resnet8", few_images, *words)
    assert list(built.phases())[-1].weights == {"ce": 1, "kd": 0.25, **term}


@pytest.mark.parametrize("method", ["kd", "sskd"])
def test_the_weighting_does_not_change_kd_and_sskd(composed: Compose, method: str) -> None:
    def weights(*words: str) -> dict[str, float]:
        found: dict[str, float] = composed(f"method={method}", *words).method.weights.model_dump()
        return found

    for weighting in ("crd_benchmark", "common"):
        assert weights(f"weighting={weighting}") == weights()


@pytest.mark.parametrize(
    ("method", "phase"), [("ab", "boundary"), ("ft", "paraphraser"), ("fsp", "flow")]
)
@pytest.mark.parametrize(("epochs", "expected"), [(240, 30), (24, 3), (2, 1)])
def test_first_phases_take_an_eighth_at_a_constant_rate(
    composed: Compose, few_images: Images, method: str, phase: str, epochs: int, expected: int
) -> None:
    config = composed(f"method={method}", f"schedule.epochs={epochs}", "pair=vgg13-vgg8")
    first, last = build_method(
        config.method, build_model("vgg8", 5), build_model("vgg13", 5), few_images
    ).phases()
    schedule = phase_schedule(first, config)
    assert (first.name, schedule.epochs) == (phase, expected)
    assert {schedule.lr_at(epoch) for epoch in range(expected)} == {0.05}
    assert phase_schedule(last, config).epochs == epochs


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pair=resnet56-resnet20"], 0.01),
        (["pair=wrn_40_2-wrn_16_2", "optimizer.lr=0.2"], 0.01),
        (["pair=vgg13-MobileNetV2"], 0.01),
        (["pair=ResNet50-vgg8"], 0.05),
        (["pair=ResNet50-vgg8", "optimizer.lr=0.2"], 0.2),
        (["pair=resnet32x4-ShuffleV1", "optimizer=adamw"], 0.001),
        (["pair=resnet56-resnet20", "method.paraphraser.lr=null", "optimizer.lr=0.2"], 0.2),
    ],
)
def test_the_student_decides_the_paraphrasers_rate(
    composed: Compose, few_images: Images, overrides: list[str], expected: float
) -> None:
    config = composed("method=ft", *overrides)
    first, _ = build_method(
        config.method, build_model("resnet8", 5), build_model("resnet8", 5), few_images
    ).phases()
    assert phase_schedule(first, config).lr == expected
