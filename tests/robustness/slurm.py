"""Sweeps on a real SLURM, which the tests start on this machine and stop: `make test-slurm`.

Its two GPUs are fake: each job is given one and trains on the CPU. Missing Debian packages are
installed; everything else, also the state of the daemons, is in a temporary folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from breaking import outcome
from faults import SMALL
from test_tracking import history, offline_runs

from sskd import CONF
from sskd.runs.status import read_status

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
HOST = socket.gethostname().partition(".")[0]
ALONE = ("-m", *SMALL, "method=vanilla")
EPOCHS = 40  # enough time to stop the run
STOPPED_AFTER = 3  # epochs, at least

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
# Jobs must wait for the GPUs, not for the cores of this machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

GRES_CONF = "NodeName={host} Name=gpu File={folder}/gpu[0-1] Flags=nvidia_gpu_env\n"

# The real sacct needs a database. squeue keeps jobs for five minutes, which submitit can use.
SACCT = """#!/bin/sh
echo 'JobID|State|NodeList'
exec squeue --states=all --array --noheader --format='%i|%T|%N'
"""


def give_up(reason: str) -> None:
    pytest.exit(f"cannot test on SLURM: {reason}", returncode=1)


def install() -> None:
    """Install the missing packages of SLURM, without their services."""
    if os.geteuid() != 0:
        give_up("its daemons and fake GPUs need root")
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        give_up("its launcher is missing; pip install '.[cluster]' installs it")
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        give_up(f"{', '.join(missing)} missing, and there is no apt-get to install them")
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", *command], capture_output=True, text=True)
        if done.returncode:
            give_up(f"apt-get {command[0]} failed: {done.stderr.strip()}")
    if Path("/run/systemd/system").exists():
        subprocess.run(["systemctl", "disable", "--now", "munge", "slurmctld", "slurmd"])


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(event: str, reached: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"no {event} within {seconds} seconds"
        time.sleep(0.2)


class Cluster:
    """A SLURM of one node; its daemons are children of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._commands: list[subprocess.Popen[str]] = []
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }
        for name in ("bin", "state", "spool"):
            (folder / name).mkdir()
        values = {"host": HOST, "folder": folder, "ports": free_ports(2)}
        (folder / "slurm.conf").write_text(SLURM_CONF.format(**values))
        (folder / "gres.conf").write_text(GRES_CONF.format(**values))
        (folder / "bin" / "sacct").write_text(SACCT)
        (folder / "bin" / "sacct").chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        for number in range(2):
            os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # null

    def start(self) -> None:
        munge = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log"}
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in munge.items()]
        self._daemon(
            "munged", "--foreground", "--force", f"--seed-file={self.folder}/seed", *options
        )
        wait_for("munge", (self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        ready = f"node (logs of the daemons: {self.folder})"
        wait_for(ready, lambda: self("sinfo", "-h", "-o", "%T", check=False) == "idle")

    def _daemon(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.log").open("wb")
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        )

    def stop(self) -> None:
        for command in self._commands:
            if command.poll() is None:  # a failed test does not wait for it
                command.kill()
                command.wait()
        self("scancel", f"--user={os.getuid()}", check=False)
        wait_for("end of the jobs", lambda: not self("squeue", "-h", check=False))
        for daemon in reversed(self._daemons):
            daemon.terminate()
            daemon.wait(timeout=60)

    def __call__(self, *command: str, check: bool = True) -> str:
        """Run a command of SLURM and return its output."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=check
        )
        return done.stdout.strip()

    def start_command(self, *command: str) -> subprocess.Popen[str]:
        """Start a command of the suite, which may launch jobs and wait for them."""
        process = subprocess.Popen(
            command, cwd=CONF.parent, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._commands.append(process)
        return process

    def jobs(self, runs: Path, column: str) -> dict[int, str]:
        """Return a column of squeue's table for each job of the sweep in ``runs``."""
        (array,) = {path.name.split("_")[0] for path in (runs / ".hydra/slurm").glob("[0-9]*_*")}
        table = self("squeue", "--states=all", "--array", "-h", "-j", array, "-o", f"%K {column}")
        return {int(number): value for number, value in map(str.split, table.splitlines())}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    install()
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Sweep:
    """The command of a sweep, which waits for its jobs."""

    def __init__(self, cluster: Cluster, runs: Path, *words: str) -> None:
        self.cluster, self.runs = cluster, runs
        self.command = [sys.executable, "train_student.py", *words, "device=cpu", f"runs={runs}"]
        # ``env`` writes the environment of each job to its log.
        slurm = ["hydra/launcher=slurm", "hydra.launcher.mem_gb=1", "hydra.launcher.setup=[env]"]
        self.process = cluster.start_command(
            *self.command, *slurm, "hydra.launcher.cpus_per_task=1"
        )

    def end(self) -> tuple[int, str, str]:
        """Wait for the command; return its status, output and errors."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err

    def rerun_without_slurm(self) -> tuple[int, str, str]:
        command = [word for word in self.command if not word.startswith("hydra.launcher")]
        self.process = self.cluster.start_command(*command)
        return self.end()

    def folder(self, job: int) -> Path:
        """Return the folder of the job with this seed."""
        (folder,) = (self.runs / "digits/scratch/resnet8").glob(f"seed{job}-*")
        return folder

    def lines(self, job: int) -> int:
        path = next(self.runs.glob(f"digits/scratch/resnet8/seed{job}-*/metrics.jsonl"), None)
        return len(path.read_text().splitlines()) if path else 0

    def id(self, job: int) -> str:
        """Return the id that SLURM gave to a job of the sweep."""
        (path,) = (self.runs / ".hydra/slurm").glob(f"*_{job}")
        return path.name

    def log(self, job: int, stream: str = "out") -> str:
        number = self.id(job)
        return (self.runs / f".hydra/slurm/{number}/{number}_0_log.{stream}").read_text()

    def visible_gpus(self, job: int) -> str:
        (value,) = {
            line.partition("=")[2]
            for line in self.log(job).splitlines()
            if line.startswith("CUDA_VISIBLE_DEVICES=")
        } or {""}
        return value


def test_each_job_has_a_gpu_and_may_fail_alone(cluster: Cluster, tmp_path: Path) -> None:
    sweep = Sweep(cluster, tmp_path / "runs", *ALONE, "optimizer.weight_decay=5e-4,1e12,1e-4")
    status, out, err = sweep.end()
    assert {sweep.visible_gpus(0), sweep.visible_gpus(1)} == {"0", "1"}
    starts, ends = cluster.jobs(sweep.runs, "%S"), cluster.jobs(sweep.runs, "%e")
    assert starts[2] >= min(ends[0], ends[1])  # ISO dates
    assert status == 1
    assert "2 of 3 jobs have finished" in out
    assert err.count("failed: ") == 1
    assert "the term 'ce' is not finite" in err
    output = cluster(sys.executable, "-m", "sskd.report", str(sweep.runs), "--status")
    assert "1 failed" in output
    assert "2 finished" in output


def test_jobs_wait_for_the_one_that_trains_their_teacher(cluster: Cluster, tmp_path: Path) -> None:
    few = [word for word in SMALL if word.startswith(("dataset.fraction", "teacher.fraction"))]
    smoke = ("-cd", "sweeps", "-cn", "smoke", "method=kd,sskd", *few, "batch_size=16")
    sweep = Sweep(cluster, tmp_path / "runs", *smoke)
    status, out, err = sweep.end()
    assert (status, err) == (0, ""), err
    assert "2 of 2 jobs have finished" in out
    logs = sweep.log(0) + sweep.log(1)
    assert logs.count("scratch/resnet14") >= 2
    assert logs.count("train: epoch 1/2") == 1
    assert len(list(sweep.runs.glob("digits/*/*/**/result.json"))) == 4  # with the teacher, ss_head


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """Return a folder of undisturbed runs with seeds 0 and 1."""
    runs = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "train_student.py", *ALONE, "device=cpu"]
    command += [f"runs={runs}", f"schedule.epochs={EPOCHS}", "seed=0,1"]
    subprocess.run(command, cwd=CONF.parent, env=cluster.environment, check=True)
    return runs


def stopped_sweep(cluster: Cluster, runs: Path, *command: str, more: tuple[str, ...] = ()) -> Sweep:
    """Return a sweep of two jobs; a command of SLURM has stopped the first one in mid-training."""
    words = (*ALONE, "seed=0,1", f"schedule.epochs={EPOCHS}", "hydra.launcher.gpus_per_node=0")
    sweep = Sweep(cluster, runs, *words, *more)
    wait_for("training", lambda: sweep.lines(0) >= STOPPED_AFTER)
    before = time.time()
    cluster(*command, sweep.id(0))
    wait_for("end", lambda: cluster.jobs(runs, "%T")[0] not in ("RUNNING", "COMPLETING"))
    assert (sweep.folder(0) / "last.pt").stat().st_mtime > before  # no step was lost
    assert STOPPED_AFTER <= sweep.lines(0) < EPOCHS
    return sweep


def finish_resumed(cluster: Cluster, sweep: Sweep, stopped_at: int) -> None:
    """Start the requeued first job now, and expect that it resumes at an epoch and both finish."""
    # SLURM itself would wait for minutes. A job that is still ending would break its next start.
    wait_for("end of its step", lambda: "task 0: " in sweep.log(0, "err"))
    time.sleep(3)
    cluster("scontrol", "update", f"JobId={sweep.id(0)}", "StartTime=now")
    status, out, err = sweep.end()
    assert (status, err) == (0, ""), err
    assert "2 of 2 jobs have finished" in out
    assert f"resumes in {sweep.folder(0)}, {stopped_at}/{EPOCHS} epochs" in sweep.log(0)


def test_torchrun_trains_a_job_on_two_gpus_and_resumes_it(cluster: Cluster, tmp_path: Path) -> None:
    words = (*ALONE, "batch_size=8", "seed=0,1", f"schedule.epochs={EPOCHS}")
    sweep = Sweep(cluster, tmp_path / "runs", *words, "hydra.launcher.gpus_per_node=2")
    wait_for("training", lambda: sweep.lines(0) >= STOPPED_AFTER)
    cluster(*WARNED, sweep.id(0))
    wait_for("requeue", lambda: cluster.jobs(sweep.runs, "%T")[0] == "PENDING")
    stopped_at = sweep.lines(0)
    assert STOPPED_AFTER <= stopped_at < EPOCHS
    finish_resumed(cluster, sweep, stopped_at)
    for job in (0, 1):
        result = json.loads((sweep.folder(job) / "result.json").read_text())
        assert (result["ranks"], result["epoch"]) == (2, EPOCHS)
        assert sweep.visible_gpus(job) == "0,1"


WARNED = ("scancel", "--signal=USR2")  # as SLURM warns a job before its time limit
PREEMPTED = ("scontrol", "requeue")  # SIGTERM, then requeued


@pytest.mark.parametrize("command", [WARNED, PREEMPTED], ids=["warned", "preempted"])
def test_a_requeued_job_resumes_where_it_stopped(
    cluster: Cluster, tmp_path: Path, undisturbed: Path, command: tuple[str, ...]
) -> None:
    sweep = stopped_sweep(cluster, tmp_path / "runs", *command)
    assert cluster.jobs(sweep.runs, "%T")[0] == "PENDING"
    stopped_at, name = sweep.lines(0), (sweep.folder(0) / "wandb_id").read_text()
    assert read_status(sweep.folder(0)).state == "stopped"
    finish_resumed(cluster, sweep, stopped_at)
    assert outcome(sweep.runs) == outcome(undisturbed)
    first, second = offline_runs(sweep.folder(0))
    assert {first.stem, second.stem} == {f"run-{name}"}
    assert [step["_step"] for step in history(second)] == list(range(EPOCHS + 1))
    assert [sweep.visible_gpus(job) for job in (0, 1)] == ["", ""]


def test_a_cancelled_job_saves_its_state(
    cluster: Cluster, tmp_path: Path, undisturbed: Path
) -> None:
    sweep = stopped_sweep(cluster, tmp_path / "runs", "scancel")
    status, _, err = sweep.end()
    assert status == 1
    assert "(state: CANCELLED); the other jobs continue" in err
    assert f"{sweep.folder(0)}: stopped; the same command resumes it" in err
    wait_for("end of the other job", lambda: read_status(sweep.folder(1)).state == "finished")
    status, out, _ = sweep.rerun_without_slurm()
    assert status == 0
    assert "2 jobs, 1 already finished" in out
    assert "resumes in" in out
    assert outcome(sweep.runs) == outcome(undisturbed)


def test_a_job_that_is_not_requeued_reports_it(cluster: Cluster, tmp_path: Path) -> None:
    short = ("hydra.launcher.timeout_min=5", "hydra.launcher.max_num_timeout=0")
    sweep = stopped_sweep(cluster, tmp_path / "runs", *WARNED, more=short)
    status, out, err = sweep.end()
    assert status == 1
    assert "1 of 2 jobs have finished" in out
    assert "the run is saved, but the job could not be requeued (Job not requeued" in err
    assert read_status(sweep.folder(1)).state == "finished"
