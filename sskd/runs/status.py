"""``status.json``: the state of a run before it has a result.

Nothing here needs PyTorch, so that the report can read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from sskd.errors import UserError
from sskd.files import StillOurs, is_regular_file, read_bounded_text, write_text

STATUS = "status.json"
MOST = 2**20  # bytes; a larger file is ignored, because it may come from anybody
_LONGEST = 50_000  # characters of an error, so that the file stays below that
SWEEP_VARIABLE = "SSKD_SWEEP"  # names the sweep, in the environment of its processes
State = Literal["queued", "running", "stopped", "failed", "finished"]

# The fields that a new state keeps.
_KEPT = ("command", "epochs", "forced")


def write_status(
    folder: Path, state: State, *, still_ours: StillOurs | None = None, **details: Any
) -> None:
    """Write the state of the run in ``folder``, with the time, the host and the process.

    ``still_ours`` is as in ``sskd.files.write_atomically``.
    """
    before = _read(folder)
    status = {
        "state": state,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "sweep": current_sweep(),
        **{key: before[key] for key in _KEPT if key in before},
        **details,
    }
    text = json.dumps(status, indent=2) + "\n"
    write_text(folder / STATUS, text, still_ours=still_ours)


def read_status(folder: Path) -> Mapping[str, Any]:
    """Return the fields of ``folder``'s status.json; none if it is missing or corrupt."""
    try:
        return _read(folder)
    except OSError:
        return {}


def _read(folder: Path) -> Mapping[str, Any]:
    """Do what ``read_status`` does, but raise OSError if the file exists and cannot be read."""
    path = folder / STATUS
    try:
        status = json.loads(read_bounded_text(path, MOST)) if is_regular_file(path) else {}
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def write_failure(
    folder: Path, error: BaseException, *, still_ours: StillOurs | None = None
) -> None:
    """Record that the run in ``folder`` failed with ``error``, or was stopped by a signal.

    The write must not hide the error itself. If the disk is full, or another process has taken the
    folder, the old status remains. ``still_ours`` is as in ``sskd.files.write_atomically``.
    """
    with contextlib.suppress(OSError, UserError):
        if isinstance(error, Exception):
            message = " ".join(str(error).split()) or type(error).__name__
            lines = "".join(traceback.format_exception(error))
            details = {"error": message[:_LONGEST], "traceback": lines[-_LONGEST:]}
            write_status(folder, "failed", still_ours=still_ours, **details)
        else:  # a signal, Ctrl-C
            write_status(folder, "stopped", still_ours=still_ours)


def current_sweep() -> str | None:
    """Return the name of the sweep that this process belongs to, or None."""
    return os.environ.get(SWEEP_VARIABLE) or None


def forced_in_this_sweep(folder: Path) -> bool:
    """Return whether this process's sweep has already restarted the run in ``folder``.

    Raises:
        OSError: the status cannot be read; a wrong answer would restart the run once more.
    """
    sweep = current_sweep()
    return sweep is not None and sweep in forced_in(_read(folder))


def forced_in(status: Mapping[str, Any]) -> list[str]:
    """Return the sweeps that restarted a run from scratch, by its ``status``."""
    sweeps = status.get("forced")
    return [str(sweep) for sweep in sweeps] if isinstance(sweeps, list) else []


def failed_in_this_sweep(folder: Path) -> str | None:
    """Return the error with which the run in ``folder`` failed in this process's sweep, or None."""
    status, sweep = read_status(folder), current_sweep()
    failed_here = sweep and status.get("sweep") == sweep and status.get("state") == "failed"
    return str(status.get("error")) if failed_here else None
