"""What makes a run the run it is: its difference from the recipe, its folder, its teacher."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sskd import CONF
from sskd.composition import compose_config, search_path_words
from sskd.config import (
    ArchSettings,
    Config,
    config_model,
    declared_defaults,
    parse_config,
    read_config,
)
from sskd.data import SOURCES, DatasetSettings
from sskd.data.reading import abbreviate
from sskd.errors import UserError, shortened
from sskd.invocation import command_words
from sskd.output import complain_once
from sskd.overrides import as_override, flatten
from sskd.paths import safe_join
from sskd.runs.names import NAME, RESULT
from sskd.runs.weightings import CE, FORMER, KD, METHODS

# What may change between two starts of one run without changing what it computes.
_IRRELEVANT_TO_RESULT = (
    ("wandb",),
    ("device",),
    ("compile",),
    ("runs",),
    ("force",),
    ("checkpoint_minutes",),
    ("dataset", "root"),
    ("dataset", "download"),
    ("teacher", "train"),
    ("teacher", "precompute"),
    ("teacher", "checkpoint"),
    # What they decide stands in the method's settings.
    ("teacher", "paraphraser_lr"),
    ("student", "paraphraser_lr"),
)

_DIGEST = "dataset.digest"

# Of a line about two runs that differ: settings, and characters of each value.
_MOST_SHOWN = 20
_LONGEST_SHOWN = 200


def identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration's plain ``values`` that decides what a run computes."""
    return _without(values, *_IRRELEVANT_TO_RESULT, *_idle(values))


def _without(values: Mapping[str, Any], *paths: tuple[str, ...]) -> dict[str, Any]:
    decisive = copy.deepcopy(dict(values))
    for *parents, last in paths:
        node = decisive
        for parent in parents:
            node = node.get(parent) or {}
            if not isinstance(node, dict):  # in the file of a folder that somebody has damaged
                node = {}
        node.pop(last, None)
    return decisive


def _idle(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the teacher's settings that decide nothing beside the other ``values``.

    Beside a checkpoint its digest says all. Without one, a setting that is given as what it is
    by default is the default.
    """
    teacher, schedule = values.get("teacher"), values.get("schedule")
    if not isinstance(teacher, dict):
        return []
    if teacher.get("checkpoint") is not None:
        return [("teacher", key) for key in teacher if key not in ("name", "digest")]
    epochs = schedule.get("epochs") if isinstance(schedule, dict) else None
    usual = {"epochs": epochs, "precision": values.get("precision")}
    return [("teacher", key) for key, value in usual.items() if teacher.get(key) == value]


def recipe(config: Config) -> Config:
    """Return the configuration that the same networks, method and dataset have by default."""
    teacher = config.teacher.name if config.teacher else None
    return _recipe(config.student.name, teacher, config.method.name, config.dataset.source)


@cache  # a cell of a sweep asks for it several times, and its seeds ask again
def _recipe(student: str, teacher: str | None, method: str, source: str) -> Config:
    composed = copy.deepcopy(_compose("student", f"method={method}", f"dataset={source}"))
    for role, network in (("student", student), ("teacher", teacher)):
        if network is not None:
            own = _compose("teacher", f"arch={network}").arch
            beside = {k: v for k, v in composed[role].items() if k not in ArchSettings.model_fields}
            composed[role] = {**beside, **own}
    return read_config(composed)


@cache  # Hydra takes a tenth of a second for one, and the cells of a sweep share a few
def _compose(primary: str, *overrides: str) -> DictConfig:
    return compose_config(primary, overrides)


def diff_from_recipe(config: Config) -> dict[str, Any]:
    """Return what decides the result and differs from the recipe, as dotted keys and values.

    The seed and the dataset's name are left out: a run's folder is named after them anyway.
    """
    return _unlike_recipe(config, identity(config.model_dump()))


def earlier_diffs_from_recipe(config: Config) -> list[dict[str, Any]]:
    """Return what else ``difference`` returned in earlier versions.

    They listed settings of no effect too, and had other weights of CE and KD by default.
    """
    values = config.model_dump()
    without_idle, whole = identity(values), _without(values, *_IRRELEVANT_TO_RESULT)
    found = [_unlike_recipe(config, whole)]
    if config.method.name in METHODS:
        for former in FORMER.values():
            usual = dict(zip((CE, KD), former, strict=True))
            found += [_unlike_recipe(config, own, usual) for own in (whole, without_idle)]
    return found


def _unlike_recipe(
    config: Config, decisive: Mapping[str, Any], former: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what of ``decisive`` is not as in the recipe, with ``former`` in place of today's."""
    usual = flatten(identity(recipe(config).model_dump())) | dict(former or {})
    told_by_name = {"seed", "dataset.name"}
    own = flatten(decisive)
    return {k: v for k, v in own.items() if k not in told_by_name and usual.get(k) != v}


def is_of(config: Config, found: Mapping[str, Any]) -> bool:
    """Return whether ``found``, as a run's folder keeps it, is ``config``; digests do not count."""
    return not explain_difference(
        _without(found, ("dataset", "digest"), ("teacher", "digest")), config.model_dump()
    )


def run_folder(config: Config, changed: Mapping[str, Any]) -> Path:
    """Return the folder of a run below ``config.runs``; ``changed`` is what its recipe is not.

    ``<dataset>/scratch/<arch>/seed<k>`` or ``<dataset>/distill/<teacher>-<student>/<method>/
    seed<k>``, with 8 hex digits of ``changed``, if there is any, so that two configurations
    never share a folder.

    Raises:
        UserError: it is a symbolic link, or lies in one below ``config.runs``.
    """
    if config.teacher is None:
        what = ["scratch", config.student.name]
    else:
        pair = f"{config.teacher.name}-{config.student.name}"
        what = ["distill", pair, config.method.name]
    name = f"seed{config.seed}"
    if changed:
        text = json.dumps(changed, sort_keys=True)
        name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return safe_join(Path(config.runs), config.dataset.name, *what, name)


def teacher_config(config: Config) -> Config:
    """Return the configuration of the run that trains ``config``'s teacher.

    It is the recipe of the teacher's architecture on the same dataset, except for what
    ``teacher.*`` says; what the student's run overrides (its optimizer, its batch size) is
    the student's own affair.
    """
    teacher = config.teacher
    assert teacher is not None
    values = config.model_dump() | {
        "student": {key: getattr(teacher, key) for key in ArchSettings.model_fields},
        "teacher": None,
        "method": {"name": "vanilla", "weights": {"ce": 1.0}},
        "seed": teacher.seed,
        "precision": teacher.precision or config.precision,
        "force": False,
    }
    usual = recipe(parse_config(values)).model_dump()
    dataset = values["dataset"]
    dataset |= {"fraction": teacher.fraction, "label_noise": teacher.label_noise}
    chosen = dataset["holdout"] or dataset["label_noise"] or dataset["fraction"] < 1
    return parse_config(
        values
        | {
            "method": usual["method"],
            "optimizer": usual["optimizer"] | {"lr": teacher.base_lr},
            "batch_size": usual["batch_size"],
            "schedule": usual["schedule"] | {"epochs": teacher.epochs or config.schedule.epochs},
            # A seed that chooses nothing must not ask for another teacher.
            "dataset": dataset if chosen else dataset | {"seed": usual["dataset"]["seed"]},
        }
    )


_kept: dict[str, str | None] | None = None


@contextmanager
def fingerprints_kept() -> Iterator[None]:
    """Take the fingerprint of each dataset once while this lasts, for many cells at one moment.

    A folder of 20,000 images takes a tenth of a second. What a cell trains on is not compared with
    what is kept here: it takes the fingerprint again when it starts.
    """
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def _fingerprint(settings: DatasetSettings) -> str | None:
    take = SOURCES[settings.source].fingerprint
    if _kept is None:
        return take(settings)
    key = settings.model_dump_json()
    if key not in _kept:
        _kept[key] = take(settings)
    return _kept[key]


def full_config(
    config: Config,
    teacher_digest: str | None = None,
    data_digest: str | None = None,
    *,
    defaults: bool = True,
) -> dict[str, Any]:
    """Return ``config`` as a run's folder keeps it: with the digests of what it was fed.

    Args:
        data_digest: of what was loaded; None computes it from the files as they are now.
        defaults: name the settings that have their default in Python too, instead of leaving
            them out, so that what is made of the rest stays the same when one is added.
    """
    values = config.model_dump(exclude_defaults=not defaults)
    fingerprint = data_digest or _fingerprint(config.dataset)
    if fingerprint is not None:
        values["dataset"]["digest"] = fingerprint
    if teacher_digest is not None:
        values["teacher"]["digest"] = teacher_digest
    return values


def explain_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return the settings of two descriptions that decide the result and differ, in words.

    What ``found`` lacks, because it was made before there was such a setting, counts as its
    default. Long values are shortened and only the first of many settings are named: ``found``
    may be of a stranger's file.
    """
    here = flatten(identity(wanted))
    usual = _defaults_of(wanted)
    assumed = {key: usual[key] for key in here if key in usual}
    there = assumed | flatten(identity(found))
    if there.get(_DIGEST) != here.get(_DIGEST) and _is_earlier_digest(there, wanted):
        there[_DIGEST] = here.get(_DIGEST)
    return abbreviate(
        [
            f"{_short_text(key)} ({_shown(there.get(key))} there, {_shown(here.get(key))} here)"
            for key in sorted(there.keys() | here.keys())
            if there.get(key) != here.get(key)
        ],
        _MOST_SHOWN,
    )


def _shown(value: object) -> str:
    return shortened(value, _LONGEST_SHOWN)


def _short_text(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else _shown(text)


def other_run(content: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Return how the run that a file's ``content`` names differs from ``wanted``; "" if not.

    Files of versions that named no run are of any.

    Raises:
        ValueError: what is there under ``NAME`` is no run.
    """
    if NAME not in content:
        return ""
    try:
        named = json.loads(json.dumps(content[NAME]))
    except (TypeError, RecursionError):
        named = None
    if not isinstance(named, dict):
        raise ValueError("it names no run")
    return explain_difference(named, wanted)


def refuse_other_result(folder: Path, result: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise UserError if the ``result`` that was read in ``folder`` is not that of ``wanted``."""
    try:
        other = other_run(result, wanted)
    except ValueError as error:
        other = str(error)
    if other:
        raise UserError(
            f"{folder / RESULT}: is the result of another run: {other}; put back this run's, or "
            "train it again with force=true"
        )


# Every version has written these; a term of the loss that a run lacks, it was trained without.
_NEVER_ASSUMED = re.compile(r"(.*\.)?(name|source|seed|weights\..*)")


def _defaults_of(described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the settings of a described run are by default, by their dotted names.

    That is the default in Python, or the recipe's value of a setting that has none.
    """
    if "student" not in described:  # a shared phase
        return {}
    student, teacher, method = (described[key] for key in ("student", "teacher", "method"))
    usual = _recipe(
        student["name"],
        teacher["name"] if teacher else None,
        method["name"],
        described["dataset"]["source"],
    )
    defaults = flatten(usual.model_dump()) | declared_defaults(config_model(described))
    return {k: v for k, v in defaults.items() if not _NEVER_ASSUMED.fullmatch(k)}


def _is_earlier_digest(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether an earlier version gave ``found`` its digest, and would give it today.

    It then covers less than today's: a warning says so.
    """
    dataset = wanted.get("dataset", {})
    if found.get(_DIGEST) is None or not DatasetSettings.model_fields.keys() <= dataset.keys():
        return False
    settings = DatasetSettings(**{key: dataset[key] for key in DatasetSettings.model_fields})
    if SOURCES[settings.source].earlier_fingerprint(settings) != found[_DIGEST]:
        return False
    names = ("student.name", "method.name", "seed")
    student, method, seed = (_short_text(str(found.get(name))) for name in names)
    complain_once(
        f"warning: the run of {student} ({method}, seed {seed}) was made by a version that "
        f"recorded the names and sizes of the files in {settings.root}: these are the same, but "
        "whether the images are cannot be checked; force=true trains it again"
    )
    return True


def training_command(config: Config) -> str:
    """Return the shell command that trains the network alone as ``config`` says."""
    told = flatten(config.model_dump())
    default = flatten(recipe(config).model_dump())
    shown = ["seed", "runs", "dataset.root", "dataset.name", "device"]
    own = diff_from_recipe(config) | {key: told[key] for key in shown if told[key] != default[key]}
    options = {"arch": config.student.name, "dataset": config.dataset.source}
    words = command_words("teacher")
    if not all((CONF / group / f"{name}.yaml").is_file() for group, name in options.items()):
        words += [shlex.quote(word) for word in search_path_words()]
    words += [f"{group}={name}" for group, name in options.items()]
    for key, value in own.items():
        # What is trained is called the student everywhere but on this command's line.
        words.append(shlex.quote(as_override(key.replace("student.", "arch."), value)))
    return " ".join(words)
