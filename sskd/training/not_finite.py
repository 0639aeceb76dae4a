"""What to say, and to advise, if a figure of a run is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from sskd.config import Config
from sskd.methods import Phase
from sskd.training.meter import Meter

_WEIGHTED = "weighted/"


def first_lost(meter: Meter, figures: Mapping[str, float], step: int) -> tuple[str, list[str]]:
    """Return which terms first became non-finite, in words, and list their names.

    A term that has a weight of 0 does not count. The words are "" if all are finite.

    Args:
        meter: what the epoch's figures were added to.
        figures: what it reads.
        step: the number of the epoch's last step.
    """
    counted = [name for name in figures if name.startswith(_WEIGHTED)]
    ago, names = meter.first_lost(counted)
    if not names:
        ago, _ = meter.first_lost(["loss"])
        return f"the sum of the terms is not finite, in step {step - ago + 1}" if ago else "", []
    terms = [name.removeprefix(_WEIGHTED) for name in names]
    quoted = ", ".join(f"'{term}'" for term in terms)
    is_single = len(terms) == 1
    what = f"the term {quoted} is" if is_single else f"the terms {quoted} are"
    if is_single and math.isfinite(figures[f"loss/{terms[0]}"]):
        what = f"the term {quoted} times its weight is"
    told = f"{what} not finite, in step {step - ago + 1}"
    if not is_single and len(terms) == len(counted):
        told += (
            " (all at once: the gradient or the step was too large, or the input was not finite)"
        )
    return told, terms


def advise(config: Config, phase: Phase, terms: Sequence[str] = ()) -> str:
    """Return what may keep ``phase`` finite, if ``terms`` of it were the first to be lost."""
    own_lr = phase.schedule is not None and phase.schedule.lr is not None
    phases = (name for name, value in config.method if value == phase.schedule)
    tries = [f"a smaller method.{next(phases, '')}.lr" if own_lr else "a smaller optimizer.lr"]
    if phase.schedule is None and len(terms) == 1 and len(phase.weights) > 1:
        tries.append(f"a smaller method.weights.{terms[0]}")
    if config.precision != "fp32":
        tries.append("precision=fp32")
    return "try " + ", or ".join(tries)


def is_sound(module: torch.nn.Module) -> bool:
    """Return whether all parameters and statistics of ``module`` are finite."""
    values = [value for value in module.state_dict().values() if value.is_floating_point()]
    return bool(torch.stack([value.isfinite().all() for value in values]).all())
