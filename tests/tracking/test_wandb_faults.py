"""If W&B's server fails, training continues at full speed and loses nothing."""

from __future__ import annotations

import json
import re
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
# Python itself prints this if an interrupt comes inside of a destructor.
IGNORED = re.compile(r"Exception ignored in: .*?\nKeyboardInterrupt: \n", re.DOTALL)


def output_of_complete(run: Started, runs: Path) -> str:
    """Wait for the run, check that W&B's file on disk has all its metrics, return its output."""
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output
    assert "Traceback" not in output
    (metrics,) = runs.rglob("metrics.jsonl")
    lines = [json.loads(line) for line in metrics.open()]
    assert len(lines) == EPOCHS
    assert (metrics.parent / "result.json").exists()
    offline = max(runs.rglob("*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    steps = [step for step in history(offline) if step["_step"] > 0]  # what `wandb sync` sends
    assert [step["test/top1"] for step in steps] == [
        pytest.approx(line["test/top1"]) for line in lines
    ]
    return output


@pytest.mark.parametrize(
    ("fault", "message"),
    [("none", "W&B: http"), ("wrong key", OFFLINE), ("answers 500", OFFLINE), ("hangs", OFFLINE),
     ("closed", OFFLINE)],
)  # fmt: skip
def test_a_server_that_fails_from_the_start(tmp_path: Path, fault: str, message: str) -> None:
    with StandIn(fault) as server:
        if fault == "closed":
            server.close()
        # No answer can come, so that there is no need to wait for one.
        seconds = 5 if fault == "none" else 1
        run = reporting_run(server.url, tmp_path / "runs", at_start=seconds, at_end=seconds)
        output = output_of_complete(run, tmp_path / "runs")
    assert message in output
    if fault == "none":
        assert server.lines["wandb-history.jsonl"] == EPOCHS + 1  # with the picture


@pytest.mark.parametrize("fault", ["answers 500", "hangs", "closed"])
def test_a_server_that_fails_in_mid_run(tmp_path: Path, fault: str) -> None:
    runs = tmp_path / "runs"
    with StandIn() as server:
        run = reporting_run(server.url, runs, at_end=1)  # no answer comes then
        wait_until(lambda: list(runs.rglob("last.pt")))
        server.fault = fault
        if fault == "closed":
            server.close()
        output = output_of_complete(run, runs)
    if fault != "closed":  # the server may have received everything before
        assert LATER in output


def test_a_killed_process_of_wandb_costs_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with StandIn() as server:
        run = reporting_run(server.url, runs)
        wait_until(lambda: list(runs.rglob("last.pt")))
        subprocess.run(["pkill", "-KILL", "-P", str(run.pid), "wandb-core"], check=True)
        output = output_of_complete(run, runs)
    assert output.count("W&B has stopped") == 1
    assert "W&B: `wandb sync" in output


def test_a_second_interrupt_does_not_wait_for_the_server(tmp_path: Path) -> None:
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
        output, _ = run.communicate()
        assert "Traceback" not in IGNORED.sub("", output), output
    assert time.monotonic() - started < 5  # less than W&B's own limit
