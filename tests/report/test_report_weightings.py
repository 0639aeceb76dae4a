"""The weights of CE and KD in the report: labels, older results, published values."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Compose
from report_runs import RESULT, never, put_alone, put_run, texts

from sskd import CONF
from sskd import report as report_package
from sskd.models import build_model
from sskd.report.groups import Entry
from sskd.report.published import display_name
from sskd.report.report import read_report
from sskd.runs.recipe import diff_from_recipe
from sskd.runs.weightings import RECIPE, WEIGHTED_METHODS, WEIGHTINGS, name_weighting
from sskd.teachers.find import run_location

HERE = ("resnet56", "resnet20")
FROM_LAST = {"teacher.epoch": "last"}
BENCHMARK = {"method.weights.ce": 1.0, "method.weights.kd": 0.0}
COMMON = {"method.weights.ce": 1.0, "method.weights.kd": 1.0}
# The SSKD paper's competitors (its appendix 6.4) and the further methods of the CRD benchmark:
# the first recipe trained them with CE, KD and the method's term.
COMPETITORS = [
    *("fitnet", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "crd"),
    *("cc", "nst", "fsp"),
]


def every_row(root: Path) -> dict[str, Entry]:
    tables = read_report(root, never).tables("last")
    entries = [entry for table in tables for entry in table.entries]
    return {entry.row: entry for entry in entries}


def rows(root: Path, table: str = "similar") -> dict[str, Entry]:
    return {name: entry for name, entry in every_row(root).items() if entry.table == table}


def put(root: Path, method: str, recipe: int | None, **difference: Any) -> None:
    folder = put_run(root, f"{method}-{len(list(root.glob('*')))}", method=method)
    changes = {key.replace("__", "."): value for key, value in difference.items()}
    record = RESULT | {"method": method, "difference": changes, "recipe": recipe}
    if recipe is None:
        del record["recipe"]
    (folder / "result.json").write_text(json.dumps(record))


def test_weightings_equal_the_configuration(composed: Compose) -> None:
    files = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("weighting/*.yaml")}
    weights = {name: (values["ce"], values["kd"]) for name, values in files.items()}
    # It differs from SSKD's in the weight of CE alone, which is its label.
    assert weights.pop("imagenet") == (1.0, WEIGHTINGS["sskd"][1])
    assert weights == WEIGHTINGS
    texts = {path.stem: path.read_text() for path in CONF.glob("method/*.yaml")}
    assert {name for name, text in texts.items() if "${weighting." in text} == WEIGHTED_METHODS


@pytest.mark.parametrize("method", ["at", "ab", "nst"])
@pytest.mark.parametrize("weighting", ["sskd", "crd_benchmark", "common"])
def test_a_label_repeats_the_option(composed: Compose, method: str, weighting: str) -> None:
    pair = ("pair=resnet56-resnet20", f"method={method}")
    changed = diff_from_recipe(composed(*pair, f"weighting={weighting}"))
    named = name_weighting(method, RECIPE, {key: str(value) for key, value in changed.items()})
    # The default has no label; the others have the word of the command line.
    assert named == ({} if weighting == "sskd" else {"weighting": weighting})


@pytest.mark.parametrize("method", COMPETITORS)
def test_results_of_the_first_recipe_have_another_row(tmp_path: Path, method: str) -> None:
    put(tmp_path, method, None)
    put(tmp_path, method, None, method__weights__kd=0.0)
    put(tmp_path, method, None, method__weights__ce=0.1, method__weights__kd=0.9)
    put(tmp_path, method, None, method__weights__kd=0.5)
    put(tmp_path, method, None, method__weights__ce=0.1)
    name = display_name(method)
    assert list(rows(tmp_path)) == [
        "teacher",
        name,
        f"{name} (method.weights.ce=1.0, method.weights.kd=0.5)",
        f"{name} (method.weights.kd=1.0)",
        f"{name} (weighting=common)",
        f"{name} (weighting=crd_benchmark)",
    ]


def test_both_recipes_share_the_row_of_equal_weights(tmp_path: Path) -> None:
    for recipe, seed, changes in ((None, 0, {}), (1, 1, {}), (2, 2, COMMON), (2, 3, {})):
        record: dict[str, Any] = {"method": "fitnet", "seed": seed, "difference": changes}
        folder = put_run(tmp_path, f"run{seed}", [60.0 + seed], **record, recipe=recipe or 1)
        if recipe is None:
            path = folder / "result.json"
            path.write_text(path.read_text().replace(', "recipe": 1', ""))
            assert "recipe" not in path.read_text()
    found = rows(tmp_path)
    assert (found["FitNet (weighting=common)"].mean, found["FitNet (weighting=common)"].n) == (
        *(61.0, 3),
    )
    assert (found["FitNet"].mean, found["FitNet"].n) == (63.0, 1)


@pytest.mark.parametrize("method", ["kd", "sskd", "dist"])
@pytest.mark.parametrize("recipe", [None, 1, 2])
def test_methods_outside_the_weightings_keep_their_weights(
    tmp_path: Path, method: str, recipe: int | None
) -> None:
    put(tmp_path, method, recipe)
    put(tmp_path, method, recipe, **{key.replace(".", "__"): 1.0 for key in COMMON})
    name = display_name(method)
    assert list(rows(tmp_path)) == [
        "teacher",
        name,
        f"{name} (method.weights.ce=1.0, method.weights.kd=1.0)",
    ]


@pytest.mark.parametrize(
    ("weights", "label"),
    [
        ({"kd": 0}, "AT (method.weights.kd=0)"),
        ({"ce": 1, "kd": 0}, "AT (weighting=crd_benchmark)"),
        ({"ce": 1.0}, "AT (method.weights.ce=1.0)"),
        ({"ce": 1.0, "kd": 1.0, "at": 10.0}, "AT (method.weights.at=10.0, weighting=common)"),
        ({"ce": 0.1, "kd": 0.9}, "AT"),
        ({"ce": None, "kd": 0.0}, "AT (method.weights.ce=null, method.weights.kd=0.0)"),
        ({"ce": "nan", "kd": 0.0}, "AT (method.weights.ce=nan, method.weights.kd=0.0)"),
    ],
)
def test_only_the_exact_weights_have_the_name(
    tmp_path: Path, weights: dict[str, Any], label: str
) -> None:
    put(tmp_path, "at", 2, **{f"method__weights__{key}": value for key, value in weights.items()})
    assert list(rows(tmp_path)) == ["teacher", label]


@pytest.mark.parametrize("recipe", [0, 3, "2", None, -1, 2.0])
def test_unknown_recipes_are_skipped(tmp_path: Path, recipe: object) -> None:
    put_run(tmp_path, "run", recipe=recipe)
    warnings: list[str] = []
    assert read_report(tmp_path, warnings.append).results == []
    assert len(warnings) == 1
    assert "'recipe'" in warnings[0]


def published_top1(row: str, source: int = 0) -> float:
    """Return a published value of the pair, read from the CSV file."""
    name = ("published.csv", "published_crd_benchmark.csv")[source]
    path = Path(report_package.__file__).with_name(name)
    with path.open(encoding="utf-8") as file:
        (line,) = (
            line
            for line in csv.DictReader(file)
            if (line["teacher"], line["student"], line["row"]) == (*HERE, row)
        )
    return float(line["top1"])


@pytest.mark.parametrize(
    ("changes", "sskd", "benchmark"),
    [
        ({}, True, False),
        (COMMON, False, False),
        (COMMON | FROM_LAST, False, False),
        (BENCHMARK, False, False),
        (BENCHMARK | FROM_LAST, False, True),
        (FROM_LAST, False, False),
        ({"method.weights.kd": 0.0} | FROM_LAST, False, False),
        # Older results have the epoch in the difference also if the teacher is a file.
        (BENCHMARK | FROM_LAST | {"teacher.digest": "0123456789abcdef"}, False, True),
        (BENCHMARK | {"teacher.digest": "0123456789abcdef"}, False, False),
    ],
)
def test_published_values_need_the_published_weights(
    tmp_path: Path, changes: dict[str, Any], sskd: bool, benchmark: bool
) -> None:
    methods = {"fitnet": "FitNet", "ab": "AB", "crd": "CRD", "nst": "NST", "fsp": "FSP"}
    for method in methods:
        put_run(tmp_path, method, method=method, difference=changes, teacher_top1=72.34)
    report = read_report(tmp_path, never)
    entries = [entry for table in report.tables("last") for entry in table.entries]
    found = {entry.row.partition(" ")[0]: entry for entry in entries}
    for name in methods.values():
        expected = None
        if sskd and name not in ("NST", "FSP"):  # which are not in that paper
            expected = published_top1(name)
        if benchmark:
            expected = published_top1(name, source=1)
        assert found[name].published == expected, name
        assert found[name].table == ("the CRD benchmark, similar" if benchmark else "similar")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teachers") / "resnet56.pth"
    torch.save(build_model("resnet56", 100).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("words", "source"),
    [
        (["method=kd"], 0),
        (["method=kd", "teacher.epoch=last"], 1),
        (["method=fitnet"], 0),
        (["method=fitnet", "weighting=crd_benchmark", "teacher.epoch=last"], 1),
        (["method=crd", "weighting=crd_benchmark", "teacher.epoch=last"], 1),
        (["method=fitnet", "teacher.epoch=last"], None),
        (["method=crd", "weighting=crd_benchmark"], None),
        (["method=sskd"], 0),
        (["method=sskd", "teacher.epoch=last"], None),
    ],
)
def test_the_requested_epoch_of_a_teacher_file_counts(
    composed: Compose, tmp_path: Path, checkpoint: Path, words: list[str], source: int | None
) -> None:
    config = composed("pair=resnet56-resnet20", f"teacher.checkpoint={checkpoint}", *words)
    changed = run_location(config)[1]
    assert "teacher.epoch" not in changed
    assert config.teacher
    asked, method = config.teacher.epoch, config.method.name
    top1 = 73.44 if source == 0 and method != "kd" else 72.34  # of SSKD, of the benchmark
    put_run(
        tmp_path,
        "run",
        method=method,
        difference=changed,
        teacher_epoch=asked,
        teacher_top1=top1,
    )
    (found,) = (entry for name, entry in every_row(tmp_path).items() if name != "teacher")
    expected = None if source is None else published_top1(display_name(config.method.name), source)
    assert found.published == expected
    assert found.table == ("the CRD benchmark, similar" if source == 1 else "similar")


def test_each_weighting_has_a_row(tmp_path: Path) -> None:
    put_alone(tmp_path, "alone", [60.0])
    for number, changes in enumerate(({}, BENCHMARK, COMMON)):
        put_run(tmp_path, f"fitnet{number}", method="fitnet", difference=changes)
        put_run(tmp_path, f"ab{number}", method="ab", difference=changes)
    report = read_report(tmp_path, never)
    (table,) = (table for table in report.tables("last") if table.epoch)
    filled = [row[0].split("\n")[0] for row in texts(table) if any(row[1:])]
    assert filled == [
        *("teacher", "student"),
        *("FitNet", "FitNet (weighting=common)", "FitNet (weighting=crd_benchmark)"),
        *("AB", "AB (weighting=common)", "AB (weighting=crd_benchmark)"),
    ]
    missing = {cell.row for cell in report.missing()}
    assert not {"FitNet", "AB"} & missing
