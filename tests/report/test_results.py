"""The measured values in the documents equal the metrics of their runs."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections import Counter
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from sskd.report.published import display_name
from sskd.report.render import render_markdown
from sskd.report.report import read_report

ROOT = Path(__file__).parents[2]
# By sweep: the number of epochs, and the rows that have three seeds.
SWEEPS = {
    "cpu": (16, {"alone", "kd", "fitnet", "at", "nst", "crd", "sskd"}),
    "short": (24, {"alone", "kd", "fitnet", "at", "crd", "sskd"}),
}
# Of the runs in float32 beside the sweep ``short``, by row.
FP32_SEEDS = {"alone": [0, 1, 2], "kd": [0, 1, 2]}
RUNS = sorted(each.name for each in (ROOT / "results/runs").iterdir())
EPOCHS = {**{sweep: epochs for sweep, (epochs, _) in SWEEPS.items()}, "short_fp32": 24}


def runs(sweep: str) -> dict[str, list[Path]]:
    """Return the folders of the runs by row."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "results/runs" / sweep).glob("*/*/*/**/metrics.jsonl")):
        if "phases" in path.parts:
            continue
        folder = path.parent.parent.name
        found.setdefault("alone" if folder == "resnet20" else folder, []).append(path.parent)
    return found


def last_top1(folder: Path, epochs: int) -> float:
    """Return the top-1 of a run's last epoch, read from its metrics."""
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["epoch"] == epochs
    return float(line["test/top1"])


def curves(sweep: str) -> dict[str, list[float]]:
    """Return the top-1 of each run's last epoch by row."""
    epochs = EPOCHS[sweep]
    return {row: [last_top1(each, epochs) for each in found] for row, found in runs(sweep).items()}


def of_result(folder: Path, key: str) -> Any:
    return json.loads((folder / "result.json").read_text())[key]


def mean_std(values: list[float]) -> str:
    """Return the mean and, for several values, the sample standard deviation as text."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def table(page: str, heading: str, first: str) -> list[list[str]]:
    """Return the rows of the table beneath ``heading`` whose first cell is ``first``."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    lines = re.split(r"\n#+ ", text)[0].splitlines()
    start = next(number for number, line in enumerate(lines) if cells(line)[0] == first)
    rows = map(cells, takewhile(lambda line: line.startswith("|"), lines[start:]))
    return [row for row in rows if set(row[0]) - set("-: ")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_front_page_equals_the_metrics() -> None:
    header, values, *_ = table("README.md", "### Measured so far", "resnet20")
    assert values[0] == "measured, 24 epochs"
    measured = {name.lower(): cell for name, cell in zip(header[1:], values[1:], strict=True)}
    reached = curves("short")
    assert set(measured) == set(reached) - {"cc", "fsp", "nst"}
    assert measured == {name: mean_std(reached[name]) for name in measured}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_page_of_results_equals_the_metrics(sweep: str) -> None:
    _, *rows = table("results/README.md", f"## The `{sweep}` sweep", "resnet20")
    reached = curves(sweep)
    assert {row[0].lower() for row in rows} == set(reached)
    means = {name: statistics.mean(values) for name, values in reached.items()}
    for name, top1, over_alone, over_kd, agreement, *_ in rows:
        row = name.lower()
        if row != "alone":
            agreed = statistics.mean(of_result(each, "agreement") for each in runs(sweep)[row])
            assert agreement == f"{agreed:.2f} %"
        assert top1 == f"{mean_std(reached[row])} ({len(reached[row])})"
        gains = {"alone": over_alone, "kd": over_kd}
        for other, text in gains.items():
            if text:
                assert float(text) == pytest.approx(means[row] - means[other], abs=0.0051)
        assert bool(over_alone) == (row != "alone")
        assert bool(over_kd) == (row not in ("alone", "kd"))


def test_the_devices_and_commits_are_those_of_the_runs() -> None:
    _, *rows = table("results/README.md", "# Measured results", "sweep")
    found: Counter[tuple[str, ...]] = Counter()
    for path in (ROOT / "results/runs").glob("*/cifar100/[ds]*/**/result.json"):
        result = json.loads(path.read_text())
        commit = re.sub(r"^([0-9a-f]{7})[0-9a-f]+", r"\1", result["commit"] or "not recorded")
        sweep = path.relative_to(ROOT / "results/runs").parts[0]
        torch = result["versions"]["torch"]
        found[sweep, result["precision"], result["device"], torch, commit] += 1
    assert Counter({(row[0], *row[2:]): int(row[1]) for row in rows}) == found


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_sweep_expects_what_was_measured(sweep: str) -> None:
    text = (ROOT / "sweeps" / f"{sweep}.yaml").read_text(encoding="utf-8")
    expected = re.findall(r"(\w+) (\d\d\.\d)\b(?!\d)", text.partition("(results/README.md): ")[2])
    assert len(expected) >= 4
    reached = curves(sweep)
    for name, top1 in expected:
        assert top1 == f"{statistics.mean(reached[name.lower()]):.1f}"


@pytest.mark.parametrize(
    ("heading", "column", "name"),
    [
        ("## The `cpu` sweep with `weighting=common`", 1, "cpu_common"),
        ("## CIFAR-100, every method on a tenth of the images", 1, "tenth"),
        ("## CIFAR-100, two epochs on a CPU", 2, "two_epochs"),
    ],
)
def test_the_page_of_earlier_results_equals_their_csv(heading: str, column: int, name: str) -> None:
    with (ROOT / f"results/cifar100_{name}.csv").open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["epoch"] == "last"]
    committed = {}
    for line in lines:
        deviation = f" ± {float(line['std']):.2f}" if line["std"] else ""
        row = line["row"].removesuffix(" (weighting=common)").replace("student", "alone")
        committed[row] = f"{float(line['mean']):.2f}{deviation}"
    del committed["teacher"]  # the page names it once, in words
    _, *rows = table("results/archive.md", heading, "resnet20")
    assert {row[0]: re.sub(r" \(\d\)", "", row[column]) for row in rows} == committed


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_first_rows_have_all_seeds(sweep: str) -> None:
    several = SWEEPS[sweep][1]
    for row, folders in runs(sweep).items():
        seeds = [of_result(each, "seed") for each in folders]
        assert sorted(seeds) == ([0, 1, 2] if row in several else [0])


def test_the_table_of_both_precisions_equals_the_metrics() -> None:
    _, *rows = table("results/README.md", "### All images, 24 epochs", "resnet20")
    assert {each[0].lower() for each in rows} == set(runs("short_fp32"))
    for row, folders in runs("short_fp32").items():
        seeds = [of_result(each, "seed") for each in folders]
        assert seeds == FP32_SEEDS[row]
        measured = [each for each in rows if each[0].lower() == row]
        fp32, bf16 = (curves(sweep)[row][: len(seeds)] for sweep in ("short_fp32", "short"))
        name = measured[0][0]
        expected = [
            [name, str(seed), f"{one:.2f}", f"{other:.2f}", f"{other - one:+.2f}"]
            for seed, one, other in zip(seeds, fp32, bf16, strict=True)
        ]
        difference = statistics.mean(bf16) - statistics.mean(fp32)
        expected.append([name, "mean", mean_std(fp32), mean_std(bf16), f"{difference:+.2f}"])
        assert measured == expected


def test_the_table_of_later_methods_on_all_images_equals_the_metrics() -> None:
    _, *rows = table("results/README.md", "## DKD and LS on all images", "resnet20")
    later = runs("short_later")
    kd = statistics.mean(curves("short")["kd"])
    expected = []
    for row, folders in {"kd": runs("short")["kd"], **later}.items():
        values = [last_top1(each, 24) for each in folders]
        agreed = statistics.mean(of_result(each, "agreement") for each in folders)
        gain = "" if row == "kd" else f"{statistics.mean(values) - kd:+.2f}"
        top1 = f"{mean_std(values)} ({len(values)})"
        expected.append([display_name(row), top1, gain, f"{agreed:.2f} %"])
    assert rows == expected
    seeds = {row: [of_result(each, "seed") for each in folders] for row, folders in later.items()}
    assert seeds == {"dkd": [0], "ls": [0]}


def prose(page: str) -> str:
    """Return the text of a page with a single space between words."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_the_standard_errors_of_the_short_sweep_equal_the_metrics() -> None:
    reached = curves("short")
    sskd = reached.pop("sskd")

    def apart(row: str) -> tuple[str, str]:
        difference = statistics.mean(sskd) - statistics.mean(reached[row])
        error = math.sqrt((statistics.variance(sskd) + statistics.variance(reached[row])) / 3)
        return f"{difference:.2f}", f"{error:.2f}"

    kd, at, fitnet, crd = map(apart, ("kd", "at", "fitnet", "crd"))
    assert (
        f"It is above KD (by {kd[0]}, standard error of the difference of the means {kd[1]}), "
        f"AT ({', '.join(at)}) and FitNet ({', '.join(fitnet)}) with each seed. "
        f"It is {crd[0]} above CRD ({crd[1]})"
    ) in prose("results/README.md")
    for row in ("kd", "at", "fitnet"):
        assert all(one > other for one, other in zip(sskd, reached[row], strict=True))


def test_the_deviations_over_seeds_of_the_short_sweep_equal_the_metrics() -> None:
    reached = curves("short")
    rows = SWEEPS["short"][1] - {"alone"}
    pooled = math.sqrt(statistics.mean(statistics.variance(reached[row]) for row in rows))
    text = prose("results/README.md")
    assert f"the five methods with three seeds is {pooled:.2f}, so two single runs" in text
    assert f"standard errors if they are {2 * pooled * math.sqrt(2):.1f} apart" in text
    assert f"and the mean of three are {2 * pooled * math.sqrt(1 + 1 / 3):.2f}." in text


def test_the_intervals_of_the_precisions_equal_the_metrics() -> None:
    # Student's t with 2 degrees of freedom, as tables have it.
    quantile = 4.303
    intervals = []
    for row in FP32_SEEDS:
        pairs = zip(curves("short")[row], curves("short_fp32")[row], strict=True)
        differences = [bf16 - fp32 for bf16, fp32 in pairs]
        mean, half = statistics.mean(differences), quantile * statistics.stdev(differences)
        half /= math.sqrt(3)
        intervals.append(f"{mean - half:.2f} to {mean + half:.2f}")
    text = prose("results/README.md")
    assert f"intervals of the mean differences are {' and '.join(intervals)} (Student's t" in text


def test_make_results_writes_the_tables_of_all_runs() -> None:
    (names,) = re.findall(r"for sweep in (.+); do", (ROOT / "Makefile").read_text())
    assert sorted(names.split()) == RUNS


@pytest.mark.parametrize("sweep", RUNS)
def test_the_committed_tables_are_those_of_the_report(sweep: str) -> None:
    report = read_report(ROOT / "results/runs" / sweep, pytest.fail)
    markdown = "\n".join(["# Results\n", *map(render_markdown, report.tables("last"))])
    written = ROOT / f"results/cifar100_{sweep}"
    assert written.with_suffix(".md").read_text(encoding="utf-8") == markdown
    assert written.with_suffix(".csv").read_text(encoding="utf-8") == report.csv()


def later_runs() -> dict[str, list[Path]]:
    """Return the folders of the later methods' runs by row, in the order of the seeds."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "results/runs/later/cifar100").glob("[ds]*/**/result.json")):
        method = of_result(path.parent, "method")
        row = "alone" if method == "vanilla" else display_name(method)
        found.setdefault(row, []).append(path.parent)
    return found


def terms_of(folder: Path) -> str:
    """Return each unweighted term of the last phase in its first epoch and in its last."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = (line for line in lines if line["stage"] == lines[-1]["stage"])
    names = [key for key in first if key.startswith("loss/")]
    return "; ".join(
        f"{name.removeprefix('loss/')} {first[name]:.4g} → {last[name]:.4g}" for name in names
    )


def test_the_table_of_later_methods_equals_the_metrics() -> None:
    heading = "## The later methods on a tenth of the images"
    _, *rows = table("results/README.md", heading, "resnet20")
    reached = later_runs()
    assert {row[0] for row in rows} == set(reached)
    for name, top1, passes, agreement, terms in rows:
        folders = reached[name]
        values = [of_result(each, "top1")["last"] for each in folders]
        assert top1 == f"{mean_std(values)} ({len(values)})"
        assert passes == str(of_result(folders[0], "passes"))
        if name != "alone":
            agreed = statistics.mean(of_result(each, "agreement") for each in folders)
            assert agreement == f"{agreed:.2f} %"
        assert terms == terms_of(folders[0])


def test_the_terms_of_later_methods_fall() -> None:
    for name, folders in later_runs().items():
        for folder in folders:
            for term in terms_of(folder).split("; "):
                first, last = map(float, re.findall(r"\S+(?= →)|(?<=→ )\S+", term))
                assert last < first, (name, term)
            # Guesses reach 1 % with a standard deviation of 0.1 points.
            assert of_result(folder, "top1")["last"] > 2, name


def test_the_table_of_a_quarter_of_the_images_equals_the_metrics() -> None:
    _, *rows = table("results/README.md", "## Few-shot: a quarter of the images", "resnet20")
    students = ROOT / "results/runs/few_shot/cifar100/distill/resnet56-resnet20"
    assert {row[0].lower() for row in rows} == {each.name for each in students.iterdir()}
    for name, *values in rows:
        folders = sorted((students / name.lower()).iterdir())
        assert [of_result(each, "seed") for each in folders] == [0, 1, 2]
        top1 = [last_top1(each, 8) for each in folders]
        agreed = statistics.mean(of_result(each, "agreement") for each in folders)
        seeds = [f"{value:.2f}" for value in top1]
        assert values == [f"{mean_std(top1)} (3)", *seeds, f"{agreed:.2f} %"]
