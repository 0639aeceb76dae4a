"""Studies: runs that differ in one setting as one table and one figure."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from report_runs import never, put_alone, put_run, texts
from test_report_page import MADE

from sskd.report.figures import as_png, as_svg, draw_figures
from sskd.report.page import Report, render_page
from sskd.report.published_studies import published_studies, published_terms
from sskd.report.recipe_values import _defaults
from sskd.report.report import read_report
from sskd.report.tables import Table
from sskd.runs.recipe import frozen_defaults

VGG = {"teacher": "vgg13", "student": "vgg8", "teacher_top1": 75.38}
DIGEST = "0123456789abcdef"


def put_study(root: Path, key: str, recipe: Any, top1: dict[Any, list[float]], **run: Any) -> None:
    """Write a run for each value and seed; those of the value ``recipe`` do not have the key."""
    base = run.pop("difference", {})
    for value, accuracies in top1.items():
        difference = base if value == recipe else {**base, key: value}
        for seed, last in enumerate(accuracies):
            name = f"{run.get('method', 'kd')}-{len(list(root.glob('*')))}"
            put_run(root, name, [last], seed=seed, difference=difference, **run)


def put_few_shot(root: Path, **run: Any) -> None:
    for method, least in (("kd", 60.0), ("sskd", 68.0)):
        top1 = {1.0: [least + 12], 0.25: [least, least + 1, least + 2], 0.5: [least + 8]}
        put_study(root, "dataset.fraction", 1.0, top1, method=method, **(VGG | run))


def report_of(root: Path) -> Report:
    return read_report(root, never)


def study_table(root: Path, key: str, **options: Any) -> Table:
    tables = report_of(root).tables(options.get("epoch", "last"))
    (found,) = (table for table in tables if f"study of {key}" in table.title and table.epoch)
    return found


def figures(root: Path) -> dict[str, Figure]:
    return draw_figures(report_of(root), never)


def test_few_shot_is_one_table(tmp_path: Path) -> None:
    put_few_shot(tmp_path)
    put_alone(tmp_path, "alone", [50.0], student="vgg8", difference={"dataset.fraction": 0.25})
    table = study_table(tmp_path, "dataset.fraction")
    assert table.title == (
        "cifar100 · the recipe · vgg13-vgg8 · study of dataset.fraction · last epoch"
    )
    assert table.header == ("dataset.fraction", "0.25", "0.5", "0.75", "1\nrecipe")
    # 60, 61, 62: mean 61, deviation 1. Figure 4a has 61.7 and, without a run here, 71.9.
    assert texts(table) == (
        ("student", "50.00 (1)", "", "", ""),
        (
            "KD\n  published (figure 4a)",
            "61.00 ± 1.00 (3)\n61.7 -0.7",
            "68.00 (1)\n69.4 -1.4",
            "\n71.9",
            "72.00 (1)\n73.6 -1.6",
        ),
        (
            "SSKD\n  published (figure 4a)",
            "69.00 ± 1.00 (3)\n69.5 -0.5",
            "76.00 (1)\n73.4 +2.6",
            "\n74.2",
            "80.00 (1)\n75.3 +4.7",
        ),
    )
    assert "read off the figure" in " ".join(table.notes)


def test_the_runs_of_a_study_are_in_no_other_table(tmp_path: Path) -> None:
    put_few_shot(tmp_path)
    titles = [table.title for table in report_of(tmp_path).tables("last")]
    study = "cifar100 · the recipe · vgg13-vgg8 · study of dataset.fraction"
    cost = "cost and agreement, means over seeds"
    assert titles == [
        "cifar100 · the recipe · similar · last epoch",
        f"cifar100 · the recipe · {cost}",
        f"{study} · last epoch",
        f"{study} · {cost}",
    ]
    assert set(figures(tmp_path)) == {
        *("gain", "curves-vgg13-vgg8", "losses-vgg13-vgg8", "study-vgg13-vgg8-dataset.fraction"),
    }
    # The runs of the recipe's value stay in the recipe's table.
    similar, _, _, costs = report_of(tmp_path).tables("last")
    assert {entry.row: entry.mean for entry in similar.entries if entry.row != "teacher"} == {
        **{"KD": 72.0, "SSKD": 80.0},
    }
    assert [row[:3] for row in texts(costs)] == [
        *(("KD", "0.25", "61.00"), ("", "0.5", "68.00"), ("", "1", "72.00")),
        *(("SSKD", "0.25", "69.00"), ("", "0.5", "76.00"), ("", "1", "80.00")),
    ]


@pytest.mark.parametrize(
    ("changes", "compared"),
    [
        ({"difference": {"precision": "bf16"}}, True),
        ({"difference": {"schedule.epochs": 24}}, False),
        ({"difference": {"dataset.label_noise": 0.1}}, False),
        ({"difference": {"teacher.epoch": "last"}}, False),
        ({"difference": {"teacher.digest": DIGEST}, "teacher_top1": 75.4}, True),
        # The CRD benchmark's teacher: KD's values in the tables had it, those of the study not.
        ({"difference": {"teacher.digest": DIGEST}, "teacher_top1": 74.64}, False),
        ({"teacher": "wrn_40_2", "student": "wrn_16_2"}, False),
        ({"dataset": "digits"}, False),
    ],
)
def test_only_the_published_experiment_is_compared(
    tmp_path: Path, changes: dict[str, Any], compared: bool
) -> None:
    put_few_shot(tmp_path, **changes)
    table = study_table(tmp_path, "dataset.fraction")
    assert ("published" in str(table.texts)) == compared
    assert any(entry.published is not None for entry in table.entries) == compared
    (study,) = report_of(tmp_path).studies
    assert any(study.published.values()) == compared


def test_a_sweep_is_sorted_by_number_with_the_best_marked(tmp_path: Path) -> None:
    held_out = {16.0: 61.0, 2.0: 62.5, 4.0: 63.0}
    for temperature, top1 in held_out.items():
        one = {temperature: [70.0 + temperature]}
        holdout = {"last": top1, "best": 70 - top1, "best_epoch": 1, "test_top1_at_best": 70.0}
        setting = {"dataset.holdout": 0.1}
        extra: dict[str, Any] = {"difference": setting, "holdout_top1": holdout}
        put_study(tmp_path, "method.temperature", 4.0, one, **extra)
    table = study_table(tmp_path, "method.temperature")
    assert table.header == ("method.temperature", "2", "4\nrecipe", "16")
    assert texts(table) == (
        ("KD\n  held-out", "72.00 (1)\n62.50", "74.00 (1) *\n63.00", "86.00 (1)\n61.00"),
    )
    at_best = study_table(tmp_path, "method.temperature", epoch="best")
    assert ["*" in cell for cell in texts(at_best)[0]] == [False, False, False, True]
    names = [entry.row for entry in table.entries]
    assert names == [f"KD (method.temperature={value})" for value in (2, 4, 16)]
    assert {entry.setting for entry in table.entries} == {"dataset.holdout=0.1"}


@pytest.mark.parametrize("key", ["method.temperature", "optimizer.lr", "dataset.fraction"])
def test_two_values_are_a_study_if_one_is_published(tmp_path: Path, key: str) -> None:
    recipe = {"method.temperature": 4.0, "optimizer.lr": 0.05, "dataset.fraction": 1.0}[key]
    put_study(tmp_path, key, recipe, {recipe: [70.0], 0.5: [60.0]})
    assert len(report_of(tmp_path).studies) == (key == "dataset.fraction")
    titles = " ".join(table.title for table in report_of(tmp_path).tables("last"))
    assert ("optimizer.lr=0.5" in titles) == (key == "optimizer.lr")


def test_a_comparison_of_methods_keeps_its_table(tmp_path: Path) -> None:
    put_study(tmp_path, "dataset.fraction", 1.0, {0.1: [50.0], 0.5: [60.0], 1.0: [70.0]})
    for method in ("at", "crd"):
        put_run(tmp_path, method, method=method, difference={"dataset.fraction": 0.1})
    (row,) = texts(study_table(tmp_path, "dataset.fraction"))
    assert row[0].startswith("KD\n")
    tables = [table for table in report_of(tmp_path).tables("last") if table.epoch]
    assert [table.title.split(" · ")[1:3] for table in tables] == [
        ["the recipe", "similar"],
        ["dataset.fraction=0.1", "similar"],
        ["the recipe", "resnet56-resnet20"],
    ]
    rows = [entry.row for entry in tables[1].entries]
    assert rows == ["teacher", "KD", "AT", "CRD"]


@pytest.mark.parametrize("key", ["teacher.seed", "dataset.seed", "dataset.holdout"])
def test_numbers_that_only_choose_are_no_study(tmp_path: Path, key: str) -> None:
    put_study(tmp_path, key, 0, {value: [70.0] for value in (0, 0.1, 0.2)})
    assert report_of(tmp_path).studies == []


def test_values_are_shown_with_all_digits(tmp_path: Path) -> None:
    values = {value: [70.0] for value in (16384, 1048576, 1048577)}
    put_study(tmp_path, "method.negatives", 0, values, method="crd")
    table = study_table(tmp_path, "method.negatives")
    assert table.header == ("method.negatives", "16384", "1048576", "1048577")


def test_rows_and_settings_are_sorted_by_number(tmp_path: Path) -> None:
    for number, value in enumerate((8.0, 16.0)):
        put_run(tmp_path, f"t{number}", difference={"method.temperature": value})
        setting = {"batch_size": int(value * 8)}
        put_run(tmp_path, f"b{number}", difference=setting)
    tables = [table for table in report_of(tmp_path).tables("last") if table.epoch]
    settings = [table.title.split(" · ")[1] for table in tables]
    assert settings == ["the recipe", "batch_size=64", "batch_size=128"]
    rows = [entry.row for entry in tables[0].entries if entry.row.startswith("KD (")]
    assert rows == ["KD (method.temperature=8.0)", "KD (method.temperature=16.0)"]


def test_a_grid_has_a_line_for_each_other_value(tmp_path: Path) -> None:
    for share in (0.0, 0.5, 1.0):
        top1 = {keep: [50 + 10 * share + keep] for keep in (0.0, 0.75, 1.0)}
        tf_ratio = {} if share == 1 else {"method.tf_ratio": share}
        put_study(tmp_path, "method.ss_ratio", 0.75, top1, method="sskd", difference=tf_ratio)
    table = study_table(tmp_path, "method.ss_ratio")
    assert [row[0] for row in texts(table)] == [
        f"SSKD (method.tf_ratio={value})" for value in (0, 0.5, 1)
    ]
    assert texts(table)[1][1:] == ("55.00 (1)", "55.75 (1)", "56.00 (1)")
    other = study_table(tmp_path, "method.tf_ratio")
    assert other.header == ("method.tf_ratio", "0", "0.5", "1\nrecipe")
    assert texts(other)[1] == ("SSKD (method.ss_ratio=0.75)", "50.75 (1)", "55.75 (1)", "60.75 (1)")
    costs = [t.title for t in report_of(tmp_path).tables("last") if "study" in t.title]
    assert sum("cost" in title for title in costs) == 1, "both studies have the same runs"
    places = {(e.setting, e.table, e.row) for t in (table, other) for e in t.entries}
    assert len(places) == 18


def test_a_point_of_another_study_is_no_row(tmp_path: Path) -> None:
    key, few = "dataset.fraction", {"dataset.fraction": 0.25}
    put_study(tmp_path, key, 1.0, {0.25: [60.0], 1.0: [70.0]})
    temperatures = {1.0: [61.0], 4.0: [], 8.0: [62.0]}
    put_study(tmp_path, "method.temperature", 4.0, temperatures, difference=few)
    assert texts(study_table(tmp_path, key))[0][1].startswith("60.00 (1)")
    assert len(study_table(tmp_path, key).rows) == 1
    temperature = study_table(tmp_path, "method.temperature")
    assert texts(temperature) == (("KD", "61.00 (1)", "60.00 (1)", "62.00 (1)"),)
    tables = [table for table in report_of(tmp_path).tables("last") if table.epoch]
    assert [table.title.split(" · ")[1] for table in tables] == [
        *("the recipe", "the recipe", "dataset.fraction=0.25"),
    ]
    assert all("study" in table.title for table in tables[1:])


def test_a_name_is_a_column_beside_two_publications(tmp_path: Path) -> None:
    recorded = {"run": {"method": {"task": "contrastive"}}}
    put_run(tmp_path, "recipe", [75.0], method="sskd", **VGG, **recorded)
    put_run(tmp_path, "x", [74.9], method="sskd", difference={"method.task": "rotation"}, **VGG)
    table = study_table(tmp_path, "method.task")
    assert table.header[1:] == ("contrastive\nrecipe", "exemplar", "jigsaw", "rotation")
    assert texts(table) == (
        (
            "SSKD\n  published (table 2)",
            *("75.00 (1)\n75.48 -0.48", "\n74.57", "\n74.85", "74.90 (1)\n75.01 -0.11"),
        ),
        ("SSKD, FN8211/SSKD\n  published", "\n74.53", "\n74.46", "\n74.34", "\n74.50"),
    )
    (axes,) = figures(tmp_path)["study-vgg13-vgg8-method.task"].axes
    assert {line.get_linestyle() for line in axes.lines} == {"None"}
    assert axes.get_xticks().tolist() == [0, 1, 2, 3]


def test_teachers_of_different_weights_are_different_lines(tmp_path: Path) -> None:
    for digest, top1 in (("a" * 64, 70.0), ("b" * 64, 60.0)):
        values = {temperature: [top1 + temperature] for temperature in (1.0, 2.0, 4.0)}
        put_study(tmp_path, "method.temperature", 4.0, values, teacher_digest=digest)
    table = study_table(tmp_path, "method.temperature")
    assert texts(table) == (
        ("KD (teacher.digest=aaaaaaaa)", "71.00 (1)", "72.00 (1)", "74.00 (1)"),
        ("KD (teacher.digest=bbbbbbbb)", "61.00 (1)", "62.00 (1)", "64.00 (1)"),
    )


def test_a_budget_has_one_teacher_for_all_epochs(tmp_path: Path) -> None:
    teacher = {"teacher.epochs": 240}
    put_run(tmp_path, "240", [70.0])  # as long as its teacher
    for epochs, top1 in ((480, 71.0), (960, 72.0)):
        put_run(tmp_path, str(epochs), [top1], difference={"schedule.epochs": epochs, **teacher})
    table = study_table(tmp_path, "schedule.epochs")
    assert table.header == ("schedule.epochs", "240\nrecipe", "480", "960")
    assert texts(table) == (("KD (teacher.epochs=240)", "70.00 (1)", "71.00 (1)", "72.00 (1)"),)


def test_networks_alone_have_studies(tmp_path: Path) -> None:
    for number, (lr, top1) in enumerate(((0.1, 68.0), (0.01, 66.0), (0.05, 70.0))):
        put_alone(
            tmp_path, str(number), [top1], difference={} if lr == 0.05 else {"optimizer.lr": lr}
        )
    table = study_table(tmp_path, "optimizer.lr")
    assert table.title.startswith("cifar100 · the recipe · networks · study of optimizer.lr")
    assert texts(table) == (("resnet20", "66.00 (1)", "70.00 (1)", "68.00 (1)"),)
    (axes,) = figures(tmp_path)["study-networks-optimizer.lr"].axes
    assert axes.get_xscale() == "log"


def test_the_terms_of_sskd_have_a_table(tmp_path: Path) -> None:
    tf, ss = "method.weights.tf", "method.weights.ss"
    put_run(tmp_path, "kd", [73.5], **VGG)
    put_run(tmp_path, "none", [73.2], method="sskd", difference={tf: 0, ss: 0.0}, **VGG)
    put_run(tmp_path, "tf", [74.0], method="sskd", difference={ss: 0.0}, **VGG)
    put_run(tmp_path, "sskd", [75.0], method="sskd", **VGG)
    tables = report_of(tmp_path).tables("last")
    table, cost = (table for table in tables if "terms of SSKD" in table.title)
    assert [row[:3] for row in texts(cost)] == [
        *(("vgg13-vgg8", "KD", "73.50"), ("", "KD on SSKD's batches", "73.20")),
        *(("", "+ tf", "74.00"), ("", "+ ss", "75.00")),
    ]
    assert table.header == ("teacher\nstudent", "vgg13\nvgg8")
    assert texts(table) == (
        ("KD\n  published", "73.50 (1)\n73.00 +0.50"),
        ("KD on SSKD's batches", "73.20 (1)"),
        ("+ tf\n  published", "74.00 (1)\n74.25 -0.25"),
        ("+ ss\n  published", "75.00 (1)\n75.30 -0.30"),
    )
    assert "weights.ss" not in str([each.texts for each in tables if each is not table])


@pytest.mark.parametrize(
    ("teacher_top1", "compared"),
    [(75.4, [False, True, True]), (74.64, [True, False, False]), (70.0, [False] * 3)],
)
def test_terms_are_compared_with_the_same_teacher(
    tmp_path: Path, teacher_top1: float, compared: list[bool]
) -> None:
    """The figure's KD had the CRD benchmark's vgg13 (74.64), its other rows SSKD's (75.38)."""
    run: dict[str, Any] = VGG | {"teacher_top1": teacher_top1}
    file = {"teacher.digest": DIGEST}
    put_run(tmp_path, "kd", difference=file, **run)
    put_run(tmp_path, "tf", method="sskd", difference=file | {"method.weights.ss": 0.0}, **run)
    put_run(tmp_path, "sskd", method="sskd", difference=file, **run)
    table, _ = (t for t in report_of(tmp_path).tables("last") if "terms of SSKD" in t.title)
    assert [entry.published is not None for entry in table.entries] == compared


def test_the_figure_has_the_numbers_of_the_table(tmp_path: Path) -> None:
    put_few_shot(tmp_path)
    figure = figures(tmp_path)["study-vgg13-vgg8-dataset.fraction"]
    (axes,) = figure.axes
    drawn = [
        (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in axes.lines
        if line.get_marker() == "o"
    ]
    whole = [0.25, 0.5, 0.75, 1.0]
    assert drawn == [
        ([0.25, 0.5, 1.0], [61.0, 68.0, 72.0]),
        (whole, [61.7, 69.4, 71.9, 73.6]),
        ([0.25, 0.5, 1.0], [69.0, 76.0, 80.0]),
        (whole, [69.5, 73.4, 74.2, 75.3]),
    ]
    bars = [each for each in axes.collections if isinstance(each, LineCollection)]
    segments = [points for each in bars for points in each.get_segments() if len(points)]
    ends = [[y for _, y in points] for points in segments]
    assert ends == [[60.0, 62.0], [68.0, 70.0]]
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["KD", "SSKD", "published (figure 4a)"]
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == "1\nrecipe"
    assert as_png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.0, 3.0, 10.0), ["0", "2.7, recipe", "3", "10"]),
        ((0.3, 30.0), ["0.3", "2.7\nrecipe", "30"]),
        ((2.0, 3.0, 20.0), ["2", "2.7, recipe", "3", "20"]),  # logarithmic
    ],
)
def test_the_labels_of_close_values_do_not_touch(
    tmp_path: Path, values: tuple[float, ...], labels: list[str]
) -> None:
    key = "method.weights.tf"
    put_study(tmp_path, key, 2.7, {value: [70.0] for value in (2.7, *values)}, method="sskd")
    figure = figures(tmp_path)[f"study-resnet56-resnet20-{key}"]
    (axes,) = figure.axes
    figure.draw_without_rendering()
    shown = axes.get_xticklabels()
    assert [label.get_text() for label in shown] == labels
    boxes = [label.get_window_extent() for label in shown]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    assert min(box.y0 for box in boxes) > axes.xaxis.label.get_window_extent().y1


def test_the_page_and_the_csv_have_the_study(tmp_path: Path) -> None:
    put_few_shot(tmp_path)
    report = report_of(tmp_path)
    drawn = draw_figures(report, never)
    shown = {name: (figure.get_suptitle(), as_svg(figure)) for name, figure in drawn.items()}
    page = render_page(report, shown, MADE)
    assert '<a href="#study">Studies</a>' in page
    assert "Study of dataset.fraction" in page
    lines = [line for line in report.csv().splitlines() if "study of" in line]
    assert lines[0] == (
        "cifar100,dataset.fraction=0.25,study of dataset.fraction,vgg13,vgg8,KD,top1,last,"
        "61.0,1.0,3,61.7,-0.7"
    )
    assert len(lines) == 12


def test_published_values_are_those_of_the_papers() -> None:
    found = {(line.key, line.pair[0], line.row, line.by): line.top1 for line in published_studies()}
    assert found["method.ss_ratio", "wrn_40_2", "SSKD", "table 1"] == {
        **{0.0: "75.27", 0.25: "75.34", 0.5: "75.97", 0.75: "75.63", 1.0: "75.53"},
    }
    hsakd = found["dataset.fraction", "resnet56", "HSAKD*", "HSAKD's authors"]
    assert hsakd == {0.25: "68.50", 0.5: "72.18", 0.75: "73.26"}
    noise = found["dataset.label_noise", "vgg13", "FT", "figure 4b"]
    assert noise == {0.0: "73.4", 0.1: "72.5", 0.3: "69.8", 0.5: "68.7"}
    assert len(published_terms()) == 12


@pytest.mark.parametrize(
    ("student", "method", "source"),
    [("resnet20", "sskd", "cifar100"), ("ShuffleV2", "ft", "digits"), ("vgg8", "hsakd", "folder")],
)
def test_the_recipe_is_read_as_runs_read_it(student: str, method: str, source: str) -> None:
    read, frozen = (
        _defaults(student, method, source),
        frozen_defaults(student, None, method, source),
    )
    numbers = {
        key: value
        for key, value in frozen.items()
        if isinstance(value, float | int | str) and not key.startswith("student.")
    }
    assert len(numbers) > 20
    assert {key: read.get(key) for key in numbers} == numbers


def test_no_value_is_the_best_if_several_share_it(tmp_path: Path) -> None:
    holdout = {"last": 60.0, "best": 60.0, "best_epoch": 1, "test_top1_at_best": 70.0}
    values = {temperature: [70.0] for temperature in (1.0, 2.0, 4.0)}
    setting = {"dataset.holdout": 0.1}
    extra: dict[str, Any] = {"difference": setting, "holdout_top1": holdout}
    put_study(tmp_path, "method.temperature", 4.0, values, **extra)
    assert "*" not in str(study_table(tmp_path, "method.temperature").texts)
