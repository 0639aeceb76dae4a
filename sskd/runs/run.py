"""A run's folder while a process works in it.

The folder's path identifies the run. Its files survive a crash, so a run may be killed at any
moment; the same command then resumes from the last checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import nn

from sskd.distributed import ranks
from sskd.errors import BusyError, UserError
from sskd.files import StillOurs, make_durable_folder, stale_temporaries, write_text
from sskd.models import save_weights
from sskd.runs.checkpoints import Checkpoints
from sskd.runs.comparison import explain_difference, refuse_other_result
from sskd.runs.folder import read_config_file, read_result, write_config_file
from sskd.runs.identity import identity
from sskd.runs.lock import FolderLock
from sskd.runs.metrics_log import MetricsLog
from sskd.runs.names import CONFIG, HEADS, LAST, PREVIOUS, RESULT, WEIGHTS
from sskd.runs.result import Result
from sskd.runs.status import failed_in_this_sweep, write_failure, write_status
from sskd.runs.untrusted import refuse_unsafe_entries

R = TypeVar("R", bound=Result)

# What model.safetensors repeats of the result.
_METADATA = ("kind", "dataset", "student", "method", "seed", "epoch", "accuracy")


class Run:
    """One run's folder, locked while it is open. Of several ranks, the first one writes.

    A folder with a run of another ``config`` is refused if the difference decides the result
    (``sskd.runs.identity.identity``).

    Attributes:
        folder, config: the folder, and the full configuration as ``config.yaml`` keeps it.
        lock: the lock of the folder, to be checked before each write.
        metrics: the lines of ``metrics.jsonl``.
        checkpoints: what the run resumes from, and its best weights.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.lock = FolderLock(folder)
        self.metrics = MetricsLog(folder, self.lock)
        self.checkpoints = Checkpoints(folder, config, self.lock, self.metrics)

    def open(self, *, wait: bool = False) -> Self:
        """Lock the folder, which is created if it is missing.

        Args:
            wait: wait for another process that has it open, instead of an error. A run that
                failed in this sweep is then not tried again, since several jobs need it.

        Raises:
            BusyError: another process is working in it.
            UserError: the folder cannot be written, or holds a run of another configuration.
        """
        ranks.from_first(lambda: self._open(wait))
        return self

    def _open(self, wait: bool) -> None:
        try:
            make_durable_folder(self.folder)
            self.lock.acquire(wait=wait)
        except OSError as error:
            reason = f"cannot be written ({error.strerror})"
            raise UserError(f"{self.folder}: {reason}; use another runs=FOLDER") from None
        try:
            if wait and (failure := failed_in_this_sweep(self.folder)) is not None:
                reason = failure.removeprefix(f"{self.folder}: ")
                raise UserError(f"{self.folder}: already failed in this sweep: {reason}")
            self._enter()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock of the folder."""
        if ranks.is_first():
            self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        finished = (self.folder / RESULT).exists()  # a later error is not a failure of the run
        if error is not None and _is_failure(error) and not finished:
            write_failure(self.folder, error, still_ours=self.lock.check)
        self.close()

    def _enter(self) -> None:
        refuse_unsafe_entries(self.folder)
        # An earlier holder that is suspended during a write finds its temporary file gone.
        for path in stale_temporaries(self.folder):
            self.lock.check()
            path.unlink(missing_ok=True)  # a sweep that queues this run may be writing
        if any((self.folder / name).exists() for name in (LAST, PREVIOUS, RESULT)):
            self._refuse_other_config()
        else:
            with self.lock.writing() as still_ours:
                write_config_file(self.folder / CONFIG, self.config, still_ours=still_ours)
        if not (self.folder / RESULT).exists():
            self._write_status("running")

    def announce(self, epochs: Mapping[str, int]) -> None:
        """Record the ``epochs`` of each phase, from which others estimate the time left."""
        ranks.from_first(lambda: self._write_status("running", epochs=dict(epochs)))

    def _write_status(self, state: Any, **details: Any) -> None:
        with self.lock.writing() as still_ours:
            write_status(self.folder, state, still_ours=still_ours, **details)

    def _refuse_other_config(self) -> None:
        other = explain_difference(read_config_file(self.folder / CONFIG), self.config)
        if other:
            raise UserError(
                f"{self.folder}: holds a run of another configuration: {other}; start "
                "from scratch with force=true (.old/ keeps the old run), or use another runs=FOLDER"
            )

    def finished(self, kind: type[R]) -> R | None:
        """Return the result if the run has finished, else None; the folder need not be open.

        Raises:
            UserError: the folder's finished run has another configuration.
        """
        result = read_result(self.folder, kind)
        if result is not None:
            self._refuse_other_config()
            refuse_other_result(self.folder, result.run, self.config)
        return result

    def finish(self, model: nn.Module | None, result: R, heads: nn.Module | None = None) -> R:
        """Write the weights of ``model`` and ``heads``, if any, and the result; return it."""
        finished = replace(result, run=identity(self.config))

        def write() -> None:
            with self.lock.writing() as still_ours:
                _write_files(self.folder, model, finished, heads, still_ours=still_ours)
            self._write_status("finished")

        ranks.from_first(write)
        return finished


def _is_failure(error: BaseException) -> bool:
    """Return whether to record ``error`` in the run's status: not if another process has the run.

    Of several ranks, only the first one records it. It does not record an error that a collective
    may have raised because another rank has ended.
    """
    if isinstance(error, BusyError) or not ranks.is_first():
        return False
    return ranks.count() == 1 or isinstance(error, UserError | KeyboardInterrupt)


def _write_files(
    folder: Path,
    model: nn.Module | None,
    result: Result,
    heads: nn.Module | None,
    *,
    still_ours: StillOurs,
) -> None:
    """Write the weights and the result of a finished run."""
    values = result.to_json()
    metadata = {key: values[key] for key in _METADATA if key in values}
    if model is not None:
        save_weights(folder / WEIGHTS, model, metadata, still_ours=still_ours)
    if heads is not None:
        save_weights(folder / HEADS, heads, {}, still_ours=still_ours)
    # Last, because the result marks the run as finished.
    text = json.dumps(values, indent=2) + "\n"
    write_text(folder / RESULT, text, still_ours=still_ours)
    (folder / PREVIOUS).unlink(missing_ok=True)
