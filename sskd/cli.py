"""How the commands end: with one line and a status, whatever went wrong.

Importing this costs nothing: the commands answer ``--help`` before torch is loaded.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sskd import CONF
from sskd.errors import BusyError, UnfinishedError, UserError, nearest
from sskd.interrupt import Interrupted, warnings_passed_on
from sskd.nested import flatten

# For the folder that Hydra makes for a sweep; a run's own is expanded with its configuration.
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)

_FULL_ERROR = "HYDRA_FULL_ERROR"
# Besides our own: what Hydra finds wrong in a configuration, and a full or forbidden disk.
_USER_CAN_MEND = (UserError, CompactHydraException, OmegaConfBaseException, OSError)

# Launchers that come with an extra.
_PLUGINS = ("hydra/launcher/joblib", "hydra/launcher/submitit_slurm")


def run_job(job: Callable[[DictConfig], object], composed: DictConfig) -> None:
    """Run one job of a Hydra command; what the user can put right is told in one line.

    In a sweep every failure is told when it happens and kept in the run's folder, because the
    other jobs go on. This, not a Hydra callback, because it sees what ends a job under every
    launcher, and callbacks are not told of some of it.
    """
    try:
        with warnings_passed_on():
            job(composed)
    except Exception as error:
        expected = isinstance(error, _USER_CAN_MEND)
        in_sweep = HydraConfig.get().mode != RunMode.RUN
        if not expected and not in_sweep:
            raise
        if not expected:
            traceback.print_exc()
        told = explain(error) if isinstance(error, BusyError) else f"error: {explain(error)}"
        print(told, file=sys.stderr, flush=True)
        if not in_sweep:
            sys.exit(_status(error))
        if not isinstance(error, BusyError):
            _keep_failure(composed, error)
        raise UserError(told) from None  # whatever it was, any launcher can hand this on


def _status(error: Exception) -> int:
    return error.status if isinstance(error, UserError) else UserError.status


def _keep_failure(composed: DictConfig, error: Exception) -> None:
    """Say in the folder of the run that it failed, for what failed before the run was opened."""
    from sskd.config import read_config
    from sskd.lock import is_held
    from sskd.status import write_failure
    from sskd.teachers import locate

    with contextlib.suppress(UserError):  # the error itself may be that there is no such folder
        folder, _ = locate(read_config(composed))
        if not is_held(folder):
            write_failure(folder, error)


def run_command(main: Callable[[], object]) -> int:
    """Run a Hydra command's ``main`` and return its exit status.

    0: finished, in a sweep every cell of it. 1: an error, told in a line. 75: nothing is wrong,
    but other processes are still at work on what is not finished. 128 + n: stopped by signal n.
    """
    asked_for_traceback = os.environ.get(_FULL_ERROR) == "1"
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises, instead of printing several lines
    try:
        main()
    except Interrupted as stop:
        again = "the same command" + " without force=true" * ("force=true" in sys.argv)
        print(f"{stop}: the state is saved, {again} goes on from it", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except UnfinishedError as error:
        return error.status
    except _USER_CAN_MEND as error:
        if asked_for_traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return _status(error)
    return 0


def explain(error: Exception) -> str:
    """Return a complaint about a configuration in one line, with the nearest right name."""
    if isinstance(error, UserError):
        return str(error)
    missing = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
    if missing in _PLUGINS:
        return f"{missing} is not installed; pip install '.[cluster]' does that"
    if isinstance(error, MissingConfigException) and missing and error.options:
        group, _, name = missing.rpartition("/")
        options = ", ".join(error.options)
        return (
            f"{group}={name}: no such {group}{nearest(name, error.options)} (there are: {options})"
        )
    if type(error).__module__.startswith("submitit."):  # goes on with all that the job has printed
        return " ".join(str(error).splitlines()[:2]) + "; the other jobs go on (see squeue)"
    unknown = re.match(r"Could not override '([^']+)'\.\s*To append", str(error))
    if unknown:
        key = unknown.group(1)
        return f"{key}: no such setting{nearest(key, _known_settings())}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as KEY=VALUE ({str(error).splitlines()[0]})"
    # Hydra advises to add with + what it does not know; the next check would refuse that.
    causes = [str(error).split("To append to your")[0]]
    if isinstance(error.__cause__, OmegaConfBaseException):
        causes.append(str(error.__cause__).splitlines()[0])
    return " ".join(" ".join(causes).split())


def _known_settings() -> list[str]:
    """Return the dotted names of all settings, and of the groups that choose them."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("student")
    values = OmegaConf.to_container(composed)
    assert isinstance(values, dict)
    named = {str(key): value for key, value in values.items()}
    groups = ["arch@teacher", "arch@student", *(path.stem for path in CONF.iterdir())]
    return groups + list(flatten(named))
