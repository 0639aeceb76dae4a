"""What each method gains over the student alone and over KD."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sskd.report.groups import Entry, Group
from sskd.report.published import Pair
from sskd.report.rows import KD, STUDENT, TEACHER, RowKey

GAIN_LEGEND = (
    "Gain: the method's mean top-1 minus the mean of the student alone, or of KD, in points. Error"
    " bars: one standard deviation of that difference, the root of the sum of both sample"
    " variances over seeds; none where either side is a single run."
)
REFERENCES = {STUDENT: "over the student alone", KD: "over KD"}


@dataclass(frozen=True)
class Gain:
    """Points of top-1 over a reference, and their standard deviation where both have one."""

    points: float
    std: float | None


def gain(entry: Entry, reference: Entry) -> Gain:
    """Return what ``entry`` gains over ``reference``; their seeds count as independent."""
    points = entry.mean - reference.mean
    if entry.std is None or reference.std is None:
        return Gain(points, None)
    return Gain(points, math.hypot(entry.std, reference.std))


def pair_gains(group: Group, table: str, pair: Pair) -> dict[RowKey, dict[RowKey, Gain]]:
    """Return the gains of each of the pair's methods, by row and then by reference."""
    entries = group.pair_entries(table, pair)
    references = {key: entries[key] for key in REFERENCES if key in entries}
    return {
        row: gains
        for row, entry in entries.items()
        if row not in (TEACHER, STUDENT)
        if (gains := {key: gain(entry, of) for key, of in references.items() if key != row})
    }
