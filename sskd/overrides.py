"""Settings as dotted keys, as words of a command line, and renamed ones."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

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
    """Return ``key=value`` as Hydra reads it back; strings that look like something else quoted."""
    if not isinstance(value, str):
        return f"{key}={json.dumps(value)}"
    if re.fullmatch(r"[A-Za-z_/][A-Za-z_/.0-9-]*", value) and value.lower() not in _NOT_STRINGS:
        return f"{key}={value}"
    # Inside quotes a backslash counts only in front of a quote, the closing one included.
    escaped = re.sub(r"\\*'", lambda found: found[0][:-1] * 2 + r"\'", value)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return f"{key}='{escaped}" + "\\" * trailing + "'"


def about_renamed(key: str) -> str | None:
    """Return a message if the dotted ``key`` is a setting of an earlier version, else None."""
    name = key.rpartition(".")[2]
    return f"{key}: is now {_RENAMED[name]}" if name in _RENAMED else None
