"""Settings as dotted keys, as words of a command line, and renamed ones."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sskd.errors import did_you_mean, nearest

# Settings of earlier versions by their last name, and what to type now.
_RENAMED = {
    "kd_weight": "use weighting=crd_benchmark for 0, weighting=common for 1, or "
    "method.weights.ce=1 method.weights.kd=VALUE for another value"
}
_NOT_STRINGS = {"true", "false", "null", "nan", "inf"}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested ``values`` with dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def as_override(key: str, value: Any) -> str:
    """Return ``key=value`` for Hydra, in quotes if it would not read ``value`` as a string."""
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    if re.fullmatch(r"[A-Za-z_/][A-Za-z_/.0-9-]*", value) and value.lower() not in _NOT_STRINGS:
        return f"{key}={value}"
    # In quotes, Hydra reads a backslash as an escape only in front of a quote, even the last one.
    escaped = re.sub(r"\\*'", lambda found: found[0][:-1] * 2 + r"\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"{key}='{escaped}" + "\\" * trailing + "'"


def about_unknown(key: str, known: Collection[str]) -> str:
    """Return a message about the dotted ``key``, which is none of the settings ``known``."""
    if _last(key) in _RENAMED:
        return f"{key}: no longer exists; {_RENAMED[_last(key)]}"
    return f"{key}: no such setting{_alternatives(key, known)}"


def _alternatives(key: str, known: Collection[str]) -> str:
    """Return the end of the message: settings to use instead of ``key``, if some are similar."""
    group, rest, names = _unknown_part(key, known)
    if group and not names:
        return f"; {group} is a setting, not a group"
    if group:
        return _alternatives_in(group, rest, names, known)
    if "." in key:
        return did_you_mean(key, known)
    # The name of a network or a method is chosen by its group.
    found = [each for each in known if _last(each) != "name"]
    name = nearest(key, map(_last, found))
    return _question([name] if name in found else [each for each in found if _last(each) == name])


def _alternatives_in(group: str, rest: str, names: list[str], known: Collection[str]) -> str:
    """Return the settings to use instead of ``rest`` in ``group``, which has ``names``.

    Those with the same last name in a group of it come first, then the nearest name, then all.
    """
    inside = [each for each in known if each.startswith(f"{group}.")]
    if same := [each for each in inside if _last(each) == _last(rest)]:
        return _question(same)
    if name := nearest(rest.partition(".")[0], names):
        return _question([f"{group}.{name}"])
    return f"; {group} has: {', '.join(names)}"


def _unknown_part(key: str, known: Collection[str]) -> tuple[str, str, list[str]]:
    """Return the last group on the path of ``key`` in ``known``, the rest, and the names there."""
    group, rest = "", key
    while True:
        prefix = f"{group}." if group else ""
        inside = (each.removeprefix(prefix) for each in known if each.startswith(prefix))
        names = list(dict.fromkeys(each.partition(".")[0] for each in inside))
        word, _, behind = rest.partition(".")
        if word not in names or not behind:
            return group, rest, names
        group, rest = prefix + word, behind


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _question(settings: Iterable[str]) -> str:
    listed = " or ".join(f"'{each}'" for each in settings)
    return f"; did you mean {listed}?" if listed else ""
