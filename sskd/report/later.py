"""Values of methods published after a source of tables, which were measured with its teachers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from sskd.report.published_csv import read_csv
from sskd.report.results import Settings

Pair = tuple[str, str]  # teacher and student

TEACHER_EPOCH, TEACHER_METHOD = "teacher.epoch", "teacher.method"
FROM_LAST = ((TEACHER_EPOCH, "last"),)
COLUMNS = ("teacher", "student", "row", "top1", "by")


@dataclass(frozen=True)
class LaterMethods:
    """Later methods with the teachers of one source.

    Attributes:
        file: their values, a CSV file beside this module; empty if there are none.
        teachers: whose teachers they had.
        variant: the settings of the method and the teacher that their students changed.
        variant_of: the same by row, for rows with other changes.
        variant_of_pair: the same by teacher, student and row, for pairs with other changes.
        without_values: the rows of further methods whose runs with ``variant`` stand beside these.
        base_of: by row that is a variant of another, the name of that method's row.
        remarks: what a reader must know before comparing, with the rows that this concerns.
    """

    file: str = ""
    teachers: str = ""
    variant: Settings = ()
    variant_of: Mapping[str, Settings] = field(default_factory=dict)
    variant_of_pair: Mapping[tuple[str, str, str], Settings] = field(default_factory=dict)
    without_values: tuple[str, ...] = ()
    base_of: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[tuple[str, frozenset[str]], ...] = ()


@dataclass(frozen=True)
class LaterValues:
    """Published top-1 accuracies of ``methods``, in percent.

    Attributes:
        top1: by (teacher, student, row), in the order of publication.
        reporters: by row, who reported its values.
    """

    methods: LaterMethods
    top1: dict[tuple[str, str, str], float]
    reporters: dict[str, str]

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows in the order of publication, those without values last."""
        return (*self.reporters, *self.methods.without_values)

    def variants_of(self, name: str) -> Iterator[str]:
        """Yield the rows that are variants of the method whose row is ``name``."""
        return (row for row, base in self.methods.base_of.items() if base == name)

    def changes_of(self, row: str, pair: Pair) -> Settings | None:
        """Return the settings that the runs of ``row`` changed; None if it is no later row."""
        if row not in self.rows:
            return None
        own = self.methods.variant_of.get(row, self.methods.variant)
        return self.methods.variant_of_pair.get((*pair, row), own)

    def notes(self, rows: Collection[str]) -> Iterator[str]:
        """Yield what a reader must know of those of ``rows`` that are later rows."""
        reported: dict[str, list[str]] = {}
        for row, by in self.reporters.items():
            if row in rows:
                reported.setdefault(by, []).append(row)
        if not reported:
            return
        listed = "; ".join(f"{', '.join(found)} ({by})" for by, found in reported.items())
        teachers = self.methods.teachers
        yield f"Values published later, with {teachers} teachers, and who reported them: {listed}."
        yield from (text for text, about in self.methods.remarks if not about.isdisjoint(rows))


def load_later(methods: LaterMethods) -> LaterValues:
    """Return the values of ``methods``.

    Raises:
        UserError: the CSV file is malformed.
    """
    lines = read_csv(methods.file, COLUMNS, COLUMNS[:3]) if methods.file else []
    return LaterValues(
        methods,
        {(line["teacher"], line["student"], line["row"]): float(line["top1"]) for line in lines},
        {line["row"]: line["by"] for line in lines},
    )


_UNSTATED_EPOCH = (
    *("OFD", "ReviewKD", "DKD", "DIST", "SimKD"),
    *("CTKD", "MLLD", "TTM", "WTTM", "LumiNet"),
)


def _ls_mlld(weight: float) -> Settings:
    """Return what LS's authors change in MLLD."""
    weights = {f"method.weights.{term}": str(weight) for term in ("instance", "batch", "classes")}
    temperatures = {"method.temperatures": "[2.0, 3.0, 5.0, 2.0, 6.0]"}
    changes = {"method.logits": "standardised"} | weights | temperatures | dict(FROM_LAST)
    return tuple(sorted(changes.items()))


SSKD_LATER = LaterMethods(
    "published_hsakd.csv",
    "SSKD's",
    variant_of={"HSAKD*": (*FROM_LAST, (TEACHER_METHOD, "hsakd_teacher"))},
    base_of={"HSAKD*": "HSAKD"},
    remarks=(
        (
            "HSAKD reports the best epoch on the test set (--best), mean of three runs. The teacher"
            " of HSAKD* was trained together with its classifiers, which raises its own accuracy by"
            " about 4 points.",
            frozenset({"HSAKD", "HSAKD*"}),
        ),
    ),
)
CRD_BENCHMARK_LATER = LaterMethods(
    "published_later.csv",
    "the CRD benchmark's",
    variant=FROM_LAST,
    without_values=("SRRL", "CAT-KD", "CRLD", "SKD"),
    variant_of={"LS+MLLD": _ls_mlld(9.0)},
    variant_of_pair={
        (*pair, "LS+MLLD"): _ls_mlld(6.0)
        for pair in (("vgg13", "vgg8"), ("vgg13", "MobileNetV2"), ("resnet32x4", "ShuffleV2"))
    },
    base_of={"LS+MLLD": "MLLD"},
    remarks=(
        (
            "LS+KD and LS+MLLD report the best epoch on the test set (--best): for"
            " resnet32x4-resnet8x4, the logs of LS's authors have 76.66 and 78.28 there, and 76.28"
            " and 78.17 at the last epoch.",
            frozenset({"LS+KD", "LS+MLLD"}),
        ),
        (
            "The sources that were read for the other later methods do not say which epoch their"
            " values are of.",
            frozenset(_UNSTATED_EPOCH),
        ),
        (
            "MLLD's and LS+MLLD's values come from 480 epochs, those of resnet32x4 with a"
            " ShuffleNet from 960.",
            frozenset({"MLLD", "LS+MLLD"}),
        ),
        (
            "TTM's authors have published its settings only for vgg13-vgg8, and WTTM's only in"
            " combination with CRD; this suite uses these settings for all pairs.",
            frozenset({"TTM", "WTTM"}),
        ),
        (
            "SimKD's authors report 73.09 for their resnet8x4 alone, 0.59 more than the CRD"
            " benchmark.",
            frozenset({"SimKD"}),
        ),
    ),
)
