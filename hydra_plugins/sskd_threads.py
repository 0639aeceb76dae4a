"""A Hydra launcher for jobs that share one process and its GPU, each in a thread of its own.

Hydra loads plugins from the package ``hydra_plugins`` alone; ``sskd.commands.threads`` does the
work.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra.core.utils import (
    JobReturn,
    configure_log,
    env_override,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

log = logging.getLogger(__name__)


class ThreadsLauncher(Launcher):
    """Runs at most ``n_jobs`` jobs at once in this process, which take turns step by step."""

    def __init__(self, n_jobs: int) -> None:
        super().__init__()
        self._n_jobs = n_jobs

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what each job needs."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs with these overrides to their end, and return their results in order.

        Raises:
            UserError: a setting of the launcher is wrong.
            Interrupted: a signal came; the jobs are saved.
        """
        # Importing torch takes seconds, which Hydra's search for plugins should not.
        from sskd.commands.threads import run_in_threads

        self._check_settings()
        setup_globals()
        hydra = self._config.hydra
        configure_log(hydra.hydra_logging, hydra.verbose)
        Path(str(hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        log.info(f"Launching {len(job_overrides)} jobs, {self._n_jobs} at once")
        jobs = {}
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
            jobs[number] = partial(self._run, number, list(overrides))
        # The environment belongs to the process, so it is set once, and not by each job.
        with env_override(hydra.job.env_set):
            return run_in_threads(jobs, self._n_jobs)

    def _check_settings(self) -> None:
        from sskd.errors import UserError, shortened

        count = self._n_jobs
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"hydra.launcher.n_jobs={shortened(count)}: should be 1 or more")
        if self._config.hydra.job.chdir:
            raise UserError(
                "hydra.job.chdir=true: jobs in threads share one working directory; use "
                "hydra.job.chdir=false, or hydra/launcher=processes"
            )

    def _run(self, number: int, overrides: list[str]) -> JobReturn:
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            config.hydra.job.env_set = {}
        done = run_job(
            hydra_context=self._context,
            task_function=self._task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        # The configurations of all jobs of a sweep would fill the memory.
        done.cfg = done.hydra_cfg = None
        gc.collect()  # networks and graphs are parts of reference cycles
        return done
