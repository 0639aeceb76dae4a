"""The published values of later methods, beside runs with the teachers that they had."""

from __future__ import annotations

import csv
import os
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from conftest import Compose
from report_runs import put_run, texts
from test_report import entries, notes_of, read, record, scratch, top1

from sskd import config
from sskd.methods import METHODS
from sskd.report import groups
from sskd.report.groups import Entry
from sskd.report.published import all_published, display_name, published_for
from sskd.report.report import read_report
from sskd.report.tables import Table, build_tables
from sskd.teachers.find import run_location

FROM_LAST = {"teacher.epoch": "last"}
SKD = {"augmentation": "weak_and_strong", "optimizer.lr": 0.1, "optimizer.weight_decay": 4e-5}
SSKD_TABLE, CRD_TABLE, SKD_TABLE = (
    *("similar", "the CRD benchmark, similar", "SKD's recipe, similar"),
)
# The reference's names that this suite spells otherwise, and its rows that the suite lacks or whose
# settings are not known.
SPELLED = {
    "LS+MLKD": "LS+MLLD",
    "KD (SKD's recipe)": "KD",
    "DKD (SKD's recipe)": "DKD",
}
LEFT_OUT = {"ITRD", "WTTM+ITRD", "LS+DKD", "SD-KD", "SD-DKD", "RLD"}
Values = dict[tuple[str, str, str], float]


def reference() -> dict[str, Values]:
    """Return the reference's values by family of teachers or recipe."""
    found: dict[str, Values] = {"sskd": {}, "crd": {}, "skd": {}}
    path = Path(os.environ["SSKD_REFERENCE"], "published_modern.csv")
    for line in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
        if line["method"] in LEFT_OUT:
            continue
        family = {"HSAKD README": "sskd", "SKD README": "skd"}
        source = line["source"].partition(";")[0]
        row = SPELLED.get(line["method"], line["method"])
        key = (line["teacher"], line["student"], row)
        found[family.get(source, "crd")][key] = float(line["top1"])
    return found


@pytest.mark.skipif("SSKD_REFERENCE" not in os.environ, reason="SSKD_REFERENCE names no folder")
def test_values_equal_the_reference() -> None:
    sskd, crd, skd = all_published("cifar100")
    assert {"sskd": sskd.later.top1, "crd": crd.later.top1, "skd": skd.top1} == reference()


def test_rows_have_the_names_of_methods() -> None:
    names = set(map(display_name, METHODS))
    for source in all_published("cifar100"):
        later = source.later
        assert {later.methods.base_of.get(row, row) for row in later.rows} <= names
        assert all(later.reporters.values())
        about = set(chain(*(rows for _, rows in later.methods.remarks)))
        assert about <= set(later.reporters)
        # Only the pairs of the source's own tables have a column.
        assert {(t, s) for t, s, _ in later.top1} <= set(chain(*source.tables.values()))


def test_a_method_has_one_published_spelling() -> None:
    assert [display_name(name) for name in ("luminet", "reviewkd", "simkd", "cat_kd", "ls")] == [
        *("LumiNet", "ReviewKD", "SimKD", "CAT-KD", "LS+KD")
    ]


LS_MLLD = ("method=mlld", "method.logits=standardised", "method.temperatures=[2,3,5,2,6]")
HSAKD_TEACHER = ("teacher.method=hsakd_teacher",)
SKD_WORDS = ("augmentation=weak_and_strong", "optimizer.lr=0.1", "optimizer.weight_decay=4e-5")


def weights(value: int) -> tuple[str, ...]:
    return tuple(f"method.weights.{term}={value}" for term in ("instance", "batch", "classes"))


@pytest.mark.parametrize(
    ("pair", "words", "place", "value"),
    [
        ("resnet56-resnet20", ("method=hsakd", *HSAKD_TEACHER), (SSKD_TABLE, "HSAKD*"), 73.73),
        ("vgg13-vgg8", (*LS_MLLD, *weights(6)), (CRD_TABLE, "LS+MLLD"), 75.22),
        ("resnet56-resnet20", (*LS_MLLD, *weights(9)), (CRD_TABLE, "LS+MLLD"), 72.33),
        ("vgg13-vgg8", ("method=skd", *SKD_WORDS), (SKD_TABLE, "SKD"), 75.75),
    ],
)
def test_the_command_of_a_row_gives_its_value(
    composed: Compose, tmp_path: Path, pair: str, words: tuple[str, ...], place: Any, value: float
) -> None:
    chosen = composed(f"pair={pair}", "teacher.epoch=last", *words)
    teacher, student = pair.split("-")
    method, changed = chosen.method.name, run_location(chosen)[1]
    run = record(teacher=teacher, student=student, method=method, difference=changed)
    found = entries(build_tables(read(tmp_path, run), "last"))
    table, row = place
    assert found[table, teacher, student, row].published == value


@pytest.mark.parametrize(
    ("method", "changes", "place", "value"),
    [
        ("dkd", FROM_LAST, (CRD_TABLE, "DKD"), 71.97),
        ("ls", FROM_LAST, (CRD_TABLE, "LS+KD"), 71.43),
        ("hsakd", {}, (SSKD_TABLE, "HSAKD"), 72.58),
        ("kd", FROM_LAST | SKD, (SKD_TABLE, "KD"), 71.74),
        # Nobody has published these for the pair.
        ("simkd", FROM_LAST, (CRD_TABLE, "SimKD"), None),
        ("srrl", FROM_LAST, (CRD_TABLE, "SRRL"), None),
        ("skd", FROM_LAST, (CRD_TABLE, "SKD"), None),
        # Another teacher or setting is another experiment.
        ("dkd", {}, (SSKD_TABLE, "DKD"), None),
        ("skd", SKD, (SSKD_TABLE, "SKD"), None),
        ("dkd", FROM_LAST | {"method.logits": "standardised"}, None, None),
        ("mlld", FROM_LAST | {"method.logits": "standardised"}, None, None),
    ],
)
def test_each_family_has_its_rows(
    tmp_path: Path, method: str, changes: dict[str, Any], place: Any, value: float | None
) -> None:
    runs = read(tmp_path, record(method=method, difference=changes))
    (entry,) = entries(build_tables(runs, "last")).values()
    assert entry.published == value
    if place:
        assert (entry.table, entry.row) == place


def compared(root: Path, **changes: Any) -> Entry:
    """Return the entry of a student of resnet56 that takes its teacher from a file."""
    runs = read(root, record(**changes))
    return next(e for e in entries(build_tables(runs, "last")).values() if e.row != "teacher")


@pytest.mark.parametrize(
    ("method", "changes", "accuracy", "value"),
    [
        ("dkd", FROM_LAST, 72.34, 71.97),
        ("dkd", FROM_LAST, 73.44, None),
        ("hsakd", {}, 73.44, 72.58),
        ("hsakd", {}, 72.34, None),
        ("skd", FROM_LAST | SKD, 72.34, 72.50),
        ("skd", FROM_LAST | SKD, 73.44, None),
    ],
)
def test_values_need_the_teacher_of_their_family(
    tmp_path: Path, method: str, changes: dict[str, Any], accuracy: float, value: float | None
) -> None:
    file = {"teacher.digest": "0123456789abcdef"}
    entry = compared(tmp_path, method=method, difference=file | changes, teacher_top1=accuracy)
    assert entry.published == value


@pytest.mark.parametrize(
    "setting", [{"schedule.epochs": 24}, {"dataset.fraction": 0.1}, SKD | {"optimizer.lr": 0.05}]
)
@pytest.mark.parametrize("method", ["dkd", "skd"])
def test_other_settings_are_not_compared(
    tmp_path: Path, method: str, setting: dict[str, Any]
) -> None:
    runs = read(tmp_path, record(method=method, difference=setting | FROM_LAST))
    tables = build_tables(runs, "last")
    assert not any(entry.published for table in tables for entry in table.entries)
    assert "published later" not in notes_of(tables)


def labels(table: Table) -> list[str]:
    return [row[0].partition("\n")[0] for row in texts(table)]


def test_a_table_has_only_the_later_rows_that_were_run(tmp_path: Path) -> None:
    runs = [record(method=name, difference=FROM_LAST) for name in ("luminet", "kd", "dkd", "crld")]
    table, *others = build_tables(read(tmp_path, *runs), "last")
    assert labels(table)[-4:] == ["CRD", "DKD", "LumiNet", "CRLD"]
    notes = notes_of([table, *others])
    assert (
        "Values published later, with the CRD benchmark's teachers, and who reported them: "
        "DKD (the authors or SDD's);"
        " LumiNet (the authors)." in notes
    )
    assert "do not say which epoch" in notes
    assert not any(name in notes for name in ("HSAKD*", "480 epochs", "TTM's", "SimKD"))


def test_cells_of_later_methods_are_not_missing(tmp_path: Path) -> None:
    put_run(tmp_path, "kd", difference=FROM_LAST)
    put_run(tmp_path, "dkd", teacher="vgg13", student="vgg8", method="dkd", difference=FROM_LAST)
    missing = {cell.row for cell in read_report(tmp_path, print).missing()}
    assert "AT" in missing
    assert not missing & set(published_for("cifar100")[1].later.rows)


def test_methods_with_their_own_number_of_epochs_stay_in_the_table(tmp_path: Path) -> None:
    longer: dict[str, Any] = {"epoch": 480, "departures": {"schedule.epochs": 480}}
    put_run(tmp_path, "mlld", method="mlld", difference=FROM_LAST, **longer)
    put_run(tmp_path, "kd", difference=FROM_LAST, epoch=240)
    warnings: list[str] = []
    found = entries(read_report(tmp_path, warnings.append).tables("last"))
    assert found[CRD_TABLE, "resnet56", "resnet20", "MLLD"].published == 72.19
    assert found[CRD_TABLE, "resnet56", "resnet20", "KD"].published == 70.66
    assert warnings == []


def test_a_network_of_another_method_is_another_network(tmp_path: Path) -> None:
    assert groups.ALONE == config.ALONE
    plain, joint = scratch("resnet56", top1=top1(73.0, 74.0)), scratch("resnet56")
    runs = read(
        tmp_path,
        plain,
        joint
        | {
            "method": "hsakd_teacher",
            "top1": top1(77.0, 78.0),
            "difference": {"method.name": "hsakd_teacher"},
        },
        record(method="hsakd"),
    )
    found = entries(build_tables(runs, "last"))
    assert found[SSKD_TABLE, "resnet56", "resnet20", "teacher"].mean == 73.0
    network = found["networks", "", "resnet56", "resnet56 (method=hsakd_teacher)"]
    assert (network.mean, network.published) == (77.0, None)


def test_the_teacher_of_hsakd_is_not_that_of_its_variant(tmp_path: Path) -> None:
    joint = FROM_LAST | {"teacher.method": "hsakd_teacher"}
    runs = read(
        tmp_path,
        record(method="hsakd", teacher_top1=73.4),
        record(method="hsakd", teacher_top1=77.2, difference=joint),
    )
    found = entries(build_tables(runs, "last"))
    teacher = found[SSKD_TABLE, "resnet56", "resnet20", "teacher"]
    assert (teacher.mean, teacher.n) == (73.4, 1)


def test_the_page_has_the_values() -> None:
    text = Path(__file__).parents[2].joinpath("docs/published.md").read_text(encoding="utf-8")
    _, _, later = text.partition("\n## Later methods\n")
    later, _, _ = later.partition("\n## ImageNet\n")  # tested in test_report_imagenet.py
    *crd, sskd, skd = later.split("| teacher<br>student |")[1:]
    expected = all_published("cifar100")
    shown = [page_values(sskd), page_values(crd[0]) | page_values(crd[1]), page_values(skd)]
    assert shown == [expected[0].later.top1, expected[1].later.top1, expected[2].top1]


def page_values(table: str) -> Values:
    """Return the values of a table without its first cell, and check who reported them."""
    header, _, *lines = (line for line in table.splitlines() if line.count("|") > 2)
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    found: Values = {}
    for line in lines:
        name, *cells = (cell.strip().replace("\\", "") for cell in line.strip("|").split("|"))
        for column, cell in zip(columns, cells, strict=True):
            teacher, _, student = column.partition("<br>")
            if column == "by":
                reporters = {
                    k: v for s in all_published("cifar100") for k, v in s.later.reporters.items()
                }
                assert cell == reporters[name]
            elif cell:
                found[teacher, student, name] = float(cell)
    return found
