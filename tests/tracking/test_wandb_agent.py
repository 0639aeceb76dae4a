"""The run of `wandb agent` receives the run of the command, and no other run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import wandb
from conftest import Command, Compose, plan_of
from crashes import CrashError, at_step, crash
from faults import SMALL
from test_tracking import history, inspect, offline_runs

from sskd.config import Config
from sskd.runs.epoch_line import EpochLine
from sskd.runs.result import HoldoutTop1, RunResult, Top1, Top5
from sskd.runs.run import Run
from sskd.tracking.environment import hide_foreign_variables
from sskd.tracking.tracker import Tracker
from sskd.train import train

AGENT = {
    "WANDB_SWEEP_ID": "sweep123",
    "WANDB_RUN_ID": "proposal",
    "WANDB_PROJECT": "tuned",
    "WANDB_ENTITY": "team",
    "WANDB_RESUME": "never",
    "WANDB_RUN_GROUP": "proposals",
    "WANDB_NAME": "brisk-sweep-3",
    "WANDB_JOB_TYPE": "sweep",
    "WANDB_NOTES": "a proposal",
}
STUDENT = [*(word for word in SMALL if "epochs" not in word), "schedule.epochs=1", "method=kd"]
VANILLA = ["method=vanilla" if word == "method=kd" else word for word in STUDENT]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Set the environment that `wandb agent` sets; return the file of the proposal's settings."""
    monkeypatch.delenv("WANDB_MODE")
    settings = tmp_path / "config-proposal.yaml"
    settings.write_text("wandb_version: 1\noptimizer.lr:\n  value: 0.05\n")
    for name, value in (AGENT | {"WANDB_SWEEP_PARAM_PATH": str(settings)}).items():
        monkeypatch.setenv(name, value)
    return settings


def described(path: Path) -> dict[str, Any]:
    """Return how the offline run in ``path`` is described to W&B."""
    (about,) = (record["run"] for record in inspect(path) if record["type"] == "run")
    assert isinstance(about, dict)
    return about


def by_kind(runs: Path) -> dict[str, dict[str, Any]]:
    """Return the description of each run in ``runs``, by its kind and id."""
    return {
        f"{about['job_type']} {about['run_id']}": about
        for about in map(described, offline_runs(runs))
    }


@pytest.mark.usefixtures("agent")
def test_the_agents_run_is_the_student(composed: Compose, tmp_path: Path) -> None:
    before = dict(os.environ)
    result = train(composed(*STUDENT))
    assert {k: v for k, v in os.environ.items() if k in AGENT} == AGENT
    assert os.environ["WANDB_SWEEP_PARAM_PATH"] == before["WANDB_SWEEP_PARAM_PATH"]
    runs = {about["job_type"]: about for about in map(described, offline_runs(tmp_path / "runs"))}
    assert runs.keys() == {"teacher", "student"}
    student, teacher = runs["student"], runs["teacher"]
    assert (student["run_id"], student["sweep_id"]) == ("proposal", "sweep123")
    assert (student["project"], student["entity"]) == ("tuned", "team")
    assert teacher["run_id"] != "proposal"
    assert not teacher.get("sweep_id")
    assert teacher["project"] == "sskd"
    assert teacher["display_name"].startswith("digits/scratch/resnet14/")
    assert not teacher.get("notes")
    assert "brisk" not in teacher["display_name"]
    path = next(path for path in offline_runs(tmp_path / "runs") if "/distill/" in str(path))
    (summary,) = inspect(path, "--summary")
    assert summary["summary"]["last/top1"] == pytest.approx(result.top1.last)


LINES = [
    EpochLine("distill", 1, {"test/top1": 40.0, "holdout/top1": 45.0}),
    EpochLine("distill", 2, {"test/top1": 30.0, "holdout/top1": 50.0}),
]


def finish(config: Config) -> Path:
    """Write a finished run of ``config``; return its folder."""
    plan = plan_of(config)
    run = Run(plan.folder, plan.full_config)
    result = RunResult(
        top1=Top1(last=30.0, best=40.0, best_epoch=1),
        top5=Top5(last=80.0, best=85.0),
        holdout_top1=HoldoutTop1(last=50.0),
        images_per_second=100.0,
        peak_memory_mib=10.0,
        seconds=3600.0,
    )
    with run.open():
        for line in LINES:
            run.metrics.log(line)
        run.finish(None, result)
    return run.folder


@pytest.mark.usefixtures("agent")
def test_a_finished_proposal_reports_its_result(command: Command, composed: Compose) -> None:
    folder = finish(composed(*VANILLA))
    status, out, err = command(*VANILLA)
    assert (status, err) == (0, "")
    assert "already finished" in out
    (path,) = offline_runs(command.runs)
    assert (described(path)["run_id"], described(path)["sweep_id"]) == ("proposal", "sweep123")
    assert path.is_relative_to(folder)
    assert [step["holdout/top1"] for step in history(path)] == [45.0, 50.0]
    (summary,) = inspect(path, "--summary")
    shown = summary["summary"]  # the sweep may optimise any of these
    assert (shown["test/top1"], shown["holdout/top1"]) == (30.0, 50.0)
    assert (shown["last/top1"], shown["best/top1"], shown["hours"]) == (30.0, 40.0, 1.0)
    assert (shown["last/top5"], shown["best/top5"]) == (80.0, 85.0)


@pytest.mark.usefixtures("agent")
def test_a_proposal_with_corrupt_metrics_has_a_summary(
    composed: Compose, tmp_path: Path, capsys: Any
) -> None:
    config = composed(*VANILLA)
    (finish(config) / "metrics.jsonl").write_text("{")
    train(config)
    assert "warning: " in capsys.readouterr().err
    (path,) = offline_runs(tmp_path / "runs")
    (summary,) = inspect(path, "--summary")
    assert summary["summary"]["last/top1"] == 30.0


# Fields that results of earlier versions may lack.
@pytest.mark.parametrize(
    "missing",
    [
        ["peak_memory_mib", "top5", "teacher_top5"],
        ["images_per_second", "agreement", "kl", "teacher_top1"],
        ["top1.best", "top1.best_epoch"],
        ["seconds"],
    ],
)
def test_an_older_result_is_reported_without_new_fields(
    composed: Compose, tmp_path: Path, agent: Path, missing: list[str]
) -> None:
    config = composed(*VANILLA)
    path = finish(config) / "result.json"
    result = json.loads(path.read_text())
    for name in missing:
        del (result["top1"] if "top1." in name else result)[name.removeprefix("top1.")]
    path.write_text(json.dumps(result))
    train(config)
    (offline,) = offline_runs(tmp_path / "runs")
    (summary,) = inspect(offline, "--summary")
    shown = summary["summary"]
    assert shown["last/top1"] == 30.0
    assert ("best/top1" in shown) == ("best/epoch" in shown) == ("top1.best" not in missing)
    assert ("last/top5" in shown) == ("best/top5" in shown) == ("top5" not in missing)
    assert shown.get("hours") == (None if "seconds" in missing else 1.0)
    assert ("peak_memory_mib" in shown) == ("peak_memory_mib" not in missing)
    assert ("images_per_second" in shown) == ("images_per_second" not in missing)


@pytest.mark.usefixtures("agent")
def test_a_resumed_proposal_is_complete_in_the_next_run(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*VANILLA, "schedule.epochs=2", "checkpoint_minutes=1e-9")
    with monkeypatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(CrashError):
            train(config)
    monkeypatch.setenv("WANDB_RUN_ID", "second")
    train(config)
    resumed = next(path for path in offline_runs(tmp_path / "runs") if "second" in path.name)
    assert [step["_step"] for step in history(resumed)] == [0, 1, 2]


@pytest.mark.usefixtures("agent")
def test_the_jobs_of_a_sweep_are_separate_runs(command: Command) -> None:
    assert command("-m", *VANILLA, "seed=0,1")[0] == 0
    jobs = by_kind(command.runs)
    assert len(jobs) == 2
    assert not any("proposal" in name for name in jobs)
    assert not any(about.get("sweep_id") for about in jobs.values())


def test_a_later_run_of_the_process_is_not_the_agents(
    composed: Compose, agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*VANILLA)
    finish(config)
    train(config)
    for name in (*AGENT, "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.delenv(name)
    agent.unlink()
    other = composed(*VANILLA, "seed=1")
    plan = plan_of(other)
    run = Run(plan.folder, plan.full_config)
    with run.open(), Tracker(run, plan):
        pass
    ids = [described(path).get("sweep_id") for path in offline_runs(tmp_path / "runs")]
    assert sorted(filter(None, ids)) == ["sweep123"]
    assert len(ids) == 2


def test_only_an_agent_receives_a_finished_result(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*VANILLA)
    finish(config)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "init", None)  # calling it would fail
    train(config)


@pytest.mark.parametrize("name", [*AGENT, "WANDB_SWEEP_PARAM_PATH", "WANDB_TAGS"])
@pytest.mark.parametrize("under_agent", [True, False])
def test_only_the_agents_run_has_the_agents_variables(
    monkeypatch: pytest.MonkeyPatch, name: str, under_agent: bool
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv(name, "value")
    shared = name in ("WANDB_PROJECT", "WANDB_ENTITY")
    with hide_foreign_variables("offline", under_agent=under_agent):
        assert (name in os.environ) == (under_agent or shared)
    assert os.environ[name] == "value"


@pytest.mark.parametrize("name", ["NOTES", "TAGS", "RUN_GROUP", "JOB_TYPE", "PROJECT", "ENTITY"])
def test_the_users_variables_are_kept_without_an_agent(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"WANDB_{name}", "value")
    for under_agent in (True, False):
        with hide_foreign_variables("offline", under_agent=under_agent):
            assert os.environ[f"WANDB_{name}"] == "value"


def test_the_users_notes_reach_the_run(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_NOTES", "before the new loss")
    wandb.teardown()  # W&B reads its variables only once in a process
    config = composed(*VANILLA)
    plan = plan_of(config)
    with Run(plan.folder, plan.full_config).open() as run, Tracker(run, plan):
        pass
    (path,) = offline_runs(tmp_path)
    assert described(path)["notes"] == "before the new loss"
