"""How the commands end: with one line and a status, whatever went wrong.

Importing this costs nothing: the commands answer ``--help`` before torch is loaded.
"""

from __future__ import annotations

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
from sskd.errors import UserError, nearest
from sskd.interrupt import Interrupted
from sskd.nested import flatten

# For the folder that Hydra makes for a sweep; a run's own is expanded with its configuration.
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)

_FULL_ERROR = "HYDRA_FULL_ERROR"
# Besides our own: what Hydra finds wrong in a configuration, and a full or forbidden disk.
_USER_CAN_MEND = (UserError, CompactHydraException, OmegaConfBaseException, OSError)


def run_job(job: Callable[[DictConfig], object], composed: DictConfig) -> None:
    """Run one job of a Hydra command; what the user can put right is told in one line.

    In a sweep every failure is told when it happens, because the other jobs go on and Hydra
    would tell the first one only, at the end.
    """
    try:
        job(composed)
    except Exception as error:
        expected = isinstance(error, _USER_CAN_MEND)
        if HydraConfig.get().mode == RunMode.RUN:
            if expected:
                sys.exit(f"error: {explain(error)}")
            raise
        if not expected:
            traceback.print_exc()
        print(f"error: {explain(error)}", file=sys.stderr, flush=True)
        raise UserError(explain(error)) from None


def run_command(main: Callable[[], object]) -> int:
    """Run a Hydra command's ``main`` and return its exit status."""
    asked_for_traceback = os.environ.get(_FULL_ERROR) == "1"
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises, instead of printing several lines
    try:
        main()
    except Interrupted as stop:
        print(f"{stop}: the state is saved, the same command goes on from it", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        return 130
    except UserError:
        return 1
    except _USER_CAN_MEND as error:
        if asked_for_traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def explain(error: Exception) -> str:
    """Return a complaint about a configuration in one line, with the nearest right name."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        options = ", ".join(error.options)
        return (
            f"{group}={name}: no such {group}{nearest(name, error.options)} (there are: {options})"
        )
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
