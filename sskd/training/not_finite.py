"""Errors and advice for losses and weights that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sskd.config import Config
from sskd.data import Images
from sskd.distributed import ranks
from sskd.errors import NotFiniteError, UserError
from sskd.methods import Phase
from sskd.training.evaluation import evaluate_epoch, predict
from sskd.training.meter import Meter

_WEIGHTED = "weighted/"


def first_non_finite(
    meter: Meter, metrics: Mapping[str, float], step: int
) -> tuple[str, list[str]]:
    """Return a description of the terms that became non-finite first, and their names.

    A term that has a weight of 0 does not count. The description is "" if all are finite.

    Args:
        meter: the averages of the epoch so far.
        metrics: the values that ``meter.read`` returned.
        step: the number of the epoch's last step, from 1.
    """
    counted = [name for name in metrics if name.startswith(_WEIGHTED)]
    steps_ago, names = meter.first_non_finite(counted)
    if not names:
        steps_ago, _ = meter.first_non_finite(["loss"])
        if not steps_ago:
            return "", []
        return f"the sum of the terms is not finite, in step {step - steps_ago + 1}", []
    terms = [name.removeprefix(_WEIGHTED) for name in names]
    quoted = ", ".join(f"'{term}'" for term in terms)
    is_single = len(terms) == 1
    subject = f"the term {quoted} is" if is_single else f"the terms {quoted} are"
    if is_single and math.isfinite(metrics[f"loss/{terms[0]}"]):
        subject = f"the term {quoted} times its weight is"
    description = f"{subject} not finite, in step {step - steps_ago + 1}"
    if not is_single and len(terms) == len(counted):
        description += (
            " (all at once: the gradient or the step was too large, or the input was not finite)"
        )
    return description, terms


@dataclass(frozen=True)
class FiniteCheck:
    """Checks that the losses and weights of a phase are finite.

    ``where`` returns the beginning of an error message: the run, the phase and the epoch.
    """

    phase: Phase
    method: nn.Module
    images: Images
    config: Config
    where: Callable[[], str] = field(kw_only=True)

    def metrics(self, meter: Meter, step: int) -> dict[str, float]:
        """Return the metrics of the epoch so far, without non-finite terms of weight 0.

        Raises:
            UserError: a term is not finite; it names the first one, and its step.
        """
        metrics = meter.read()
        problem, terms = first_non_finite(meter, metrics, step)
        if problem:
            self._refuse_non_finite_teacher()
            raise self.error(problem, terms)
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def shown_metrics(self, meter: Meter, step: int) -> dict[str, float]:
        """Return the metrics for the progress of one rank; a check needs all ranks at once."""
        return meter.read() if ranks.count() > 1 else self.metrics(meter, step)

    def checked_metrics(self, meter: Meter, step: int) -> dict[str, float]:
        """Return ``metrics``, after a check of the weights, which no later loss has seen yet."""
        metrics = self.metrics(meter, step)
        if not all_finite(self.phase.trains):
            raise self.error("weights are not finite")
        return metrics

    def evaluate(self, network: nn.Module) -> dict[str, float]:
        """Return the accuracies of ``network``; raise UserError if its logits are not finite."""
        try:
            return evaluate_epoch(network, self.images)
        except NotFiniteError as error:
            raise self.error(str(error)) from None

    def error(self, problem: str, terms: Sequence[str] = ()) -> UserError:
        """Return the error about ``problem``, which began in ``terms``, with advice."""
        return UserError(f"{self.where()}: {problem}; {advise(self.config, self.phase, terms)}")

    def _refuse_non_finite_teacher(self) -> None:
        """Raise UserError if the teacher's logits are not finite, which no setting can fix."""
        if isinstance(teacher := getattr(self.method, "teacher", None), nn.Module):
            name = f"{self.where()}: a term is not finite: the teacher, test set"
            try:
                predict(teacher, self.images.test, self.images, name)
            except NotFiniteError as error:
                raise UserError(f"{error}; use another teacher") from None


def advise(config: Config, phase: Phase, terms: Sequence[str] = ()) -> str:
    """Return what to try against a divergence of ``phase`` that began in ``terms``."""
    own_lr = phase.schedule is not None and phase.schedule.lr is not None
    tries = [_own_rate(config, phase) if own_lr else "a smaller optimizer.lr"]
    if phase.schedule is None and len(terms) == 1 and len(phase.weights) > 1:
        tries.append(f"a smaller method.weights.{terms[0]}")
    if config.precision != "fp32":
        tries.append("precision=fp32")
    return "try " + ", or ".join(tries)


def _own_rate(config: Config, phase: Phase) -> str:
    """Return the advice about the learning rate of a phase that has its own."""
    settings = (name for name, value in config.method if value is phase.schedule)
    setting = next(settings, None)
    return f"a smaller method.{setting}.lr" if setting else f"a smaller rate of phase {phase.name}"


def all_finite(module: nn.Module) -> bool:
    """Return whether all parameters and statistics of ``module`` are finite."""
    values = [value for value in module.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in values]).all())
