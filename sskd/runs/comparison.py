"""Compare the run in a folder, which may be untrusted, with the expected run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sskd.config import Config, config_model, declared_defaults
from sskd.data import SOURCES, DatasetSettings
from sskd.data.reading import abbreviate
from sskd.errors import UserError, shortened
from sskd.output import complain_once
from sskd.overrides import flatten
from sskd.runs.identity import identity, without_digests
from sskd.runs.names import NAME, RESULT
from sskd.runs.recipe import defaults_of, frozen_defaults

_DIGEST = "dataset.digest"
# Limits of an error about two runs that differ: settings, and characters of each value.
_MOST_SHOWN = 20
_LONGEST_SHOWN = 200


def is_run_of(config: Config, found: Mapping[str, Any]) -> bool:
    """Return whether ``found``, the content of a ``config.yaml``, is a run of ``config``.

    Digests do not count.
    """
    return not explain_difference(without_digests(found), config.model_dump())


def explain_difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return a list of the settings that decide the result and differ; "" if there are none.

    A setting that ``found`` lacks, because a version before the setting wrote it, counts as its
    default. Long values are shortened, and only the first of many settings are named: ``found``
    may be untrusted.
    """
    here = flatten(identity(expected))
    defaults = _defaults_of(expected)
    assumed = {key: defaults[key] for key in here if key in defaults}
    there = assumed | flatten(identity(found))
    if there.get(_DIGEST) != here.get(_DIGEST) and _is_earlier_digest(there, expected):
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


def other_run(content: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """Return how the run that a file's ``content`` names differs from ``expected``; "" if not.

    Files of the first version name no run, and are accepted for any.

    Raises:
        ValueError: the value under ``NAME`` is not a run.
    """
    if NAME not in content:
        return ""
    try:
        named = json.loads(json.dumps(content[NAME]))
    except (TypeError, RecursionError):
        named = None
    if not isinstance(named, dict):
        raise ValueError("it names no run")
    return explain_difference(named, expected)


def refuse_other_result(
    folder: Path, run: Mapping[str, Any] | None, expected: Mapping[str, Any]
) -> None:
    """Raise UserError if the result in ``folder`` belongs to a ``run`` other than ``expected``.

    Results of the first version name no run, and are accepted for any.
    """
    if run is not None and (other := explain_difference(run, expected)):
        raise UserError(
            f"{folder / RESULT}: is the result of another run: {other}; restore this run's file, "
            "or start from scratch with force=true"
        )


# Every version wrote these. A run that lacks a term of the loss was trained without it.
_NEVER_ASSUMED = re.compile(r"(.*\.)?(name|source|seed|weights\..*)")


def _defaults_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of the settings of a run's configuration, by dotted key.

    A default is that in Python, or the recipe's if there is none in Python.
    """
    if "student" not in values:  # a shared phase
        return {}
    student, teacher, method = (values[key] for key in ("student", "teacher", "method"))
    teacher_name = teacher["name"] if teacher else None
    names = (student["name"], teacher_name, method["name"], values["dataset"]["source"])
    found = flatten(defaults_of(*names).model_dump()) | frozen_defaults(*names)
    found |= declared_defaults(config_model(values))
    return {k: v for k, v in found.items() if not _NEVER_ASSUMED.fullmatch(k)}


def _is_earlier_digest(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether ``found`` has the digest that an earlier version computed for the same files.

    That digest covers less than today's, which a warning says.
    """
    dataset = expected.get("dataset", {})
    if found.get(_DIGEST) is None or not DatasetSettings.model_fields.keys() <= dataset.keys():
        return False
    settings = DatasetSettings(**{key: dataset[key] for key in DatasetSettings.model_fields})
    if SOURCES[settings.source].earlier_digest(settings) != found[_DIGEST]:
        return False
    names = ("student.name", "method.name", "seed")
    student, method, seed = (_short_text(str(found.get(name))) for name in names)
    complain_once(
        f"warning: the run of {student} ({method}, seed {seed}) was made by a version that "
        f"recorded only names and sizes of the files in {settings.root}; they are unchanged, but "
        "the contents cannot be verified; force=true trains it from scratch"
    )
    return True
