"""The published values that the tables compare with, and the names of their rows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sskd.report.later import (
    CRD_BENCHMARK_LATER,
    FROM_LAST,
    SSKD_LATER,
    TEACHER_EPOCH,
    LaterMethods,
    LaterValues,
    Pair,
    load_later,
)
from sskd.report.published_csv import read_csv
from sskd.report.results import DIGEST, SHORT_DIGEST, FinishedRun, Metric, Settings
from sskd.runs.weightings import WEIGHTING

# A row: its name, and the settings that set its runs apart from the plain row of that name.
RowKey = tuple[str, Settings]

TEACHER_ROW = "teacher"
STUDENT_ROW = "student"
TEACHER: RowKey = (TEACHER_ROW, ())
STUDENT: RowKey = (STUDENT_ROW, ())
KD: RowKey = ("KD", ())
# The order of rows if nothing is published. Other methods follow in alphabetical order.
ROWS = (
    *(TEACHER_ROW, STUDENT_ROW, "KD", "FitNet", "AT", "SP", "VID"),
    *("RKD", "PKT", "AB", "FT", "CRD", "SSKD"),
)
# Methods that their papers do not write in capitals alone.
DISPLAY_NAMES = {
    "fitnet": "FitNet",
    "reviewkd": "ReviewKD",
    "simkd": "SimKD",
    "cat_kd": "CAT-KD",
    "luminet": "LumiNet",
    "ls": "LS+KD",
    "hsakd_teacher": "HSAKD teacher",
}

COLUMNS = ("table", "teacher", "student", "row", "top1")
TOP5_COLUMN = "top5"
RERUN_COLUMNS = ("teacher", "student", "by", "top1", "std", "runs")
# Settings that may differ from the recipe in a comparison with published values.
COMPARABLE = frozenset({"precision"})
USUAL_EPOCH = "best"
# Settings of a teacher that this suite trains. They do not count if its accuracy alone does.
TEACHER_RECIPE = frozenset(
    f"teacher.{key}" for key in ("epochs", "batch_size", "milestones", "precision")
)
METRIC_NAMES: dict[Metric, str] = {"top1": "top-1", "top5": "top-5"}


def display_name(method: str) -> str:
    """Return the name of ``method`` as the papers write it."""
    return DISPLAY_NAMES.get(method, method.upper())


def settings_text(settings: Settings) -> str:
    """Return settings as ``key=value, key=value``, with a shortened digest."""
    return ", ".join(
        f"{key}={value[:SHORT_DIGEST] if key == DIGEST else value}" for key, value in settings
    )


def row_label(row: RowKey) -> str:
    """Return a row's name and, in parentheses, the settings that set it apart."""
    name, variant = row
    return f"{name} ({settings_text(variant)})" if variant else name


@dataclass(frozen=True)
class PublishedSource:
    """A publication.

    Attributes:
        file: its values, a CSV file beside this module.
        name: shown in the titles of its tables; empty for a dataset's main source.
        notes: what a reader must know before comparing. ``{teachers}`` becomes the list of its
            teachers, each with its accuracy.
        variant: the settings of the method and the teacher that its students changed.
        variant_of: the same by row, for rows with other changes.
        reruns: by row, the file of values that others measured.
        teachers_of: by row, the file of the teachers of a row that was copied from there, or whose
            own file lists none.
        epochs: the number of epochs of its networks.
        setting: what all its runs changed in the rest of the recipe.
        later: the values of later methods with its teachers.
        has_top5: whether its file has top-5 accuracies too.
        base_of: by row that is a variant of another, the name of that method's row.
        teachers_are_files: whether its teachers had another recipe than the suite's teachers, so
            that a teacher trained here counts as the published one only if it is as accurate.
        teacher_tolerance: by how many points of top-1 a teacher may differ from the published one.
        condition: when a value is shown, after "only if".
    """

    file: str
    name: str
    notes: tuple[str, ...]
    variant: Settings = ()
    variant_of: Mapping[str, Settings] = field(default_factory=dict)
    reruns: Mapping[str, str] = field(default_factory=dict)
    teachers_of: Mapping[str, str] = field(default_factory=dict)
    epochs: int = 240
    setting: Settings = ()
    later: LaterMethods = field(default_factory=LaterMethods)
    has_top5: bool = False
    base_of: Mapping[str, str] = field(default_factory=dict)
    teachers_are_files: bool = False
    # The closest two published teachers of one network on CIFAR-100 differ by 0.21.
    teacher_tolerance: float = 0.1
    condition: str = (
        "nothing but the precision differs from the published setting and configuration and, if the"
        " teacher is a file, its accuracy equals the published teacher's"
    )


@dataclass(frozen=True)
class Rerun:
    """The method of a published ``row`` as others measured it.

    ``top1`` has, by (teacher, student), the mean in percent and the sample standard deviation,
    which is None for a single run.
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
        """Return the value of ``pair``, or an empty text if there is none."""
        if pair not in self.top1:
            return ""
        mean, std = self.top1[pair]
        return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


@dataclass(frozen=True)
class Published:
    """Published accuracies, in percent, of one source on one dataset.

    Attributes:
        name: the source's name.
        rows: in the printed order.
        tables: a table's (teacher, student) pairs by its name, in the printed order.
        top1: by (teacher, student, row).
        top5: the same for top-5; empty if none was published.
        alone: the top-1 of the networks trained from scratch, by name; without the teachers if they
            had another recipe (``teachers_are_files``).
        variants: by row, what the runs changed in the recipe.
        teachers: by row, the top-1 of the teachers by name.
        reruns: what others measured.
        epochs: the number of epochs of the networks.
        notes: what a reader must know before comparing.
        setting: what all runs changed in the recipe, without their method and teacher.
        later: the values of later methods, which are not in ``rows``, ``tables`` and ``top1``.
        base_of, teachers_are_files, teacher_tolerance, condition: those of the ``PublishedSource``.
    """

    name: str
    rows: tuple[str, ...]
    tables: dict[str, tuple[Pair, ...]]
    top1: dict[tuple[str, str, str], float]
    top5: dict[tuple[str, str, str], float]
    alone: dict[str, float]
    variants: dict[str, Settings]
    teachers: dict[str, dict[str, float]]
    reruns: tuple[Rerun, ...]
    epochs: int
    notes: tuple[str, ...]
    setting: Settings
    later: LaterValues
    base_of: Mapping[str, str]
    teachers_are_files: bool
    teacher_tolerance: float
    condition: str

    @property
    def all_rows(self) -> tuple[str, ...]:
        """The rows: the networks alone first, later methods last."""
        return tuple(dict.fromkeys((TEACHER_ROW, STUDENT_ROW, *self.rows, *self.later.rows)))

    def value(self, pair: Pair, row: str, metric: Metric = "top1") -> float | None:
        """Return the value of ``row``, which may be a later method's; None if there is none."""
        if metric == "top5":
            return self.top5.get((*pair, row))
        return self.top1.get((*pair, row), self.later.top1.get((*pair, row)))

    def is_comparable(self, setting: Settings) -> bool:
        """Return whether runs of ``setting`` may be compared with these values.

        Only the precision may differ from the published setting. Another schedule, batch size,
        optimizer or part of the data is another experiment.
        """
        return tuple(item for item in setting if item[0] not in COMPARABLE) == self.setting

    def row_of(self, run: FinishedRun) -> str | None:
        """Return the row whose published runs changed the same settings as ``run``, if any did."""
        name, requested = display_name(run.method), requested_settings(run)
        if self.teachers_are_files:
            requested = tuple(item for item in requested if item[0] not in TEACHER_RECIPE)
        pair = (run.teacher or "", run.student)
        own = (row for row, base in self.base_of.items() if base == name)
        for row in (name, *own, *self.later.variants_of(name)):
            if self.variants.get(row, self.later.changes_of(row, pair)) == requested:
                return row
        return None

    def has_teacher_of(self, row: str, run: FinishedRun) -> bool:
        """Return whether the run's teacher is, as far as known, the published one of ``row``.

        A teacher trained by this suite has the published recipe, unless ``teachers_are_files``. Of
        other teachers only the accuracy is known, which must equal the published teacher's.
        """
        if DIGEST not in dict(run.variant) and not self.teachers_are_files:
            return True
        if run.teacher is None or run.teacher_top1 is None:
            return False
        return self.is_teacher_of(row, run.teacher, run.teacher_top1)

    def is_teacher_of(self, row: str, teacher: str, top1: float) -> bool:
        """Return whether a ``teacher`` with this ``top1`` is as accurate as that of ``row``."""
        expected = self.teachers.get(row, {}).get(teacher)
        return expected is not None and abs(top1 - expected) <= self.teacher_tolerance

    def is_same_experiment(self, row: str, run: FinishedRun) -> bool:
        """Return whether the published value of ``row`` and ``run`` may be compared."""
        return self.row_of(run) == row and self.has_teacher_of(row, run)


def requested_settings(run: FinishedRun) -> Settings:
    """Return the run's changes to its method and teacher, with the teacher's requested epoch.

    If the teacher is a file, its digest alone decides the result, and the requested epoch is
    recorded beside the difference. Older results have the epoch in the difference.
    """
    variant = dict(run.variant)
    if variant.pop(DIGEST, None) is not None and run.teacher_epoch is not None:
        variant.pop(TEACHER_EPOCH, None)
        if run.teacher_epoch != USUAL_EPOCH:
            variant[TEACHER_EPOCH] = run.teacher_epoch
    return tuple(sorted(variant.items()))


CRD_TEACHERS = "published_crd_benchmark.csv"
SSKD = PublishedSource(
    "published.csv",
    "",
    (
        "Published: Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020, with its"
        " authors' teachers ({teachers}). Its KD row equals the CRD benchmark's (Tian et al., ICLR"
        " 2020) digit for digit, which had other teachers: figure 4 of the paper shows about 73.6"
        " for KD on vgg13-vgg8, but its table 72.98.",
        "SSKD reports the best epoch on the test set, so its values compare with the best epoch"
        " (--best); the last epoch is the fairer measure of a method.",
        "Published re-runs of SSKD, with the number of runs: HSAKD's authors (Yang et al., IJCAI"
        " 2021), mean ± standard deviation; the repository FN8211/SSKD, best epoch, with that"
        " repository's vgg13 as the teacher (74.49).",
    ),
    reruns={"SSKD": "published_sskd_reruns.csv"},
    teachers_of={"KD": CRD_TEACHERS},
    later=SSKD_LATER,
)
CRD_BENCHMARK = PublishedSource(
    CRD_TEACHERS,
    "the CRD benchmark",
    (
        "The CRD benchmark: Tian et al., Contrastive Representation Distillation, ICLR 2020, with"
        " its authors' teachers ({teachers}). It distils from the teacher's last epoch, all methods"
        " except KD without KD's term (weighting=crd_benchmark), and reports the last epoch, so its"
        " values compare with the last epoch.",
    ),
    variant=(*FROM_LAST, (WEIGHTING, "crd_benchmark")),
    variant_of={"KD": FROM_LAST},
    later=CRD_BENCHMARK_LATER,
)
SKD = PublishedSource(
    "published_skd.csv",
    "SKD's recipe",
    (
        "SKD's recipe: Jeong et al., Streamlined Knowledge Distillation, CVPR 2026; shown beside"
        " runs with the CRD benchmark's teachers, although its authors' code also trains the"
        " teachers on strongly augmented images. An epoch has two copies of each image, one of"
        " them strongly augmented, and the learning rate is 0.1 for all networks. This recipe"
        " raises KD about as much as a better method does, so its values must not be compared with"
        " those of other recipes.",
    ),
    variant=FROM_LAST,
    teachers_of=dict.fromkeys(("KD", "DKD", "SKD"), CRD_TEACHERS),
    setting=(
        ("augmentation", "weak_and_strong"),
        ("optimizer.lr", "0.1"),
        ("optimizer.weight_decay", "4e-05"),
    ),
)
IMAGENET = PublishedSource(
    "published_imagenet.csv",
    "",
    (
        "Published: Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020, table 5,"
        " which prints errors; shown is 100 minus the error. The teacher ({teachers}) and the"
        " student alone have the accuracies of torchvision's checkpoints, whose recipe has a weight"
        " decay of 1e-4.",
        "The paper states a weight of CE of 1.0, but only SSKD's row is known to be of its own"
        " runs. KD, CRD and CRD+KD seem to be the values of CRD's authors (Tian et al., ICLR 2020),"
        " whose KD had the weights CE 0.5 and KD 0.9 (RepDistiller, issue 10). AT's values are"
        " those of its authors (the repository szagoruyko/attention-transfer), who did not use KD"
        " and had a weight decay of 1e-4 and another ResNet34.",
        "The published re-run of SSKD is of torchdistill (Matsubara, RRPR 2020; one run), in which"
        " KD has 71.37, AT 70.90 and CRD 70.93. It trained the head for 30 epochs; the paper does"
        " not describe this phase.",
    ),
    variant=(("method.weights.ce", "1.0"),),
    variant_of=dict.fromkeys(("AT", "CRD"), ((WEIGHTING, "crd_benchmark"),)),
    reruns={"SSKD": "published_imagenet_reruns.csv"},
    epochs=100,
    setting=(
        ("batch_size", "256"),
        ("schedule.epochs", "100"),
        ("schedule.milestones", "[0.3, 0.6, 0.9]"),
    ),
    has_top5=True,
    base_of={"CRD+KD": "CRD"},
    teachers_are_files=True,
    # The packed test images are scaled and encoded again, so torchvision's checkpoint need not
    # reach exactly its 73.30 with them.
    teacher_tolerance=0.3,
    condition=(
        "the run has, apart from the precision, this suite's recipe and weights for that row, and"
        " its teacher, trained here or not, is as accurate as the published one"
    ),
)
# Runs that match no source's settings are shown with the first source of their dataset.
SOURCES = {"cifar100": (SSKD, CRD_BENCHMARK, SKD), "imagenet": (IMAGENET,)}


def published_for(dataset: str, setting: Settings = ()) -> tuple[Published, ...]:
    """Return the published values for ``dataset`` by source; an empty tuple if there are none.

    For CIFAR-100 they are the two tables each of Xu et al., Knowledge Distillation Meets
    Self-Supervision, ECCV 2020, and of the CRD benchmark: ``similar`` (teacher and student of
    one family) and ``cross`` (of two). The rows ``teacher`` and ``student`` are networks trained
    from scratch, the others are the student distilled by that method. A source with a recipe of
    its own follows if runs of ``setting`` may be compared with it. For ImageNet there is one table,
    of Xu et al.

    Raises:
        UserError: a CSV file of the package is malformed.
    """
    first, others = all_published(dataset)[:1], all_published(dataset)[1:]
    own = (each for each in others if not each.setting or each.is_comparable(setting))
    return (*first, *own)


def metrics_of(dataset: str) -> tuple[Metric, ...]:
    """Return the accuracies that the tables of ``dataset`` show: top-5 too if it was published."""
    has_top5 = any(source.top5 for source in all_published(dataset))
    return ("top1", "top5") if has_top5 else ("top1",)


@functools.cache
def all_published(dataset: str) -> tuple[Published, ...]:
    """Return the published values for ``dataset`` of all sources, whatever their recipe."""
    return tuple(_load(source) for source in SOURCES.get(dataset, ()))


def column_lines(pair: Pair, metric: Metric, metrics: Sequence[Metric]) -> tuple[str, ...]:
    """Return the lines above a column: the pair and, if there are several metrics, its metric."""
    return (*pair, METRIC_NAMES[metric]) if len(metrics) > 1 else pair


def _load(source: PublishedSource) -> Published:
    lines = _read_tables(source.file, has_top5=source.has_top5)
    tables: dict[str, dict[Pair, None]] = {}
    for line in lines:
        name = f"{source.name}, {line['table']}" if source.name else line["table"]
        tables.setdefault(name, {})[line["teacher"], line["student"]] = None
    rows = tuple(dict.fromkeys(line["row"] for line in lines))
    teachers = _from_scratch(lines, TEACHER_ROW)
    later = load_later(source.later)
    listed = ", ".join(f"{name} {top1:.2f}" for name, top1 in teachers.items())
    return Published(
        name=source.name,
        rows=rows,
        tables={name: tuple(pairs) for name, pairs in tables.items()},
        top1=_by_cell(lines, "top1"),
        top5=_by_cell(lines, TOP5_COLUMN) if source.has_top5 else {},
        alone=({} if source.teachers_are_files else teachers) | _from_scratch(lines, STUDENT_ROW),
        variants={
            row: source.variant_of.get(row, source.variant)
            for row in rows
            if row not in (TEACHER_ROW, STUDENT_ROW)
        },
        teachers=dict.fromkeys((*rows, *later.rows), teachers)
        | {
            row: _from_scratch(_read_tables(file), TEACHER_ROW)
            for row, file in source.teachers_of.items()
        },
        reruns=_load_reruns(source),
        epochs=source.epochs,
        notes=tuple(note.format(teachers=listed) for note in source.notes),
        setting=source.setting,
        later=later,
        base_of=source.base_of,
        teachers_are_files=source.teachers_are_files,
        teacher_tolerance=source.teacher_tolerance,
        condition=source.condition,
    )


def _by_cell(lines: Iterable[Mapping[str, str]], column: str) -> dict[tuple[str, str, str], float]:
    """Return the numbers of ``column`` by (teacher, student, row)."""
    return {(line["teacher"], line["student"], line["row"]): float(line[column]) for line in lines}


def _from_scratch(lines: Iterable[Mapping[str, str]], row: str) -> dict[str, float]:
    """Return the accuracy by network in ``row``: ``teacher`` or ``student``."""
    return {line[row]: float(line["top1"]) for line in lines if line["row"] == row}


def _load_reruns(source: PublishedSource) -> tuple[Rerun, ...]:
    reruns: dict[tuple[str, str, int], dict[Pair, tuple[float, float | None]]] = {}
    for row, file in source.reruns.items():
        key, numbers = RERUN_COLUMNS[:3], RERUN_COLUMNS[3:]
        for line in read_csv(file, RERUN_COLUMNS, key, numbers, optional=("std",)):
            value = (float(line["top1"]), float(line["std"]) if line["std"] else None)
            top1 = reruns.setdefault((row, line["by"], int(float(line["runs"]))), {})
            top1[line["teacher"], line["student"]] = value
    return tuple(Rerun(*key, top1) for key, top1 in reruns.items())


def _read_tables(file: str, *, has_top5: bool = False) -> list[dict[str, str]]:
    numbers = ("top1", TOP5_COLUMN) if has_top5 else ("top1",)
    return read_csv(file, (*COLUMNS[:4], *numbers), ("teacher", "student", "row"), numbers)
