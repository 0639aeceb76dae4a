"""The recipe that folders are named after: complete, and independent of later defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from omegaconf import OmegaConf

import sskd.runs.recipe
from sskd import CONF
from sskd.config import Config
from sskd.overrides import flatten
from sskd.runs.folder import run_folder
from sskd.runs.freeze import freeze
from sskd.runs.identity import identity
from sskd.runs.recipe import FROZEN, default_config, diff_from_recipe, recipe

ARCHITECTURES = sorted(path.stem for path in (CONF / "arch").glob("*.yaml"))
OPTIONS = [
    *(
        f"arch@student={student} arch@teacher={teacher}"
        for student, teacher in zip(ARCHITECTURES, reversed(ARCHITECTURES), strict=True)
    ),
    *(f"method={path.stem}" for path in sorted((CONF / "method").glob("*.yaml"))),
    # The name of dataset=folder is by default that of its folder, which is in the path of a run.
    *("dataset=cifar10", "dataset=cifar100", "dataset=digits"),
    *("dataset=stl10", "dataset=svhn", "dataset=tiny_imagenet"),
]


def folder_of(config: Config) -> Path:
    return run_folder(config, diff_from_recipe(config))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_recipe_has_the_defaults_of_every_option(composed: Compose, option: str) -> None:
    """If a default is changed on purpose, exclude its option here."""
    default = default_config(composed(*option.split()))
    expected = flatten(identity(default.model_dump()))
    if default.teacher is None:
        expected["method.name"] = "vanilla"
    assert recipe(default).items() >= expected.items()
    # The path of a network alone does not have its method.
    other = {} if default.teacher or default.method.name == "vanilla" else {"method.name"}
    assert diff_from_recipe(default).keys() == set(other)


def test_freezing_again_changes_nothing() -> None:
    frozen = OmegaConf.to_container(OmegaConf.load(str(FROZEN)))
    assert isinstance(frozen, dict)
    assert freeze({str(key): value for key, value in frozen.items()}) == frozen


def test_freezing_adds_what_a_known_option_lacks() -> None:
    frozen: Any = OmegaConf.to_container(OmegaConf.load(str(FROZEN)))
    before = frozen["method"]["sskd"]["ss_head"].pop("milestones")
    del frozen["method"]["sskd"]["ss_ratio"]
    frozen["method"]["sskd"]["tf_ratio"] = 0.25  # a default of earlier is kept
    sskd_entry = freeze(frozen)["method"]["sskd"]
    assert sskd_entry["ss_head"]["milestones"] == before
    assert sskd_entry["ss_ratio"] == 0.75  # the paper's, in conf/method/sskd.yaml
    assert sskd_entry["tf_ratio"] == 0.25


@pytest.fixture
def warmer_kd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Change the default temperature of KD in the configuration files from 4 to 3."""
    original = sskd.runs.recipe._compose

    def changed(primary: str, *overrides: str) -> object:
        composed = original(primary, *overrides).copy()
        if composed.method.name == "kd":
            composed.method.temperature = 3.0
        return composed

    sskd.runs.recipe.defaults_of.cache_clear()
    monkeypatch.setattr(sskd.runs.recipe, "_compose", changed)
    yield
    sskd.runs.recipe.defaults_of.cache_clear()


@pytest.mark.usefixtures("warmer_kd")
def test_a_changed_default_renames_no_finished_run(composed: Compose) -> None:
    before = composed("method=kd", "method.temperature=4")
    after = composed("method=kd", "method.temperature=3")
    assert default_config(before).method.temperature == 3.0
    assert folder_of(before).name == "seed0"
    assert diff_from_recipe(after) == {"method.temperature": 3.0}
    assert folder_of(after).name.startswith("seed0-")


def test_an_option_without_an_entry_has_its_own_defaults(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the network, the method and the dataset of an extension."""
    frozen: Any = OmegaConf.load(str(FROZEN))
    for group, name in (("arch", "resnet8"), ("arch", "vgg8"), ("method", "ft")):
        del frozen[group][name]
    OmegaConf.save(frozen, tmp_path / "recipe.yaml")
    monkeypatch.setattr(sskd.runs.recipe, "FROZEN", tmp_path / "recipe.yaml")
    sskd.runs.recipe.frozen_defaults.cache_clear()
    sskd.runs.recipe._frozen_file.cache_clear()
    try:
        for words in (("arch@student=resnet8",), ("arch@teacher=vgg8", "arch@student=vgg8")):
            assert diff_from_recipe(composed("method=ft", *words)) == {}
    finally:
        sskd.runs.recipe.frozen_defaults.cache_clear()
        sskd.runs.recipe._frozen_file.cache_clear()
