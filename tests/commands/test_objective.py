"""The accuracy that each job returns to a sweeper that searches, such as Optuna's."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from conftest import Command
from faults import SMALL
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

import sskd.train
import train_teacher
from sskd.commands.objective import objective
from sskd.errors import JobError, UserError
from sskd.models import build_model
from sskd.output import complain_once
from sskd.runs.folder import read_result
from sskd.runs.result import RunResult

JOB = [*(word for word in SMALL if "epochs" not in word), "schedule.epochs=1", "method=vanilla"]
HOLDOUT = "dataset.holdout=0.2"


class Collector(Sweeper):
    """Runs a job for each value of ``seeds`` and keeps the results, as a search does."""

    returned: list[Any] = []  # noqa: RUF012

    def __init__(self, seeds: list[int], direction: str) -> None:
        self.seeds = seeds

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        for number, seed in enumerate(self.seeds):
            (job,) = self.launcher.launch([[*arguments, f"seed={seed}"]], initial_job_idx=number)
            try:
                Collector.returned.append(float(job.return_value))
            except JobError as error:
                Collector.returned.append(error)
                raise


@pytest.fixture(autouse=True)
def _collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register ``hydra/sweeper=collector`` in the one package from which Hydra takes plugins."""
    module = ModuleType("hydra_plugins.collector")
    monkeypatch.setattr(Collector, "__module__", module.__name__)
    monkeypatch.setattr(module, "Collector", Collector, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Plugins.instance().register(Collector)
    settings = {
        "_target_": f"{module.__name__}.Collector",
        "seeds": [0, 1],
        "direction": "maximize",
    }
    ConfigStore.instance().store("collector", settings, group="hydra/sweeper")
    Collector.returned.clear()
    yield
    del ConfigStore.instance().repo["hydra"]["sweeper"]["collector.yaml"]


def search(command: Command, *words: str, script: Any = None) -> tuple[int, str, str]:
    given = {} if script is None else {"script": script}
    return command("-m", "hydra/sweeper=collector", *words, **given)


def last_lines(runs: Path) -> list[dict[str, Any]]:
    """Return the metrics of each run's last epoch, in the order of the seeds."""
    paths = sorted(runs.rglob("metrics.jsonl"), key=lambda path: path.parent.name)
    return [json.loads(path.read_text().splitlines()[-1]) for path in paths]


def test_a_job_returns_the_last_held_out_top1(command: Command) -> None:
    status, _, err = search(command, *JOB, HOLDOUT)
    assert (status, err) == (0, "")
    lines = last_lines(command.runs)
    assert Collector.returned == [pytest.approx(line["holdout/top1"]) for line in lines]
    assert [line["holdout/top1"] for line in lines] != [line["test/top1"] for line in lines]
    # Finished jobs return the same.
    first = [*Collector.returned]
    assert search(command, *JOB, HOLDOUT)[0] == 0
    assert Collector.returned == first * 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -5, 100.5, True, "77", None, [70.0]])
@pytest.mark.parametrize("key", ["top1", "holdout_top1"])
def test_only_a_percentage_is_an_accuracy(tmp_path: Path, key: str, value: object) -> None:
    found: dict[str, Any] = {"top1": {"last": 70.0}, "holdout_top1": None}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(found | {key: {"last": value}}))
    with pytest.raises(UserError, match=r"has no accuracy|is not a result") as caught:
        objective(read_result(tmp_path, RunResult) or RunResult(), tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_without_held_out_images_a_warning_is_printed(command: Command) -> None:
    status, _, err = search(command, *JOB)
    assert status == 0
    assert Collector.returned == [
        pytest.approx(line["test/top1"]) for line in last_lines(command.runs)
    ]
    assert (err.count("\n"), err.count("warning: ")) == (1, 1)
    assert "test set" in err
    assert "dataset.holdout=" in err
    # A single run and a grid do not choose by the accuracy.
    complain_once.cache_clear()
    assert command(*JOB)[2] == ""
    assert command("-m", *JOB, "seed=0,1")[2] == ""
    assert command("-m", "hydra/sweeper=basic", *JOB, "seed=0,1")[2] == ""


def test_a_job_that_fails_is_a_failure_of_the_search(command: Command) -> None:
    words = [word for word in JOB if "teacher.train" not in word and "method" not in word]
    status, out, err = search(command, *words, "method=kd")
    assert status == 1
    (error,) = Collector.returned
    assert isinstance(error, UserError)
    assert "no finished run of the teacher" in str(error)
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [f"error: {error}"]
    assert "Traceback" not in out + err


@pytest.mark.parametrize("finished", [True, False])
def test_a_teacher_removed_at_the_end_fails_no_job(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    """Training needs its file; the accuracy that is returned does not."""
    teacher = tmp_path / "teacher.pth"
    state = build_model("resnet14", 10).state_dict()
    torch.save(state, teacher)
    words = [word for word in JOB if "method" not in word and "teacher.train" not in word]
    words += ["method=kd", f"teacher.checkpoint={teacher}"]
    if finished:
        assert command(*words)[0] == 0

    name = "last_top1" if finished else "measure_result"
    original = getattr(sskd.train, name)

    def remove_then_do(*arguments: Any, **named: Any) -> Any:
        teacher.unlink()
        return original(*arguments, **named)

    monkeypatch.setattr(sskd.train, name, remove_then_do)
    status, _, err = search(command, *words, "hydra.sweeper.seeds=[0]")
    assert (status, "error" in err) == (0, False)
    (line,) = last_lines(command.runs)
    assert Collector.returned == [pytest.approx(line["test/top1"])]


def test_train_teacher_returns_the_accuracy_too(command: Command) -> None:
    words = ["arch=resnet8", *(w for w in JOB if "arch" not in w and "teacher" not in w), HOLDOUT]
    assert search(command, *words, script=train_teacher)[0] == 0
    lines = last_lines(command.runs)
    assert Collector.returned == [pytest.approx(line["holdout/top1"]) for line in lines]


def test_a_search_for_the_lowest_accuracy_is_refused(command: Command) -> None:
    status, _, err = search(command, *JOB, "hydra.sweeper.direction=minimize")
    assert status == 1
    assert err.splitlines()[0] == (
        "error: hydra.sweeper.direction=minimize: would search for the lowest accuracy; add "
        "hydra.sweeper.direction=maximize"
    )
    assert not list(command.runs.rglob("result.json"))


@pytest.mark.parametrize("held_out", [3, [], {"best": 50.0}, {"last": "high"}, {"last": None}])
def test_a_corrupt_held_out_result_is_an_error(tmp_path: Path, held_out: Any) -> None:
    found = {"top1": {"last": 50.0}, "holdout_top1": held_out}
    (tmp_path / "result.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"has no accuracy on held-out|is not a result"):
        objective(read_result(tmp_path, RunResult) or RunResult(), tmp_path)


@pytest.mark.parametrize("result", [{"top1": {"last": 50.0}, "holdout_top1": None},
                                    {"top1": {"last": 50.0}}])  # fmt: skip
def test_an_old_result_gives_the_test_accuracy(result: dict[str, Any]) -> None:
    assert objective(RunResult.from_json(result), Path("folder")) == 50.0


@pytest.mark.parametrize("sweeper", ["optuna", "search"])
def test_a_sweeper_that_is_not_installed_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, sweeper: str
) -> None:
    sweepers = ConfigStore.instance().repo["hydra"]["sweeper"]
    monkeypatch.delitem(sweepers, "optuna.yaml", raising=False)
    status, _, err = command("-m", f"hydra/sweeper={sweeper}", *JOB)
    assert (status, err.count("\n")) == (1, 1)
    assert "hydra/sweeper/optuna is not installed; install it with pip install '.[optuna]'" in err


def test_optuna_finds_the_best_of_its_runs(command: Command) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    space = "optimizer.lr=tag(log, interval(0.001, 0.1))"
    words = ["hydra/sweeper=search", "hydra.sweeper.n_trials=3", *JOB, HOLDOUT, space]
    assert command("-m", *words)[0] == 0
    found = yaml.safe_load((command.runs / ".hydra" / "optimization_results.yaml").read_text())
    held_out = [line["holdout/top1"] for line in last_lines(command.runs)]
    assert len(held_out) == 3
    assert found["best_value"] == pytest.approx(max(held_out))


@pytest.mark.parametrize("entry", ["", "optimization_results.yaml", "slurm"])
def test_a_link_in_the_sweeps_folder_is_refused(
    command: Command, tmp_path: Path, entry: str
) -> None:
    """An untrusted folder of runs could choose what a sweeper or a launcher overwrites."""
    outside = tmp_path / "outside"
    outside.mkdir()
    link = command.runs / ".hydra" / entry
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    status, _, err = search(command, *JOB, HOLDOUT, "hydra.sweeper.seeds=[0]")
    assert status == 1
    assert f"{link}: is a symbolic link" in err
    status, _, err = command("-m", *JOB, "seed=0")
    assert status == 1
    assert f"{link}: is a symbolic link" in err
    assert list(outside.iterdir()) == []
