"""SLURM jobs with several GPUs or nodes, in which torchrun trains the run."""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from many_ranks import environment
from omegaconf import DictConfig, OmegaConf
from torch.distributed.run import parse_args

import train_teacher
from sskd import CONF
from sskd.commands import nodes
from sskd.distributed import group
from sskd.errors import Interrupted, UserError
from sskd.runs.status import SWEEP_VARIABLE, write_failure

WORDS = ["dataset=digits", "seed=3"]
FOLDER = Path("missing")


def job_of(primary: str, *launcher: str) -> DictConfig:
    """Return the configuration of a job of a sweep on SLURM, which HydraConfig then has too."""
    words = ["hydra/launcher=slurm", "hydra.mode=MULTIRUN", *launcher]
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose(primary, [*WORDS, *words], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what is started instead of torchrun, as torchrun reads its words."""
    submitit = pytest.importorskip("submitit")
    job = SimpleNamespace(job_id="4217_3", node=1, hostnames=["first", "second"])
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: job)
    found: list[Any] = []

    def run(words: list[str], grace: int) -> int:
        assert grace == 110  # of the 120 seconds of SLURM's warning
        found.append(parse_args(words[3:]))
        return 0

    monkeypatch.setattr(nodes, "_run", run)
    return found


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_torchrun_trains_the_run_on_all_gpus_of_all_nodes(started: list[Any], role: str) -> None:
    nodes.train_on_nodes(
        job_of(role, "hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=4"), FOLDER
    )
    (read,) = started
    assert (read.nnodes, read.nproc_per_node, read.node_rank) == ("2", "4", 1)
    assert (read.master_addr, read.master_port) == ("first", 20_000 + 42173 % 12_000)
    assert read.no_python
    assert read.training_script == sys.executable
    script, *words = read.training_script_args
    assert Path(script) == CONF.parent / f"train_{role}.py"
    assert words == ["-cn", role, "hydra.mode=RUN", *WORDS]


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_job_with_one_gpu_needs_no_torchrun(started: list[Any], gpus: int) -> None:
    nodes.train_on_nodes(job_of("student", f"hydra.launcher.gpus_per_node={gpus}"), FOLDER)
    assert not started


def test_one_node_needs_no_port(started: list[Any]) -> None:
    nodes.train_on_nodes(job_of("student", "hydra.launcher.gpus_per_node=2"), FOLDER)
    (read,) = started
    assert (read.standalone, read.nproc_per_node, read.no_python) == (True, "2", True)


def test_a_failure_of_torchrun_has_the_reason_of_the_run(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = job_of("student", "hydra.launcher.gpus_per_node=2")
    monkeypatch.setattr(nodes, "_run", lambda words, grace: 3)
    with pytest.raises(UserError, match="torchrun ended with status 3"):
        nodes.train_on_nodes(job, tmp_path)
    monkeypatch.setenv(SWEEP_VARIABLE, "sweep")
    write_failure(tmp_path, UserError("the term 'kd' is not finite"))
    with pytest.raises(UserError, match="the term 'kd' is not finite"):
        nodes.train_on_nodes(job, tmp_path)


def test_the_status_of_torchrun_is_returned() -> None:
    assert nodes._run([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3


def test_the_warning_of_slurm_ends_torchrun_by_sigterm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = (
        "import pathlib, signal, sys, time\n"
        "def stop(*_): pathlib.Path(sys.argv[2]).touch(); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "signal.raise_signal(signal.SIGUSR2)\n"  # SLURM may send it to every process of the job
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(60)\n"
    )
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"

    def warn() -> None:
        while not ready.exists():
            time.sleep(0.01)
        signal.raise_signal(signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, lambda *_: None)  # as submitit installs one
    threading.Thread(target=warn).start()
    try:
        with pytest.raises(Interrupted, match="stopped by SIGUSR2"):
            nodes._run([sys.executable, "-c", script, str(ready), str(stopped)], 30)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert stopped.exists()


def test_torchrun_refuses_launchers_of_other_processes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(group, "connect", lambda: None)
    monkeypatch.setattr(group, "end", lambda: None)
    words = ("-m", "dataset=digits", "seed=0,1", "hydra/launcher=threads")
    status, out, err = command(*words, script=train_teacher)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.endswith("use hydra/launcher=basic\n")
