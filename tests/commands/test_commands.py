"""The commands as a user types them: help, mistakes, and real processes that are killed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import outcome
from conftest import Command, Compose
from faults import FEW, SMALL
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from starting import DEVNULL, Started, run

import sskd.training.step
import train_student
import train_teacher
from sskd.commands.hydra_errors import user_message
from sskd.errors import UserError
from sskd.models import build_model
from sskd.train import train

ROOT = Path(train_student.__file__).resolve().parent


MISTAKES = [
    (["method=sskdd"], "did you mean 'sskd'?"),
    (["arch@student=resnet21"], "did you mean 'resnet20'?"),
    (["student.name=resnet21"], "did you mean 'resnet20'?"),
    (["dataset=cifar1000"], "did you mean 'cifar100'?"),
    (["dataset.source=cifr100"], "did you mean 'cifar100'?"),
    (["pair=vgg13-vgg9"], "did you mean 'vgg13-vgg8'?"),
    (["methd=kd"], "did you mean 'method'?"),
    (["optimizer.lrr=0.1"], "did you mean 'optimizer.lr'?"),
    (["+method.temprature=4"], "did you mean 'method.temperature'?"),
    (["+method.weights.tff=4"], "did you mean 'method.weights.tf'?"),
    (["+foo.bar=1"], "foo: no such setting"),
    (["lr=0.1", "method=kd"], "lr: no such setting; did you mean 'optimizer.lr'?"),
    (["method.lr=0.1"], "method.lr: no such setting; did you mean 'method.ss_head.lr'?"),
    (["schedule.epoch=2"], "did you mean 'schedule.epochs'?"),
    (["method=mlld", "method.distill.epoch=2"], "did you mean 'method.distill.epochs'?"),
    (["ss_head.epoch=2"], "did you mean 'method.ss_head.epochs'?"),
    (["milestone=1", "method=kd"], "did you mean 'teacher.milestones' or 'schedule.milestones'?"),
    (["method.beta=1", "method=at"], "method.beta: no such setting; method has: name, weights, "),
    (["method.epochs=2", "method=dkd"], "method.epochs: no such setting; method has: name, weig"),
    (["wandb.name=run"], "wandb.name: no such setting; wandb has: "),
    (["name=run"], "name: no such setting\n"),
    (["+method.wights.kd=1"], "did you mean 'method.weights'?"),
    (["optimizer.lr.x=1"], "optimizer.lr.x: no such setting; optimizer.lr is a setting, not"),
    (["method=mlld", "method.temperatures=4"], "method.temperatures: should be a list in brack"),
    (["method=mlld", "method.temperatures=[]"], "should have at least 1 item, not 0 (got [])"),
    (["optimizer.lr=-1"], "optimizer.lr: should be greater than 0"),
    (["optimizer.lr=abc"], "optimizer.lr: should be a valid number"),
    (["optimizer.lr=nan"], "optimizer.lr: should be"),
    (["optimizer.lr=inf"], "optimizer.lr: should be"),
    (["optimizer.momentum=1"], "optimizer.momentum: should be less than 1"),
    (["optimizer.nesterov=1"], "optimizer.nesterov: should be a valid boolean"),
    (["optimizer.nesterov=true", "optimizer.momentum=0"], "needs a momentum above 0; set optim"),
    (["method=ft", "method.rate=100"], "method.rate: should be less than or equal to 4"),
    (["batch_size=0"], "batch_size: should be greater than 0"),
    (["batch_size=1.5"], "batch_size: should be a valid integer"),
    (["batch_size=true"], "batch_size: should be a valid integer"),
    (["seed=-1"], "seed: should be greater than or equal to 0"),
    (["schedule.epochs=0"], "schedule.epochs: should be greater than 0"),
    (["schedule.milestones=[150]"], "schedule.milestones.0: should be less than or equal to 1"),
    (["method.temperature=0"], "method.temperature: should be greater than 0"),
    (["method.ss_ratio=1.5"], "method.ss_ratio: should be less than or equal to 1"),
    (["method.weights.tf=-1"], "method.weights.tf: should be greater than or equal to 0"),
    (["method=vanilla", "+teacher.bogus=1"], "teacher.bogus: no such setting"),
    (["method=vanilla", "teacher.seed=abc"], "teacher.seed: should be a valid integer"),
    (["+arch=resnet20"], "arch and teacher cannot be combined"),
    (["arch=resnet20"], "Did you mean to override one of arch@student, arch@teacher?"),
    (["dataset.name=cifar100"], "is the name of another dataset, and this one is digits"),
    (["device=meta"], "device=meta: there is no such device"),
    (["wandb.project=a/b"], "wandb.project: "),
    (["teacher.checkpoint="], "teacher.checkpoint: should have at least 1 character"),
    (["~method.weights.tf"], "method.weights.tf: missing"),
    (["precision=fp8"], "precision: should be 'auto', 'fp32', 'tf32' or 'bf16'"),
    (["compile=yes"], "compile: should be 'auto', 'off' or 'default'"),
    (["device=cuda:99"], "device=cuda:99: there is no such device"),
    (["device=gpu"], "device=gpu: there is no such device"),
    (["dataset.fraction=0"], "dataset.fraction: should be greater than 0"),
    (["dataset.label_noise=1"], "dataset.label_noise: should be less than 1"),
    (["dataset.name=../up"], "dataset.name: "),
    (["wandb.mode=sometimes"], "wandb.mode: should be"),
    (["teacher.epoch=first"], "teacher.epoch: should be 'best' or 'last'"),
    (["teacher.checkpoint=nowhere.pth"], "no checkpoint at nowhere.pth"),
    (["method=kd,sskd"], "add -m to sweep over them"),
    (["method=crd", "method.negatives=0"], "method.negatives: should be greater than 0"),
    (["method=crd", "method.momentum=2"], "method.momentum: should be less than or equal to 1"),
    (["method=ft", "+method.rte=1"], "did you mean 'method.rate'?"),
    (["method=ab", "+method.weights.ab=1"], "method.weights.ab: no such setting"),
    (["weighting.kd=-1", "method=at"], "weighting.kd: should be greater than or equal to 0"),
    (["weighting.ce=abc", "method=sskd"], "weighting.ce: should be a valid number"),
    (["optimizer.lr="], "optimizer.lr: should be a valid number"),
    (["optimizer.lr=${foo}"], "foo"),
    (["method="], "method"),
    (["optimizer.lr=[1"], "optimizer.lr=[1"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_one_line_and_changes_nothing(
    command: Command, mistake: list[str], message: str
) -> None:
    status, out, err = command("dataset=digits", *mistake)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.strip().count("\n") == 0, err
    assert message in err
    assert not command.runs.exists()


@pytest.mark.parametrize(
    ("word", "settings"),
    [
        ("lr=0.1", "'optimizer.lr'"),
        ("epochs=3", "'schedule.epochs'"),
        ("optimizer.lrr=1", "'optimizer.lr'"),
    ],
)
def test_a_network_alone_is_offered_no_setting_of_a_student(
    command: Command, word: str, settings: str
) -> None:
    _, _, err = command("arch=resnet8", word, script=train_teacher)
    key = word.partition("=")[0]
    assert err.startswith(f"error: {key}: no such setting; did you mean {settings}")
    assert "method" not in err
    assert "teacher" not in err


@pytest.mark.parametrize(
    ("launcher", "plugin"), [("slurm", "submitit_slurm"), ("processes", "joblib")]
)
def test_a_missing_launcher_is_one_line_with_its_extra(
    command: Command, monkeypatch: pytest.MonkeyPatch, launcher: str, plugin: str
) -> None:
    Plugins.instance()  # registers the launchers that are installed
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(launchers, f"{plugin}.yaml", raising=False)
    status, _, err = command("-m", *SMALL, "method=vanilla", f"hydra/launcher={launcher}")
    assert (status, err.count("\n")) == (1, 1)
    assert (
        f"hydra/launcher/{plugin} is not installed; install it with pip install '.[cluster]'" in err
    )
    assert not command.runs.exists()


def test_an_unknown_launcher_is_not_called_installable(command: Command) -> None:
    status, _, err = command("-m", *SMALL, "method=vanilla", "hydra/launcher=slrum")
    assert (status, err.count("\n")) == (1, 1)
    assert "did you mean 'slurm'?" in err


def test_a_job_without_a_result_is_one_line() -> None:
    submitit = pytest.importorskip("submitit")
    error = submitit.core.utils.UncompletedJobError(
        "Job 7_0 (task: 0) with path 7_0_0_result.pkl\nhas not produced any output "
        "(state: CANCELLED)\nError stream produced:\n-----\nTraceback"
    )
    line = user_message(error)
    assert line.startswith("Job 7_0 (task: 0) with path 7_0_0_result.pkl has not produced any ")
    assert line.endswith("output (state: CANCELLED); the other jobs continue (see squeue)")


def test_a_method_with_a_teacher_is_not_for_train_teacher(command: Command) -> None:
    status, _, err = command("method=kd", script=train_teacher)
    assert (status, err.count("\n")) == (1, 1)
    assert "method=kd needs a teacher: use train_student.py" in err


@pytest.mark.parametrize("extra", ["+teacher.seed=3", "+arch@teacher=resnet20"])
def test_train_teacher_takes_no_teacher(command: Command, extra: str) -> None:
    status, _, err = command("dataset=digits", extra, script=train_teacher)
    assert (status, err.count("\n")) == (1, 1)
    assert "arch and teacher cannot be combined" in err


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_a_disk_that_refuses_is_one_line(
    command: Command, tmp_path: Path, sweep: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    command.runs = tmp_path / "file" / "runs"
    status, _, err = command(*sweep, *SMALL, "method=vanilla")
    assert (status, err.count("\n")) == (1, 1), err
    assert str(command.runs) in err


@pytest.mark.parametrize("sweep", [[], ["-m"]])
def test_an_error_with_an_empty_cause_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, sweep: list[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise UserError("what to do about it") from EOFError()

    monkeypatch.setattr(sskd.training.step, "train_step", refuse)
    status, _, err = command(*sweep, *SMALL, "method=vanilla")
    line, *at_the_end = err.splitlines()
    assert (status, line) == (1, "error: what to do about it")
    assert len(at_the_end) == len(sweep)
    assert all(line.endswith(": failed: what to do about it") for line in at_the_end)


def test_a_sweep_reports_each_job_that_breaks(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sskd.training.step, "train_step", broken)
    status, _, err = command("-m", *SMALL, "method=vanilla", "seed=0,1")
    assert status == 1
    assert err.count("Traceback") == err.count("error: out of memory") == 2


def bad_checkpoints(folder: Path) -> dict[str, tuple[Path, str]]:
    good = build_model("resnet14", 10)
    files = {name: folder / f"{name}.pth" for name in ("network", "classes", "cut", "code")}
    torch.save({"model": build_model("resnet20", 10).state_dict()}, files["network"])
    torch.save({"model": build_model("resnet14", 100).state_dict()}, files["classes"])
    torch.save({"model": good.state_dict()}, files["cut"])
    files["cut"].write_bytes(files["cut"].read_bytes()[:20_000])

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {folder / 'canary'}",)

    files["code"].write_bytes(pickle.dumps({"model": Code()}, protocol=2))
    return {
        "network": (files["network"], "holds a resnet20 with 10 classes, not a resnet14"),
        "classes": (files["classes"], "holds a resnet14 with 100 classes"),
        "cut": (files["cut"], "truncated"),
        "code": (files["code"], "refused without being run"),
    }


@pytest.mark.parametrize("kind", ["network", "classes", "cut", "code"])
def test_a_teacher_that_cannot_serve_is_refused(
    command: Command, tmp_path: Path, kind: str
) -> None:
    path, message = bad_checkpoints(tmp_path)[kind]
    before = path.read_bytes()
    arguments = [item for item in SMALL if not item.startswith("teacher.train")]
    status, _, err = command(*arguments, "method=kd", f"teacher.checkpoint={path}")
    assert (status, err.strip().count("\n")) == (1, 0), err
    assert message in err
    assert err.count(str(path)) == 1  # the cause names it too and is left out
    assert not (tmp_path / "canary").exists()
    assert path.read_bytes() == before
    assert not list(tmp_path.rglob("result.json"))


def test_an_empty_data_root_is_one_line(command: Command, tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    arguments = ["method=vanilla", f"dataset.root={root}", "dataset.download=false"]
    status, _, err = command(*arguments)
    assert (status, err.count("\n")) == (1, 1)
    assert f"CIFAR100 is not in {root}" in err
    assert "dataset.download=true" in err


def test_a_sweep_continues_after_a_job_that_fails(command: Command) -> None:
    status, _, err = command("-m", *SMALL, "method=vanilla", "optimizer.weight_decay=1e12,5e-4")
    assert status == 1
    assert "the term 'ce' is not finite" in err
    finished = [json.loads(path.read_text()) for path in command.runs.rglob("result.json")]
    assert [result["difference"].get("optimizer.weight_decay") for result in finished] == [None]


def test_a_sweep_of_settings_gives_each_job_a_folder(command: Command) -> None:
    status, _, _ = command(
        "-m", *SMALL, "method=vanilla", "optimizer.lr=0.01,0.02", "seed=range(2)"
    )
    assert status == 0
    assert len(list(command.runs.rglob("result.json"))) == 4
    strange = [path for path in ROOT.iterdir() if path.name in ("outputs", "multirun")]
    assert not strange


@pytest.mark.parametrize("script", ["train_teacher", "train_student"])
def test_help_is_readable_and_does_not_load_torch(script: str) -> None:
    code = (
        f"import sys, runpy; sys.argv = ['{script}.py', '--help']\n"
        f"try: runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'wandb' not in sys.modules, 'heavy'"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for group in ("arch", "dataset", "method", "optimizer", "schedule"):
        assert f"\n{group}: " in found.stdout or f"  {group}: " in found.stdout
    assert found.stdout.count(f"python {script}.py ") >= 6
    assert "Results go to" in found.stdout


def test_a_killed_process_resumes_where_it_stopped(composed: Compose, tmp_path: Path) -> None:
    """SIGKILL while the head phase trains, then while the student does."""
    runs = tmp_path / "killed"
    arguments = [*FEW, "schedule.epochs=12", "method=sskd", "checkpoint_minutes=1e-9"]
    train(composed(*arguments, f"runs={tmp_path / 'whole'}"))
    command = ["train_student.py", *arguments, f"runs={runs}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for waited_for in ("phases/*/*/*/last.pt", "distill/*/*/*/last.pt"):
        process = Started(*command, env=environment, stdout=DEVNULL, stderr=DEVNULL)
        deadline = time.monotonic() + 120
        while not list(runs.glob(f"digits/{waited_for}")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        assert process.poll() is None, "it finished before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = run(*command, env=environment)
    assert last.returncode == 0, last.stderr
    assert outcome(runs) == outcome(tmp_path / "whole")


def test_a_terminated_process_has_the_usual_status(tmp_path: Path) -> None:
    arguments = [*SMALL, "schedule.epochs=400", "method=vanilla", f"runs={tmp_path / 'runs'}"]
    process = subprocess.Popen(  # the script as a user starts it
        [sys.executable, "train_student.py", *arguments],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").rglob("last.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "stopped by SIGTERM: the state is saved; the same command resumes the run\n"
