"""The published values of the papers, and the re-runs of SSKD by others."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest
from report_runs import texts
from test_report import PUBLISHED_ORDER, crd, read, record, scratch, top1

from sskd.report.published import published_for
from sskd.report.tables import build_tables


def test_published_values_of_the_papers() -> None:
    sskd, crd_benchmark = published_for("cifar100")
    assert [len(pairs) for pairs in sskd.tables.values()] == [5, 6]
    assert len(sskd.top1) == 11 * len(PUBLISHED_ORDER)
    assert sskd.top1["wrn_40_2", "wrn_16_2", "SSKD"] == 76.04
    assert sskd.top1["resnet56", "resnet20", "KD"] == 70.66
    assert sskd.top1["wrn_40_2", "wrn_16_2", "AB"] == 68.89
    assert sskd.top1["resnet32x4", "ShuffleV2", "SSKD"] == 78.61
    assert sskd.top1["ResNet50", "MobileNetV2", "teacher"] == 79.10
    assert sskd.alone["vgg8"] == 70.68
    assert [len(pairs) for pairs in crd_benchmark.tables.values()] == [7, 6]
    # 15 rows, of which FSP lacks wrn_40_2-wrn_40_1 and the second table.
    assert len(crd_benchmark.top1) == 13 * 15 - 7
    assert crd_benchmark.top1["wrn_40_2", "ShuffleV1", "CRD"] == 76.05
    assert crd_benchmark.top1["resnet110", "resnet32", "KD"] == 73.08
    assert published_for("digits") == ()


# The teachers of SSKD and of the CRD benchmark, with the accuracies of their releases.
TEACHERS = {
    "vgg13": (75.38, 74.64),
    "resnet56": (73.44, 72.34),
    "resnet32x4": (79.63, 79.42),
    "wrn_40_2": (76.46, 75.61),
    "ResNet50": (79.10, 79.34),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_notes_list_the_teachers_of_both_sources(tmp_path: Path, name: str) -> None:
    for source, published in enumerate(published_for("cifar100")):
        assert published.alone[name] == TEACHERS[name][source]
        assert f"{name} {TEACHERS[name][source]:.2f}" in published.notes[0]
        assert "authors' teachers" in published.notes[0]
    tables = build_tables(read(tmp_path, record(method="at"), crd(method="at")), "last")
    notes = " ".join(note for table in tables for note in table.notes)
    assert all(f"{name} {top1:.2f}" in notes for top1 in TEACHERS[name])
    assert "73.6 for KD on vgg13-vgg8, but its table 72.98" in notes


def test_reruns_of_sskd_are_beneath_its_row(tmp_path: Path) -> None:
    pairs = [("wrn_40_2", "wrn_16_2"), ("resnet56", "resnet20"), ("vgg13", "vgg8")]
    runs = [record(method="sskd", teacher=teacher, student=student) for teacher, student in pairs]
    runs.append(record(method="kd", teacher="resnet32x4", student="resnet8x4"))
    (table, _) = build_tables(read(tmp_path, *runs), "best")
    rows = {row[0]: row[1:] for row in texts(table)}
    assert table.header[1:] == (
        *("wrn_40_2\nwrn_16_2", "resnet56\nresnet20", "resnet32x4\nresnet8x4", "vgg13\nvgg8"),
    )
    # Mean and deviation of three runs by Yang et al.; empty for a pair without a run of SSKD.
    hsakd = rows["SSKD, HSAKD's authors (3)\n  published re-run"]
    assert hsakd == ("\n76.16 ± 0.17", "\n70.80 ± 0.02", "", "")
    other = rows["SSKD, FN8211/SSKD (1)\n  published re-run"]
    assert other == ("", "\n70.87", "", "\n74.53")
    labels = list(rows)
    assert labels.index("SSKD\n  published") == len(labels) - 3
    # Re-runs are not results of this suite.
    assert not any("HSAKD" in entry.row for entry in table.entries)
    assert "HSAKD's authors (Yang et al., IJCAI 2021)" in " ".join(
        note for each in build_tables(read(tmp_path / "more", *runs), "last") for note in each.notes
    )


FILE = {"teacher.digest": "0123456789abcdef"}
BENCHMARK = {"weighting": "crd_benchmark", "teacher.epoch": "last"}


# resnet56 has 73.44 in SSKD and 72.34 in the CRD benchmark, from which KD's value is copied.
@pytest.mark.parametrize(
    ("method", "changes", "teacher_top1", "value"),
    [
        ("fitnet", {}, 73.44, 71.60),
        ("fitnet", {}, 73.40, 71.60),
        ("fitnet", {}, 72.34, None),
        ("fitnet", {}, 70.64, None),
        ("fitnet", {}, 75.0, None),
        ("fitnet", {}, None, None),
        ("sskd", {}, 73.44, 71.49),
        ("sskd", {}, 72.34, None),
        ("kd", {}, 72.34, 70.66),
        ("kd", {}, 73.44, None),
        ("fitnet", BENCHMARK, 72.34, 69.21),
        ("fitnet", BENCHMARK, 73.44, None),
        ("kd", {"teacher.epoch": "last"}, 72.34, 70.66),
        ("kd", {"teacher.epoch": "last"}, 73.44, None),
    ],
)
def test_published_values_need_the_published_teacher(
    tmp_path: Path,
    method: str,
    changes: dict[str, str],
    teacher_top1: float | None,
    value: float | None,
) -> None:
    run = record(method=method, difference=FILE | changes, teacher_top1=teacher_top1)
    table, *_ = build_tables(read(tmp_path, run), "last")
    entries = {entry.row.partition(" ")[0]: entry for entry in table.entries}
    (student,) = (entry for name, entry in entries.items() if name != "teacher")
    assert student.published == value
    assert "its accuracy equals the published teacher's" in " ".join(table.notes)
    assert any("re-run" in row[0] for row in texts(table)) == (value == 71.49)
    if teacher_top1 is not None:
        expected = 72.34 if "teacher.epoch" in changes else 73.44
        assert entries["teacher"].published == (
            expected if abs(teacher_top1 - expected) <= 0.1 else None
        )


def test_a_teacher_trained_here_is_always_comparable(tmp_path: Path) -> None:
    alone = scratch("resnet56", top1=top1(71.0, 72.0))
    table, *_ = build_tables(read(tmp_path, alone, record(method="at", teacher_top1=72.0)), "best")
    published = {entry.row: entry.published for entry in table.entries}
    assert published == {"teacher": 73.44, "AT": 71.78}


@pytest.mark.parametrize(
    "changes",
    [
        {"difference": {"schedule.epochs": 24}},
        {"difference": {"method.weights.tf": 3.0}},
        {"difference": {"teacher.epoch": "last"}},
        {"dataset": "cifar10"},
        {"method": "kd"},
    ],
)
def test_reruns_need_the_same_experiment(tmp_path: Path, changes: dict[str, Any]) -> None:
    tables = build_tables(read(tmp_path, record(**{"method": "sskd"} | changes)), "last")
    assert not any("HSAKD" in row[0] for table in tables for row in texts(table))


@pytest.mark.skipif("SSKD_REFERENCE" not in os.environ, reason="SSKD_REFERENCE names no folder")
def test_reruns_equal_the_reference() -> None:
    published, _ = published_for("cifar100")
    name = Path(os.environ["SSKD_REFERENCE"], "published_sskd_reruns.csv")
    with name.open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [
        (*pair, rerun.by, top1, std, rerun.runs)
        for rerun in published.reruns
        for pair, (top1, std) in rerun.top1.items()
    ] == [
        (
            *(line["teacher"], line["student"], line["by"], float(line["top1"])),
            *(float(line["std"]) if line["std"] else None, int(line["runs"])),
        )
        for line in lines
    ]


@pytest.mark.skipif("SSKD_REFERENCE" not in os.environ, reason="SSKD_REFERENCE names no folder")
@pytest.mark.parametrize(
    ("source", "name"), [(0, "published.csv"), (1, "published_crd_benchmark.csv")]
)
def test_published_values_equal_the_reference(source: int, name: str) -> None:
    published = published_for("cifar100")[source]
    with Path(os.environ["SSKD_REFERENCE"], name).open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert published.top1 == {
        (line["teacher"], line["student"], line["row"]): float(line["top1"]) for line in lines
    }
    for table, pairs in zip(("similar", "cross"), published.tables.values(), strict=True):
        rows = [line for line in lines if line["table"] == table and line["row"] == "KD"]
        assert list(pairs) == [(line["teacher"], line["student"]) for line in rows]


def page_rows() -> list[list[str]]:
    text = Path(__file__).parents[2].joinpath("docs/published.md").read_text(encoding="utf-8")
    own, _, _ = text.partition("\n## Later methods\n")  # tested in test_report_later.py
    lines = (line for line in own.splitlines() if line.startswith("|"))
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_has_the_published_values_and_reruns() -> None:
    published, _ = published_for("cifar100")
    pairs: list[tuple[str, str]] = []
    found: dict[tuple[str, str, str], str] = {}
    for name, *cells in page_rows()[:-4]:  # the last table has the teachers
        if name == "teacher<br>student":
            pairs = [(first, second) for first, _, second in (c.partition("<br>") for c in cells)]
            continue
        found |= {(*pair, name): cell for pair, cell in zip(pairs, cells, strict=True) if cell}
    reruns = {
        (*pair, f"re-run, {rerun.by} ({rerun.runs})"): rerun.text(pair)
        for rerun in published.reruns
        for pair in rerun.top1
    }
    values = {key: f"{top1:.2f}" for key, top1 in published.top1.items()} | reruns
    assert {key: cell for key, cell in found.items() if "---" not in cell} == values


@pytest.mark.parametrize("source", [0, 1])
def test_the_page_lists_the_teachers_of_both_sources(source: int) -> None:
    (header, _, *families) = page_rows()[-4:]
    row = dict(zip(header, families[source], strict=True))
    assert {name: row[name] for name in TEACHERS} == {
        name: f"{top1[source]:.2f}" for name, top1 in TEACHERS.items()
    }
