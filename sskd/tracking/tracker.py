"""Weights & Biases: one run for each run's folder, online or to be synced later."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import wandb

from sskd.config import Config
from sskd.errors import UserError
from sskd.output import complain, say
from sskd.overrides import as_override, flatten
from sskd.runs.identity import diff_from_recipe
from sskd.runs.run import Run
from sskd.runs.weightings import CE, KD, RECIPE, find_weighting
from sskd.tracking.session import open_run, sync_folder, sync_later
from sskd.training.signals import Interrupted

# Figures about the student as a whole; the others are named after their phase.
_UNPREFIXED = ("test/", "holdout/", "best/")
# Where a result has the figures of W&B's summary.
_SUMMARISED = {
    "last/top1": "top1.last",
    "best/top1": "top1.best",
    "best/epoch": "top1.best_epoch",
    "hours": "seconds",
    "teacher_top1": "teacher_top1",
    "agreement": "agreement",
    "kl": "kl",
    "images_per_second": "images_per_second",
    "peak_memory_mib": "peak_memory_mib",
}


def report_finished(run: Run, config: Config, result: Mapping[str, Any]) -> None:
    """Show a run that has finished before in the W&B run that ``wandb agent`` has named for it."""
    try:
        run.metrics = run.read_metrics()
    except UserError as error:
        complain(f"warning: {error}")
    with Tracker(run, config, agents=True) as tracker:
        for line in run.metrics:
            tracker.log(line)
        tracker.summarise(result)


class Tracker:
    """A run's counterpart in W&B, open while it is entered.

    Nothing it does asks a question, and where W&B cannot be reached the run is kept on disk.
    """

    def __init__(self, run: Run, config: Config, *, agents: bool = False) -> None:
        """Take the W&B run that ``wandb agent`` has named if ``agents``, else one of its own."""
        self._run = run
        self._agents = agents
        self._config = config
        self._name = str(run.folder.relative_to(config.runs))
        self._lines = 0
        self._lost = False
        self._pictures: dict[str, Path] = {}
        self._result: Mapping[str, Any] = {}

    def __enter__(self) -> Self:
        self._wandb = self._open(self._config.wandb.mode)
        return self

    def _open(self, mode: str) -> wandb.Run:
        config = self._config
        arch, method = config.student.name, config.method.name
        pair = f"{config.teacher.name}-{arch}" if config.teacher else arch
        return open_run(
            mode,
            self._run.folder,
            self._name,
            agents=self._agents,
            project=config.wandb.project,
            entity=config.wandb.entity,
            group=f"{pair}/{method}",
            job_type="student" if config.teacher else "teacher",
            tags=[config.dataset.name, *config.wandb.tags],
            config={
                **self._run.config,
                "pair": pair,
                "variant": self._variant(),
                "recipe": RECIPE,
            },
        )

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is KeyboardInterrupt:
            return  # a second Ctrl-C: nobody waits for a server any more
        try:
            if kind is not None and issubclass(kind, Interrupted):
                self._wandb.mark_preempting()  # it will come back: "preempted", not "failed"
            self._wandb.finish(exit_code=0 if kind is None else 1)
        except TimeoutError:
            say(sync_later(self._wandb))
        except Exception as lost:  # must not take the place of what has ended the run
            self._lose(lost)
        if kind is None and not self._lost and not self._agents:
            return
        with contextlib.suppress(Exception):
            # Else a later run would wait for it, or the end of this process, or be the agent's.
            wandb.teardown()
        if kind is None and self._lost:
            self._keep_offline()

    def _keep_offline(self) -> None:
        """Write all of a finished run to the disk again: what W&B's process had is lost with it."""
        self._lost, self._lines = False, 0
        try:
            self._wandb = self._open("offline")
            for name, path in self._pictures.items():
                self.picture(name, path)
            for line in self._run.metrics:
                self.log(line)
            self.summarise(self._result)
            self._wandb.finish()
        except Exception as error:  # the run itself has finished
            self._lose(error)
        kept = f"W&B: `wandb sync {sync_folder(self._wandb)}` sends this run"
        say("W&B: this run is not kept for it" if self._lost else kept)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log the next line of ``metrics.jsonl``; its number is W&B's step.

        A run that comes back logs all its lines again: W&B passes over the steps that it has,
        and has the others from a process that was stopped before it could write them.
        """
        figures = {
            key if key.startswith(_UNPREFIXED) else f"{line['stage']}/{key}": value
            for key, value in line.items()
            if isinstance(value, int | float)
        }
        if "test/top1" in line:  # of the last phase, whatever its name
            figures["epoch"] = line["epoch"]
        self._lines += 1
        self._send(lambda: self._wandb.log(figures, step=self._lines))

    def picture(self, name: str, path: Path) -> None:
        """Show the picture in ``path``."""
        self._pictures[name] = path
        self._send(lambda: self._wandb.log({name: wandb.Image(str(path))}, step=0))

    def summarise(self, result: Mapping[str, Any]) -> None:
        """Show the result in the run's row of a table, as far as its version has recorded it."""
        self._result = result
        flat = flatten(result)
        figures = {shown: flat.get(name) for shown, name in _SUMMARISED.items()}
        summary = {k: v for k, v in figures.items() if isinstance(v, int | float)}
        if "hours" in summary:
            summary["hours"] /= 3600  # seconds
        self._send(lambda: self._wandb.summary.update(summary))

    def _variant(self) -> str:
        """Return the method and what differs from its recipe: its seeds share it, no other run.

        The weighting of CE and KD is always named, since a default of an earlier recipe had another
        in runs that W&B may still have.
        """
        config = self._config
        changed = diff_from_recipe(config)
        texts = {key: str(value) for key, value in changed.items()}
        if weighting := find_weighting(config.method.name, RECIPE, texts):
            own = flatten(config.model_dump())
            changed = {key: value for key, value in changed.items() if key not in (CE, KD)}
            changed |= {key: own.get(key, text) for key, text in weighting.items()}
        if config.teacher and config.teacher.checkpoint:
            changed["teacher.digest"] = self._run.config["teacher"]["digest"][:8]
        # Two folders of images may have one name.
        if digest := self._run.config["dataset"].get("digest"):
            changed["dataset.digest"] = digest[:8]
        told = ", ".join(as_override(key, value) for key, value in sorted(changed.items()))
        return f"{config.method.name} ({told})" if told else config.method.name

    def _send(self, action: Callable[[], object]) -> None:
        """Do ``action`` unless W&B's own process has ended: SLURM stops all of a job at once."""
        if self._lost:
            return
        try:
            action()
        except (OSError, wandb.Error) as lost:  # of a connection, most of all
            self._lose(lost)

    def _lose(self, lost: Exception) -> None:
        if not self._lost:
            say(f"W&B has stopped ({type(lost).__name__}); the run continues without it")
        self._lost = True
