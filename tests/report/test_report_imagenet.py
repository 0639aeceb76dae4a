"""ImageNet's published top-1 and top-5 beside made-up runs of the same recipe, and of others."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from pages import table
from report_runs import texts
from test_report import notes_of, read, record, scratch, top1

from sskd.report.groups import build_groups, find_missing
from sskd.report.published import all_published, published_for
from sskd.report.render import render_csv
from sskd.report.results import FIXED_SOURCES
from sskd.report.tables import build_tables

# The top-1 and top-5 errors that Xu et al., ECCV 2020, print in table 5.
ERRORS = {
    "teacher": (26.70, 8.58),
    "student": (30.25, 10.93),
    "KD": (29.34, 10.12),
    "AT": (29.30, 10.00),
    "CRD": (28.83, 9.87),
    "CRD+KD": (28.62, 9.51),
    "SSKD": (28.38, 9.33),
}
PAIR = ("ResNet34", "ResNet18")
RECIPE = {"schedule.epochs": 100, "schedule.milestones": [0.3, 0.6, 0.9], "batch_size": 256}
FILE = {"teacher.digest": "0123456789abcdef"}  # torchvision's checkpoint
ALONE = {"method.weights.ce": 1.0, "method.weights.kd": 0.0}
WITH_KD = {"method.weights.ce": 1.0}  # and KD's weight of 0.9 on CIFAR
METHODS = [("kd", WITH_KD), ("at", ALONE), ("crd", ALONE), ("crd", WITH_KD), ("sskd", WITH_KD)]
DIGEST = None if "imagenet" in FIXED_SOURCES else "a" * 64
DATA = {"dataset": "imagenet", "dataset_source": "imagenet", "dataset_digest": DIGEST}


def distilled(method: str, weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = record(
        **DATA | {"teacher": "ResNet34", "student": "ResNet18", "method": method},
        difference=RECIPE | FILE | weights,
        top1=top1(70.0, 71.0),
        top5={"last": 89.5, "best": 90.0},
        teacher_top1=73.31,
        teacher_top5=91.42,
    )
    return values | changes


def alone(**changes: Any) -> dict[str, Any]:
    values = scratch("ResNet18", **DATA, difference=RECIPE, top1=top1(69.0, 70.0))
    return values | {"top5": {"last": 89.0, "best": 89.5}} | changes


def test_the_published_values_are_the_printed_errors() -> None:
    (source,) = published_for("imagenet")
    assert source.rows == tuple(ERRORS)
    for row, (first, fifth) in ERRORS.items():
        assert source.value(PAIR, row) == pytest.approx(100 - first)
        assert source.value(PAIR, row, "top5") == pytest.approx(100 - fifth)
    assert not any(other.top5 for other in all_published("cifar100"))


def test_the_page_has_the_published_values() -> None:
    header, *rows = table("docs/published.md", "ImageNet")
    assert header[:3] == ["row", "top-1", "top-5"]
    *values, rerun = rows
    assert {row: (float(first), float(fifth)) for row, first, fifth, _ in values} == {
        row: (round(100 - first, 2), round(100 - fifth, 2))
        for row, (first, fifth) in ERRORS.items()
    }
    (source,) = all_published("imagenet")
    assert rerun[:2] == ["*re-run, torchdistill (1)*", source.reruns[0].text(PAIR)]


def test_both_accuracies_stand_beside_the_published(tmp_path: Path) -> None:
    runs = [distilled(*each) for each in METHODS if each[0] != "at"]
    runs.append(distilled("kd", WITH_KD, seed=1, top1=top1(72.0, 73.0)))
    del runs[-1]["top5"]  # of a version without top-5
    shown, _ = build_tables(read(tmp_path, *runs, alone()), "last")
    assert shown.header[1:] == ("ResNet34\nResNet18\ntop-1", "ResNet34\nResNet18\ntop-5")
    rows = {row[0].split("\n")[0]: row[1:] for row in texts(shown)}
    assert rows == {
        "teacher": ("73.31 (1)\n73.30 +0.01", "91.42 (1)\n91.42 +0.00"),
        "student": ("69.00 (1)\n69.75 -0.75", "89.00 (1)\n89.07 -0.07"),
        "KD": ("71.00 ± 1.41 (2)\n70.66 +0.34", "89.50 (1)\n89.88 -0.38"),
        "AT": ("", ""),
        "CRD": ("70.00 (1)\n71.17 -1.17", "89.50 (1)\n90.13 -0.63"),
        "CRD+KD": ("70.00 (1)\n71.38 -1.38", "89.50 (1)\n90.49 -0.99"),
        "SSKD": ("70.00 (1)\n71.62 -1.62", "89.50 (1)\n90.67 -1.17"),
        "SSKD, torchdistill (1)": ("\n70.09", ""),
    }
    notes = notes_of([shown])
    assert "Top-5 in %" in notes
    # Other weights than these are known of published runs.
    assert "nothing but the precision" not in notes
    assert "as accurate as the published one (within 0.3 points)" in notes
    lines = csv.DictReader(render_csv(shown.entries).splitlines())
    metrics = [line["metric"] for line in lines]
    assert (metrics.count("top1"), metrics.count("top5")) == (6, 6)


def test_top5_is_that_of_the_epoch_with_the_best_top1(tmp_path: Path) -> None:
    shown, _ = build_tables(read(tmp_path, distilled("kd", WITH_KD)), "best")
    (row,) = (row for row in texts(shown) if row[0].startswith("KD"))
    assert [cell.partition(" ")[0] for cell in row[1:]] == ["71.00", "90.00"]


@pytest.mark.parametrize(
    ("method", "weights", "own"),
    [
        ("kd", WITH_KD, "KD (method.weights.ce=0.1)"),
        ("at", ALONE, "AT (weighting=sskd)"),
        ("crd", WITH_KD, "CRD (weighting=sskd)"),
        ("sskd", WITH_KD, "SSKD (method.weights.ce=0.1)"),
    ],
)
@pytest.mark.parametrize("setting", [RECIPE, RECIPE | {"schedule.epochs": 2}])
def test_default_weights_have_a_row_of_their_own(
    tmp_path: Path, method: str, weights: dict[str, Any], own: str, setting: dict[str, Any]
) -> None:
    usual = distilled(method, weights, difference=setting | FILE, top1=top1(60.0, 61.0))
    row = "CRD+KD" if method == "crd" else method.upper()
    both = read(
        tmp_path / "both", distilled(method, weights, difference=setting | FILE | weights), usual
    )
    found = {e.row: e for e in build_tables(both, "last")[0].entries if e.metric == "top1"}
    assert {name: found[name].mean for name in (row, own)} == {row: 70.0, own: 60.0}
    assert found[own].published is None
    assert (found[row].published is not None) == (setting == RECIPE)
    groups = [g for each in build_groups(read(tmp_path / "usual", usual), "last") for g in each]
    assert row in {cell.row for cell in find_missing(groups, ())}


@pytest.mark.parametrize(("accuracy", "same"), [(73.05, True), (73.55, True), (72.9, False)])
def test_a_teacher_trained_here_is_compared_first(
    tmp_path: Path, accuracy: float, same: bool
) -> None:
    trained = scratch("ResNet34", **DATA, difference=RECIPE, top1=top1(accuracy, 74.0))
    own = {"teacher.batch_size": 256, "teacher.milestones": [0.3, 0.6, 0.9]}
    student = distilled("kd", WITH_KD, difference=RECIPE | WITH_KD | own, teacher_top1=accuracy)
    runs = read(tmp_path, trained | {"top5": {"last": 91.0, "best": 91.5}}, student)
    shown, _ = build_tables(runs, "last")
    found = {(entry.row, entry.metric): entry.published for entry in shown.entries}
    assert found == {
        ("teacher", "top1"): 73.30 if same else None,
        ("teacher", "top5"): 91.42 if same else None,
        ("KD", "top1"): 70.66 if same else None,
        ("KD", "top5"): 89.88 if same else None,
    }
    # A network of another recipe than the published teacher's is no row of that table.
    (alone,) = build_tables(runs[:1], "last")
    assert [entry.published for entry in alone.entries] == [None]


OTHER = {"schedule.epochs": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"difference": RECIPE | FILE | WITH_KD | OTHER},
        {"difference": RECIPE | FILE | WITH_KD | {"optimizer.weight_decay": 0.0001}},
        {"difference": RECIPE | FILE},  # a CE of 0.1
        {"difference": FILE},  # the recipe of CIFAR
        {"teacher_top1": 70.0},
        {"difference": RECIPE | WITH_KD, "teacher_top1": 70.0},  # a teacher trained here
        {"dataset_source": "folder"},
        {"dataset": "cifar100", "dataset_source": "cifar100", "dataset_digest": None},
        {"dataset": "tiny_imagenet_64", "dataset_source": "tiny_imagenet"},
        {"teacher": "ResNet50_224", "student": "MobileNetV1"},
    ],
)
def test_other_experiments_have_no_published_value(tmp_path: Path, changes: dict[str, Any]) -> None:
    tables = build_tables(read(tmp_path, distilled("kd", WITH_KD, **changes)), "last")
    students = [entry for each in tables for entry in each.entries if entry.row != "teacher"]
    assert students
    assert {entry.published for entry in students} == {None}


def test_imagenet_runs_show_no_value_of_cifar(tmp_path: Path) -> None:
    pair = {"teacher": "resnet56", "student": "resnet20"}
    (shown, _) = build_tables(read(tmp_path, record(**DATA, **pair, method="at")), "last")
    assert [entry.published for entry in shown.entries if entry.row != "teacher"] == [None]
