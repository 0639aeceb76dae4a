"""One job: the run that a command trains, or one of the runs of a sweep.

Importing this takes no time: the commands answer ``--help`` before torch is loaded.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sskd.commands.hydra_errors import USER_ERRORS, user_message
from sskd.errors import BusyError, JobError, exit_status
from sskd.output import complain, steady_output
from sskd.training.signals import forward_scheduler_signal, raise_on_sigterm


def run_job(composed: DictConfig) -> float:
    """Train the run of one job; an error that the user can fix is reported in one line.

    In a sweep each failure is reported when it happens and kept in the run's folder, because the
    other jobs continue. A Hydra callback could not do this: no launcher calls it after every error.

    Returns:
        The accuracy that a search maximises.
    """
    try:
        with steady_output(), forward_scheduler_signal(), raise_on_sigterm():
            return _train(composed)
    except Exception as error:
        expected = isinstance(error, USER_ERRORS)
        in_sweep = HydraConfig.get().mode != RunMode.RUN
        if not expected and not in_sweep:
            raise
        if not expected:
            complain(traceback.format_exc())
        is_busy = isinstance(error, BusyError)
        complain(("" if is_busy else "error: ") + user_message(error))
        if not in_sweep:
            sys.exit(exit_status(error))
        if not is_busy:
            _keep_failure(composed, error)
        # Any launcher can pickle this, and any sweeper takes it for a failure.
        failure = JobError(user_message(error), exit_status(error))
    # Outside of the block: otherwise it would refer to the error, and that to the run's tensors.
    raise failure


def _train(composed: DictConfig) -> float:
    # Importing torch takes seconds, which --help and tab completion should not.
    from sskd.commands.advice import about_weighting
    from sskd.commands.nodes import train_on_nodes
    from sskd.commands.objective import check_search, objective
    from sskd.config import read_config
    from sskd.distributed.group import on_all_ranks
    from sskd.invocation.extensions import load_extensions
    from sskd.output import say
    from sskd.runs.untrusted import refuse_unsafe_sweep_folder
    from sskd.teachers.find import run_location
    from sskd.train import carry_out

    hydra = HydraConfig.get()
    is_alone = hydra.mode == RunMode.RUN
    load_extensions()
    config = read_config(composed)
    if is_alone and (line := about_weighting(config.method.name, hydra.overrides.task)):
        say(line)
    check_search(config.dataset.holdout)
    if not is_alone:
        refuse_unsafe_sweep_folder(Path(config.runs))
        train_on_nodes(composed, run_location(config)[0])
    with on_all_ranks(config.model_dump(mode="json")):
        plan, result = carry_out(config, from_command_line=is_alone)
    return objective(result, plan.folder)


def _keep_failure(composed: DictConfig, error: Exception) -> None:
    """Write the failure to the run's folder, from which a sweep reports it."""
    from sskd.config import read_config
    from sskd.runs.lock import FolderLock
    from sskd.runs.status import write_failure
    from sskd.teachers.find import run_location

    # The error may be that there is no folder for the run.
    with contextlib.suppress(*USER_ERRORS):
        folder, _ = run_location(read_config(composed))
        if folder.is_dir():
            lock = FolderLock(folder)
            lock.acquire(watch=False)
            try:
                write_failure(folder, error, still_ours=lock.check)
            finally:
                lock.release()
