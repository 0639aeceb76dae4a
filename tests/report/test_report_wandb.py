"""What the report logs to W&B, read from an offline run."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from report_runs import never, put_alone, put_run, put_status
from test_tracking import inspect, offline_runs

import sskd.report.to_wandb
from sskd.report.__main__ import main
from sskd.report.report import read_report
from sskd.report.to_wandb import RESULTS, _results, log_report


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    root = tmp_path / "runs"
    for seed, top1 in enumerate([69.0, 70.0]):
        put_alone(root, f"cifar100/scratch/resnet20/seed{seed}", [60.0, top1 - 9], seed=seed)
        name = f"cifar100/distill/resnet56-resnet20/kd/seed{seed}"
        put_run(root, name, [top1 + 3, top1], seed=seed, peak_memory_mib=100.0)
    weights = {"method.weights.ce": 1.0, "method.weights.kd": 1.0}
    at: dict[str, Any] = {"method": "at", "difference": weights, "dataset_source": "cifar100"}
    put_run(root, "cifar100/distill/resnet56-resnet20/at/seed0-0123abcd", **at)
    joint: dict[str, Any] = {"method": "hsakd_teacher", "student": "resnet56"}
    joint |= {"difference": {"method.name": "hsakd_teacher"}}
    put_alone(root, "cifar100/scratch/resnet56/seed0-01234567", [77.0, 78.0], **joint)
    folder = root / "cifar100/distill/resnet56-resnet20/sskd/seed0"
    put_status(folder, "failed", error="=not finite")
    return root


def tables_of(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the logged tables by name, each row as a dict."""
    found = {}
    for file in path.parent.rglob("*.table.json"):
        table = json.loads(file.read_text())
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        found[file.name.partition("_")[0]] = rows
    return found


def test_tables_figures_and_files_are_logged(runs: Path) -> None:
    assert main([str(runs), "--wandb", "team/table"]) == 0
    (path,) = offline_runs(runs)
    records = inspect(path)
    (about,) = (record["run"] for record in records if record["type"] == "run")
    assert (about["job_type"], about["display_name"]) == ("report", "tables")
    assert (about["entity"], about["project"]) == ("team", "table")
    tables = tables_of(path)
    (kd,) = (row for row in tables["results"] if row["row"] == "KD")
    assert kd["last"] == pytest.approx(69.5)
    assert kd["last std"] == pytest.approx(statistics.stdev([69.0, 70.0]))
    assert kd["best"] == pytest.approx(72.5)
    assert (kd["n"], kd["published"]) == (2, 70.66)
    assert kd["last - published"] == pytest.approx(69.5 - 70.66)
    assert kd["best - published"] == pytest.approx(72.5 - 70.66)
    assert [row["hours"] for row in tables["cost"]] == [2.0] * 6
    # Rows of another weighting than the default have its name.
    at = "AT (weighting=common)"
    for name in ("results", "cost"):
        assert {row["row"] for row in tables[name] if row["row"].startswith("AT")} == {at}
    assert [row["peak memory (MiB)"] for row in tables["cost"] if row["row"] == "KD"] == [100] * 2
    # A network that was trained with another method than alone has its name once.
    (joint,) = (row["row"] for row in tables["cost"] if row["pair"] == "resnet56")
    assert joint == "HSAKD teacher"
    failed = {row["state"]: row for row in tables["failed"]}
    assert failed["failed"]["reason"] == "=not finite"
    assert "resnet56-resnet20 · FitNet" in {
        row["cell"].partition("similar · ")[2] for row in tables["failed"]
    }
    (summary,) = inspect(path, "--summary")
    assert {key for key in summary["summary"] if "/" in key} == {
        *("tables/results", "tables/cost", "tables/failed"),
        *("plots/gain", "plots/curves", "plots/losses"),
    }
    assert len(list(path.parent.rglob("media/images/plots/*.png"))) == 3
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    (files,) = (artifact for artifact in artifacts if artifact["type"] == "report")
    names = {Path(entry["path"]).suffix for entry in files["manifest"]["contents"]}
    assert names == {".csv", ".html", ".md", ".tex", ".png", ".svg"}


def test_a_top5_without_that_of_the_best_epoch(tmp_path: Path) -> None:
    pair: dict[str, Any] = {"teacher": "ResNet34", "student": "ResNet18"}
    data = {"dataset": "imagenet", "dataset_source": "imagenet", "dataset_digest": "a" * 64}
    put_run(tmp_path, "run", top5={"last": 89.0, "best": None}, **(pair | data))
    rows = [dict(zip(RESULTS, row, strict=True)) for row in _results(read_report(tmp_path, never))]
    (top5,) = (row for row in rows if row["metric"] == "top5")
    assert (top5["last"], top5["best"], top5["best - published"]) == (89.0, None, None)


def test_a_second_report_updates_the_same_run(runs: Path) -> None:
    for _ in range(2):
        log_report(read_report(runs, never), "sskd", None, never)
    ids = {path.stem for path in offline_runs(runs)}
    assert len(ids) == 1


def test_tables_are_printed_if_the_server_times_out(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_late(*_: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(sskd.report.to_wandb, "_log", too_late)
    assert main([str(runs), "--wandb"]) == 0
    out, err = capsys.readouterr()
    assert "error" not in err
    assert out.index("KD") < out.index("W&B did not answer; `wandb sync ")
