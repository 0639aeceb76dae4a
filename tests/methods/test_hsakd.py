"""HSAKD: its losses against loops, its classifiers, and teachers that bring their own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import Compose, random_images
from torch import nn

from sskd.checks.samples import first_batch
from sskd.data import Images
from sskd.errors import UserError
from sskd.methods import build_method
from sskd.methods.auxiliary import AuxiliaryClassifiers, joint_labels, joint_loss
from sskd.methods.hsakd import HSAKD, hierarchical_kl
from sskd.methods.networks import Networks
from sskd.models import build_model
from sskd.runs.recipe import diff_from_recipe, teacher_config, training_command
from sskd.teachers.assembly import assemble
from sskd.teachers.find import find_teacher
from sskd.train import train
from sskd.training.phase_settings import phase_optimizer

# Stages of each family, and the number of channels that are pooled.
FAMILIES = {
    "resnet8": (3, 64), "resnet8x4": (3, 256), "wrn_16_2": (3, 128), "vgg8": (4, 512),
    "ResNet50": (4, 2048), "MobileNetV2": (4, 1280), "ShuffleV1": (3, 960), "ShuffleV2": (3, 1024),
    "ResNet18": (4, 512), "MobileNetV1": (4, 1024),
}  # fmt: skip


def divergence(teacher: list[float], student: list[float], temperature: float) -> float:
    p, q = ([math.exp(z / temperature) for z in row] for row in (teacher, student))
    p, q = ([x / sum(row) for x in row] for row in (p, q))
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_the_joint_label_of_a_view_is_its_class_and_rotation() -> None:
    expected = [8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7]
    assert joint_labels(torch.tensor([2, 0, 1])).tolist() == expected


def test_losses_equal_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        [3 * torch.randn(8, 12, generator=generator) for _ in range(3)] for _ in range(2)
    )
    labels = [2, 0]
    found = hierarchical_kl(student, teacher, 3.0).item()
    expected = cross_entropy = 0.0
    for own, other in zip(student, teacher, strict=True):
        for row, (s, t) in enumerate(zip(own.double(), other.double(), strict=True)):
            expected += divergence(t.tolist(), s.tolist(), 3.0) / 8
            joint = 4 * labels[row // 4] + row % 4
            cross_entropy += (s.exp().sum().log() - s[joint]).item() / 8
    assert found == pytest.approx(expected, rel=1e-5)
    joint_term = joint_loss(student, torch.tensor(labels))
    assert joint_term.item() == pytest.approx(cross_entropy, rel=1e-5)


@pytest.mark.parametrize(("name", "size"), [*((name, 32) for name in FAMILIES), ("vgg8", 64)])
def test_a_branch_ends_like_its_network(name: str, size: int) -> None:
    stages, width = FAMILIES[name]
    with torch.device("meta"):
        network = build_model(name, 5)
        features = network(torch.empty(2, 3, size, size))
        assert (len(features.stages), features.pooled.shape[1]) == (stages, width)
        for number, stage in enumerate(features.stages, 1):
            branch = network.get_submodule("").branch(number)  # type: ignore[operator]
            assert branch(stage).shape == features.last_map.shape


def test_a_network_without_branches_is_refused(few_images: Images) -> None:
    class Plain(nn.Module):
        """A network of another project."""

    with pytest.raises(UserError, match="Plain has none; choose networks"):
        AuxiliaryClassifiers(Plain(), Networks(Plain(), None, few_images))


def make(
    composed: Compose, images: Images, *words: str, heads: dict[str, torch.Tensor] | None = None
) -> HSAKD:
    torch.manual_seed(0)
    student, teacher = (build_model(name, images.num_classes) for name in ("resnet8", "resnet14"))
    settings = composed("method=hsakd", *words).method
    method = build_method(settings, student, teacher, images, heads=heads)
    assert isinstance(method, HSAKD)
    return method


def test_all_views_and_stages_are_compared(composed: Compose, few_images: Images) -> None:
    method = make(composed, few_images).eval()
    batch = first_batch(few_images, list(method.phases())[-1], 3)
    assert torch.equal(batch.x[2::4], torch.rot90(batch.x[::4], 2, (2, 3)))
    with torch.no_grad():
        found = method.loss(batch).terms
        teacher, student = method.teacher(batch.x), method.student(batch.x)
        of_teacher = method.teacher_classifiers(teacher.stages)
        of_student = method.student_classifiers(student.stages)
        joint = [
            divergence(t.tolist(), s.tolist(), 3.0)
            for stage in zip(of_teacher, of_student, strict=True)
            for t, s in zip(*(each.double() for each in stage), strict=True)
        ]
        rows = zip(teacher.logits.double(), student.logits.double(), strict=True)
        kl = [divergence(t.tolist(), s.tolist(), 3.0) for t, s in rows]
        ce = -student.logits[::4].double().log_softmax(1)[range(3), batch.y].mean().item()
    assert found["kl_p"].item() == pytest.approx(sum(kl) / 12, rel=1e-4)
    assert found["kl_q"].item() == pytest.approx(sum(joint) / 12, rel=1e-4)
    assert found["ce"].item() == pytest.approx(ce, rel=1e-4)


def test_a_teacher_with_classifiers_needs_no_first_phase(
    composed: Compose, few_images: Images
) -> None:
    without = make(composed, few_images)
    assert [phase.name for phase in without.phases()] == ["teacher_classifiers", "distill"]
    state = {key: tensor + 1 for key, tensor in without.teacher_classifiers.state_dict().items()}
    method = make(composed, few_images, heads=state)
    assert [phase.name for phase in method.phases()] == ["distill"]
    for key, tensor in method.teacher_classifiers.state_dict().items():
        assert torch.equal(tensor, state[key])
    with pytest.raises(UserError, match="not the auxiliary classifiers"):
        make(composed, few_images, heads={"other": torch.zeros(1)})


def test_nesterov_replaces_the_setting_of_the_run(composed: Compose, few_images: Images) -> None:
    def nesterov(*words: str) -> object:
        config = composed("method=hsakd", *words)
        method = make(composed, few_images, *words)
        return phase_optimizer(list(method.phases())[-1], config).model_dump().get("nesterov")

    assert nesterov() is True
    assert nesterov("method.nesterov=false") is False
    assert nesterov("optimizer=adamw") is None
    with pytest.raises(UserError, match="phase distill: nesterov=true needs a momentum"):
        nesterov("optimizer.momentum=0")


def test_the_teacher_of_another_method_is_another_run(composed: Compose) -> None:
    config = composed("method=hsakd", "teacher.method=hsakd_teacher", "pair=resnet56-resnet20")
    teacher = teacher_config(config)
    assert teacher.method.name == "hsakd_teacher"
    assert diff_from_recipe(teacher) == {"method.name": "hsakd_teacher"}
    assert "method=hsakd_teacher" in training_command(teacher)
    assert diff_from_recipe(teacher_config(composed("method=kd"))) == {}
    with pytest.raises(UserError, match="'kd' does not train a network alone"):
        composed("method=kd", "teacher.method=kd")


def test_students_use_the_classifiers_of_their_teacher(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (
        *("dataset=digits", "dataset.fraction=0.02", "schedule.epochs=1", "method=hsakd"),
        *("arch@teacher=resnet8", "arch@student=resnet8"),
        *("teacher.train=true", "teacher.fraction=0.02"),
        "teacher.method=hsakd_teacher",
    )
    with pytest.raises(UserError, match=r"use teacher\.epoch=last"):
        train(composed(*words))
    assert not list(tmp_path.rglob("config.yaml")), "it was refused after the teacher's training"
    result = train(composed(*words, "teacher.epoch=last"))
    assert (result.passes, result.departures) == (4, {"optimizer.nesterov": True})
    (heads,) = tmp_path.rglob("heads.safetensors")
    assert not list(tmp_path.rglob("teacher_classifiers"))
    assert "ignored" not in capsys.readouterr().out
    from_file = composed(*words[:-1], f"teacher.checkpoint={heads.parent}", "teacher.epoch=last")
    method = assemble(from_file, random_images(2, 8, classes=10), find_teacher(from_file))
    assert f"teacher: {heads} is ignored" in capsys.readouterr().out
    assert [phase.name for phase in method.phases()] == ["teacher_classifiers", "distill"]
    heads.write_bytes(b"")
    with pytest.raises(UserError, match="missing or corrupt; train the teacher from scratch"):
        train(composed(*words, "teacher.epoch=last", "seed=1"))
