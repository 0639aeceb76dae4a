"""A setting that a later version adds does not change what earlier runs are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from omegaconf import OmegaConf

import sskd.config
import sskd.methods.ab
import sskd.runs.recipe
from sskd.config import Config, parse_config
from sskd.data import DatasetSettings, Images
from sskd.errors import UserError
from sskd.methods import AB, METHODS, Vanilla, build_method
from sskd.methods.kd import KD
from sskd.models import build_model
from sskd.optimizers import OPTIMIZERS, OptimizerChoice, SGDSettings
from sskd.runs.folder import run_folder
from sskd.runs.identity import full_config
from sskd.runs.plan import TeacherWeights
from sskd.runs.recipe import diff_from_recipe, teacher_config
from sskd.runs.result import RunResult, Top1
from sskd.runs.run import Run
from sskd.schedule import PhaseSettings
from sskd.settings import Positive, Share
from sskd.teachers.find import find_teacher
from sskd.teachers.phases import phase_settings
from sskd.train import train

RUN = ("dataset=digits", "arch@teacher=resnet8", "arch@student=resnet8", "seed=3")


def forget_settings() -> None:
    """Let the settings and their defaults be built again, of other classes than before."""
    for cached in (
        sskd.runs.recipe.defaults_of,
        sskd.config._settings_of,
        sskd.config._config_of,
    ):
        cached.cache_clear()


class LaterKD(KD):
    def __init__(self, *networks: Any, sharpness: Positive = 1.0, **shared: Any) -> None:
        super().__init__(*networks, **shared)
        self.sharpness = sharpness


class LaterVanilla(Vanilla):
    def __init__(self, *networks: Any, smoothing: Share = 0.0, **shared: Any) -> None:
        super().__init__(*networks, **shared)
        self.smoothing = smoothing


class LaterSGD(SGDSettings):
    maximize: bool = False


class LaterPhase(PhaseSettings):
    warmup: Share = 0.0


class LaterArch(sskd.config.ArchSettings):
    dropout: Share = 0.0


class LaterTeacher(sskd.config.TeacherSettings):
    dropout: Share = 0.0


class LaterDataset(DatasetSettings):
    cutout: int = 0


class AveragedConfig(Config):
    ema: Share = 0.0


class DatasetConfig(Config):
    dataset: LaterDataset


class ArchConfig(Config):
    student: LaterArch
    teacher: LaterTeacher | None


# By what is added: a function that adds it, the setting's name, its default and another value.
Later = Callable[[pytest.MonkeyPatch], None]
LATER: dict[str, tuple[Later, str, Any, Any]] = {
    "a keyword of a method": (
        lambda patch: patch.setitem(METHODS, "kd", LaterKD),
        "method.sharpness", 1.0, 2.0,
    ),
    "a setting of all runs": (
        lambda patch: patch.setattr(sskd.config, "Config", AveragedConfig),
        "ema", 0.0, 0.5,
    ),
    "a setting of data": (
        lambda patch: patch.setattr(sskd.config, "Config", DatasetConfig),
        "dataset.cutout", 0, 8,
    ),
    "a setting of a network": (
        lambda patch: patch.setattr(sskd.config, "Config", ArchConfig),
        "student.dropout", 0.0, 0.5,
    ),
    "a setting of an optimizer": (
        lambda patch: patch.setitem(OPTIMIZERS, "sgd", OptimizerChoice(
            OPTIMIZERS["sgd"].build, LaterSGD)),
        "optimizer.maximize", False, True,
    ),
    "a setting of a phase": (
        lambda patch: patch.setattr(sskd.methods.ab, "PhaseSettings", LaterPhase),
        "method.boundary.warmup", 0.0, 0.5,
    ),
}  # fmt: skip


@pytest.fixture
def upgrade(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that adds the setting that ``LATER`` has under a name."""

    def add_setting(kind: str) -> None:
        LATER[kind][0](monkeypatch)
        forget_settings()

    yield add_setting
    monkeypatch.undo()
    forget_settings()


def words_of(kind: str) -> tuple[str, ...]:
    return (*RUN, "method=ab" if "phase" in kind else "method=kd")


def folder_of(config: Config) -> Path:
    return run_folder(config, diff_from_recipe(config))


def write_run(config: Config, name: str, text: str) -> None:
    """Write the run folder of ``config`` as an earlier version does, with one file in it."""
    folder = folder_of(config)
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(full_config(config)), folder / "config.yaml")
    (folder / name).write_text(text)


def setting(config: Config, path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("kind", LATER)
def test_a_default_in_python_is_enough(
    composed: Compose, upgrade: Callable[[str], None], kind: str
) -> None:
    _, path, default, other = LATER[kind]
    upgrade(kind)
    assert setting(composed(*words_of(kind)), path) == default
    changed = composed(*words_of(kind), f"+{path}={json.dumps(other)}")
    assert diff_from_recipe(changed) == {path: other}


@pytest.mark.parametrize("kind", LATER)
@pytest.mark.parametrize("extra", [(), ("batch_size=32",)])
def test_a_finished_run_is_found_in_its_folder(
    composed: Compose, upgrade: Callable[[str], None], kind: str, extra: tuple[str, ...]
) -> None:
    before = composed(*words_of(kind), *extra)
    write_run(before, "result.json", '{"top1": {"last": 50.0}}')
    upgrade(kind)
    after = composed(*words_of(kind), *extra)
    assert folder_of(after) == folder_of(before)
    assert Run(folder_of(after), full_config(after)).finished(RunResult) == RunResult(
        top1=Top1(last=50.0)
    )


@pytest.mark.parametrize("kind", LATER)
def test_a_stopped_run_is_resumed(
    composed: Compose, upgrade: Callable[[str], None], kind: str
) -> None:
    write_run(composed(*words_of(kind)), "last.pt", "a checkpoint")
    upgrade(kind)
    config = composed(*words_of(kind))
    with Run(folder_of(config), full_config(config)).open():
        pass


@pytest.mark.parametrize("kind", LATER)
def test_another_value_is_another_configuration(
    composed: Compose, upgrade: Callable[[str], None], kind: str
) -> None:
    _, path, default, other = LATER[kind]
    old = composed(*words_of(kind))
    write_run(old, "result.json", "{}")
    upgrade(kind)
    changed = composed(*words_of(kind), f"+{path}={json.dumps(other)}")
    assert folder_of(changed) != folder_of(old)
    with pytest.raises(UserError, match=rf"{path} \({default!r} there, {other!r} here\)"):
        Run(folder_of(old), full_config(changed)).finished(RunResult)


@pytest.mark.parametrize("kind", [kind for kind in LATER if "phase" not in kind])
def test_a_student_finds_its_teacher(
    composed: Compose, upgrade: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_run(teacher_config(composed(*words_of(kind))), "result.json", '{"digest": {"best": "0"}}')
    upgrade(kind)
    monkeypatch.setitem(METHODS, "vanilla", LaterVanilla)
    forget_settings()
    found = find_teacher(composed(*words_of(kind)))
    assert found is not None
    assert found.digest == "0"


@pytest.mark.parametrize("kind", ["a setting of data", "a setting of an optimizer"])
def test_a_shared_phase_stays_in_its_folder(
    composed: Compose, upgrade: Callable[[str], None], few_images: Images, kind: str
) -> None:
    def settings() -> dict[str, Any]:
        config = composed(*RUN, "method=sskd")
        student, teacher = (build_model("resnet8", 5) for _ in range(2))
        method = build_method(config.method, student, teacher, few_images)
        return phase_settings(next(iter(method.phases())), config, TeacherWeights(Path(), "0"))

    before = settings()
    upgrade(kind)
    assert settings() == before


def test_a_method_gets_its_constructors_default(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, few_images: Images
) -> None:
    class Widened(AB):
        def __init__(self, *networks: Any, widths: list[int] = [1, 2], **shared: Any) -> None:  # noqa: B006
            super().__init__(*networks, **shared)
            self.widths = widths

    monkeypatch.setitem(METHODS, "ab", Widened)
    config = composed(*RUN, "method=ab")
    student, teacher = (build_model("resnet8", 5) for _ in range(2))
    built = build_method(config.method, student, teacher, few_images)
    assert isinstance(built, Widened)
    assert built.widths == [1, 2]


def test_a_default_out_of_its_own_range_is_refused(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(KD):
        def __init__(self, *networks: Any, sharpness: Positive = -1.0, **shared: Any) -> None:
            super().__init__(*networks, **shared)

    monkeypatch.setitem(METHODS, "kd", Wrong)
    with pytest.raises(UserError, match=r"method\.sharpness: should be greater than 0"):
        composed(*RUN, "method=kd")


def test_a_missing_setting_counts_as_the_recipes_value(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting has a value in the YAML files and no default in Python."""

    class Required(Config):
        ema: Share

    old = composed(*RUN, "method=kd")
    write_run(old, "result.json", "{}")
    original = sskd.runs.recipe._compose

    def with_ema(*words: str) -> Any:
        return OmegaConf.create({**OmegaConf.to_container(original(*words)), "ema": 0.25})  # type: ignore[dict-item]

    monkeypatch.setattr(sskd.config, "Config", Required)
    monkeypatch.setattr(sskd.runs.recipe, "_compose", with_ema)
    forget_settings()
    same, other = (parse_config({**old.model_dump(), "ema": ema}) for ema in (0.25, 0.5))
    assert Run(folder_of(old), full_config(same)).finished(RunResult) == RunResult()
    with pytest.raises(UserError, match=r"ema \(0.25 there, 0.5 here\)"):
        Run(folder_of(old), full_config(other)).finished(RunResult)
    forget_settings()


@pytest.mark.parametrize("missing", ["method.name", "student.name", "seed", "method.weights.kd"])
def test_no_default_is_assumed_for_what_was_always_written(composed: Compose, missing: str) -> None:
    config = composed(*RUN, "method=kd")
    write_run(config, "result.json", "{}")
    path = folder_of(config) / "config.yaml"
    content = OmegaConf.load(path)
    *parents, last = missing.split(".")
    node: Any = content
    for parent in parents:
        node = node[parent]
    del node[last]
    OmegaConf.save(content, path)
    with pytest.raises(UserError, match=rf"{missing} \(None there"):
        Run(folder_of(config), full_config(config)).finished(RunResult)


def test_a_later_version_trains_no_finished_run_again(
    composed: Compose, upgrade: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has trained its teacher. A sweep checks each of its jobs in the same way."""
    tiny = ("dataset.fraction=0.05", "teacher.fraction=0.05", "schedule.epochs=1")
    words = (*words_of("a setting of all runs"), *tiny, "teacher.train=true")
    result = train(composed(*words))
    for kind in LATER:
        if "phase" not in kind:
            LATER[kind][0](monkeypatch)
    monkeypatch.setitem(METHODS, "vanilla", LaterVanilla)
    forget_settings()
    assert train(composed(*words)) == result
