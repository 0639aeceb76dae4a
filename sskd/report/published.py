"""The published figures that the tables stand beside."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib import resources

Pair = tuple[str, str]


@dataclass(frozen=True)
class Published:
    """Published top-1 accuracies, in percent, of one dataset.

    ``tables`` maps a table's name to its (teacher, student) pairs in the printed order;
    ``top1`` is keyed by (teacher, student, row); ``alone`` holds the networks trained from
    scratch by name; ``notes`` tell what a reader must know before comparing.
    """

    tables: dict[str, tuple[Pair, ...]]
    top1: dict[tuple[str, str, str], float]
    alone: dict[str, float]
    notes: tuple[str, ...]


SSKD_NOTES = (
    "Published: Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020. Its KD row"
    " repeats the CRD benchmark's (Tian et al., ICLR 2020) digit for digit though its teachers"
    " differ, so that row was not run with its own teachers.",
    "SSKD keeps the best epoch on the test set, so its figures compare with the best epoch"
    " (--best); the last epoch is the fairer measure of a method.",
)
# Datasets with published figures: the file beside this module, and what to know about it.
SOURCES = {"cifar100": ("published.csv", SSKD_NOTES)}


@functools.cache
def published_for(dataset: str) -> Published | None:
    """Return the published figures for ``dataset``, or None where there are none.

    For CIFAR-100 they are the two tables of Xu et al., Knowledge Distillation Meets
    Self-Supervision, ECCV 2020: ``similar`` (teacher and student of similar style) and
    ``cross`` (of different style). The rows ``teacher`` and ``student`` are the two networks
    trained alone, the others are the student distilled by that method.
    """
    if dataset not in SOURCES:
        return None
    name, notes = SOURCES[dataset]
    tables: dict[str, dict[Pair, None]] = {}
    top1: dict[tuple[str, str, str], float] = {}
    alone: dict[str, float] = {}
    with resources.files(__package__).joinpath(name).open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            pair = (line["teacher"], line["student"])
            tables.setdefault(line["table"], {})[pair] = None
            top1[(*pair, line["row"])] = float(line["top1"])
            if line["row"] in ("teacher", "student"):
                alone[line[line["row"]]] = float(line["top1"])
    return Published({table: tuple(pairs) for table, pairs in tables.items()}, top1, alone, notes)
