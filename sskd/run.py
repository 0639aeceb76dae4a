"""A run's folder: its configuration, metrics, checkpoints and result.

The folder is the run's identity. What stands in it is written whole or not at all, so a run
may be killed at any moment; the next start of the same command goes on from ``last.pt``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from sskd.errors import BusyError, UserError
from sskd.identity import differing
from sskd.lock import FolderLock, forget_lock
from sskd.models import save_weights
from sskd.status import failed_in_this_sweep, write_failure, write_status
from sskd.storage import leftovers, write_text, write_whole

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
LAST = "last.pt"
BEST = "best.pt"
WEIGHTS = "model.safetensors"
RESULT = "result.json"


class Run:
    """One run's folder, locked while it is open.

    A folder that holds a run of another ``config`` is refused, where the difference is one
    that decides the result (``sskd.identity.identity``).
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.metrics: list[dict[str, Any]] = []
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
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(wait=wait)
        except OSError as error:
            raise UserError(
                f"{self.folder}: cannot be written ({error.strerror}); "
                "choose another folder with runs=FOLDER"
            ) from None
        try:
            if wait:
                self._refuse_failed()
            self._take_up()
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
        if error is not None and not isinstance(error, BusyError):
            write_failure(self.folder, error)
        self.close()

    def _refuse_failed(self) -> None:
        if reason := failed_in_this_sweep(self.folder):
            told = reason.removeprefix(f"{self.folder}: ")
            raise UserError(f"{self.folder}: has failed in this sweep already: {told}")

    def _take_up(self) -> None:
        for path in leftovers(self.folder):
            path.unlink(missing_ok=True)  # a sweep that queues this run may be writing
        if any((self.folder / name).exists() for name in (LAST, RESULT)):
            self._refuse_other_config()
        else:
            text = OmegaConf.to_yaml(OmegaConf.create(dict(self.config)))
            write_text(self.folder / CONFIG, text)
        if not (self.folder / RESULT).exists():
            write_status(self.folder, "running")

    def plan(self, epochs: Mapping[str, int]) -> None:
        """Say how many ``epochs`` each stage will take, so that others can tell the time left."""
        write_status(self.folder, "running", epochs=dict(epochs))

    def _refuse_other_config(self) -> None:
        other = differing(read_config_file(self.folder / CONFIG), self.config)
        if other:
            raise UserError(
                f"{self.folder}: holds a run of another configuration: {other}; start afresh with "
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
        return result

    def checkpoint(self) -> dict[str, Any] | None:
        """Return what ``save`` last wrote, on the CPU; ``metrics`` are cut back to that moment.

        Returns None, and no metrics, where nothing was saved.
        """
        if not (self.folder / LAST).exists():
            self._set_metrics([])
            return None
        try:
            state: dict[str, Any] = torch.load(
                self.folder / LAST, map_location="cpu", weights_only=True
            )
            lines = self.read_metrics(state["lines"])
            if len(lines) < state["lines"]:
                raise ValueError(f"{METRICS} is too short")
        except PermissionError:  # says nothing about what the files hold
            raise
        except Exception as error:  # torch has a dozen types of error for a damaged file
            raise UserError(
                f"{self.folder}: {LAST} or {METRICS} is damaged ({type(error).__name__}); "
                "remove this folder to start afresh"
            ) from error
        self._set_metrics(lines)
        return state

    def _set_metrics(self, lines: list[dict[str, Any]]) -> None:
        self.metrics = lines
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in lines))

    def read_metrics(self, count: int | None = None) -> list[dict[str, Any]]:
        """Return the first ``count`` lines of ``metrics.jsonl``, or all."""
        lines = (self.folder / METRICS).read_text().splitlines()[:count]
        return [json.loads(line) for line in lines]

    def log(self, line: dict[str, Any]) -> None:
        """Add one line, an epoch's figures, to ``metrics.jsonl``."""
        self._lock.check()
        self.metrics.append(line)
        with (self.folder / METRICS).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def save(self, state: dict[str, Any]) -> None:
        """Write ``last.pt``: all that is needed to go on from here."""
        self._lock.check()
        whole = {**state, "lines": len(self.metrics)}
        write_whole(self.folder / LAST, lambda stream: torch.save(whole, stream))

    def save_best(self, model: nn.Module, epoch: int, accuracy: float) -> None:
        """Write ``best.pt``: the network's weights at its best epoch, in the published layout."""
        state = {"model": model.state_dict(), "epoch": epoch, "accuracy": accuracy}
        write_whole(self.folder / BEST, lambda stream: torch.save(state, stream))

    def finish(self, model: nn.Module, result: Mapping[str, Any]) -> None:
        """Write ``model``'s weights and nothing else's, and then the result.

        The result marks the run finished, so it comes last.
        """
        self._lock.check()
        told = ("kind", "dataset", "student", "method", "seed", "epoch", "accuracy")
        about = {key: result[key] for key in told if key in result}
        save_weights(self.folder / WEIGHTS, model, about)
        write_text(self.folder / RESULT, json.dumps(dict(result), indent=2) + "\n")
        write_status(self.folder, "finished")


def read_config_file(path: Path) -> dict[str, Any]:
    """Return the configuration that a run's folder was made with; UserError if it is not one."""
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: is not a run's configuration; start afresh with force=true")
    return {str(key): value for key, value in config.items()}


def read_result(folder: Path) -> dict[str, Any] | None:
    """Return the result of the run in ``folder``, or None where none has finished."""
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        result = None
    if not isinstance(result, dict):
        raise UserError(f"{path}: is not a result; start afresh with force=true")
    return result


def put_aside(folder: Path) -> None:
    """Move a run's folder into ``.old/`` beside it, so that a new run can take its place."""
    if not folder.exists():
        return
    old = folder.parent / ".old"
    lock = FolderLock(folder)
    try:
        lock.acquire()
        old.mkdir(exist_ok=True)
        target = old / f"{folder.name}-{_last_put_aside(folder) + 1}"
        folder.rename(target)
        forget_lock(target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be moved to {old} ({error.strerror})") from None
    finally:
        lock.release()


def _last_put_aside(folder: Path) -> int:
    """Return the number of the latest run that was put aside from ``folder``, or 0."""
    names = [path.name for path in (folder.parent / ".old").glob(f"{folder.name}-*")]
    numbers = [name.removeprefix(f"{folder.name}-") for name in names]
    return max((int(number) for number in numbers if number.isdigit()), default=0)
