"""How the commands end: with one line and a status, whatever went wrong.

Importing this costs nothing: the commands answer ``--help`` before torch is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sskd import CONF
from sskd.commands.advice import (
    about_commas,
    about_plus,
    about_quotes,
    refuse_missing_keys,
    refuse_odd_choices,
)
from sskd.errors import (
    BusyError,
    CellError,
    UnfinishedError,
    UserError,
    did_you_mean,
    mask_unprintable,
    shortened,
)
from sskd.invocation import command_line, current_role, tool_command, with_packaged_sweeps
from sskd.output import complain, steady_output
from sskd.training.signals import Interrupted, forward_scheduler_signal, raise_on_sigterm

# For the folder that Hydra makes for a sweep; a run's own is expanded with its configuration.
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
# For the text of --help.
OmegaConf.register_new_resolver("command", command_line, replace=True)
OmegaConf.register_new_resolver("tool", tool_command, replace=True)

_FULL_ERROR = "HYDRA_FULL_ERROR"
# Besides our own: what Hydra finds wrong in a configuration, and a full or forbidden disk.
_USER_ERRORS = (UserError, CompactHydraException, OmegaConfBaseException, OSError, yaml.YAMLError)
# Where Hydra reads files. It takes for granted that they are text and that their defaults are
# lists, and lets any exception out where they are not.
_COMPOSES = ("hydra._internal.config_", "hydra._internal.defaults_list")

# What comes with an extra, by the file that Hydra misses without it.
_PLUGINS = {
    "hydra/launcher/joblib": "cluster",
    "hydra/launcher/submitit_slurm": "cluster",
    "hydra/sweeper/optuna": "optuna",
}


def run_job(composed: DictConfig) -> float:
    """Train the run of one job; an error that the user can fix is reported in one line.

    Returns the accuracy that a sweeper which searches maximises.

    In a sweep every failure is told when it happens and kept in the run's folder, because the
    other jobs go on. This, not a Hydra callback, because it sees what ends a job under every
    launcher, and callbacks are not told of some of it.
    """
    try:
        with steady_output(), forward_scheduler_signal(), raise_on_sigterm():
            return _train(composed)
    except Exception as error:
        expected = isinstance(error, _USER_ERRORS)
        in_sweep = HydraConfig.get().mode != RunMode.RUN
        if not expected and not in_sweep:
            raise
        if not expected:
            complain(traceback.format_exc())
        told = (
            user_message(error) if isinstance(error, BusyError) else f"error: {user_message(error)}"
        )
        complain(told)
        if not in_sweep:
            sys.exit(_status(error))
        if not isinstance(error, BusyError):
            _keep_failure(composed, error)
        # Whatever it was, any launcher can hand this on, and any sweeper takes it for a failure.
        raise CellError(user_message(error), _status(error)) from None


def _train(composed: DictConfig) -> float:
    # Importing torch takes seconds, which --help and tab completion should not.
    from sskd.commands.advice import about_weighting
    from sskd.commands.objective import check_search, objective
    from sskd.config import read_config
    from sskd.output import say
    from sskd.train import carry_out

    hydra = HydraConfig.get()
    alone = hydra.mode == RunMode.RUN
    config = read_config(composed)
    if alone and (line := about_weighting(config.method.name, hydra.overrides.task)):
        say(line)
    check_search(config.dataset.holdout)
    folder, result = carry_out(config, commanded=alone)
    return objective(result, folder)


def _status(error: Exception) -> int:
    return error.status if isinstance(error, UserError) else UserError.status


def _keep_failure(composed: DictConfig, error: Exception) -> None:
    """Say in the folder of the run that it failed, for what failed before the run was opened."""
    from sskd.config import read_config
    from sskd.runs.lock import FolderLock
    from sskd.runs.status import write_failure
    from sskd.teachers.find import run_location

    # The error itself may be that there is no such folder.
    with contextlib.suppress(UserError, OSError):
        folder, _ = run_location(read_config(composed))
        if folder.is_dir():
            lock = FolderLock(folder)
            lock.acquire(watch=False)
            try:
                write_failure(folder, error, still_ours=lock.check)
            finally:
                lock.release()


def run_command(main: Callable[[], object]) -> int:
    """Run a Hydra command's ``main`` and return its exit status.

    0: finished, in a sweep every cell of it. 1: an error, told in a line. 75: nothing is wrong,
    but other processes are still at work on what is not finished. 128 + n: stopped by signal n.
    """
    sys.argv = [sys.argv[0], *with_packaged_sweeps(sys.argv[1:])]
    asked_for_traceback = os.environ.get(_FULL_ERROR) == "1"
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises, instead of printing several lines
    with steady_output():
        return _ended(main, asked_for_traceback)


def _ended(main: Callable[[], object], asked_for_traceback: bool) -> int:
    try:
        refuse_missing_keys(sys.argv[1:])
        refuse_odd_choices(sys.argv[1:])
        main()
    except Interrupted as stop:
        complain(f"{stop}: the state is saved, {_rerun_hint()} resumes")
        return 128 + stop.signum
    except KeyboardInterrupt:
        if "wandb" in sys.modules:
            _end_at_once(130)  # else W&B might wait for its server
        return 130
    except (UnfinishedError, CellError) as error:
        return error.status
    except _USER_ERRORS as error:
        if asked_for_traceback:
            raise
        complain(f"error: {user_message(error)}")
        return _status(error)
    except Exception as error:
        if asked_for_traceback:
            raise
        if isinstance(error, ValueError) and _raised_by_hydra(error):
            complain(f"error: {_long_number() or ' '.join(str(error).split())}")
            return UserError.status
        if not _raised_by_hydra_compose(error):
            raise
        cause = "cannot be composed (" + " ".join(str(error).split()) + ")"
        told = "its defaults lead back to itself" if isinstance(error, RecursionError) else cause
        complain(f"error: {_long_number() or f'{_primary_file()}: {told}'}")
        return UserError.status
    return 0


def _raised_by_hydra_compose(error: Exception) -> bool:
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_globals.get("__name__", "").startswith(_COMPOSES) for frame in frames)


def _raised_by_hydra(error: Exception) -> bool:
    """Return whether Hydra itself raised ``error``: about its options, as for two that exclude."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return str(innermost.f_globals.get("__name__", "")).startswith("hydra.")


def _primary_file() -> Path:
    """Return the file that the command line has composed: a sweep's, or the command's own."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", default=CONF, type=Path)
    parser.add_argument("--config-name", "-cn", default=current_role())
    given, _ = parser.parse_known_args()
    return Path(given.config_dir, f"{given.config_name.removesuffix('.yaml')}.yaml")


def _long_number() -> str:
    """Return what is wrong with a number on the command line that Python refuses to read."""
    most = sys.get_int_max_str_digits()
    for key, _, value in (word.partition("=") for word in sys.argv):
        if 0 < most < len(value) and re.fullmatch(r"[+-]?[\d_]+", value):
            return f"{key}: {shortened(int(value[:100]))} has {len(value)} digits, too many"
    return ""


def _end_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _rerun_hint() -> str:
    return "the same command" + " without force=true" * ("force=true" in sys.argv)


def user_message(error: Exception) -> str:
    """Return a complaint about a configuration in one line, with the nearest right name."""
    return mask_unprintable(_user_message(error))


def _user_message(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        told = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return told + f"; free some space there, and {_rerun_hint()} goes on" * full
    missing = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    if missing in _PLUGINS:
        return f"{missing} is not installed; pip install '.[{_PLUGINS[missing]}]' does that"
    if isinstance(error, MissingConfigException) and missing and error.options:
        group, _, name = missing.rpartition("/")
        options = ", ".join(error.options)
        hint = did_you_mean(name, error.options)
        return f"{group}={name}: no such {group}{hint} (there are: {options})"
    if type(error).__module__.startswith("submitit."):  # goes on with all that the job has printed
        return " ".join(str(error).splitlines()[:2]) + "; the other jobs go on (see squeue)"
    if advice := about_plus(error) or about_commas(error):
        return advice
    if isinstance(error, yaml.YAMLError):
        return f"not YAML that can be read: {' '.join(str(error).split())}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: cannot be read as KEY=VALUE ({str(error).splitlines()[0]})"
            f"{about_quotes(str(error.override))}"
        )
    if "No match in the defaults list" in str(error):
        told = " ".join(str(error).split("To append to your")[0].split())
        return f"{told} (a sweep's file begins with 'defaults: [student]')"
    # Hydra advises to add with + what it does not know; the next check would refuse that.
    causes = [str(error).split("To append to your")[0]]
    if isinstance(error.__cause__, OmegaConfBaseException):
        causes.append(str(error.__cause__).splitlines()[0])
    return " ".join(" ".join(causes).split())
