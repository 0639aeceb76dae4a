"""W&B's server fails in all its ways; training goes on at its pace, and nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from stand_in import EPOCHS, StandIn, reporting_run, wait_until
from starting import Started
from test_tracking import history

OFFLINE = "W&B cannot be used online"
LATER = "W&B did not answer; `wandb sync"


def ends_well(run: Started, runs: Path) -> str:
    """Wait for the run; hold what is on disk against its metrics; return what it said."""
    told, _ = run.communicate(timeout=240)
    assert run.returncode == 0, told
    assert "Traceback" not in told
    (metrics,) = runs.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.open()]
    assert len(lines) == EPOCHS
    assert (metrics.parent / "result.json").exists()
    kept = max(runs.rglob("*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    steps = [step for step in history(kept) if step["_step"] > 0]  # what `wandb sync` sends
    assert [step["test/top1"] for step in steps] == [
        pytest.approx(line["test/top1"]) for line in lines
    ]
    return told


@pytest.mark.parametrize(
    ("fault", "said"),
    [("none", "W&B: http"), ("wrong key", OFFLINE), ("answers 500", OFFLINE), ("hangs", OFFLINE),
     ("closed", OFFLINE)],
)  # fmt: skip
def test_a_server_that_fails_from_the_start(tmp_path: Path, fault: str, said: str) -> None:
    with StandIn(fault) as server:
        if fault == "closed":
            server.close()
        told = ends_well(reporting_run(server.url, tmp_path / "runs"), tmp_path / "runs")
    assert said in told
    if fault == "none":
        assert server.lines["wandb-history.jsonl"] == EPOCHS + 1  # and the picture


@pytest.mark.parametrize("fault", ["answers 500", "hangs", "closed"])
def test_a_server_that_fails_in_mid_run(tmp_path: Path, fault: str) -> None:
    runs = tmp_path / "runs"
    with StandIn() as server:
        run = reporting_run(server.url, runs)
        wait_until(lambda: list(runs.rglob("last.pt")))
        server.fault = fault
        if fault == "closed":
            server.close()
        told = ends_well(run, runs)
    if fault != "closed":  # it may have had everything by then
        assert LATER in told


def test_wandbs_own_process_that_dies_costs_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with StandIn() as server:
        run = reporting_run(server.url, runs)
        wait_until(lambda: list(runs.rglob("last.pt")))
        subprocess.run(["pkill", "-KILL", "-P", str(run.pid), "wandb-core"], check=True)
        told = ends_well(run, runs)
    assert told.count("W&B has stopped") == 1
    assert "W&B: `wandb sync" in told


def test_a_second_interrupt_ends_at_once_whatever_the_server_does(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with StandIn() as server:
        run = reporting_run(server.url, runs, "schedule.epochs=1000", "batch_size=1000")
        wait_until(lambda: list(runs.rglob("last.pt")))
        server.fault = "hangs"
        run.send_signal(signal.SIGINT)
        time.sleep(0.01)
        started = time.monotonic()
        while run.poll() is None and time.monotonic() < started + 60:
            run.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert run.poll() == 130
        told, _ = run.communicate()
        assert "Traceback" not in told, told
    assert time.monotonic() - started < 5  # not even W&B's own limit
