"""What `wandb agent` gets: the command's own cell in its run, and no other cell."""

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
from sskd.runs.result import HoldoutTop1, RunResult, Top1
from sskd.runs.run import Run
from sskd.tracking.environment import surroundings
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
TAUGHT = [*(word for word in SMALL if "epochs" not in word), "schedule.epochs=1", "method=kd"]
ALONE = ["method=vanilla" if word == "method=kd" else word for word in TAUGHT]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Be what `wandb agent` starts, without a login; return the file of the proposal's settings."""
    monkeypatch.delenv("WANDB_MODE")
    settings = tmp_path / "config-proposal.yaml"
    settings.write_text("wandb_version: 1\noptimizer.lr:\n  value: 0.05\n")
    for name, value in (AGENT | {"WANDB_SWEEP_PARAM_PATH": str(settings)}).items():
        monkeypatch.setenv(name, value)
    return settings


def told(path: Path) -> dict[str, Any]:
    (about,) = (record["run"] for record in inspect(path) if record["type"] == "run")
    assert isinstance(about, dict)
    return about


def by_kind(runs: Path) -> dict[str, dict[str, Any]]:
    """Return what W&B is told of each run, by its kind and id."""
    return {
        f"{about['job_type']} {about['run_id']}": about for about in map(told, offline_runs(runs))
    }


@pytest.mark.usefixtures("agent")
def test_a_teacher_on_the_way_is_not_the_agents_run(composed: Compose, tmp_path: Path) -> None:
    before = dict(os.environ)
    result = train(composed(*TAUGHT))
    assert {k: v for k, v in os.environ.items() if k in AGENT} == AGENT
    assert os.environ["WANDB_SWEEP_PARAM_PATH"] == before["WANDB_SWEEP_PARAM_PATH"]
    runs = {about["job_type"]: about for about in map(told, offline_runs(tmp_path / "runs"))}
    assert runs.keys() == {"teacher", "student"}
    own, other = runs["student"], runs["teacher"]
    assert (own["run_id"], own["sweep_id"]) == ("proposal", "sweep123")
    assert (own["project"], own["entity"]) == ("tuned", "team")
    assert other["run_id"] != "proposal"
    assert not other.get("sweep_id")
    assert other["project"] == "sskd"
    assert other["display_name"].startswith("digits/scratch/resnet14/")
    assert not other.get("notes")
    assert "brisk" not in other["display_name"]
    student = next(path for path in offline_runs(tmp_path / "runs") if "/distill/" in str(path))
    (summary,) = inspect(student, "--summary")
    assert summary["summary"]["last/top1"] == pytest.approx(result.top1.last)


LINES = [
    {"stage": "distill", "epoch": 1, "test/top1": 40.0, "holdout/top1": 45.0},
    {"stage": "distill", "epoch": 2, "test/top1": 30.0, "holdout/top1": 50.0},
]


def finish(config: Config) -> Path:
    """Leave what a finished run of ``config`` leaves; return its folder."""
    plan = plan_of(config)
    run = Run(plan.folder, plan.full_config)
    result = RunResult(
        top1=Top1(last=30.0, best=40.0, best_epoch=1),
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
def test_a_proposal_that_has_finished_reports_its_result(
    command: Command, composed: Compose
) -> None:
    folder = finish(composed(*ALONE))
    status, out, err = command(*ALONE)
    assert (status, err) == (0, "")
    assert "already finished" in out
    (path,) = offline_runs(command.runs)
    assert (told(path)["run_id"], told(path)["sweep_id"]) == ("proposal", "sweep123")
    assert path.is_relative_to(folder)
    assert [step["holdout/top1"] for step in history(path)] == [45.0, 50.0]
    (summary,) = inspect(path, "--summary")
    shown = summary["summary"]  # whichever of these the agent's sweep optimises
    assert (shown["test/top1"], shown["holdout/top1"]) == (30.0, 50.0)
    assert (shown["last/top1"], shown["best/top1"], shown["hours"]) == (30.0, 40.0, 1.0)


@pytest.mark.usefixtures("agent")
def test_a_finished_proposal_with_damaged_metrics_reports_its_summary(
    composed: Compose, tmp_path: Path, capsys: Any
) -> None:
    config = composed(*ALONE)
    (finish(config) / "metrics.jsonl").write_text("{")
    train(config)
    assert "warning: " in capsys.readouterr().err
    (path,) = offline_runs(tmp_path / "runs")
    (summary,) = inspect(path, "--summary")
    assert summary["summary"]["last/top1"] == 30.0


# What the first version did not record, and more that a result may lack.
@pytest.mark.parametrize(
    "lacking",
    [
        ["peak_memory_mib"],
        ["images_per_second", "agreement", "kl", "teacher_top1"],
        ["top1.best", "top1.best_epoch"],
        ["seconds"],
    ],
)
def test_an_older_result_is_reported_without_what_it_lacks(
    composed: Compose, tmp_path: Path, agent: Path, lacking: list[str]
) -> None:
    config = composed(*ALONE)
    path = finish(config) / "result.json"
    result = json.loads(path.read_text())
    for name in lacking:
        del (result["top1"] if "top1." in name else result)[name.removeprefix("top1.")]
    path.write_text(json.dumps(result))
    train(config)
    (offline,) = offline_runs(tmp_path / "runs")
    (summary,) = inspect(offline, "--summary")
    shown = summary["summary"]
    assert shown["last/top1"] == 30.0
    assert ("best/top1" in shown) == ("best/epoch" in shown) == ("top1.best" not in lacking)
    assert shown.get("hours") == (None if "seconds" in lacking else 1.0)
    assert ("peak_memory_mib" in shown) == ("peak_memory_mib" not in lacking)
    assert ("images_per_second" in shown) == ("images_per_second" not in lacking)


@pytest.mark.usefixtures("agent")
def test_a_proposal_that_was_stopped_is_whole_in_the_next_agents_run(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*ALONE, "schedule.epochs=2", "checkpoint_minutes=1e-9")
    with monkeypatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(CrashError):
            train(config)
    monkeypatch.setenv("WANDB_RUN_ID", "second")
    train(config)
    whole = next(path for path in offline_runs(tmp_path / "runs") if "second" in path.name)
    assert [step["_step"] for step in history(whole)] == [0, 1, 2]


@pytest.mark.usefixtures("agent")
def test_the_cells_of_a_sweep_are_runs_of_their_own(command: Command) -> None:
    assert command("-m", *ALONE, "seed=0,1")[0] == 0
    cells = by_kind(command.runs)
    assert len(cells) == 2
    assert not any("proposal" in name for name in cells)
    assert not any(about.get("sweep_id") for about in cells.values())


def test_a_later_run_of_the_process_is_not_the_agents(
    composed: Compose, agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*ALONE)
    finish(config)
    train(config)
    for name in (*AGENT, "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.delenv(name)
    agent.unlink()
    other = composed(*ALONE, "seed=1")
    plan = plan_of(other)
    run = Run(plan.folder, plan.full_config)
    with run.open(), Tracker(run, plan):
        pass
    ids = [told(path).get("sweep_id") for path in offline_runs(tmp_path / "runs")]
    assert sorted(filter(None, ids)) == ["sweep123"]
    assert len(ids) == 2


def test_a_result_is_reported_to_an_agent_alone(
    composed: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(*ALONE)
    finish(config)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "init", None)  # nothing is to call it
    train(config)


@pytest.mark.parametrize("name", [*AGENT, "WANDB_SWEEP_PARAM_PATH", "WANDB_TAGS"])
@pytest.mark.parametrize("agents", [True, False])
def test_only_the_agents_run_sees_what_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str, agents: bool
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv(name, "value")
    of_all = name in ("WANDB_PROJECT", "WANDB_ENTITY")
    with surroundings("offline", agents=agents):
        assert (name in os.environ) == (agents or of_all)
    assert os.environ[name] == "value"


@pytest.mark.parametrize("name", ["NOTES", "TAGS", "RUN_GROUP", "JOB_TYPE", "PROJECT", "ENTITY"])
def test_a_users_own_words_are_kept_without_an_agent(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"WANDB_{name}", "value")
    for agents in (True, False):
        with surroundings("offline", agents=agents):
            assert os.environ[f"WANDB_{name}"] == "value"


def test_a_users_own_notes_reach_the_run(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_NOTES", "before the new loss")
    wandb.teardown()  # W&B reads its variables once a process
    config = composed(*ALONE)
    plan = plan_of(config)
    with Run(plan.folder, plan.full_config).open() as run, Tracker(run, plan):
        pass
    (path,) = offline_runs(tmp_path)
    assert told(path)["notes"] == "before the new loss"
