"""The table of similarities to the teacher, beside the paper's values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

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
from sskd.report.published_csv import read_csv
from sskd.report.results import FinishedRun
from sskd.report.tables import Cell, Table

MEASURES = {"agreement": 2, "kl": 3, "cka": 4, "cka_minibatch": 4, "weights": 4}  # digits
HEADERS = {
    "agreement": "agree %",
    "kl": "KL",
    "cka": "CKA",
    "cka_minibatch": "CKA, minibatches",
    "weights": "weights",
}
PUBLISHED = ("kl", "cka")
LEGEND = (
    "Student and teacher on the same test images, means ± sample standard deviation over seeds."
    " n: the number of students. agree %: the share of images on which both predict the same"
    " class. KL: the mean divergence KL(teacher || student) of their predictions, in nats, at"
    " temperature 1. CKA: centred kernel alignment (linear kernel) of their pooled features, of"
    " all images at once, and its estimate from minibatches of 256 by the unbiased estimator of"
    " HSIC. weights: the mean absolute difference between the correlations of the classes' weight"
    " vectors in both classifiers, over all pairs of different classes. Both networks get the"
    " normalisation of the student's training."
)
PUBLISHED_LEGEND = (
    "Published: table 7 of Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020,"
    " beside students of its recipe alone. The paper states neither the kernel and the layer of CKA"
    " nor the reduction of KL, so only the order of the methods and the ratios of values can be"
    " compared."
)


@dataclass(frozen=True)
class Similarity(Measured):
    """The similarity of one student to its teacher.

    Attributes:
        values: by the names in ``MEASURES``; without what cannot be measured.
        difference: of the correlations of both classifiers' weights, [C, C], if both have some.
    """

    difference: Tensor | None = None


@dataclass(frozen=True)
class Summary:
    """A row: the values of its students by measure, and the published ones if they compare.

    ``difference`` is the mean over the students.
    """

    row: Row
    values: Mapping[str, tuple[float, ...]]
    published: Mapping[str, float]
    difference: Tensor | None

    @property
    def students(self) -> int:
        """The number of students."""
        return max(map(len, self.values.values()))


@cache
def published() -> dict[tuple[str, ...], dict[str, float]]:
    """Return the paper's values by (teacher, student, row, dataset)."""
    key = ("teacher", "student", "row", "dataset")
    lines = read_csv("published_similarity.csv", (*key, *PUBLISHED), key, PUBLISHED)
    return {
        tuple(line[name] for name in key): {name: float(line[name]) for name in PUBLISHED}
        for line in lines
    }


def published_values(run: FinishedRun | None, dataset: str) -> dict[str, float]:
    """Return the paper's values for the experiment of ``run``; none if there are none."""
    for (*pair, row, name), values in published().items():
        if run and [run.teacher, run.student, dataset] == [*pair, name] and is_published(run, row):
            return values
    return {}


def summarise(measured: Sequence[Similarity], dataset: str, *, comparable: bool) -> list[Summary]:
    """Return the rows in their order; only if ``comparable``, with published values."""
    summaries = []
    for row, found in by_row(measured):
        values = {
            name: tuple(each.values[name] for each in found if name in each.values)
            for name in MEASURES
        }
        differences = [each.difference for each in found if each.difference is not None]
        mean = sum(differences[1:], differences[0]) / len(differences) if differences else None
        paper = published_values(found[0].run, dataset) if comparable else {}
        summaries.append(Summary(row, values, paper, mean))
    return summaries


def build_table(summaries: Sequence[Summary], dataset: str) -> Table:
    """Return the table of the similarities on the test part of ``dataset``."""
    rows = [each.row for each in summaries]
    columns = row_columns(rows) | {
        "n": [Cell(str(each.students), each.students) for each in summaries],
    }
    notes = [LEGEND, *setting_notes(rows, "students")]
    for name, digits in MEASURES.items():
        columns[HEADERS[name]] = [mean_cell(each.values[name], digits) for each in summaries]
    for name in PUBLISHED * any(each.published for each in summaries):
        title = f"published {HEADERS[name]}"
        cells = (value_cell(each.published.get(name), MEASURES[name]) for each in summaries)
        columns[title] = list(cells)
    if any(each.published for each in summaries):
        notes.append(PUBLISHED_LEGEND)
    return table_of(f"Similarity to the teacher on the test part of {dataset}", columns, notes)


def csv_lines(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Return the numbers of each row, for a CSV file."""
    lines = []
    for each in summaries:
        line: dict[str, Any] = {**each.row._asdict(), "n": each.students}
        for name, values in each.values.items():
            line[name], line[f"{name}_std"] = mean_std_n(values)[:2] if values else (None, None)
        lines.append(line | {f"published_{name}": each.published.get(name) for name in PUBLISHED})
    return lines
