"""The measured figures in the documents, held against the metrics of the runs they come from."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A sweep's epochs, and the rows of it that have three seeds.
SWEEPS = {
    "cpu": (16, {"alone", "kd", "fitnet", "at", "nst", "crd", "sskd"}),
    "short": (24, {"alone", "kd", "fitnet", "at", "crd", "sskd"}),
}


def curves(sweep: str) -> dict[str, list[float]]:
    """Return by row the top-1 of each bf16 run's last epoch, read from its metrics alone."""
    found: dict[str, list[float]] = {}
    for path in sorted((ROOT / "results/runs" / sweep).glob("*/*/*/**/metrics.jsonl")):
        config = path.with_name("config.yaml").read_text(encoding="utf-8")
        if "phases" in path.parts or "precision: bf16" not in config:
            continue
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        folder = path.parent.parent.name
        row = "alone" if folder == "resnet20" else folder
        found.setdefault(row, []).append(lines[-1]["test/top1"])
        assert lines[-1]["epoch"] == SWEEPS[sweep][0]
    return found


def figure(values: list[float]) -> str:
    """Return the mean and, of several values, the sample standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def table(page: str, heading: str, first: str) -> list[list[str]]:
    """Return the rows of the table beneath ``heading`` whose first cell is ``first``."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    lines = re.split(r"\n#+ ", text)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    start = next(number for number, row in enumerate(rows) if row[0] == first)
    return [row for row in rows[start:] if set(row[0]) - set("-: ")]


def test_the_front_page_has_what_the_runs_reached() -> None:
    header, cells, *_ = table("README.md", "### Measured so far", "alone")
    measured = {name.lower(): cell for name, cell in zip(header, cells, strict=True)}
    reached = curves("short")
    assert set(measured) == set(reached) - {"cc", "fsp", "nst"}
    assert measured == {name: figure(reached[name]) for name in measured}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_the_page_of_results_has_what_the_runs_reached(sweep: str) -> None:
    _, *rows = table("results/README.md", f"## The `{sweep}` sweep", "resnet20")
    reached = curves(sweep)
    assert {row[0].lower() for row in rows} == set(reached)
    means = {name: statistics.mean(values) for name, values in reached.items()}
    for name, top1, over_alone, over_kd, *_ in rows:
        row = name.lower()
        assert top1 == f"{figure(reached[row])} ({len(reached[row])})"
        gains = {"alone": over_alone, "kd": over_kd}
        for other, text in gains.items():
            if text:
                assert float(text) == pytest.approx(means[row] - means[other], abs=0.0051)
        assert bool(over_alone) == (row != "alone")
        assert bool(over_kd) == (row not in ("alone", "kd"))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_all_seeds_of_the_first_rows_are_there(sweep: str) -> None:
    several = SWEEPS[sweep][1]
    assert {name: len(values) for name, values in curves(sweep).items()} == {
        name: 3 if name in several else 1 for name in curves(sweep)
    }
