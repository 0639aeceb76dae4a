"""Checks of the files in a run's folder, which may be untrusted: YAML, JSON, links, pipes.

Nothing here needs PyTorch, so that the report and the command line can use it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sskd.errors import UserError, one_line
from sskd.files import is_regular_file, read_bounded_text, safe_join
from sskd.runs.fields import parse_object

SWEEP_FOLDER = ".hydra"  # of Hydra's launchers and sweepers: conf/common.yaml
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
        _refuse_unsafe_yaml(text)
        content = OmegaConf.to_container(OmegaConf.create(text))
        str(content)  # ValueError for an integer of more digits than Python writes
    except (OSError, OmegaConfBaseException, ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(one_line(error)) from None
    if not isinstance(content, dict):
        raise ValueError("it is not a mapping")
    return {str(key): value for key, value in content.items()}


def _refuse_unsafe_yaml(text: str) -> None:
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
    return dict(parse_object(read_bounded_text(path, most)))


def refuse_unsafe_sweep_folder(runs: Path) -> None:
    """Raise UserError if ``.hydra`` below ``runs`` redirects what a launcher or sweeper writes."""
    folder = safe_join(runs, SWEEP_FOLDER)
    if folder.is_dir():
        refuse_unsafe_entries(folder)


def refuse_unsafe_entries(folder: Path) -> None:
    """Raise UserError if an entry of ``folder`` redirects writes (a link) or blocks them (a pipe).

    A run writes to fixed names in its folder, so an untrusted folder could choose what it
    overwrites.
    """
    for path in folder.iterdir():
        blocks = path.exists() and not path.is_file() and not path.is_dir()
        if path.is_symlink() or blocks:
            kind = "symbolic link" if path.is_symlink() else "pipe or a device"
            raise UserError(
                f"{path}: is a {kind}, but a run keeps its files in its own folder; "
                "put the file itself there"
            )
