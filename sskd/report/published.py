"""The published figures that the tables stand beside."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sskd.report.facts import read_figures
from sskd.report.result import DIGEST, Result, Settings
from sskd.runs.weightings import WEIGHTING

Pair = tuple[str, str]
TEACHER_ROW = "teacher"
STUDENT_ROW = "student"
COLUMNS = ("table", "teacher", "student", "row", "top1")
RERUN_COLUMNS = ("teacher", "student", "by", "top1", "std", "runs")
# What a setting may hold beside the recipe without being another experiment.
COMPARABLE = frozenset({"precision"})
TEACHER_EPOCH, USUAL_EPOCH = "teacher.epoch", "best"
# Points. The closest two published teachers of one network differ by 0.21.
SAME_TEACHER = 0.1


@dataclass(frozen=True)
class Source:
    """A publication: the file of its figures beside this module, and what they were made under.

    ``variant`` is what its students changed in their method and teacher, where ``variant_of``
    says nothing else of a row; ``name`` sets its tables apart from those of other sources.
    ``reruns`` has the files of what others measured of its rows. A note may name its
    ``{teachers}``, each with its accuracy. ``teachers_of`` has the file of the teachers of a row
    that was copied from there. ``epochs`` is the number of epochs that its networks trained.
    """

    file: str
    name: str
    notes: tuple[str, ...]
    variant: Settings = ()
    variant_of: Mapping[str, Settings] = field(default_factory=dict)
    reruns: Mapping[str, str] = field(default_factory=dict)
    teachers_of: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 240


@dataclass(frozen=True)
class Rerun:
    """The method of a published ``row`` as others measured it.

    ``top1`` has the mean in percent and, if ``runs`` are several, the deviation, by (teacher,
    student).
    """

    row: str
    by: str
    runs: int
    top1: dict[Pair, tuple[float, float | None]]

    @property
    def label(self) -> str:
        """The row's name in a table."""
        return f"{self.row}, {self.by} ({self.runs})"

    def text(self, pair: Pair) -> str:
        """Return the figure of ``pair``, or an empty text if there is none."""
        if pair not in self.top1:
            return ""
        mean, std = self.top1[pair]
        return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


@dataclass(frozen=True)
class Published:
    """Published top-1 accuracies, in percent, of one source on one dataset.

    ``tables`` maps a table's name to its (teacher, student) pairs in the printed order, and
    ``rows`` are in that order too; ``top1`` is keyed by (teacher, student, row); ``alone``
    holds the networks trained from scratch by name; ``variants`` is what the runs of a
    method's row have changed in the recipe; ``teachers`` has the accuracies of each row's
    teachers; ``reruns`` are what others measured; ``epochs`` is the number of epochs that the
    networks trained; ``notes`` say what a reader must know before comparing.
    """

    name: str
    rows: tuple[str, ...]
    tables: dict[str, tuple[Pair, ...]]
    top1: dict[tuple[str, str, str], float]
    alone: dict[str, float]
    variants: dict[str, Settings]
    teachers: dict[str, dict[str, float]]
    reruns: tuple[Rerun, ...]
    epochs: int
    notes: tuple[str, ...]

    def holds(self, row: str, run: Result) -> bool:
        """Return whether ``run``, of the method in ``row``, was made as the figures were."""
        return self.variants.get(row) == _asked_for(run)

    def compares(self, row: str, run: Result) -> bool:
        """Return whether the figure of ``row`` and ``run`` are of the same experiment.

        A teacher that this suite trained has the recipe of the published one. Of a teacher from a
        file only the accuracy is known, which must be that of the row's own teacher.
        """
        return self.holds(row, run) and self.has_its_teacher(row, run)

    def has_its_teacher(self, row: str, run: Result) -> bool:
        """Return whether the teacher of ``run``, if it is a file, is as accurate as the row's."""
        if DIGEST not in dict(run.variant):
            return True
        expected = self.teachers[row].get(run.teacher or "")
        if expected is None or run.teacher_top1 is None:
            return False
        return abs(run.teacher_top1 - expected) <= SAME_TEACHER


def _asked_for(run: Result) -> Settings:
    """Return what ``run`` changed in its method and teacher, with the epoch of the teacher.

    The digest of a teacher from a file decides what a run computes, so that the epoch that was
    asked for is recorded beside the difference. Older results have it in their difference.
    """
    variant = dict(run.variant)
    if variant.pop(DIGEST, None) is not None and run.teacher_epoch is not None:
        variant.pop(TEACHER_EPOCH, None)
        if run.teacher_epoch != USUAL_EPOCH:
            variant[TEACHER_EPOCH] = run.teacher_epoch
    return tuple(sorted(variant.items()))


SSKD = Source(
    "published.csv",
    "",
    (
        "Published: Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020, from"
        " teachers of its own ({teachers}). Its KD row is the CRD benchmark's (Tian et al., ICLR"
        " 2020) digit for digit, from other teachers: the paper's own figure 4 has about 73.6 for"
        " KD on vgg13-vgg8, where its table has 72.98.",
        "SSKD keeps the best epoch on the test set, so its figures compare with the best epoch"
        " (--best); the last epoch is the fairer measure of a method.",
        "Published re-runs of SSKD, with the number of runs: HSAKD's authors (Yang et al., IJCAI"
        " 2021), mean ± standard deviation; the repository FN8211/SSKD, best epoch, from its own"
        " vgg13 (74.49).",
    ),
    reruns={"SSKD": "published_sskd_reruns.csv"},
    teachers_of={"KD": "published_crd_benchmark.csv"},
)
FROM_LAST = ((TEACHER_EPOCH, "last"),)
CRD_BENCHMARK = Source(
    "published_crd_benchmark.csv",
    "the CRD benchmark",
    (
        "The CRD benchmark: Tian et al., Contrastive Representation Distillation, ICLR 2020, from"
        " teachers of its own ({teachers}). It distils from the teacher's last epoch, every method"
        " but KD without KD's term (weighting=crd_benchmark), and reports the last epoch, so its"
        " figures compare with the last epoch.",
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
    lines = _read(source.file)
    tables: dict[str, dict[Pair, None]] = {}
    top1: dict[tuple[str, str, str], float] = {}
    for line in lines:
        pair = (line["teacher"], line["student"])
        name = f"{source.name}, {line['table']}" if source.name else line["table"]
        tables.setdefault(name, {})[pair] = None
        top1[(*pair, line["row"])] = float(line["top1"])
    rows = tuple(dict.fromkeys(line["row"] for line in lines))
    teachers = _alone(lines, TEACHER_ROW)
    named = ", ".join(f"{name} {top1:.2f}" for name, top1 in teachers.items())
    return Published(
        name=source.name,
        rows=rows,
        tables={name: tuple(pairs) for name, pairs in tables.items()},
        top1=top1,
        alone=teachers | _alone(lines, STUDENT_ROW),
        variants={
            row: source.variant_of.get(row, source.variant)
            for row in rows
            if row not in (TEACHER_ROW, STUDENT_ROW)
        },
        teachers=dict.fromkeys(rows, teachers)
        | {row: _alone(_read(file), TEACHER_ROW) for row, file in source.teachers_of.items()},
        reruns=_load_reruns(source),
        epochs=source.epochs,
        notes=tuple(note.format(teachers=named) for note in source.notes),
    )


def _read(file: str) -> list[dict[str, str]]:
    return read_figures(file, COLUMNS, ("teacher", "student", "row"))


def _alone(lines: Iterable[Mapping[str, str]], row: str) -> dict[str, float]:
    """Return the accuracies by network in ``row``, that of the teacher or of the student alone."""
    return {line[row]: float(line["top1"]) for line in lines if line["row"] == row}


def _load_reruns(source: Source) -> tuple[Rerun, ...]:
    reruns: dict[tuple[str, str, int], dict[Pair, tuple[float, float | None]]] = {}
    for row, file in source.reruns.items():
        cell, numbers = RERUN_COLUMNS[:3], RERUN_COLUMNS[3:]
        for line in read_figures(file, RERUN_COLUMNS, cell, numbers, optional=("std",)):
            figure = (float(line["top1"]), float(line["std"]) if line["std"] else None)
            of = reruns.setdefault((row, line["by"], int(float(line["runs"]))), {})
            of[line["teacher"], line["student"]] = figure
    return tuple(Rerun(*key, top1) for key, top1 in reruns.items())
