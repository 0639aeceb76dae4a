"""Weights & Biases: one run for each run's folder, online or to be synced later."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import wandb

from sskd.errors import Interrupted
from sskd.output import say
from sskd.overrides import as_override, flatten
from sskd.runs.epoch_line import EpochLine
from sskd.runs.plan import RunPlan
from sskd.runs.recipe import follows_weighting
from sskd.runs.result import RunResult
from sskd.runs.run import Run
from sskd.runs.weightings import CE, KD, RECIPE, find_weighting
from sskd.tracking.session import end_service, offline_folder, open_run, sync_later
from sskd.turns import outside_turn

# Metrics of the student as a whole; the others have the name of their phase as prefix.
_UNPREFIXED = ("test/", "holdout/", "best/")
# The keys of W&B's summary, and the fields of a result that they show.
_SUMMARY = {
    "last/top1": "top1.last",
    "best/top1": "top1.best",
    "best/epoch": "top1.best_epoch",
    "last/top5": "top5.last",
    "best/top5": "top5.best",
    "hours": "seconds",
    "teacher_top1": "teacher_top1",
    "agreement": "agreement",
    "kl": "kl",
    "images_per_second": "images_per_second",
    "peak_memory_mib": "peak_memory_mib",
}


class Tracker:
    """A run's counterpart in W&B, open inside a ``with`` statement.

    It never asks a question. If W&B cannot be reached, the run is kept on disk.
    """

    def __init__(self, run: Run, plan: RunPlan, *, under_agent: bool = False) -> None:
        """Use the W&B run that ``wandb agent`` has named if ``under_agent``, else its own."""
        self._run, self._plan, self._under_agent = run, plan, under_agent
        self._lines = 0
        self._lost = False
        self._pictures: dict[str, Path] = {}
        self._result: RunResult | None = None

    def __enter__(self) -> Self:
        self._open(self._plan.config.wandb.mode)
        return self

    def _open(self, mode: str) -> None:
        name = str(self._plan.folder.relative_to(self._plan.config.runs))
        arguments = _init_arguments(self._plan)
        self._wandb = open_run(
            mode,
            self._plan.folder,
            name,
            under_agent=self._under_agent,
            still_ours=self._run.lock.check,
            **arguments,
        )

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is KeyboardInterrupt:
            return  # a second Ctrl-C: the user does not want to wait for a server
        try:
            if kind is not None and issubclass(kind, Interrupted):
                self._wandb.mark_preempting()  # W&B then shows "preempted", not "failed"
            with outside_turn():  # it may wait for a server
                self._wandb.finish(exit_code=0 if kind is None else 1)
        except TimeoutError:
            say(sync_later(self._wandb))
        except Exception as lost:  # must not replace the error that ended the run
            self._lose(lost)
        if kind is None and not self._lost and not self._under_agent:
            return
        # Otherwise a later run, or the end of this process, waits for W&B's process, and a later
        # run takes the agent's settings.
        end_service()
        if kind is None and self._lost:
            self._keep_offline()

    def _keep_offline(self) -> None:
        """Write the whole finished run to disk, because the data in W&B's process was lost."""
        self._lost, self._lines = False, 0
        try:
            self._open("offline")
            for name, path in self._pictures.items():
                self.picture(name, path)
            for line in self._run.metrics.lines:
                self.log(line)
            if self._result is not None:
                self.summarise(self._result)
            self._wandb.finish()
        except Exception as error:  # the run itself has finished
            self._lose(error)
        kept = f"W&B: `wandb sync {offline_folder(self._wandb)}` uploads this run"
        say("W&B: this run could not be saved for a later upload" if self._lost else kept)

    def log(self, line: EpochLine) -> None:
        """Log the next line of ``metrics.jsonl``; its number is W&B's step.

        A resumed run logs all its lines again: W&B ignores the steps that it has, and adds those
        that an earlier process could not upload.
        """
        values = {"epoch": line.epoch, **line.metrics}
        metrics = {
            name if name.startswith(_UNPREFIXED) else f"{line.phase}/{name}": value
            for name, value in values.items()
        }
        if "test/top1" in line.metrics:  # only the evaluated phase has it
            metrics["epoch"] = line.epoch
        self._lines += 1
        self._send(lambda: self._wandb.log(metrics, step=self._lines))

    def picture(self, name: str, path: Path) -> None:
        """Log the picture in ``path``."""
        self._pictures[name] = path
        self._send(lambda: self._wandb.log({name: wandb.Image(str(path))}, step=0))

    def summarise(self, result: RunResult) -> None:
        """Write the fields of ``result`` that were recorded to the run's summary."""
        self._result = result
        fields = flatten(result.to_json())
        values = {key: fields.get(name) for key, name in _SUMMARY.items()}
        summary = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if "hours" in summary:
            summary["hours"] /= 3600  # the result has seconds
        self._send(lambda: self._wandb.summary.update(summary))

    def _send(self, action: Callable[[], object]) -> None:
        """Do ``action``, unless W&B's process has ended, as SLURM stops all processes at once."""
        if self._lost:
            return
        try:
            action()
        except (OSError, wandb.Error) as lost:  # usually a closed connection
            self._lose(lost)

    def _lose(self, lost: Exception) -> None:
        if not self._lost:
            say(f"W&B has stopped ({type(lost).__name__}); the run continues without it")
        self._lost = True


def _init_arguments(plan: RunPlan) -> dict[str, Any]:
    """Return the arguments of ``wandb.init`` that describe the run."""
    config = plan.config
    student, method = config.student.name, config.method.name
    pair = f"{config.teacher.name}-{student}" if config.teacher else student
    return {
        "project": config.wandb.project,
        "entity": config.wandb.entity,
        "group": f"{pair}/{method}",
        "job_type": "student" if config.teacher else "teacher",
        "tags": [config.dataset.name, *config.wandb.tags],
        "config": {
            **plan.full_config,
            "pair": pair,
            "variant": _variant(plan),
            "recipe": RECIPE,
        },
    }


def _variant(plan: RunPlan) -> str:
    """Return the method and its difference from the recipe: shared by its seeds, and no other run.

    The weighting of CE and KD is always named, because the default of an earlier recipe was another
    one in runs that W&B may still have.
    """
    config = plan.config
    difference = dict(plan.difference)
    difference.pop("teacher.digest", None)
    texts = {key: str(value) for key, value in difference.items()}
    follows = follows_weighting(config)
    if weighting := find_weighting(config.method.name, RECIPE, texts, follows=follows):
        values = flatten(config.model_dump())
        difference = {key: value for key, value in difference.items() if key not in (CE, KD)}
        difference |= {key: values.get(key, text) for key, text in weighting.items()}
    if config.teacher and config.teacher.checkpoint:
        difference["teacher.digest"] = plan.full_config["teacher"]["digest"][:8]
    if plan.data_digest:  # two folders of images may have the same name
        difference["dataset.digest"] = plan.data_digest[:8]
    words = ", ".join(as_override(key, value) for key, value in sorted(difference.items()))
    return f"{config.method.name} ({words})" if words else config.method.name
