"""Settings as dotted keys, as words of a command line, and renamed ones."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from sskd.errors import did_you_mean

# Settings of earlier versions by their last name, and what to type now.
_RENAMED = {
    "kd_weight": "weighting=crd_benchmark (0), weighting=common (1), or another value as "
    "method.weights.ce=1 method.weights.kd=VALUE"
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
    name = key.rpartition(".")[2]
    if name in _RENAMED:
        return f"{key}: is now {_RENAMED[name]}"
    return f"{key}: no such setting{_alternatives(key, known)}"


def _alternatives(key: str, known: Collection[str]) -> str:
    """Return the settings to use instead of ``key``.

    Those with its last name come first, preferably in the same group; then the nearest name in
    the same group; then the names of all settings there.
    """
    of_name = [each for each in known if each.rpartition(".")[2] == key.rpartition(".")[2]]
    of_group = [each for each in of_name if each.partition(".")[0] == key.partition(".")[0]]
    if same := of_group or of_name:
        return f"; did you mean {' or '.join(map(repr, same))}?"
    group, word, names = _unknown_part(key, known)
    if hint := did_you_mean(word, names):
        return hint.replace("'", f"'{group}.", 1) if group else hint
    return f"; {group} has: {', '.join(names)}" if group and names else ""


def _unknown_part(key: str, known: Collection[str]) -> tuple[str, str, list[str]]:
    """Return the group in which ``key`` leaves ``known``, the next name, and the names there."""
    group, rest = "", key
    while True:
        prefix = f"{group}." if group else ""
        inside = (each.removeprefix(prefix) for each in known if each.startswith(prefix))
        names = list(dict.fromkeys(each.partition(".")[0] for each in inside))
        word, _, rest = rest.partition(".")
        if word not in names or not rest:
            return group, word, names
        group = prefix + word
