"""The recipe's value of a setting, without PyTorch: what a run that does not change it has."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import Any

import yaml

from sskd import CONF
from sskd.overrides import flatten
from sskd.report.results import FinishedRun, as_text
from sskd.runs.weightings import RECIPE, USUAL, WEIGHTING, WEIGHTINGS

_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def recipe_value(run: FinishedRun, key: str) -> str | None:
    """Return the value of ``key`` that ``run`` has if its difference lacks the key, as text.

    It is the recorded one. A result that lacks it is older than the setting, or than the record of
    settings; it has the recipe's value. None if that is not known.
    """
    if (recorded := dict(run.settings).get(key)) is not None:
        return recorded
    source = run.origin.source or run.dataset
    found = _defaults(run.student, run.method, source).get(key)
    return None if found is None else as_text(found)


@functools.cache
def _defaults(student: str, method: str, source: str) -> dict[str, Any]:
    """Return the recipe of these names by dotted key.

    A setting that was added later has the default of its configuration file.
    """
    frozen = _frozen_file()
    flat = flatten({"method": _option("method", method), "dataset": _option("dataset", source)})
    flat[WEIGHTING] = next(name for name, weights in WEIGHTINGS.items() if weights == USUAL)
    flat |= flatten(
        {
            **frozen["common"],
            "student": frozen["arch"].get(student, {}),
            "method": frozen["method"].get(method, {}),
            "dataset": frozen["dataset"].get(source, {}),
        }
    )
    for key, value in flat.items():
        if isinstance(value, str) and (reference := _REFERENCE.fullmatch(value)):
            flat[key] = flat.get(reference[1])
    return flat


def _option(group: str, name: str) -> dict[str, Any]:
    """Return the configuration file of an option of the suite; empty if it has none."""
    known = {path.stem: path for path in (CONF / group).glob("*.yaml")}
    found: Any = yaml.safe_load(known[name].read_text(encoding="utf-8")) if name in known else {}
    return found if isinstance(found, dict) else {}


@functools.cache
def _frozen_file() -> dict[str, Any]:
    path = resources.files("sskd.runs") / "recipes" / f"{RECIPE}.yaml"
    frozen: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return frozen
