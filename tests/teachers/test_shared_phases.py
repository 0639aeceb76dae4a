"""First phases of a student, some of which students share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from breaking import outcome
from conftest import Compose, SmallTeacher, plan_of
from faults import SMALL

import sskd.teachers.precompute
from sskd.data import Images
from sskd.errors import UserError
from sskd.invocation import extensions
from sskd.runs.plan import TeacherWeights
from sskd.teachers.assembly import assemble
from sskd.teachers.outputs import layout_of
from sskd.teachers.phases import phase_settings
from sskd.teachers.precompute import _settings
from sskd.teachers.shared import shared_folder
from sskd.train import train


@pytest.mark.parametrize(("method", "phase"), [("sskd", "ss_head"), ("ft", "paraphraser")])
def test_a_shared_first_phase_is_computed_once(
    composed: Compose, tmp_path: Path, method: str, phase: str, capsys: Any,
    small_teacher: SmallTeacher,
) -> None:  # fmt: skip
    small_teacher.put(tmp_path / "alone", tmp_path / "second")
    alone, second = f"runs={tmp_path / 'alone'}", f"runs={tmp_path / 'second'}"
    train(composed(*SMALL, f"method={method}", alone))
    train(composed(*SMALL, f"method={method}", second, "arch@student=wrn_16_1"))
    capsys.readouterr()
    train(composed(*SMALL, f"method={method}", second))
    assert f"{phase}/seed0" in capsys.readouterr().out.split(": reused")[0]
    assert len(list((tmp_path / "second").rglob("phases/*/*/*/result.json"))) == 1
    expected = outcome(tmp_path / "alone")
    found = {
        name: value for name, value in outcome(tmp_path / "second").items() if name in expected
    }
    assert found == expected


@pytest.mark.parametrize(
    ("method", "phase", "term"),
    [("ab", "boundary", "ab"), ("ft", "paraphraser", "reconstruction"), ("fsp", "flow", "fsp")],
)
def test_metrics_of_a_first_phase_have_its_name(
    composed: Compose, tmp_path: Path, method: str, phase: str, term: str,
    small_teacher: SmallTeacher,
) -> None:  # fmt: skip
    small_teacher.put(tmp_path / "runs")
    more = ("dataset.fraction=0.05", "batch_size=16")  # with fewer images each loss is mostly noise
    train(composed(*SMALL, *more, f"method={method}", f"method.{phase}.epochs=0.67"))
    (path,) = tmp_path.glob(f"runs/digits/distill/*/{method}/*/metrics.jsonl")
    lines = [json.loads(line) for line in path.open()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        (phase, 1), (phase, 2), ("distill", 1), ("distill", 2), ("distill", 3),
    ]  # fmt: skip
    first, second = lines[:2]
    assert second[f"loss/{term}"] < first[f"loss/{term}"]
    assert first["loss"] == pytest.approx(first[f"loss/{term}"], rel=1e-6)
    assert not any(key.startswith("test/") for key in first)


def test_a_shared_phase_depends_on_these_settings_alone(
    composed: Compose, few_images: Images
) -> None:
    def settings(*overrides: str) -> dict[str, Any]:
        common = ("method=ft", "dataset=digits", "arch@teacher=resnet14", "arch@student=resnet8")
        config = composed(*common, *overrides)
        phase, _ = assemble(config, few_images).phases()
        return phase_settings(phase, config, TeacherWeights(Path("teacher.pt"), "digest"))

    default = settings()
    for change in ("arch@student=wrn_16_1", "method.weights.ft=1", "method.temperature=2"):
        assert settings(change) == default, change
    for change in ("method.rate=0.25", "method.paraphraser.lr=0.02", "arch@student=vgg8", "seed=1",
                   "method.paraphraser.epochs=0.5", "batch_size=32", "precision=bf16",
                   "optimizer.momentum=0", "dataset.fraction=0.5",
                   "augmentation=weak_and_strong", "gather_batch=true",
                   "sync_batch_norm=true"):  # fmt: skip
        assert settings(change) != default, change


# Commit e2621d5 named the folders so. The format of the outputs was 1 then.
@pytest.mark.parametrize(
    ("method", "precision", "name"),
    [
        ("ft", "fp32", "paraphraser/seed0-8544e82e"),
        ("ft", "bf16", "paraphraser/seed0-dbc36f8a"),
        ("sskd", "fp32", "ss_head/seed0-e848747d"),
        ("sskd", "bf16", "ss_head/seed0-ff4a4c77"),
        ("kd", "fp32", "teacher_outputs/10daa5c5"),
        ("kd", "bf16", "teacher_outputs/6c8ecda6"),
    ],
)
@pytest.mark.parametrize("auto", [False, True])
def test_shared_phases_keep_their_names(
    composed: Compose, few_images: Images, monkeypatch: pytest.MonkeyPatch,
    method: str, precision: str, name: str, auto: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(sskd.teachers.precompute, "FORMAT", 1)
    words = (f"method={method}", "dataset=digits", "arch@teacher=resnet14", "arch@student=resnet8")
    config = composed(*words, f"precision={'auto' if auto else precision}")
    plan = plan_of(config, "digest").computed_in(precision)
    assert plan.teacher is not None
    built = assemble(config, few_images)
    first, *more = built.phases()
    if more:
        settings = phase_settings(first, plan.config, plan.teacher)
    else:
        layout = layout_of(built, few_images, plan.config.precision)
        settings = {**_settings(layout, few_images, plan), "images": "0" * 64}
    assert shared_folder(config, settings) == Path(config.runs, "digits/phases/resnet14", name)


@pytest.mark.parametrize(
    ("choice", "counts"),
    [
        (("method", "ft"), True),
        (("arch", "resnet14"), True),
        (("dataset", "digits"), True),
        (("arch", "resnet8"), False),
        (("method", "at"), False),
    ],
)
def test_a_shared_phase_depends_on_the_users_code(
    composed: Compose, few_images: Images, monkeypatch: pytest.MonkeyPatch,
    choice: tuple[str, str], counts: bool,
) -> None:  # fmt: skip
    words = ("method=ft", "dataset=digits", "arch@teacher=resnet14", "arch@student=resnet8")
    config = composed(*words)
    phase, _ = assemble(config, few_images).phases()
    teacher = TeacherWeights(Path("teacher.pt"), "digest")
    found = [phase_settings(phase, config, teacher)]
    for digest in ("0" * 64, "1" * 64):
        monkeypatch.setitem(extensions._digests, choice, digest)
        found.append(phase_settings(phase, config, teacher))
    assert "code" not in found[0]
    distinct = {json.dumps(settings, sort_keys=True) for settings in found}
    assert len(distinct) == (3 if counts else 1)


def test_a_students_metrics_begin_with_its_first_phase(composed: Compose, tmp_path: Path) -> None:
    config = composed(*SMALL, "method=sskd")
    train(config)
    (path,) = (tmp_path / "runs/digits/distill").rglob("metrics.jsonl")
    lines = [json.loads(line) for line in path.open()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        ("ss_head", 1), ("distill", 1), ("distill", 2), ("distill", 3),
    ]  # fmt: skip
    for line in lines[1:]:
        weighted = {"ce": 0.1, "kd": 0.9, "tf": 2.7, "ss": 10.0}
        for term, weight in weighted.items():
            assert line[f"weighted/{term}"] == pytest.approx(
                weight * line[f"loss/{term}"], rel=1e-5
            )
        total = sum(line[f"weighted/{term}"] for term in weighted)
        assert line["loss"] == pytest.approx(total, rel=1e-5)


def test_a_corrupt_shared_phase_is_named(composed: Compose, tmp_path: Path) -> None:
    train(composed(*SMALL, "method=sskd"))
    (path,) = (tmp_path / "runs").glob("digits/phases/*/*/*/model.safetensors")
    original = path.read_bytes()
    for content in (original[:-1] + bytes([original[-1] ^ 1]), original[:100]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: is corrupt; delete the folder"):
            train(composed(*SMALL, "method=sskd", "method.weights.tf=1"))
    path.write_bytes(original)
    for text in ("{", "[1]\n", '{"stage": 3}\n'):
        path.with_name("metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match=rf"{path.parent}: metrics.jsonl is corrupt: .*; del"):
            train(composed(*SMALL, "method=sskd", "method.weights.tf=1"))
