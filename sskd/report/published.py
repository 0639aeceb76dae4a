"""The published figures that the tables stand beside."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

from sskd.errors import UserError
from sskd.report.results import Result, Settings, without_digest
from sskd.report.weightings import WEIGHTING

Pair = tuple[str, str]
TEACHER_ROW = "teacher"
STUDENT_ROW = "student"
COLUMNS = ("table", "teacher", "student", "row", "top1")
# What a setting may hold beside the recipe without being another experiment.
COMPARABLE = frozenset({"precision"})


@dataclass(frozen=True)
class Source:
    """A publication: the file of its figures beside this module, and what they were made under.

    ``variant`` is what its students changed in their method and teacher, where ``variant_of``
    says nothing else of a row; ``name`` sets its tables apart from those of other sources.
    """

    file: str
    name: str
    notes: tuple[str, ...]
    variant: Settings = ()
    variant_of: Mapping[str, Settings] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """Published top-1 accuracies, in percent, of one source on one dataset.

    ``tables`` maps a table's name to its (teacher, student) pairs in the printed order, and
    ``rows`` are in that order too; ``top1`` is keyed by (teacher, student, row); ``alone``
    holds the networks trained from scratch by name; ``variants`` is what the runs of a
    method's row have changed in the recipe; ``notes`` tell what a reader must know before
    comparing.
    """

    name: str
    rows: tuple[str, ...]
    tables: dict[str, tuple[Pair, ...]]
    top1: dict[tuple[str, str, str], float]
    alone: dict[str, float]
    variants: dict[str, Settings]
    notes: tuple[str, ...]

    def holds(self, row: str, run: Result) -> bool:
        """Return whether ``run``, of the method in ``row``, was made as the figures were."""
        return self.variants.get(row) == without_digest(run.variant)


SSKD = Source(
    "published.csv",
    "",
    (
        "Published: Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020. Its KD row"
        " repeats the CRD benchmark's (Tian et al., ICLR 2020) digit for digit though its teachers"
        " differ, so that row was not run with its own teachers.",
        "SSKD keeps the best epoch on the test set, so its figures compare with the best epoch"
        " (--best); the last epoch is the fairer measure of a method.",
    ),
)
FROM_LAST = (("teacher.epoch", "last"),)
CRD_BENCHMARK = Source(
    "published_crd_benchmark.csv",
    "the CRD benchmark",
    (
        "The CRD benchmark: Tian et al., Contrastive Representation Distillation, ICLR 2020. It"
        " distils from the teacher's last epoch, every method without KD's term, and reports the"
        " last epoch, so its figures compare with the last epoch.",
    ),
    variant=(*FROM_LAST, (WEIGHTING, "crd_benchmark")),
    variant_of={"KD": FROM_LAST},
)
# The first source of a dataset also shows what was made as none of them were.
SOURCES = {"cifar100": (SSKD, CRD_BENCHMARK)}


def is_comparable(setting: Settings) -> bool:
    """Return whether published figures may stand beside runs of ``setting``.

    They may where nothing but the precision differs from the recipe. Another schedule, batch
    size, optimizer or part of the data is another experiment, and its difference to the
    published figure would mean nothing.
    """
    return all(key in COMPARABLE for key, _ in setting)


@functools.cache
def published_for(dataset: str) -> tuple[Published, ...]:
    """Return the published figures for ``dataset``, by source; none where there are none.

    For CIFAR-100 they are the two tables each of Xu et al., Knowledge Distillation Meets
    Self-Supervision, ECCV 2020, and of the CRD benchmark: ``similar`` (teacher and student of
    similar style) and ``cross`` (of different style). The rows ``teacher`` and ``student`` are
    the two networks trained alone, the others are the student distilled by that method.
    """
    return tuple(_load(source) for source in SOURCES.get(dataset, ()))


def _load(source: Source) -> Published:
    lines = _read_lines(source)
    tables: dict[str, dict[Pair, None]] = {}
    top1: dict[tuple[str, str, str], float] = {}
    alone: dict[str, float] = {}
    for line in lines:
        pair = (line["teacher"], line["student"])
        name = f"{source.name}, {line['table']}" if source.name else line["table"]
        tables.setdefault(name, {})[pair] = None
        top1[(*pair, line["row"])] = float(line["top1"])
        if line["row"] in (TEACHER_ROW, STUDENT_ROW):
            alone[line[line["row"]]] = float(line["top1"])
    rows = tuple(dict.fromkeys(line["row"] for line in lines))
    return Published(
        name=source.name,
        rows=rows,
        tables={name: tuple(pairs) for name, pairs in tables.items()},
        top1=top1,
        alone=alone,
        variants={
            row: source.variant_of.get(row, source.variant)
            for row in rows
            if row not in (TEACHER_ROW, STUDENT_ROW)
        },
        notes=source.notes,
    )


def _read_lines(source: Source) -> list[dict[str, str]]:
    """Return the figures of the source's file.

    Raises UserError, with the line's number, where one is damaged.
    """
    path = resources.files(__package__).joinpath(source.file)
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    number = 0
    try:
        rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline=""), strict=True)
        for number, row in enumerate(rows, start=1):
            if number == 1:
                _require(tuple(row) == COLUMNS, f"should be {','.join(COLUMNS)}")
                continue
            _require(len(row) == len(COLUMNS), f"has {len(row)} columns, not {len(COLUMNS)}")
            line = dict(zip(COLUMNS, row, strict=True))
            _require(all(row), f"has no {next((key for key in COLUMNS if not line[key]), '')}")
            _require(0 < float(line["top1"]) <= 100, f"top1 is {line['top1']}, not from 0 to 100")
            cell = (line["teacher"], line["student"], line["row"])
            _require(cell not in lines, f"{', '.join(cell)} has a figure already")
            lines[cell] = line
        _require(bool(lines), "has no figures")
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {number}: {error}; install the package again") from None
    return list(lines.values())


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
