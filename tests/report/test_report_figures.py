"""The report's figures: their data and their files."""

from __future__ import annotations

import json
import math
import struct
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from report_runs import epoch_line, never, put_alone, put_metrics, put_run

from sskd.report.figures import (
    LOSS,
    WEIGHTED,
    as_png,
    as_svg,
    draw_figures,
    loss_curves,
    top1_curve,
)
from sskd.report.groups import pair_gains
from sskd.report.metrics import read_metrics
from sskd.report.plots import Curve, avoid_overlap, draw_curves
from sskd.report.published import KD, STUDENT, RowKey
from sskd.report.report import read_report

PAIR = ("resnet56", "resnet20")


def figures(root: Path) -> dict[str, Figure]:
    return draw_figures(read_report(root, never), never)


def test_a_reference_without_gains_is_not_drawn(tmp_path: Path) -> None:
    for method, top1 in (("kd", 70.0), ("at", 71.0), ("sskd", 72.0)):
        put_run(tmp_path, method, [top1], method=method)
    gain = figures(tmp_path)["gain"]
    (legend,) = gain.legends
    assert [text.get_text() for text in legend.get_texts()] == ["over KD"]
    (axes,) = gain.axes
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == list(axes.get_yticks())


def test_gains_and_their_deviation(tmp_path: Path) -> None:
    for seed, (alone, kd, sskd) in enumerate([(69.0, 70.0, 72.0), (70.0, 71.0, 72.0)]):
        put_alone(tmp_path, f"alone{seed}", [alone], seed=seed)
        put_run(tmp_path, f"kd{seed}", [kd], seed=seed)
        put_run(tmp_path, f"sskd{seed}", [sskd], seed=seed, method="sskd")
    put_run(tmp_path, "at", [71.0], method="at")
    (group,) = read_report(tmp_path, never).groups()
    gains = {row[0]: gain for row, gain in pair_gains(group, "similar", PAIR).items()}
    # Sample variances: 1/2 alone, 1/2 with KD, 0 with SSKD; a single AT has none.
    assert (gains["KD"][STUDENT].points, gains["KD"][STUDENT].std) == (1.0, 1.0)
    assert gains["SSKD"][STUDENT].points == 2.5
    assert gains["SSKD"][STUDENT].std == pytest.approx(math.sqrt(0.5))
    assert gains["SSKD"][KD].points == 1.5
    assert (gains["AT"][KD].points, gains["AT"][KD].std) == (0.5, None)
    # KD has no gain over itself. Teacher and student are not methods.
    assert KD not in gains["KD"]
    assert set(gains) == {"KD", "AT", "SSKD"}


def test_bars_and_error_bars_are_the_gains(tmp_path: Path) -> None:
    put_alone(tmp_path, "alone", [69.0])
    put_alone(tmp_path, "alone1", [71.0], seed=1)
    put_run(tmp_path, "kd", [72.0])
    put_run(tmp_path, "kd1", [74.0], seed=1)
    put_run(tmp_path, "at", [72.5], method="at")
    (axes, *_) = figures(tmp_path)["gain"].axes
    # Over the student alone (mean 70): KD 3, AT 2.5; over KD (73): AT -0.5.
    bars = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    assert [bar.get_width() for bar in bars] == [3.0, 2.5, -0.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["KD", "AT"]
    errors = [lines for lines in axes.collections if isinstance(lines, LineCollection)]
    drawn = [points for lines in errors for points in lines.get_segments()]
    # KD: 3 plus and minus sqrt(2 + 2); a single AT has no bar.
    ends = [sorted(x for x, _ in points) for points in drawn if len(points)]
    assert ends == [[pytest.approx(1.0), pytest.approx(5.0)]]


def test_curves_are_means_over_seeds_by_epoch(tmp_path: Path) -> None:
    put_run(tmp_path, "a", [10.0, 20.0, 30.0])
    put_run(tmp_path, "b", [20.0, 20.0], seed=1)
    runs = [read_metrics(tmp_path / name, never) for name in "ab"]
    curve = top1_curve(runs)
    assert curve.epochs == (1, 2, 3)
    assert curve.mean == (15.0, 20.0, 30.0)
    # 10 and 20: squared deviations 25 + 25 over n - 1 = 1; the third epoch has one run.
    assert list(curve.std) == pytest.approx([math.sqrt(50), 0.0, 0.0])


def test_the_last_quarter_shows_shorter_runs_too() -> None:
    curves: dict[RowKey, Curve] = {
        KD: Curve((1, 2, 3, 4), (10.0, 20.0, 30.0, 31.0), (0.0,) * 4),
        ("MLLD", ()): Curve((1, 8), (15.0, 35.0), (0.0,) * 2),
    }
    _, end = axes = draw_curves("title", list(curves), curves).axes
    places = [[np.asarray(line.get_xdata()).tolist() for line in each.lines[:2]] for each in axes]
    assert places == [[[1, 2, 3, 4], [1, 8]], [[25, 50, 75, 100], [12.5, 100]]]
    assert (end.get_xlim(), end.get_xlabel()) == ((75, 100), "% of the run's epochs")


def test_the_last_quarter_shows_the_whole_deviation() -> None:
    curves: dict[RowKey, Curve] = {
        KD: Curve((1, 2, 3, 4), (10.0, 20.0, 30.0, 31.0), (9.0, 9.0, 0.5, 4.0)),
        STUDENT: Curve((1, 2, 3, 4), (10.0, 20.0, 28.0, 30.0), (9.0, 9.0, 6.0, 0.5)),
    }
    _, end = draw_curves("title", list(curves), curves).axes
    # The bands reach from 28 - 6 to 31 + 4; a margin of 5 % and 0.1 points is on each side.
    assert end.get_ylim() == pytest.approx((22 - 0.75, 35 + 0.75))


def test_the_last_quarter_shows_lines_that_begin_between_two_epochs() -> None:
    curves: dict[RowKey, Curve] = {KD: Curve((1, 4, 6), (10.0, 20.0, 30.0), (0.0, 4.0, 0.0))}
    _, end = draw_curves("title", list(curves), curves).axes
    # After 4.5 epochs the mean is 22.5 and its deviation 3.
    assert end.get_ylim() == pytest.approx((19.5 - 0.625, 30 + 0.625))


def test_the_legend_names_the_deviation_if_there_are_seeds(tmp_path: Path) -> None:
    put_alone(tmp_path, "alone", [69.0, 70.0])
    put_run(tmp_path, "kd", [69.0, 71.0])
    assert not any(map(deviations, figures(tmp_path).values()))
    lines = [epoch_line("a", e, 69.0 + e, **{"loss/kd": 1.0}) for e in (1, 2)]
    put_metrics(put_run(tmp_path, "kd-1", [69.0, 72.0], seed=1), lines)
    put_alone(tmp_path, "alone-1", [69.0, 71.0], seed=1)
    named = {name.partition("-")[0]: deviations(each) for name, each in figures(tmp_path).items()}
    over_seeds = ["± std over seeds"]
    assert named == {
        "gain": ["± std of the difference"],
        "curves": over_seeds,
        "losses": over_seeds,
    }


def deviations(figure: Figure) -> list[str]:
    """Return the entries for deviations in the legend above the panels."""
    texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return [text for text in texts if "std" in text]


def test_loss_curves_count_epochs_through_all_phases(tmp_path: Path) -> None:
    lines = [epoch_line("ss_head", epoch) for epoch in (1, 2)]
    for line in lines:
        for key in ("loss/ce", "loss/kd", "weighted/ce", "weighted/kd"):
            del line[key]
        line["loss/contrast"] = line["weighted/contrast"] = float(line["epoch"])
    lines += [epoch_line("distill", epoch, 50.0) for epoch in (1, 2, 3)]
    put_metrics(tmp_path, lines)
    runs = [read_metrics(tmp_path, never)]
    raw, weighted = loss_curves(runs, LOSS), loss_curves(runs, WEIGHTED)
    assert list(raw) == ["contrast", "ce", "kd"]
    assert raw["contrast"].epochs == (1, 2)
    assert raw["ce"].epochs == (3, 4, 5)
    assert raw["ce"].mean == (3.0, 1.5, 1.0)
    assert list(weighted["ce"].mean) == pytest.approx([0.3, 0.15, 0.1])
    assert top1_curve(runs).epochs == (1, 2, 3)


@pytest.mark.parametrize(
    "line",
    [
        *("", "{", "[]", "null", "\xff", "[" * 100_000, '{"stage": "a"}'),
        *(
            '{"stage": "\\u001b", "epoch": 1}',
            '{"stage": "a", "epoch": -1}',
            '{"stage": "a", "epoch": 10000000}',
        ),
    ],
)
def test_malformed_lines_are_counted_and_skipped(tmp_path: Path, line: str) -> None:
    good = json.dumps(epoch_line("distill", 1, 50.0))
    (tmp_path / "metrics.jsonl").write_bytes(f"{good}\n{line}\n{good}\n".encode("latin-1"))
    warnings: list[str] = []
    assert len(read_metrics(tmp_path, warnings.append)) == 2
    assert len(warnings) == 1
    assert "1 of 3 lines" in warnings[0]


def test_metrics_that_are_not_finite_numbers_are_skipped(tmp_path: Path) -> None:
    odd: dict[str, Any] = {"a": math.nan, "b": math.inf, "c": "1", "d": True, "e": None, "\x1b": 1}
    put_metrics(tmp_path, [{"stage": "a", "epoch": 1, "good": 1, **odd, "f": 10**400, "g": -1e31}])
    (line,) = read_metrics(tmp_path, never)
    assert line.epoch == 1
    assert line.metrics == {"good": 1}


@pytest.mark.parametrize(
    ("places", "gap"),
    [([0.5], 0.1), ([0.0, 0.0, 0.0], 0.1), ([0.9, 0.95, 1.0], 0.2), ([0.1, 0.5, 0.52], 0.05)],
)
def test_labels_do_not_overlap_or_leave_the_panel(places: list[float], gap: float) -> None:
    moved = avoid_overlap(places, gap)
    assert all(b - a >= gap - 1e-9 for a, b in pairwise(moved))
    assert min(moved) >= 0
    assert max(moved) <= 1
    overlap = any(b - a < gap for a, b in pairwise(places))
    assert overlap or moved == places


def test_rows_have_the_same_colours_in_all_figures(tmp_path: Path) -> None:
    put_alone(tmp_path, "alone", [60.0, 65.0])
    put_run(tmp_path, "kd", [60.0, 66.0])
    put_run(tmp_path, "at", [60.0, 67.0], method="at")
    put_run(tmp_path, "other pair", [60.0, 68.0], method="at", teacher="vgg13", student="vgg8")
    found = figures(tmp_path)
    pairs = ("resnet56-resnet20", "vgg13-vgg8")
    assert set(found) == {"gain", *(f"{kind}-{p}" for kind in ("curves", "losses") for p in pairs)}

    def colours(name: str) -> dict[float, object]:
        """Return the colours by the last accuracy, which is different in each row."""
        whole, _ = found[name].axes
        return {float(np.asarray(line.get_ydata())[-1]): line.get_color() for line in whole.lines}

    first, second = colours("curves-resnet56-resnet20"), colours("curves-vgg13-vgg8")
    assert set(first) == {65.0, 66.0, 67.0}
    assert len(set(first.values())) == 3
    assert second == {68.0: first[67.0]}


def test_each_group_has_other_names_of_figures(tmp_path: Path) -> None:
    put_run(tmp_path, "recipe")
    put_run(tmp_path, "short", difference={"schedule.epochs": 24})
    put_run(tmp_path, "crd", difference={"teacher.epoch": "last"})
    names = set(figures(tmp_path))
    curves = {name for name in names if name.startswith("curves-")}
    assert curves == {
        "curves-cifar100-the-recipe-resnet56-resnet20",
        "curves-cifar100-the-recipe-the-CRD-benchmark-resnet56-resnet20",
        "curves-cifar100-schedule.epochs=24-resnet56-resnet20",
    }


def test_large_values_and_long_names_can_be_drawn(tmp_path: Path) -> None:
    lines = [epoch_line("a", 1, 9e29), epoch_line("a", 999_999, 50.0, **{"loss/vid": -9e29})]
    put_metrics(put_run(tmp_path, "run", student="s" * 500, method="m" * 500), lines)
    put_run(tmp_path, "other", student="s" * 501)
    assert top1_curve([read_metrics(tmp_path / "run", never)]).mean == (50.0,)
    found = figures(tmp_path)
    assert len(found) == 4
    assert all(len(name) < 200 for name in found)
    assert all(as_png(figure).startswith(b"\x89PNG") for figure in found.values())


@pytest.mark.parametrize("least", [0.5, 1e-2, 3e-4, 1e-6, 1e-9])
def test_loss_axes_have_a_few_labels_over_any_decades(tmp_path: Path, least: float) -> None:
    lines = [epoch_line("a", e, 50.0, **{"loss/kd": loss}) for e, loss in ((1, 9.0), (2, least))]
    put_metrics(put_run(tmp_path, "run"), lines)
    (axes,) = figures(tmp_path)["losses-resnet56-resnet20"].axes
    low, high = axes.get_ylim()
    assert 2 <= sum(low <= place <= high for place in axes.get_yticks()) <= 7


def test_without_metrics_nothing_is_drawn(tmp_path: Path) -> None:
    folder = put_run(tmp_path, "run")
    (folder / "metrics.jsonl").unlink()
    assert figures(tmp_path) == {}


HOSTILE = ("$\\frac{", "$x$ $y$", "</text><script>alert(1)</script>", "--><b>", "_hidden", "\u4e2d")


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_can_be_drawn(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    data: dict[str, Any] = {"dataset": name, "dataset_source": "folder", "student": name}
    put_alone(tmp_path, "alone", [69.0, 70.0], **data)
    put_run(tmp_path, "kd", [69.0, 71.0], teacher=name, **data)
    folder = put_run(tmp_path, "x", teacher=name, method=name, **data)
    put_metrics(folder, [epoch_line(name, e, 50.0 + e, **{f"loss/{name}": 1.0}) for e in (1, 2)])
    for key, figure in figures(tmp_path).items():
        assert key.isascii()
        assert "/" not in key
        svg = as_svg(figure)
        tags = {element.tag.partition("}")[2] for element in ET.fromstring(svg).iter()}
        assert "text" in tags
        assert not tags & {"script", "b"}
        as_png(figure)
    assert [str(warning.message) for warning in recwarn] == []


def test_image_files_are_deterministic_with_the_right_size(tmp_path: Path) -> None:
    put_alone(tmp_path, "alone", [69.0, 70.0])
    put_run(tmp_path, "kd", [69.0, 71.0])
    first, again = figures(tmp_path), figures(tmp_path)
    for name, figure in first.items():
        png, svg = as_png(figure), as_svg(figure)
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", png[16:24])
        inches = figure.get_size_inches()
        assert (width, height) == pytest.approx(tuple(inches * 150), abs=1)
        assert width >= 900
        root = ET.fromstring(svg)
        points = [float(root.attrib[key].removesuffix("pt")) for key in ("width", "height")]
        assert points == pytest.approx(list(inches * 72), abs=0.01)
        assert svg == as_svg(again[name])
