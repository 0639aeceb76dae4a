"""The recipe: the default settings of a network, a method and a dataset, frozen in a version.

A run's folder is named after its difference from the recipe. ``recipes/<version>.yaml`` keeps the
defaults of the version, so a default that is changed in the configuration files later renames no
finished run: the new default is then a difference. Options that the file lacks, such as the method
of an extension, have the defaults of their configuration file.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sskd import CONF
from sskd.config import ALONE, ArchSettings, Config, parse_config, read_config
from sskd.invocation.composition import compose_config, search_path_words
from sskd.invocation.names import command_words
from sskd.overrides import as_override, flatten
from sskd.runs.identity import identity, identity_with_idle
from sskd.runs.weightings import CE, FORMER, KD, RECIPE, WEIGHTED_METHODS

FROZEN = resources.files("sskd.runs") / "recipes" / f"{RECIPE}.yaml"
# The folder's path names these, so they are not part of the difference.
_IN_PATH = frozenset({"seed", "dataset.name"})


def default_config(config: Config) -> Config:
    """Return the configuration that the networks, method and dataset of ``config`` have by default.

    The defaults are those of today's configuration files.
    """
    teacher = config.teacher.name if config.teacher else None
    return defaults_of(config.student.name, teacher, config.method.name, config.dataset.source)


@cache  # Hydra composes in a tenth of a second, and the jobs of a sweep share their defaults
def defaults_of(student: str, teacher: str | None, method: str, source: str) -> Config:
    """Return the default configuration of these names."""
    composed = copy.deepcopy(_compose("student", f"method={method}", f"dataset={source}"))
    for role, network in (("student", student), ("teacher", teacher)):
        if network is not None:
            arch = _compose("teacher", f"arch={network}").arch
            other = {k: v for k, v in composed[role].items() if k not in ArchSettings.model_fields}
            composed[role] = {**other, **arch}
    return read_config(composed)


def weights_of_weighting(method: str, source: str = "cifar100") -> set[str]:
    """Return the terms of ``method`` whose weights are those of ``weighting`` by default."""
    weights = _compose("student", f"method={method}", f"dataset={source}").method.weights
    written: Any = OmegaConf.to_container(weights, resolve=False)
    return {term for term, weight in written.items() if str(weight) == f"${{weighting.{term}}}"}


def follows_weighting(config: Config) -> bool:
    """Return whether the method of ``config`` has the CE and KD of ``weighting`` by default."""
    return {"ce", "kd"} <= weights_of_weighting(config.method.name, config.dataset.source)


@cache
def _compose(primary: str, *overrides: str) -> DictConfig:
    return compose_config(primary, overrides)


def recipe(config: Config) -> dict[str, Any]:
    """Return the default settings of ``config``'s names by dotted key, as the recipe froze them."""
    teacher = config.teacher.name if config.teacher else None
    names = (config.student.name, teacher, config.method.name, config.dataset.source)
    found = flatten(identity(default_config(config).model_dump())) | frozen_defaults(*names)
    # The path of a network alone does not have its method.
    return found if teacher else found | {"method.name": ALONE}


@cache
def frozen_defaults(student: str, teacher: str | None, method: str, source: str) -> dict[str, Any]:
    """Return the settings of these names that the recipe froze, by dotted key.

    A network that it lacks has today's settings, from which other settings are derived.
    """
    frozen = _frozen_file()
    arch, today = frozen["arch"], defaults_of(student, teacher, method, source)
    values = {**frozen["common"], "student": arch.get(student) or today.student.model_dump()}
    if teacher is None:
        del values["teacher"]
    else:
        assert today.teacher is not None
        own = {key: getattr(today.teacher, key) for key in ArchSettings.model_fields}
        values["teacher"] = {**values["teacher"], **(arch.get(teacher) or own)}
    chosen = {"method": frozen["method"].get(method), "dataset": frozen["dataset"].get(source)}
    values |= {group: entry for group, entry in chosen.items() if entry is not None}
    resolved: Any = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    return flatten(resolved)


def has_unfrozen_defaults(config: Config) -> bool:
    """Return whether defaults of ``config`` are of options that the recipe lacks.

    If their configuration file changes, so does the difference of each of their runs.
    """
    frozen, teacher = _frozen_file(), config.teacher
    networks = {config.student.name, *([teacher.name] if teacher else [])}
    return (
        config.method.name not in frozen["method"]
        or config.dataset.source not in frozen["dataset"]
        or not networks <= frozen["arch"].keys()
    )


@cache
def _frozen_file() -> dict[str, Any]:
    frozen: dict[str, Any] = yaml.safe_load(FROZEN.read_text(encoding="utf-8"))
    return frozen


def diff_from_recipe(config: Config) -> dict[str, Any]:
    """Return the settings that decide the result and differ from the recipe, by dotted key.

    The seed and the dataset's name are left out, because the folder's path has them.
    """
    return _difference(identity(config.model_dump()), recipe(config))


def earlier_diffs_from_recipe(config: Config) -> list[dict[str, Any]]:
    """Return the differences that earlier versions computed for the same run.

    They listed settings without effect too, and had other weights of CE and KD by default.
    """
    values, defaults = config.model_dump(), recipe(config)
    without_idle, with_idle = identity(values), identity_with_idle(values)
    found = [_difference(with_idle, defaults)]
    if config.method.name in WEIGHTED_METHODS:
        for weights in FORMER.values():
            former = defaults | dict(zip((CE, KD), weights, strict=True))
            found += [_difference(own, former) for own in (with_idle, without_idle)]
    return found


def _difference(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(values)
    return {k: v for k, v in flat.items() if k not in _IN_PATH and defaults.get(k) != v}


def teacher_config(config: Config) -> Config:
    """Return the configuration of the run that trains ``config``'s teacher.

    It has the defaults of the teacher's architecture on the same dataset, with the settings of
    ``teacher.*``. Other overrides of the student's run, such as its batch size, do not apply.
    """
    teacher = config.teacher
    assert teacher is not None
    values = config.model_dump() | {
        "student": {key: getattr(teacher, key) for key in ArchSettings.model_fields},
        "teacher": None,
        "seed": teacher.seed,
        "augmentation": "weak",
        "sync_batch_norm": False,
        "gather_batch": False,
        "precision": teacher.precision or config.precision,
        "force": False,
    }
    source = config.dataset.source
    defaults = defaults_of(teacher.name, None, teacher.method, source).model_dump()
    dataset = values["dataset"]
    dataset |= {"fraction": teacher.fraction, "label_noise": teacher.label_noise}
    chosen = dataset["holdout"] or dataset["label_noise"] or dataset["fraction"] < 1
    schedule = defaults["schedule"] | {"epochs": teacher.epochs or config.schedule.epochs}
    if teacher.milestones is not None:
        schedule["milestones"] = teacher.milestones
    return parse_config(
        values
        | {
            "method": defaults["method"],
            "optimizer": defaults["optimizer"] | {"lr": teacher.base_lr},
            "batch_size": teacher.batch_size or defaults["batch_size"],
            "schedule": schedule,
            # If the seed does not affect the data, it must not select another teacher.
            "dataset": dataset if chosen else dataset | {"seed": defaults["dataset"]["seed"]},
        }
    )


def training_command(config: Config) -> str:
    """Return the shell command that trains the network alone as ``config`` says."""
    values, default = config.model_dump(), default_config(config).model_dump()
    flat, flat_default = flatten(values), flatten(default)
    shown = ["seed", "runs", "dataset.root", "dataset.name", "device"]
    own = _difference(identity(values), flatten(identity(default)))
    own |= {key: flat[key] for key in shown if flat[key] != flat_default[key]}
    options = {"arch": config.student.name, "dataset": config.dataset.source}
    if config.method.name != ALONE:
        options["method"] = config.method.name
    words = command_words("teacher")
    if not all((CONF / group / f"{name}.yaml").is_file() for group, name in options.items()):
        words += [shlex.quote(word) for word in search_path_words()]
    words += [f"{group}={name}" for group, name in options.items()]
    for key, value in own.items():
        # Elsewhere the trained network is "student"; on this command line it is "arch".
        words.append(shlex.quote(as_override(key.replace("student.", "arch."), value)))
    return " ".join(words)
