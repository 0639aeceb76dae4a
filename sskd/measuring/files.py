"""Write the files of a measurement: a table, its numbers, each network's values, a picture."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

from sskd.errors import UserError, shortened
from sskd.files import read_bounded_text, write_atomically
from sskd.report.render import csv_field, render_markdown
from sskd.report.tables import Table

SUFFIXES = (".json", ".md", ".csv", ".png", ".svg")
MOST_BYTES = 2**26  # of an earlier file
ABOUT = "about"
Record = Mapping[str, Any]


class Output:
    """The files whose paths begin with ``out``.

    Args:
        out: as in ``--out``; None: nothing is written.
        about: what is measured. Files that are about something else are not overwritten.
        names: the networks. Files about others are not overwritten either.

    Attributes:
        about: as given.

    Raises:
        UserError: ``out`` is a folder or not writable, or there are such files.
    """

    def __init__(self, out: str | None, about: Record, names: Collection[str]) -> None:
        self.about: dict[str, Any] = json.loads(json.dumps(about))
        self._base = None if out is None else base_path(out, SUFFIXES)
        if self._base:
            self._refuse_other(names)

    def write(
        self,
        table: Table,
        lines: Sequence[Record],
        networks: Sequence[Record],
        draw: Callable[[], Mapping[str, bytes]],
    ) -> list[Path]:
        """Write the files and return their paths.

        Args:
            table: written as markdown.
            lines: the lines of the CSV file, with the same keys.
            networks: what was measured of each network, written as JSON.
            draw: returns the picture by suffix.

        Raises:
            UserError: a file cannot be written.
        """
        if self._base is None:
            return []
        record = {ABOUT: self.about, "networks": networks}
        contents = {
            # First: without it, a later command would not recognise the others.
            ".json": f"{json.dumps(record, indent=1)}\n".encode(),
            ".md": f"# Results\n\n{render_markdown(table)}".encode(),
            ".csv": _csv(lines).encode(),
            **draw(),
        }
        return write_files({self._path(suffix): each for suffix, each in contents.items()})

    def _path(self, suffix: str) -> Path:
        assert self._base is not None
        return self._base.with_name(f"{self._base.name}{suffix}")

    def _refuse_other(self, names: Collection[str]) -> None:
        present = [self._path(suffix) for suffix in SUFFIXES if self._path(suffix).exists()]
        if present and (reason := self._difference(names)):
            raise UserError(
                f"{present[0]}: holds something else ({reason}); choose another --out PATH, or "
                "move the file away"
            )

    def _difference(self, names: Collection[str]) -> str:
        """Return how the present files differ; empty if they are of the same measurement."""
        try:
            record = json.loads(read_bounded_text(self._path(".json"), MOST_BYTES))
            found = dict(record[ABOUT])
            others = [each["name"] for each in record["networks"] if each["name"] not in names]
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return "it is not a file of this command"
        keys = [key for key in {**found, **self.about} if found.get(key) != self.about.get(key)]
        if keys:
            differing = (f"{key}: {found.get(key)}, not {self.about.get(key)}" for key in keys)
            return ", ".join(differing)
        return f"it has {shortened(others[0])} too" if others else ""


def base_path(out: str, suffixes: Collection[str]) -> Path:
    """Return the path with which the names of all files of ``--out`` begin.

    Args:
        suffixes: those of the files, of which ``out`` may have one.

    Raises:
        UserError: ``out`` is a folder, or the folder of the files is not writable.
    """
    base = Path(out)
    if base.suffix in suffixes:
        base = base.with_suffix("")
    if not base.name or base.is_dir():
        raise UserError(f"--out '{out}' is a folder; name a file in it, such as '{base / 'table'}'")
    folder = next(each for each in base.absolute().parents if each.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(f"--out '{base}': cannot write in {folder}; name another file with --out")
    return base


def write_files(contents: Mapping[Path, bytes]) -> list[Path]:
    """Write the files of ``--out`` in their order, each atomically, and return their paths.

    Raises:
        UserError: a file cannot be written.
    """
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, methodcaller("write", content))
        except OSError as error:
            raise UserError(f"--out: cannot write {path} ({error})") from error
    return list(contents)


def _csv(lines: Sequence[Record]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({key: csv_field(value) for key, value in line.items()})
    return text.getvalue()
