"""The benchmarks run and write what they measured. The speed itself is not tested."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import SMALL
from starting import run

from benchmarks import grid, methods, packed, scale, throughput
from benchmarks.conventional import CONVENTIONAL, ConventionalSSKD, kept_rows, softened_kl
from benchmarks.throughput import Measured, Row, Turns
from benchmarks.workload import Case, noise
from sskd.methods.kd import kd_loss
from sskd.methods.sskd import keep_rows
from sskd.methods.tasks import similarity
from sskd.models import build_model

RESULTS = Path(__file__).parents[2] / "results"
# Runs a module and forks its processes, which would otherwise start a new Python.
FORKS = """
import multiprocessing, runpy, sys
context = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method: context
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def test_the_cost_of_methods_is_written(tmp_path: Path) -> None:
    command = ["-c", FORKS, "benchmarks.methods", "--pairs", "wrn_16_2-resnet8"]
    small = ["--methods", "kd", "ft", "fsp", "--batch", "2", "--rounds", "2", "--images", "20"]
    out = ["--device", "cpu", "--out", str(tmp_path / "new" / "cost")]
    done = run(*command, *small, *out)
    assert done.returncode == 0, done.stderr
    assert "method=fsp wrn_16_2-resnet8: needs the same channels" in done.stderr
    costs = json.loads((tmp_path / "new" / "cost.json").read_text())["costs"]
    assert [(cost["method"], cost["phase"]) for cost in costs] == [
        ("kd", "distill"), ("ft", "paraphraser"), ("ft", "distill"),
    ]  # fmt: skip
    assert all(cost[key] > 0 for cost in costs for key in ("seconds", "base_seconds", "memory"))
    table = (tmp_path / "new" / "cost.md").read_text()
    assert [line for line in table.splitlines() if line] == [
        line for line in done.stdout.splitlines() if line
    ]


def test_throughput_is_written(tmp_path: Path) -> None:
    command = ["-c", FORKS, "benchmarks.throughput", "--works", "kd", "evaluation"]
    small = ["--pair", "resnet14-resnet8", "--batch", "4", "--rounds", "2", "--steps", "1"]
    more = ["--images", "24", "--workers", "1", "--precisions", "fp32", "--device", "cpu"]
    out = ["--out", str(tmp_path / "new" / "throughput")]
    done = run(*command, *small, *more, "--precompute", *out)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "new" / "throughput.json").read_text())["rows"]
    assert [row["work"] for row in rows] == ["kd", "evaluation"]
    for row in rows:
        for side in (row["suite"], row["baseline"]):
            assert len(side["rounds"]) == 2
            assert min(side["rounds"]) > 0
            assert 0 <= side["data_share"] <= 1
    assert rows[0]["suite"]["flop_share"] > 0
    text = (tmp_path / "new" / "throughput.md").read_text()
    assert "teacher's outputs precomputed" in text.splitlines()[0]
    assert text.count("| kd |") == 3
    assert text.count("| evaluation |") == 1


def test_the_fast_path_is_compared_with_a_plain_run(tmp_path: Path) -> None:
    command = ("-m", "benchmarks.fast_path", "method=kd,sskd", *SMALL)
    done = run(*command, "schedule.epochs=2", "wandb.mode=disabled", "--runs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["distill", "distill", "ss_head", "distill", "distill"]
    for _, _, _, fast, plain, *_ in rows:
        assert float(fast) == pytest.approx(float(plain), rel=1e-2)


@pytest.mark.parametrize("method", sorted(CONVENTIONAL))
def test_a_conventional_step_trains_every_parameter(method: str) -> None:
    images = noise(40, torch.device("cpu"))
    student, teacher = (build_model(name, images.num_classes) for name in ("resnet8", "resnet14"))
    side = CONVENTIONAL[method](student, teacher, images, batch_size=4, workers=0)
    before = [parameter.detach().clone() for parameter in side.student.parameters()]
    batch = side.draw()
    side.train(batch)
    assert all(map(math.isfinite, side.metrics))
    changed = zip(before, side.student.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in changed)


def test_the_conventional_losses_are_those_of_the_suite() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 20, generator=generator)
    target = torch.randint(20, (60,), generator=generator)
    for ratio in (0.0, 0.5, 1.0):
        mask = keep_rows(scores, target, ratio)
        indices = kept_rows(scores, target, ratio)
        assert len(indices) == mask.sum()
        ranks = (scores > scores.gather(1, target[:, None])).sum(1)
        assert sorted(ranks[indices].tolist()) == sorted(ranks[mask].tolist())
    views = torch.randn(12, 5, generator=generator)
    normal = torch.arange(12) % 4 == 0
    found = ConventionalSSKD.similarity(views, normal)
    torch.testing.assert_close(found, similarity(views[~normal], views[normal]))
    logits, teacher = torch.randn(2, 6, 9, generator=generator)
    torch.testing.assert_close(softened_kl(logits, teacher, 4.0), kd_loss(logits, teacher, 4.0))


def test_scale_is_written(tmp_path: Path) -> None:
    command = ["-c", FORKS, "benchmarks.scale", "--pair", "resnet14-resnet8"]
    small = ["--batches", "2", "--cells", "1", "2", "--seconds", "0.1", "--images", "20"]
    out = ["--device", "cpu", "--out", str(tmp_path / "scale")]
    done = run(*command, *small, *out)
    assert done.returncode == 0, done.stderr
    scales = json.loads((tmp_path / "scale.json").read_text())["scales"]
    assert [(each["batch"], each["jobs"]) for each in scales] == [(2, 1), (2, 1), (2, 2)]
    assert all(each["images_per_second"] > 0 and each["memory"] > 0 for each in scales)
    assert (tmp_path / "scale.md").read_text() == done.stdout


def test_packed_images_are_compared_with_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packed, "USUAL", (75, 50))
    monkeypatch.setattr(packed, "LARGE", (400, 300))
    small = ["--images", "20", "--workers", "0", "--batch", "8", "--rounds", "2"]
    words = ["packed", *small, "--device", "cpu", "--out", str(tmp_path / "packed")]
    monkeypatch.setattr(sys, "argv", words)
    packed.main()
    measured = json.loads((tmp_path / "packed.json").read_text())["images_per_second"]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in measured.values())
    assert capsys.readouterr().out.endswith((tmp_path / "packed.md").read_text())


def test_the_grid_has_the_hours_of_every_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Seconds a step of 4 images: conventional, fp32, bf16.
    steps = {"kd": (1.0, 0.5, 0.25), "crd": (3.0, 1.0, 0.5), "sskd": (8.0, 2.0, 1.0)}

    def compare(work: str, case: Case, turns: Turns) -> list[Row]:
        baseline, *suite = (Measured([seconds], case.batch, 0, 0) for seconds in steps[work])
        rows = zip(turns.precisions, suite, strict=True)
        return [
            Row(work, case.pair, precision, suite=side, baseline=baseline)
            for precision, side in rows
        ]

    monkeypatch.setattr(grid, "compare", compare)
    out = tmp_path / "grid"
    options = ["--pairs", "a-b", "c-d", "--batch", "4", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["grid", *options])
    grid.main()
    # 240 epochs of 50,000 images, for 9 methods that cost as much as KD, CRD and SSKD.
    hours = [
        12e6 / 4 / 3600 * (9 * kd + crd + sskd)
        for kd, crd, sskd in zip(*(steps[work] for work in ("kd", "crd", "sskd")), strict=True)
    ]
    lines = out.with_suffix(".md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[-3:]] == [
        "a-b",
        "c-d",
        "**22 distillations**",
    ]
    for line, times in zip(lines[-3:], (1, 1, 2), strict=True):
        cells = [cell.strip(" *") for cell in line.split("|")[-4:-1]]
        assert cells == [f"{times * each:,.0f}" for each in hours]
    assert lines[-1] in capsys.readouterr().out
    assert len(json.loads(out.with_suffix(".json").read_text())["seconds"]) == 2


def committed(name: str) -> tuple[Namespace, dict[str, Any], list[str]]:
    """Return the options, the JSON and the lines of markdown of committed results."""
    measured = json.loads((RESULTS / f"{name}.json").read_text())
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    return Namespace(**measured["options"]), measured, lines


@pytest.mark.parametrize(
    "name", ["throughput", "throughput_precomputed", "throughput_precomputed_sskd"]
)
def test_the_throughput_page_is_that_of_its_json(name: str) -> None:
    options, measured, lines = committed(name)
    rows = [
        Row(**row | {side: Measured(**row[side]) for side in ("suite", "baseline")})
        for row in measured["rows"]
    ]
    title = throughput.title_of(options, measured["machine"])
    assert lines == throughput.tables(title, rows)


def test_the_grid_page_is_that_of_its_json() -> None:
    options, measured, lines = committed("grid")
    title = throughput.title_of(options, measured["machine"])
    found = [grid.Seconds(**pair) for pair in measured["seconds"]]
    assert lines == grid.table(title, found, measured["crd"])


def test_the_scale_page_is_that_of_its_json() -> None:
    options, measured, lines = committed("scale")
    scales = [scale.Scale(**each) for each in measured["scales"]]
    count = len(options.batches)
    assert lines == scale.tables(options, measured["machine"], scales[:count], scales[count:])


def test_the_page_of_costs_is_that_of_its_json() -> None:
    options, measured, lines = committed("method_cost")
    costs = [methods.Cost(**cost) for cost in measured["costs"]]
    assert lines == methods.tables(costs, options, measured["machine"])
