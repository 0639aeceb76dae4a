"""A grid of runs: which have finished, which are launched, and how it ended."""

from __future__ import annotations

import os
import shlex
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sskd.commands.hydra_errors import user_message
from sskd.config import Config, read_config
from sskd.errors import BusyError, UnfinishedError, UserError
from sskd.invocation.composition import search_path_words
from sskd.invocation.names import command_words, current_role
from sskd.output import complain, say
from sskd.runs.folder import read_result, write_queued
from sskd.runs.identity import digests_kept
from sskd.runs.lock import is_held
from sskd.runs.own_code import warn_of_changed_code
from sskd.runs.result import RunResult
from sskd.runs.run import Run
from sskd.runs.status import (
    SWEEP_VARIABLE,
    failed_in_this_sweep,
    forced_in_this_sweep,
    read_status,
)
from sskd.runs.untrusted import refuse_unsafe_sweep_folder
from sskd.teachers.find import resolve_plan, run_location
from sskd.tracking.environment import check_environment
from sskd.training.signals import raise_on_sigterm

Overrides = Sequence[str]
_POOL_SHUTDOWN = 30.0  # seconds that the processes of a broken pool have to end


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        overrides: the words that compose its configuration.
        command: the command line that repeats the run alone.
        config: its configuration.
        folder: the run's folder.
    """

    overrides: list[str]
    command: str
    config: Config
    folder: Path

    def finished(self) -> RunResult | None:
        """Return the result of the run; None if there is none, or that cannot be determined."""
        try:
            if read_result(self.folder, RunResult) is None:
                return None
            plan = resolve_plan(self.config)
            return Run(plan.folder, plan.full_config).finished(RunResult)
        except UserError:
            return None

    def is_pending(self) -> bool:
        """Return whether the run has no result, failed in this sweep, or is still to be forced.

        A run that failed, or that ``force=true`` trains again, may have an old result.
        """
        if failed_in_this_sweep(self.folder) is not None:
            return True
        if self.config.force and not forced_in_this_sweep(self.folder):
            return True
        try:
            return read_result(self.folder, RunResult) is None
        except UserError:
            return True

    def reason(self) -> str:
        """Return why the run has not finished."""
        if is_held(self.folder):
            return "another process works on it"
        status = read_status(self.folder)
        if status.state == "failed":
            return "failed: " + str(status.error).removeprefix(f"{self.folder}: ")
        rerun = "the same command" + " without force=true" * self.config.force
        if status.state == "running":
            return f"interrupted; {rerun} resumes it from its last checkpoint"
        if status.state == "stopped":
            return f"stopped; {rerun} resumes it"
        return f"{status.state or 'not started'}; the same command starts it"


class Sweep:
    """The jobs of one command; jobs of the same run are merged.

    Two pairs with one student, for example, have one run of the student alone.

    Args:
        grid: the overrides of each job.
        compose: returns the configuration of one job's overrides.

    Raises:
        UserError: a job's configuration is wrong; nothing has been launched.
    """

    def __init__(
        self, grid: Iterable[Overrides], compose: Callable[[list[str]], DictConfig]
    ) -> None:
        jobs: dict[str, Job] = {}
        for overrides in grid:
            composed = compose(list(overrides))
            settings = [str(key) for key in composed if key != "hydra"]
            config = read_config(OmegaConf.masked_copy(composed, settings))
            check_environment(config.wandb.mode)
            folder, changed = run_location(config)
            job = Job(list(overrides), _command(composed, overrides), config, folder)
            # An earlier recipe may have given the same folder name to another job.
            jobs.setdefault(f"{folder} {changed}", job)
        self.jobs = list(jobs.values())

    def queue(self) -> list[list[str]]:
        """Mark the jobs that have not finished as queued, and return their overrides."""
        for runs in {job.config.runs for job in self.jobs}:
            refuse_unsafe_sweep_folder(Path(runs))
        os.environ[SWEEP_VARIABLE] = uuid.uuid4().hex  # launchers pass it to their processes
        pending = []
        with digests_kept():
            for job in self.jobs:
                if not job.config.force and (result := job.finished()):
                    warn_of_changed_code(job.folder, job.config, result)
                else:
                    pending.append(job)
        for job in pending:
            with suppress(UserError):  # another process has it, or the job itself reports why
                write_queued(job.folder, command=job.command)
        done = len(self.jobs) - len(pending)
        jobs = "job" if len(self.jobs) == 1 else "jobs"
        say(f"{len(self.jobs)} {jobs}, {done} already finished")
        return [job.overrides for job in pending]

    def launch(
        self, pending: list[list[str]], size: int | None, launcher: Callable[..., Any]
    ) -> None:
        """Launch jobs by their overrides, at most ``size`` at once.

        If a process of a pool dies, the pool ends the others too. Its jobs are then launched again:
        first those that had not started, then those that had. Jobs that had started twice are
        launched one by one, since one of them may be the reason. Any other failure of the launcher
        ends the sweep.
        """
        size, number = size or max(len(pending), 1), 0
        starts: Counter[tuple[str, ...]] = Counter()
        suspects: list[list[str]] = []
        while pending or suspects:
            batch = pending[:size] or suspects[:1]
            pending, suspects = pending[size:], suspects if pending else suspects[1:]
            try:
                with raise_on_sigterm():
                    launcher(batch, initial_job_idx=number)
            except BrokenExecutor as error:
                complain(f"warning: a process has died: {user_message(error)}")
                untouched, started = self._after_a_broken_pool(batch)
                starts.update(map(tuple, started))
                again = [job for job in started if starts[tuple(job)] == 1]
                pending = untouched + pending + again
                suspects += [job for job in started if starts[tuple(job)] == 2]
            except Exception as error:  # of joblib or submitit, about a process that died
                complain(f"error: the launcher gave up: {user_message(error)}")
                return
            number += len(batch)

    def _after_a_broken_pool(
        self, batch: list[list[str]]
    ) -> tuple[list[list[str]], list[list[str]]]:
        """Return the overrides of the jobs that had not started, and of those that had.

        Jobs that ended are in neither. At least one counts as started: it may have died while it
        trained its teacher.
        """
        jobs = [job for job in self.jobs if job.overrides in batch]
        deadline = time.monotonic() + _POOL_SHUTDOWN
        while any(is_held(job.folder) for job in jobs) and time.monotonic() < deadline:
            time.sleep(0.1)  # the pool ends its processes at this moment
        ended = [j for j in jobs if not j.is_pending() or failed_in_this_sweep(j.folder)]
        left = [job for job in jobs if job not in ended and not is_held(job.folder)]
        started = [j for j in left if read_status(j.folder).state != "queued"] or left[:1]
        untouched = [job.overrides for job in left if job not in started]
        return untouched, [job.overrides for job in started]

    def report_unfinished(self) -> None:
        """Print which jobs have not finished, and why.

        Raises:
            UnfinishedError: some have not. It has the status of BusyError if other processes work
                on all of these.
        """
        pending = [job for job in self.jobs if job.is_pending()]
        done = len(self.jobs) - len(pending)
        verb = "job has" if len(self.jobs) == 1 else "jobs have"
        say(f"{done} of {len(self.jobs)} {verb} finished")
        busy = [job for job in pending if is_held(job.folder)]
        for job in pending:
            complain(f"  {job.folder}: {job.reason()}")
        if pending:
            raise UnfinishedError((BusyError if pending == busy else UserError).status)


def _command(composed: DictConfig, overrides: Overrides) -> str:
    """Return the command line that runs one job alone."""
    words = [*command_words(current_role()), *search_path_words()]
    if "-cd" in words:  # the primary configuration may be a sweep's
        words += ["-cn", composed.hydra.job.config_name, "hydra.mode=RUN"]
    return shlex.join([*words, *overrides])
