"""What a result stands for beyond its names: its data, and its teacher's weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sskd.files import read_bounded_text
from sskd.report import fields
from sskd.runs.names import CONFIG, MOST_CONFIG

SHOWN = 8  # digits of a digest
# Sources whose content is always the same; their names belong to no other data.
FIXED = frozenset({"cifar100", "cifar10", "digits"})


@dataclass(frozen=True)
class Origin:
    """The source and the digest of the data, and the digest of the teacher's weights.

    ``source`` is None if the data is not known, ``digest`` is None for a published dataset, whose
    content is always the same, and ``teacher`` if it is not known or there is none.
    """

    source: str | None = None
    digest: str | None = None
    teacher: str | None = None

    @property
    def data(self) -> Origin:
        """The part that is about the data."""
        return Origin(self.source, self.digest)

    def data_text(self, digits: int | None = None) -> str:
        """Return the source and the first ``digits`` of the digest, or all of them, in words."""
        return " ".join(filter(None, (self.source or "unknown data", (self.digest or "")[:digits])))


def parse_origin(record: Mapping[str, object]) -> Origin:
    """Return the origin that a result records; an older one records none."""
    texts = (
        None if record.get(key) is None else fields.text(dict(record), key)
        for key in ("dataset_source", "dataset_digest", "teacher_digest")
    )
    return Origin(*texts)


def read_origin(folder: Path) -> Origin:
    """Return the origin of an older result, as far as the configuration beside it has it.

    It reads the lines that a run writes, and no other YAML: a parser of YAML takes seconds for a
    file that is made to do that.
    """
    try:
        text = read_bounded_text(folder / CONFIG, MOST_CONFIG)
    except (OSError, ValueError):
        return Origin()
    return Origin(
        _setting(text, "dataset", "source"),
        _setting(text, "dataset", "digest"),
        _setting(text, "teacher", "digest"),
    )


def _setting(text: str, group: str, key: str) -> str | None:
    block = re.search(rf"^{group}:\n((?:  .*\n)*)", text, re.MULTILINE)
    line = block and re.search(rf"^  {key}: (['\"]?)([\w.-]+)\1$", block[1], re.MULTILINE)
    return line[2] if line and line[2] != "null" else None
