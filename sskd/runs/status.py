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
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

from sskd.errors import UserError, one_line, shortened
from sskd.files import StillOurs, is_regular_file, read_bounded_text, write_text
from sskd.runs import fields
from sskd.runs.names import MOST_EPOCHS

STATUS = "status.json"
MOST = 2**20  # bytes; a larger file is ignored, because it may be untrusted
_LONGEST = 50_000  # characters of an error, so that the file stays below that
SWEEP_VARIABLE = "SSKD_SWEEP"  # names the sweep, in the environment of its processes
State = Literal["queued", "running", "stopped", "failed", "finished"]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class Status:
    """The state of a run; None, or nothing, for what is not known.

    Attributes:
        state: None if the run has no status.
        since: the time of the write, by the process ``pid`` of ``host``.
        sweep: the sweep that this process belongs to.
        command: repeats the run.
        epochs: of each phase.
        forced: the sweeps that restarted the run from scratch.
        error, traceback: of a run that failed.
    """

    state: State | None = None
    since: datetime | None = None
    host: str | None = None
    pid: int | None = None
    sweep: str | None = None
    command: str | None = None
    epochs: Mapping[str, int] = field(default_factory=dict)
    forced: tuple[str, ...] = ()
    error: str | None = None
    traceback: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the known fields as plain values."""
        values = {name: value for name, value in vars(self).items() if value not in (None, {}, ())}
        if self.since is not None:
            values["since"] = self.since.isoformat(timespec="seconds")
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the status with these fields, without malformed ones.

        Raises:
            ValueError: the state is missing or unknown.
        """
        found = fields.text(values, "state")
        state = next((known for known in STATES if known == found), None)
        if state is None:
            raise ValueError(f"'state' is {shortened(found)}")
        forced = values.get("forced")
        return cls(
            state=state,
            since=fields.timestamp(values, "since"),
            pid=_integer(values.get("pid")),
            epochs=_epochs(values.get("epochs")),
            forced=tuple(map(str, forced)) if isinstance(forced, list) else (),
            **{name: value for name in _TEXTS if isinstance(value := values.get(name), str)},
        )


_TEXTS = ("host", "sweep", "command", "error", "traceback")


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _epochs(values: object) -> dict[str, int]:
    if not isinstance(values, dict):
        return {}
    counts = {str(phase): _integer(count) for phase, count in values.items()}
    return {phase: count for phase, count in counts.items() if count and 0 < count <= MOST_EPOCHS}


def write_status(
    folder: Path, state: State, *, still_ours: StillOurs | None = None, **details: Any
) -> None:
    """Write the state of the run in ``folder``, with the time, the host and the process.

    A new state keeps the command, the epochs and ``forced``, unless ``details`` have them.
    ``still_ours`` is as in ``sskd.files.write_atomically``.
    """
    before = _read(folder)
    status = Status(
        state,
        since=datetime.now(UTC),
        host=socket.gethostname(),
        pid=os.getpid(),
        sweep=current_sweep(),
        command=before.command,
        epochs=before.epochs,
        forced=before.forced,
    )
    text = json.dumps(replace(status, **details).to_json(), indent=2) + "\n"
    write_text(folder / STATUS, text, still_ours=still_ours)


def read_status(folder: Path) -> Status:
    """Return ``folder``'s status; an empty one if it is missing or corrupt."""
    try:
        return _read(folder)
    except OSError:
        return Status()


def parse_status(folder: Path) -> Status:
    """Return ``folder``'s status; an empty one if there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a status.
    """
    path = folder / STATUS
    if not is_regular_file(path):
        return Status()
    return Status.from_json(fields.parse_object(read_bounded_text(path, MOST)))


def _read(folder: Path) -> Status:
    """Do what ``read_status`` does, but raise OSError if the file exists and cannot be read."""
    try:
        return parse_status(folder)
    except (FileNotFoundError, ValueError):
        return Status()


def write_failure(
    folder: Path, error: BaseException, *, still_ours: StillOurs | None = None
) -> None:
    """Record that the run in ``folder`` failed with ``error``, or was stopped by a signal.

    The write must not hide the error itself. If the disk is full, or another process has taken the
    folder, the old status remains. ``still_ours`` is as in ``sskd.files.write_atomically``.
    """
    with contextlib.suppress(OSError, UserError):
        if isinstance(error, Exception):
            message = one_line(error)
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
    return sweep is not None and sweep in _read(folder).forced


def failed_in_this_sweep(folder: Path) -> str | None:
    """Return the error with which the run in ``folder`` failed in this process's sweep, or None."""
    status, sweep = read_status(folder), current_sweep()
    failed_here = sweep and status.sweep == sweep and status.state == "failed"
    return str(status.error) if failed_here else None
