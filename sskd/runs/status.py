"""What is known of a run before it has a result: ``status.json`` in its folder.

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
MOST = 2**20  # bytes that it may have, since it may be a stranger's
_LONGEST = 50_000  # characters of an error, so that the status stays below that
SWEEP_VARIABLE = "SSKD_SWEEP"  # in the environment of a sweep's processes: which sweep it is
State = Literal["queued", "running", "stopped", "failed", "finished"]

# What stays true when a run goes from one state to the next.
_KEPT = ("command", "epochs", "forced")


def write_status(
    folder: Path, state: State, *, still_ours: StillOurs | None = None, **details: Any
) -> None:
    """Say what the run in ``folder`` is doing, since when, and which process says so.

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
    """Return what ``folder``'s status.json says; nothing where it is missing or damaged."""
    try:
        return _read(folder)
    except OSError:
        return {}


def _read(folder: Path) -> Mapping[str, Any]:
    """Return the same; raise OSError where it is there and cannot be read at this moment."""
    path = folder / STATUS
    try:
        status = json.loads(read_bounded_text(path, MOST)) if is_regular_file(path) else {}
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def write_failure(
    folder: Path, error: BaseException, *, still_ours: StillOurs | None = None
) -> None:
    """Say that the run in ``folder`` failed, or was stopped, by ``error``.

    That must not hide the error itself, so a disk that is full, or another holder of the folder,
    leaves the old status. ``still_ours`` is as in ``sskd.files.write_atomically``.
    """
    with contextlib.suppress(OSError, UserError):
        if isinstance(error, Exception):
            told = " ".join(str(error).split()) or type(error).__name__
            lines = "".join(traceback.format_exception(error))
            details = {"error": told[:_LONGEST], "traceback": lines[-_LONGEST:]}
            write_status(folder, "failed", still_ours=still_ours, **details)
        else:  # a signal, Ctrl-C
            write_status(folder, "stopped", still_ours=still_ours)


def current_sweep() -> str | None:
    """Return the name of the sweep that this process belongs to, if it belongs to one."""
    return os.environ.get(SWEEP_VARIABLE) or None


def forced_in_this_sweep(folder: Path) -> bool:
    """Return whether the run in ``folder`` was begun afresh by the sweep of this process.

    Raises:
        OSError: its status cannot be read; a wrong no would begin it once more.
    """
    sweep = current_sweep()
    return sweep is not None and sweep in forced_in(_read(folder))


def forced_in(status: Mapping[str, Any]) -> list[str]:
    """Return the sweeps that have begun a run afresh, as its status tells."""
    told = status.get("forced")
    return [str(sweep) for sweep in told] if isinstance(told, list) else []


def failed_in_this_sweep(folder: Path) -> str | None:
    """Return why the run in ``folder`` failed in the sweep that this process belongs to, if so."""
    status, sweep = read_status(folder), current_sweep()
    failed_here = sweep and status.get("sweep") == sweep and status.get("state") == "failed"
    return str(status.get("error")) if failed_here else None
