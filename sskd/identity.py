"""What makes a run the run it is: its difference from the recipe, its folder, its teacher."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from sskd import CONF
from sskd.config import Config, parse_config, read_config
from sskd.nested import flatten

# What may change between two starts of one run without changing what it computes.
_NOT_IDENTITY = (
    ("wandb",),
    ("device",),
    ("runs",),
    ("force",),
    ("checkpoint_minutes",),
    ("dataset", "root"),
    ("dataset", "download"),
    ("teacher", "train"),
    ("teacher", "checkpoint"),
)


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration's plain ``values`` that decides what a run computes."""
    decisive = copy.deepcopy(dict(values))
    for *parents, last in _NOT_IDENTITY:
        node = decisive
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(last, None)
    return decisive


def recipe(config: Config) -> Config:
    """Return the configuration that the same networks, method and dataset have by default."""
    overrides = [
        f"arch@student={config.student.name}",
        f"method={config.method.name}",
        f"dataset={config.dataset.source}",
    ]
    if config.teacher:
        overrides.append(f"arch@teacher={config.teacher.name}")
    if GlobalHydra.instance().is_initialized():
        return read_config(compose("student", overrides))
    with initialize_config_dir(str(CONF), version_base=None):
        return read_config(compose("student", overrides))


def difference(config: Config) -> dict[str, Any]:
    """Return what decides the result and differs from the recipe, as dotted keys and values.

    The seed and the dataset's name are left out: a run's folder is named after them anyway.
    """
    usual = flatten(identity(recipe(config).model_dump()))
    own = flatten(identity(config.model_dump()))
    told_by_name = {"seed", "dataset.name"}
    return {k: v for k, v in own.items() if k not in told_by_name and usual.get(k) != v}


def run_folder(config: Config, changed: Mapping[str, Any]) -> Path:
    """Return the folder of a run below ``config.runs``; ``changed`` is what its recipe is not.

    ``<dataset>/scratch/<arch>/seed<k>`` or ``<dataset>/distill/<teacher>-<student>/<method>/
    seed<k>``, with 8 hex digits of ``changed``, if there is any, so that two configurations
    never share a folder.
    """
    parent = Path(config.runs, config.dataset.name)
    if config.teacher is None:
        parent = parent / "scratch" / config.student.name
    else:
        pair = f"{config.teacher.name}-{config.student.name}"
        parent = parent / "distill" / pair / config.method.name
    if not changed:
        return parent / f"seed{config.seed}"
    text = json.dumps(changed, sort_keys=True)
    return parent / f"seed{config.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def teacher_config(config: Config) -> Config:
    """Return the configuration of the run that trains ``config``'s teacher.

    It is the recipe of the teacher's architecture on the same dataset, except for what
    ``teacher.*`` says; what the student's run overrides (its optimizer, its batch size) is
    the student's own affair.
    """
    teacher = config.teacher
    assert teacher is not None
    values = config.model_dump() | {
        "student": {"name": teacher.name, "base_lr": teacher.base_lr},
        "teacher": None,
        "method": {"name": "vanilla", "weights": {"ce": 1.0}},
        "seed": teacher.seed,
        "precision": teacher.precision or config.precision,
        "force": False,
    }
    usual = recipe(parse_config(values)).model_dump()
    values["optimizer"] = usual["optimizer"]
    values["batch_size"] = usual["batch_size"]
    values["schedule"] = usual["schedule"] | {"epochs": teacher.epochs or config.schedule.epochs}
    values["dataset"] |= {"fraction": teacher.fraction, "label_noise": teacher.label_noise}
    return parse_config(values)


def training_command(config: Config) -> str:
    """Return the shell command that trains the network alone as ``config`` says."""
    words = ["python", "train_teacher.py", f"arch={config.student.name}"]
    words.append(f"dataset={config.dataset.source}")
    usual = recipe(config)
    own = difference(config)
    told = flatten(config.model_dump())
    shown = ["seed", "runs", "dataset.root", "dataset.name", "device"]
    default = flatten(usual.model_dump())
    own |= {key: told[key] for key in shown if told[key] != default[key]}
    words += [shlex.quote(f"{key}={_as_override(value)}") for key, value in own.items()]
    return " ".join(words)


def _as_override(value: Any) -> str:
    return "null" if value is None else json.dumps(value) if not isinstance(value, str) else value
