"""The table of a linear transfer, beside the paper's values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sskd.measuring.rows import (
    Measured,
    Row,
    by_row,
    is_published,
    mean_cell,
    row_columns,
    setting_notes,
    table_of,
    value_cell,
)
from sskd.report.groups import mean_std_n
from sskd.report.published import STUDENT_ROW, TEACHER_ROW
from sskd.report.published_csv import read_csv
from sskd.report.results import FinishedRun
from sskd.report.tables import Table

PAIR = ("wrn_40_2", "ShuffleV1")
DATASETS = ("stl10", "tiny_imagenet")
LEGEND = (
    "Top-1 in % on the test part of a linear classifier on the network's pooled features: mean ±"
    " sample standard deviation over seeds of the network (number of networks). The network is"
    " frozen, in eval mode, and its inputs have the normalisation of its own training."
)
BEST_LEGEND = (
    "Best: the classifier's best epoch on the test part, which HSAKD's code reports; the last epoch"
    " is the fairer measure."
)
PUBLISHED_LEGEND = (
    "Published: table 6 of Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020,"
    " which does not print its protocol, shown beside networks of its recipe alone. Compare the"
    " order of the methods and their differences."
)


@cache
def published() -> dict[tuple[str, str], float]:
    """Return the paper's top-1 of ``PAIR`` in percent, by row and dataset."""
    lines = read_csv(
        "published_transfer.csv",
        ("teacher", "student", "row", *DATASETS),
        ("teacher", "student", "row"),
        DATASETS,
    )
    return {(line["row"], name): float(line[name]) for line in lines for name in DATASETS}


def published_value(run: FinishedRun | None, dataset: str) -> float | None:
    """Return the paper's value for the experiment of ``run``; None if there is none."""
    if run is None or run.dataset != "cifar100":
        return None
    names = dict(zip((TEACHER_ROW, STUDENT_ROW), PAIR, strict=True))
    for (row, name), top1 in published().items():
        pair = (None, names[row]) if row in names else PAIR
        same = name == dataset and (run.teacher, run.student) == pair
        if same and is_published(run, STUDENT_ROW if row in names else row):
            return top1
    return None


@dataclass(frozen=True)
class Summary:
    """A row: top-1 in percent of its networks, and the published value if it may be compared.

    ``best`` is empty if the protocol has no epochs.
    """

    row: Row
    last: tuple[float, ...]
    best: tuple[float, ...]
    published: float | None


def summarise(measured: Sequence[Measured], dataset: str, *, comparable: bool) -> list[Summary]:
    """Return the rows in their order; only if ``comparable``, with published values.

    The values of a network are the fields of ``protocols.Reached``.
    """
    summaries = []
    for row, found in by_row(measured):
        has_epochs = all(each.values["best_epoch"] for each in found)
        summaries.append(
            Summary(
                row,
                last=tuple(each.values["last"] for each in found),
                best=tuple(each.values["best"] for each in found if has_epochs),
                published=published_value(found[0].run, dataset) if comparable else None,
            )
        )
    return summaries


def build_table(summaries: Sequence[Summary], dataset: str, protocol: str) -> Table:
    """Return the table of the transfer to ``dataset``; ``protocol`` describes the training."""
    rows = [each.row for each in summaries]
    columns = row_columns(rows) | {
        "last": [mean_cell(each.last, 2, count=True) for each in summaries],
        "best": [mean_cell(each.best, 2) for each in summaries],
        "published": [value_cell(each.published, 2) for each in summaries],
    }
    notes = [LEGEND, f"The classifier's protocol: {protocol}.", *setting_notes(rows, "networks")]
    for name, legend in (("best", BEST_LEGEND), ("published", PUBLISHED_LEGEND)):
        if any(cell.text for cell in columns[name]):
            notes.append(legend)
        else:
            del columns[name]
    return table_of(f"Linear transfer to {dataset}", columns, notes)


def csv_lines(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Return the numbers of each row, for a CSV file."""
    lines = []
    for each in summaries:
        mean, std, n = mean_std_n(each.last)
        best = mean_std_n(each.best)[0] if each.best else None
        numbers = {"mean": mean, "std": std, "n": n, "mean_best": best}
        lines.append(each.row._asdict() | numbers | {"published": each.published})
    return lines
