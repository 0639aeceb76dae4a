"""Checks of the files in a run's folder, which may come from anybody: YAML, JSON, odd entries.

Nothing here needs PyTorch, so that the report and the command line can use it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sskd.errors import UserError, shortened
from sskd.files import is_regular_file, read_bounded_text

_DEEPEST = 50  # levels; a configuration has five


def read_yaml(path: Path, most: int) -> dict[str, Any]:
    """Return the YAML mapping in the file ``path`` of at most ``most`` bytes.

    Raises:
        ValueError: it cannot be read, or is not a mapping; the message says why.
    """
    try:
        if not is_regular_file(path):
            raise ValueError("it is not a regular file" if path.exists() else "it is missing")
        text = read_bounded_text(path, most)
        _refuse_odd_yaml(text)
        content = OmegaConf.to_container(OmegaConf.create(text))
        str(content)  # ValueError for an integer of more digits than Python writes
    except (OSError, OmegaConfBaseException, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    if not isinstance(content, dict):
        raise TypeError("it is not a mapping")
    return {str(key): value for key, value in content.items()}


def _refuse_odd_yaml(text: str) -> None:
    """Raise ValueError for YAML that no run writes and that may exhaust or break a reader."""
    depth = 0
    for event in yaml.parse(text):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it has aliases, which can grow without bound")
        if isinstance(event, yaml.ScalarEvent) and depth == 0:
            raise ValueError("it is a single value")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")


def read_json(path: Path, most: int) -> dict[str, Any]:
    """Return the JSON object in the file ``path`` of at most ``most`` bytes.

    Raises:
        OSError: the file cannot be read at the moment.
        ValueError: it is not a regular file, or not a JSON object.
    """
    if not is_regular_file(path):
        raise ValueError("it is not a regular file")
    try:
        content = json.loads(read_bounded_text(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def refuse_odd_entries(folder: Path) -> None:
    """Raise UserError if an entry of ``folder`` redirects writes (a link) or blocks them (a pipe).

    A run writes to fixed names in its folder, so an untrusted folder could choose what it
    overwrites.
    """
    for path in folder.iterdir():
        odd = path.exists() and not path.is_file() and not path.is_dir()
        if path.is_symlink() or odd:
            kind = "symbolic link" if path.is_symlink() else "pipe or a device"
            raise UserError(
                f"{path}: is a {kind}, but a run keeps its files in its own folder; "
                "put the file itself there"
            )


class Record:
    """Typed access to the fields of a JSON object; a missing field reads as None.

    Each method raises ValueError, with the field's name, if the value has another type.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix

    def text(self, key: str) -> str | None:
        """Return a string."""
        return self._typed(key, str, "a string")

    def integer(self, key: str) -> int | None:
        """Return a whole number, 0 or more."""
        value: int | None = self._typed(key, int, "a whole number")
        if value is not None and value < 0:
            raise ValueError(f"'{self._prefix}{key}' is negative")
        return value

    def number(self, key: str, high: float = sys.float_info.max) -> float | None:
        """Return a finite number of at most ``high``."""
        value: float | None = self._typed(key, (int, float), "a number")
        if value is not None and not -sys.float_info.max <= value <= high:
            raise ValueError(f"'{self._prefix}{key}' is {shortened(value)}, out of range")
        return value

    def percent(self, key: str) -> float | None:
        """Return a number from 0 to 100."""
        value = self.number(key, 100)
        if value is not None and value < 0:
            raise ValueError(f"'{self._prefix}{key}' is {shortened(value)}, out of range")
        return value

    def flag(self, key: str) -> bool | None:
        """Return true or false."""
        value: bool | None = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"'{self._prefix}{key}' is not true or false")
        return value

    def mapping(self, key: str) -> dict[str, Any] | None:
        """Return an object."""
        return self._typed(key, dict, "an object")

    def record(self, key: str) -> Record | None:
        """Return the fields of an object."""
        values = self.mapping(key)
        return None if values is None else Record(values, f"{self._prefix}{key}.")

    def _typed(self, key: str, kind: Any, name: str) -> Any:
        value = self._values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise ValueError(f"'{self._prefix}{key}' is not {name}")
        return value
