"""A run's folder: its configuration, metrics, checkpoints and result.

The folder is the run's identity. What stands in it is written whole or not at all, so a run
may be killed at any moment; the next start of the same command goes on from ``last.pt``, or from
``previous.pt``, the checkpoint before it, where that is damaged. A checkpoint names its run by what
decides the run's result, and one of another run is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from operator import methodcaller
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf
from torch import Tensor, nn

from sskd.errors import BusyError, UserError
from sskd.files import (
    append_line,
    make_durable_folder,
    read_lines,
    stale_temporaries,
    write_at,
    write_atomically,
    write_text,
)
from sskd.models import save_weights
from sskd.output import complain
from sskd.runs.checkpoint_file import CorruptFileError, load_checkpoint, save_checkpoint
from sskd.runs.folder import read_config_file, read_result
from sskd.runs.identity import explain_difference, identity, other_run, refuse_other_result
from sskd.runs.lock import FolderLock
from sskd.runs.names import (
    BEST,
    CONFIG,
    DAMAGED,
    LAST,
    METRICS,
    MOST_EPOCHS,
    MOST_METRICS,
    NAME,
    PREVIOUS,
    RESULT,
    WEIGHTS,
)
from sskd.runs.status import failed_in_this_sweep, write_failure, write_status


class Run:
    """One run's folder, locked while it is open.

    A folder that holds a run of another ``config`` is refused, where the difference is one
    that decides the result (``sskd.runs.identity.identity``).
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.metrics: list[dict[str, Any]] = []
        self._metrics_digest = hashlib.sha256()
        self._lock = FolderLock(folder)

    def open(self, *, wait: bool = False) -> Self:
        """Make the folder, or take it up where it stopped.

        Args:
            wait: wait for another process that has it open, instead of an error: the run is one
                that several cells of a sweep need, so what has failed in that is not tried again.

        Raises:
            BusyError: another process is at work in it.
            UserError: the folder cannot be written, holds a run of another configuration, or one
                that is waited for has failed in this sweep.
        """
        try:
            make_durable_folder(self.folder)
            self._lock.acquire(wait=wait)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); "
                "choose another folder with runs=FOLDER"
            ) from None
        try:
            if wait:
                self._refuse_failed()
            self._enter()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        ended = (self.folder / RESULT).exists()  # what comes after it is no failure of the run
        if error is not None and not isinstance(error, BusyError) and not ended:
            write_failure(self.folder, error, still_ours=self._lock.check)
        self.close()

    def _refuse_failed(self) -> None:
        if reason := failed_in_this_sweep(self.folder):
            told = reason.removeprefix(f"{self.folder}: ")
            raise UserError(f"{self.folder}: has failed in this sweep already: {told}")

    def _enter(self) -> None:
        for path in self.folder.iterdir():
            odd = path.exists() and not path.is_file() and not path.is_dir()
            if path.is_symlink() or odd:
                # A stranger's folder must not lead what is written elsewhere, or keep it waiting.
                kind = "symbolic link" if path.is_symlink() else "pipe or a device"
                raise UserError(
                    f"{path}: is a {kind}, but a run keeps its files in its own folder; "
                    "put the file itself there"
                )
        # This is also what keeps out an earlier holder that is suspended during a write.
        for path in stale_temporaries(self.folder):
            self._lock.check()
            path.unlink(missing_ok=True)  # a sweep that queues this run may be writing
        if any((self.folder / name).exists() for name in (LAST, PREVIOUS, RESULT)):
            self._refuse_other_config()
        else:
            text = OmegaConf.to_yaml(OmegaConf.create(dict(self.config)))
            with self._still_ours() as ours:
                write_text(self.folder / CONFIG, text, still_ours=ours)
        if not (self.folder / RESULT).exists():
            with self._still_ours() as ours:
                write_status(self.folder, "running", still_ours=ours)

    def plan(self, epochs: Mapping[str, int]) -> None:
        """Say how many ``epochs`` each phase will take, so that others can tell the time left."""
        with self._still_ours() as ours:
            write_status(self.folder, "running", still_ours=ours, epochs=dict(epochs))

    def _refuse_other_config(self) -> None:
        other = explain_difference(read_config_file(self.folder / CONFIG), self.config)
        if other:
            raise UserError(
                f"{self.folder}: holds a run of another configuration: {other}; start again with "
                "force=true (the old run is kept under .old/), or use another runs=FOLDER"
            )

    def finished(self) -> dict[str, Any] | None:
        """Return the result if the run has finished, else None; the folder need not be open.

        Raises:
            UserError: what has finished there is a run of another configuration.
        """
        result = read_result(self.folder)
        if result is not None:
            self._refuse_other_config()
            refuse_other_result(self.folder, result, self.config)
        return result

    def checkpoint(self, phases: Collection[str]) -> dict[str, Any] | None:
        """Return what ``save`` last wrote, on the CPU; ``metrics`` are cut back to that moment.

        Where that is damaged it is the checkpoint before, with a warning. Returns None, and no
        metrics, where nothing was saved.

        Args:
            phases: the names of those that the run has; the checkpoint stands in one of them.

        Raises:
            UserError: no checkpoint is whole, or the metrics are not, or it is another run's.
        """
        last, previous, damage = self.folder / LAST, self.folder / PREVIOUS, ""
        for path in (last, previous):
            if not path.exists():
                continue
            try:
                state = load_checkpoint(path)
                if other := self._other_run(path, state):
                    raise UserError(
                        f"{path}: is a checkpoint of another run: {other}; put back this run's, "
                        "or remove this folder to start again"
                    )
                if not isinstance(state.get("stage"), str) or state["stage"] not in phases:
                    raise CorruptFileError(path.name, f"it stands in phase '{state.get('stage')}'")
                lines, figures = self._metrics_at(state)
            except CorruptFileError as error:
                damage = damage or f"{self.folder}: {error}"
                continue
            if damage:
                complain(f"warning: {damage}; resuming from {path.name}")
                self._lock.check()
                if last.exists():
                    last.replace(self.folder / DAMAGED)  # for whoever wants to look into it
                path.replace(last)  # else the next one would take its place
            self._set_metrics(lines, figures)
            return state
        if damage:
            raise UserError(f"{damage}; put back a copy, or remove this folder to start afresh")
        self._set_metrics([], [])
        return None

    def _other_run(self, path: Path, state: Mapping[str, Any]) -> str:
        """Return how the run that a checkpoint names differs from this one; "" if it does not."""
        try:
            return other_run(state, self.config)
        except ValueError as error:
            raise CorruptFileError(path.name, str(error)) from None

    def _metrics_at(self, state: Mapping[str, Any]) -> tuple[list[bytes], list[dict[str, Any]]]:
        """Return the lines of ``metrics.jsonl`` of when ``state`` was saved, and what they say."""
        count, digest = state.get("lines"), state.get("metrics_digest")
        if not isinstance(count, int):
            raise CorruptFileError(LAST, "it is not a run's checkpoint")
        path = self.folder / METRICS
        lines = list(islice(self._lines(), max(count, 0))) if path.exists() else []
        # Checkpoints of versions that kept no digest have only the number to go by.
        if len(lines) < count or digest not in (None, hashlib.sha256(b"".join(lines)).hexdigest()):
            raise CorruptFileError(METRICS, "lines of it were changed or lost")
        return lines, _figures(lines)

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines of ``metrics.jsonl``; raise CorruptFileError if there are too many."""
        try:
            yield from read_lines(self.folder / METRICS, MOST_METRICS, MOST_EPOCHS)
        except ValueError as error:
            raise CorruptFileError(METRICS, str(error)) from None

    def _set_metrics(self, lines: list[bytes], figures: list[dict[str, Any]]) -> None:
        self.metrics = figures
        self._metrics_digest = hashlib.sha256(b"".join(lines))
        # A new file: a holder before this one may still append to the old one.
        write = methodcaller("writelines", lines)
        with self._still_ours() as ours:
            write_atomically(self.folder / METRICS, write, still_ours=ours)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return all lines of ``metrics.jsonl`` of a run that has finished.

        Raises:
            UserError: they are damaged.
        """
        try:
            return _figures(self._lines())
        except (CorruptFileError, OSError) as error:
            raise UserError(
                f"{self.folder}: {error}; remove this folder, and the same command makes it anew"
            ) from None

    def log(self, figures: dict[str, Any]) -> None:
        """Add one line, an epoch's figures, to ``metrics.jsonl``."""
        line = json.dumps(figures)
        with self._still_ours() as ours:
            append_line(self.folder / METRICS, line, still_ours=ours)
        self._metrics_digest.update(f"{line}\n".encode())
        self.metrics.append(figures)

    def write_at(self, name: str, offset: int, data: bytes, *, sync: bool) -> None:
        """Write ``data`` into the folder's file ``name`` (``sskd.files.write_at``)."""
        with self._still_ours() as ours:
            write_at(self.folder / name, offset, data, sync=sync, still_ours=ours)

    def save(self, state: dict[str, Any]) -> None:
        """Write ``last.pt``: all that is needed to go on from here; the one before it is kept."""
        told = {"lines": len(self.metrics), "metrics_digest": self._metrics_digest.hexdigest()}
        content = {**state, **told, NAME: identity(self.config)}
        with self._still_ours() as ours:
            save_checkpoint(
                self.folder / LAST, content, keep=self.folder / PREVIOUS, still_ours=ours
            )

    def save_best(self, model: nn.Module, epoch: int, accuracy: float) -> None:
        """Write ``best.pt``: the network's weights at its best epoch, in the published layout."""
        told = {"epoch": epoch, "accuracy": accuracy, NAME: identity(self.config)}
        state = {"model": model.state_dict(), **told}
        with self._still_ours() as ours:
            save_checkpoint(self.folder / BEST, state, still_ours=ours)

    def load_best(self, epoch: int) -> dict[str, Tensor] | None:
        """Return the weights of the best ``epoch``; None, with a warning, where they are lost."""
        try:
            best = load_checkpoint(self.folder / BEST)
            if other := self._other_run(self.folder / BEST, best):
                raise CorruptFileError(BEST, f"it is of another run: {other}")
            if best.get("epoch") != epoch:
                raise CorruptFileError(BEST, f"it is of epoch {best.get('epoch')}")
            if not isinstance(best.get("model"), dict):
                raise CorruptFileError(BEST, "it holds no weights")
        except (CorruptFileError, OSError) as error:
            told = f"warning: {self.folder}: the weights of epoch {epoch}, the best, are lost"
            complain(f"{told}: {error}")
            return None
        weights: dict[str, Tensor] = best["model"]
        return weights

    def finish(self, model: nn.Module | None, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write ``model``'s weights, if there is one, and nothing else's, and then the result.

        The result marks the run finished, so it comes last. Returns it as written: it names its
        run.
        """
        named = {**result, NAME: identity(self.config)}
        told = ("kind", "dataset", "student", "method", "seed", "epoch", "accuracy")
        about = {key: result[key] for key in told if key in result}
        with self._still_ours() as ours:
            if model is not None:
                save_weights(self.folder / WEIGHTS, model, about, still_ours=ours)
            text = json.dumps(named, indent=2) + "\n"
            write_text(self.folder / RESULT, text, still_ours=ours)
            (self.folder / PREVIOUS).unlink(missing_ok=True)
            write_status(self.folder, "finished", still_ours=ours)
        return named

    @contextmanager
    def _still_ours(self) -> Iterator[Callable[[], None]]:
        """Return what asks in mid-write whether the run is still ours; ask it also before.

        And after, if the folder was removed in the meantime, or what was prepared in it.
        """
        self._lock.check()
        try:
            yield self._lock.check
        except FileNotFoundError:
            self._lock.check()
            raise


def _figures(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return what lines of ``metrics.jsonl`` say; raise CorruptFileError where that is nothing."""
    try:
        figures = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(METRICS, type(error).__name__) from None
    if not all(isinstance(line, dict) and isinstance(line.get("stage"), str) for line in figures):
        raise CorruptFileError(METRICS, "a line is no epoch's")
    return figures
