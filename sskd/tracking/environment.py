"""Check W&B's environment variables, and hide the variables that name another run.

``wandb agent`` names its run in variables (``WANDB_SWEEP_ID``, ``WANDB_RUN_ID``). It is the run of
the command. A teacher that is trained first, and the jobs of a sweep, are other runs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sskd.errors import UserError, shortened

# They name one run. Runs of this suite name themselves, so a user's own values have no effect.
_RUN_VARIABLES = (
    "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH",
    "WANDB_RUN_ID",
    "WANDB_RUN_STORAGE_ID",
    "WANDB_RUN_DIR",
    "WANDB_RESUME",
    "WANDB_NAME",
)
# ``wandb agent`` may set these too. Without an agent they are the user's, and apply to every run.
_AGENT_VARIABLES = ("WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_NOTES", "WANDB_TAGS")
_SECRET = ("KEY", "TOKEN")  # in the names of variables whose values are never printed
# Seconds. A run that W&B has not started within the first stays offline; data that is not uploaded
# within the second is left for `wandb sync`.
INIT_TIMEOUT = "WANDB_INIT_TIMEOUT"
FINISH_TIMEOUT = "WANDB_FINISH_TIMEOUT"
_TIMEOUTS = {INIT_TIMEOUT: "20", FINISH_TIMEOUT: "60"}
_SHORTEST = {INIT_TIMEOUT: 1, FINISH_TIMEOUT: 0}  # seconds; no server answers within 0
_LONGEST = 1e6  # seconds


def started_by_agent() -> bool:
    """Return whether ``wandb agent`` has started this command."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def requested_mode(mode: str) -> str:
    """Return the mode that ``wandb.mode`` selects: that of WANDB_MODE if it is ``auto``."""
    return (os.environ.get("WANDB_MODE") or "auto") if mode == "auto" else mode


def check_environment(mode: str) -> None:
    """Check the variables that W&B reads, unless it is off; an empty one counts as not set.

    Raises:
        UserError: W&B cannot read one of them.
    """
    if requested_mode(mode) == "disabled":
        return
    given = {k: v for k, v in sorted(os.environ.items()) if k.startswith("WANDB_") and v}
    if given:
        for variable in _TIMEOUTS:
            timeout(variable)
        _refuse_invalid(given)


def _refuse_invalid(given: dict[str, str]) -> None:
    import wandb  # takes a second, which a start without these variables should not
    from pydantic import ValidationError

    for name, value in given.items():
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except (ValueError, wandb.Error) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            shown = "" if any(part in name for part in _SECRET) else f"={shortened(value)[1:-1]}"
            reason = " ".join(reason.split()).removeprefix("Input ").removeprefix("Value error, ")
            raise UserError(
                f"{name}{shown}: {reason}; set another value, or unset it "
                "(wandb.mode=disabled runs without W&B)"
            ) from None


def timeout(variable: str) -> float:
    """Return how many seconds a run waits for W&B's server.

    Args:
        variable: ``INIT_TIMEOUT``, at the run's start, or ``FINISH_TIMEOUT``, at its end.

    Raises:
        UserError: the environment's value is not a number of seconds.
    """
    given = os.environ.get(variable) or _TIMEOUTS[variable]
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    least = _SHORTEST[variable]
    if not least <= seconds <= _LONGEST:
        raise UserError(
            f"{variable}={shortened(given)[1:-1]}: should be a number of seconds, "
            f"{least} to {_LONGEST:.0f}"
        )
    return seconds


@contextmanager
def hide_foreign_variables(mode: str, *, under_agent: bool) -> Iterator[None]:
    """Hide from W&B the variables that are empty or belong to another run.

    Args:
        mode: see ``requested_mode``; a run without W&B sees none of them.
        under_agent: this is the run that ``wandb agent`` has named in them.
    """
    off = requested_mode(mode) == "disabled"
    others: tuple[str, ...] = () if under_agent else _RUN_VARIABLES
    if started_by_agent() and not under_agent:
        others += _AGENT_VARIABLES
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("WANDB_") and (not value or off or name in others)
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
