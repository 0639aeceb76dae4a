"""What one finished run reached, as the report has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sskd.report.origin import Origin
from sskd.runs.weightings import WEIGHTING

Epoch = Literal["last", "best"]
Settings = tuple[tuple[str, str], ...]

DIGEST = "teacher.digest"
# What differs under these keys belongs to one row of a table; all else is the table's setting.
ROW_KEYS = ("teacher.", "method.", WEIGHTING)


@dataclass(frozen=True)
class Result:
    """What one finished run reached.

    Accuracies and ``agreement`` are percentages, ``kl`` is in nats. ``teacher`` is None for a
    network trained from scratch, whose name is ``student``. ``difference`` holds what the run
    changed in today's recipe: dotted keys and their values as text, sorted by key, and the weights
    of CE and KD as ``weighting`` if they have a name. ``epochs`` counts those of the last stage.
    ``teacher_epoch`` is the epoch that was asked for, which ``difference`` does not have if the
    teacher is a file. It, ``peak_memory_mib``, ``commit`` and ``epochs`` are None if not recorded.
    ``settings`` are all that decide the result but the seed and digests, empty if not recorded.
    """

    kind: str
    dataset: str
    teacher: str | None
    student: str
    method: str
    seed: int
    difference: Settings
    last: float
    best: float
    teacher_epoch: str | None
    teacher_top1: float | None
    agreement: float | None
    kl: float | None
    seconds: float
    images_per_second: float
    parameters: int
    peak_memory_mib: float | None
    commit: str | None
    epochs: int | None
    origin: Origin
    folder: Path
    settings: Settings = ()

    @property
    def setting(self) -> Settings:
        """The part of the difference that all runs of one table share."""
        return tuple(item for item in self.difference if not item[0].startswith(ROW_KEYS))

    @property
    def variant(self) -> Settings:
        """The part of the difference that gives the run a row of its own."""
        return tuple(item for item in self.difference if item[0].startswith(ROW_KEYS))

    def top1(self, epoch: Epoch) -> float:
        """Return the test accuracy, in percent, of the last or of the best epoch."""
        return self.last if epoch == "last" else self.best


def without_digest(settings: Settings) -> Settings:
    """Return ``settings`` without the digest of the teacher's weights."""
    return tuple((key, value) for key, value in settings if key != DIGEST)
