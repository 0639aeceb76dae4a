"""The self-supervised tasks of SSKD: views, heads, targets and terms of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import Compose, plan_of, random_images
from torch import Tensor

from sskd.checks.device import check_device
from sskd.checks.methods import check_phases, check_resume, check_single_image
from sskd.checks.samples import first_batch
from sskd.data import CROPS, Images
from sskd.errors import UserError
from sskd.methods import Method, Phase, build_method
from sskd.methods.sskd import SSKD, keep_rows
from sskd.methods.tasks import (
    CONTRASTIVE_VIEWS,
    TASKS,
    TaskName,
    TransformationName,
)
from sskd.models import build_model
from sskd.runs.plan import TeacherWeights
from sskd.runs.recipe import diff_from_recipe
from sskd.teachers.phases import phase_settings
from sskd.teachers.precompute import find_or_compute_outputs

TASK_WORDS = [f"method.task={name}" for name in TASKS]
VIEW_WORDS = [f"method.transformations={name}" for name in CONTRASTIVE_VIEWS]
CLASSIFIERS = {"rotation": 4, "jigsaw": 24, "exemplar": 40}
PAIR = ("method=sskd", "arch@teacher=resnet14", "arch@student=resnet8")


def make(composed: Compose, images: Images, *words: str) -> SSKD:
    torch.manual_seed(0)
    student, teacher = (build_model(name, images.num_classes) for name in ("resnet8", "resnet14"))
    built = build_method(composed(*PAIR, *words).method, student, teacher, images)
    assert isinstance(built, SSKD)
    return built


def first_phase(method: Method) -> Phase:
    return next(iter(method.phases()))


def test_the_names_are_those_of_the_settings() -> None:
    assert get_args(TaskName) == tuple(TASKS)
    assert get_args(TransformationName) == tuple(CONTRASTIVE_VIEWS)
    assert [kind.loss for kind in TASKS.values()] == ["contrast", *CLASSIFIERS]


@pytest.mark.parametrize("words", [*TASK_WORDS[1:], VIEW_WORDS[1]])
def test_each_task_and_transformation_passes_the_checks(
    composed: Compose, few_images: Images, words: str
) -> None:
    def build() -> Method:
        return make(composed, few_images, words)

    check_phases(build(), random_images(3, 4))
    check_single_image(build(), few_images)
    check_device(build(), few_images)


def test_transformed_views_resume_with_the_same_bits(composed: Compose, few_images: Images) -> None:
    few = replace(few_images, train=few_images.train.take(torch.arange(6)))
    check_resume(lambda: make(composed, few, VIEW_WORDS[1]), few)


@pytest.mark.parametrize(("task", "classes"), CLASSIFIERS.items())
def test_the_head_of_a_classifier_has_the_classes_of_its_task(
    composed: Compose, few_images: Images, task: str, classes: int
) -> None:
    method = make(composed, few_images, f"method.task={task}")
    for head in (method.teacher_head, method.student_head):
        assert isinstance(head, torch.nn.Linear)
        assert head.weight.shape == (classes, 64)


def test_targets(composed: Compose, few_images: Images) -> None:
    def target(task: str) -> tuple[Tensor, Any]:
        method = make(composed, few_images, f"method.task={task}")
        batch = first_batch(few_images, first_phase(method), 6)
        return method.task.target(batch).view(6, 4), batch

    rotation, _ = target("rotation")
    assert rotation.tolist() == [[0, 1, 2, 3]] * 6
    jigsaw, batch = target("jigsaw")
    assert (jigsaw[:, 0] == 0).all()
    assert ((jigsaw[:, 1:] > 0) & (jigsaw[:, 1:] < 24)).all()
    assert torch.equal(jigsaw, batch.crops.view(6, 4) // CROPS)
    exemplar, batch = target("exemplar")
    assert torch.equal(exemplar, batch.indices[:, None].expand(-1, 4))


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_the_terms_of_a_classifier_equal_loops(
    composed: Compose, few_images: Images, task: str
) -> None:
    method = make(composed, few_images, f"method.task={task}", "method.ss_ratio=0.5").eval()
    batch = first_batch(few_images, first_phase(method), 6)
    with torch.no_grad():
        output = method.loss(batch)
        found = output.terms
        head_output = method.head_loss(batch)
        teacher, student = (
            head(network(batch.x).pooled).double()
            for head, network in (
                (method.teacher_head, method.teacher),
                (method.student_head, method.student),
            )
        )
    target = method.task.target(batch)
    kept = [row for row, keep in enumerate(keep_rows(teacher, target, 0.5)) if keep]
    assert 0 < len(kept) < 24
    p, q = (teacher[kept] / 0.5).softmax(1), (student[kept] / 0.5).softmax(1)
    expected = (0.25 * (p * (p / q).log()).sum(1)).mean().item()
    assert found["ss"].item() == pytest.approx(expected, rel=1e-3)
    right = 100 * (student.argmax(1) == target).double().mean().item()
    assert output.metrics[f"{task}_top1"].item() == pytest.approx(right)
    loss = -teacher.log_softmax(1)[range(24), target].mean().item()
    assert head_output.terms[task].item() == pytest.approx(loss, rel=1e-4)
    assert head_output.metrics.keys() == {f"{task}_top1"}


@pytest.mark.parametrize("task", CLASSIFIERS)
def test_the_head_learns_its_task(composed: Compose, few_images: Images, task: str) -> None:
    method = make(composed, few_images, f"method.task={task}")
    phase = first_phase(method)
    batch = first_batch(few_images, phase, 4)
    optimizer = torch.optim.Adam(phase.trains.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = phase.loss(batch).terms[task]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_task_with_views_of_its_own_refuses_transformations(
    composed: Compose, few_images: Images
) -> None:
    words = ("method.task=jigsaw", "method.transformations=pool")
    with pytest.raises(UserError, match=r"transformations=pool has no effect.*task=contrastive"):
        make(composed, few_images, *words)


def test_a_jigsaw_of_odd_images_is_refused(composed: Compose) -> None:
    with pytest.raises(UserError, match=r"31 pixels; use an even dataset\.size"):
        make(composed, random_images(4, 4, size=31), "method.task=jigsaw")


@pytest.mark.parametrize("setting", ["task", "transformations"])
def test_an_unknown_name_is_refused_with_the_known_ones(composed: Compose, setting: str) -> None:
    with pytest.raises(UserError, match=rf"method\.{setting}: should be .*'rotation'"):
        composed(*PAIR, f"method.{setting}=rotaton")


def test_the_defaults_name_the_folder_and_the_phase_of_earlier_versions(
    composed: Compose, few_images: Images
) -> None:
    plain, other = composed(*PAIR), composed(*PAIR, "method.task=jigsaw")
    assert diff_from_recipe(plain) == {}
    assert diff_from_recipe(other) == {"method.task": "jigsaw"}
    earlier = plain.method.model_dump(exclude={"task", "transformations"})
    assert type(plain.method).model_validate(earlier) == plain.method

    def settings(*words: str) -> dict[str, Any]:
        phase = first_phase(make(composed, few_images, *words))
        return phase_settings(phase, plain, TeacherWeights(Path(), "0"))

    found = settings()
    assert (found["views"], found["weights"], found["settings"]) == (4, {"contrast": 1.0}, {})
    others = [settings(words) for words in (*TASK_WORDS[1:], *VIEW_WORDS[1:])]
    keys = {str((each["views"], each["weights"])) for each in (found, *others)}
    assert len(keys) == len(others) + 1
    assert others[1]["views"]["jigsaws"] == 3
    assert others[3]["views"]["transformed"]["pool"] == [
        "colour_dropping", "rotation", "crop_resize", "colour_jitter",
    ]  # fmt: skip


def test_the_phase_of_hsakd_stays_in_its_folder(composed: Compose, few_images: Images) -> None:
    """Its views are written out, and a version with more kinds of views must not name them."""
    config = composed("method=hsakd", *PAIR[1:])
    student, teacher = (build_model("resnet8", 5) for _ in range(2))
    method = build_method(config.method, student, teacher, few_images)
    found = phase_settings(first_phase(method), config, TeacherWeights(Path(), "0"))
    assert found["views"] == {"rotations": 4, "one_crop": True, "strong": None}


def test_nothing_is_precomputed_for_transformed_views(
    composed: Compose, few_images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(*PAIR, VIEW_WORDS[1])
    method = make(composed, few_images, VIEW_WORDS[1])
    find_or_compute_outputs(method, few_images, plan_of(config))
    assert method.precomputed is None
    assert "there are too many transformed views to store" in capsys.readouterr().out
