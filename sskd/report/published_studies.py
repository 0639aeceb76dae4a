"""Published studies: one setting of a method or of the data at several values."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from sskd.report.later import Pair
from sskd.report.published import Published, all_published
from sskd.report.published_csv import read_csv
from sskd.report.results import FinishedRun, Settings, as_number

Value = float | str  # of a setting: a number or a name
STUDIED_DATASET = "cifar100"
STUDIES, TERMS = "published_studies.csv", "published_terms.csv"
COLUMNS = ("key", "teacher", "student", "row", "value", "top1", "by")
TERM_COLUMNS = ("teacher", "student", "row", "top1")
_XU = "Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020"
READ_OFF = "The values are read off the figure, ± 0.1."
# What a reader must know of each source.
SOURCE_NOTES = {
    "figure 4a": f"Figure 4a: {_XU}. {READ_OFF}",
    "figure 4b": f"Figure 4b: {_XU}. {READ_OFF}",
    "table 1": (
        f"Table 1: {_XU}. At 75 %, two of its three values differ by 0.3 and 0.4 from the paper's"
        " tables of all methods."
    ),
    "table 2": f"Table 2: {_XU}.",
    "HSAKD's authors": (
        "HSAKD's authors: Yang et al., IJCAI 2021. They call the row HSAKD. Its 73.26 with 75 % of"
        " the images is more than HSAKD's 72.58 with all of them, so it is shown as HSAKD*, whose"
        " teacher was trained together with its classifiers (73.73 with all images)."
    ),
    "FN8211/SSKD": (
        "FN8211/SSKD: a re-run of 2026 in that repository, one seed, best epoch; its vgg13 has"
        " 74.49."
    ),
}
TERMS_NOTE = (
    f"Published: figure 3b, {_XU}. {READ_OFF} Its KD equals the KD row of the paper's tables, which"
    " is the CRD benchmark's."
)


@dataclass(frozen=True)
class PublishedLine:
    """The published top-1 of one row, in percent, by the value of the setting ``key``.

    The numbers are text, with as many digits as were published.
    """

    key: str
    pair: Pair
    row: str
    by: str
    top1: dict[Value, str]

    @property
    def note(self) -> str:
        """What a reader must know of the source."""
        return SOURCE_NOTES[self.by]


def as_value(text: str) -> Value:
    """Return ``text`` as a number if it is one."""
    number = as_number(text)
    return text if number is None else number


def value_text(value: Value) -> str:
    """Return a value of a setting as text, a number with all its reliable digits."""
    return f"{value:.15g}" if isinstance(value, float) else value


@functools.cache
def published_studies() -> tuple[PublishedLine, ...]:
    """Return the published studies on CIFAR-100.

    Raises:
        UserError: the CSV file is malformed.
    """
    key = (*COLUMNS[:5], COLUMNS[6])
    found: dict[tuple[str, Pair, str, str], dict[Value, str]] = {}
    for line in read_csv(STUDIES, COLUMNS, key):
        place = (line["key"], (line["teacher"], line["student"]), line["row"], line["by"])
        found.setdefault(place, {})[as_value(line["value"])] = line["top1"]
    return tuple(PublishedLine(*place, top1=top1) for place, top1 in found.items())


@functools.cache
def published_terms() -> dict[tuple[Pair, str], str]:
    """Return the published top-1 of SSKD's terms by pair and row, as published.

    Raises:
        UserError: the CSV file is malformed.
    """
    lines = read_csv(TERMS, TERM_COLUMNS, TERM_COLUMNS[:3])
    return {((line["teacher"], line["student"]), line["row"]): line["top1"] for line in lines}


def studied_keys() -> frozenset[str]:
    """Return the settings that have published studies."""
    return frozenset(line.key for line in published_studies())


def source_of(dataset: str) -> Published | None:
    """Return the source whose teachers and recipe the published studies had."""
    return all_published(dataset)[0] if dataset == STUDIED_DATASET else None


def comparable_lines(
    dataset: str, key: str, setting: Settings, runs: Iterable[FinishedRun]
) -> Iterator[PublishedLine]:
    """Yield the published lines with which ``runs``, which differ in ``key``, may be compared.

    The rule is that of the tables: apart from ``key`` only the precision may differ from the
    recipe, and a teacher from a file must have the published accuracy.
    """
    source, runs = source_of(dataset), list(runs)
    if source is None or not source.is_comparable(setting):
        return
    for line in published_studies():
        if line.key == key and all(_is_same(source, line, run) for run in runs):
            yield line


def published_row(source: Published | None, run: FinishedRun, key: str) -> str | None:
    """Return the row that ``run`` has in the published tables, whatever its value of ``key``."""
    if source is None:
        return None
    return source.row_of(replace(run, difference=without(run.difference, key)))


def without(settings: Settings, *keys: str) -> Settings:
    """Return ``settings`` without those ``keys``."""
    return tuple(item for item in settings if item[0] not in keys)


def _is_same(source: Published, line: PublishedLine, run: FinishedRun) -> bool:
    return (
        (run.teacher, run.student) == line.pair
        and published_row(source, run, line.key) == line.row
        # KD had the same teacher as the others there, unlike in the tables.
        and source.has_teacher_of("SSKD", run)
    )
