"""A SLURM job with several GPUs or nodes: torchrun inside it trains the run on all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sskd import CONF, IN_CHECKOUT
from sskd.errors import UserError
from sskd.invocation.composition import search_path_words
from sskd.runs.status import failed_in_this_sweep
from sskd.training.signals import StopSignals

if TYPE_CHECKING:
    import submitit

# Ports of the first node, by job number, so that two jobs on a node rarely have the same.
# Linux assigns the ports from 32,768 on to outgoing connections.
_FIRST_PORT, _PORTS = 20_000, 12_000
_POLL = 0.2  # seconds
_END = 10  # seconds of SLURM's warning that are left for the end of this process


def train_on_nodes(composed: DictConfig, folder: Path) -> None:
    """Train the run of this SLURM job under torchrun, if the job has several GPUs or nodes.

    Each node of the job calls it. Then the run in ``folder`` has finished, and this process only
    reads its result.

    Raises:
        UserError: the run failed, or torchrun did.
        Interrupted: a signal came; the ranks have saved the run.
    """
    launcher = HydraConfig.get().launcher
    nodes, gpus = (_setting(launcher, name) for name in ("nodes", "gpus_per_node"))
    if nodes * gpus == 1 or not str(launcher.get("_target_")).endswith("SlurmLauncher"):
        return
    import submitit

    job = submitit.JobEnvironment()
    grace = max(int(launcher.signal_delay_s) - _END, _END)
    status = _run([*_torchrun(job, nodes, gpus), *_command(composed)], grace)
    if status:
        ended = f"torchrun ended with status {status}; see its output in the log of the SLURM job"
        raise UserError(failed_in_this_sweep(folder) or ended)


def _setting(launcher: Any, name: str) -> int:
    return int(launcher.get(name) or 1)


def _torchrun(job: submitit.JobEnvironment, nodes: int, gpus: int) -> list[str]:
    """Return the words that start torchrun on this node."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={gpus}"]
    if nodes == 1:
        return [*torchrun, "--standalone", "--no_python"]
    number = int("".join(filter(str.isdecimal, job.job_id)))
    return [
        *torchrun,
        *(f"--nnodes={nodes}", f"--node_rank={job.node}"),
        *(f"--master_addr={job.hostnames[0]}", f"--master_port={_FIRST_PORT + number % _PORTS}"),
        "--no_python",
    ]


def _command(composed: DictConfig) -> list[str]:
    """Return the words of the command that trains the run of this job alone."""
    role = "student" if "teacher" in composed else "teacher"
    script = Path(sys.executable).with_name(f"sskd-{role}")
    start = (
        [sys.executable, str(CONF.parent / f"train_{role}.py")] if IN_CHECKOUT else [str(script)]
    )
    hydra = HydraConfig.get()
    overrides = [word for word in hydra.overrides.task if not word.startswith("hydra")]
    return [
        *start,
        *search_path_words(),
        "-cn",
        str(hydra.job.config_name),
        "hydra.mode=RUN",
        *overrides,
    ]


def _run(words: list[str], grace: int) -> int:
    """Run torchrun to its end and return its status; a signal to this process stops it.

    torchrun then waits ``grace`` seconds for the ranks, which save the run.
    """
    with StopSignals() as signals:
        # SLURM may send its warning to all processes of the job, and those have no handler.
        environment = os.environ | {"PET_SHUTDOWN_TIMEOUT": str(grace)}  # --shutdown-timeout
        process = subprocess.Popen(words, env=environment, preexec_fn=_ignore_warnings)
        try:
            while process.poll() is None and signals.received is None:
                time.sleep(_POLL)
        finally:
            process.terminate()
            process.wait()
        signals.raise_if_received()
    return process.returncode


def _ignore_warnings() -> None:
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
