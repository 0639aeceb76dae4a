"""What a phase and the configuration of its run say together: schedule, batches, optimizer."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from sskd.config import Config
from sskd.data import EpochLoader, Images
from sskd.distributed import ranks
from sskd.errors import UserError
from sskd.methods import Phase
from sskd.optimizers import OPTIMIZERS
from sskd.overrides import flatten
from sskd.schedule import Schedule
from sskd.settings import Settings


def check_phase(phase: Phase, config: Config) -> None:
    """Raise UserError if settings of ``phase`` and of ``config`` exclude each other."""
    phase_optimizer(phase, config)
    _refuse_rate_of_other_optimizer(phase, config)
    if phase.views.strong and config.strong_copies:
        raise UserError(
            f"augmentation={config.augmentation}: method={config.method.name} has strong views of "
            "its own; use augmentation=weak"
        )


def _refuse_rate_of_other_optimizer(phase: Phase, config: Config) -> None:
    """Raise UserError if ``phase`` has a learning rate that is meant for another optimizer."""
    lr = phase.schedule.lr if phase.schedule else None
    name = config.optimizer.name
    if lr is not None and not OPTIMIZERS[name].published_rates:
        raise UserError(
            f"optimizer={name}: method.{phase.name}.lr={lr} is meant for sgd; add "
            f"method.{phase.name}.lr=null to train the phase at optimizer.lr={config.optimizer.lr}"
        )


def phase_schedule(phase: Phase, config: Config) -> Schedule:
    """Return the schedule of ``phase`` in a run of ``config``."""
    own = config.schedule
    whole = Schedule.from_shares(own.epochs, config.optimizer.lr, own.milestones, own.gamma)
    return whole if phase.schedule is None else whole.phase(phase.schedule)


def phase_loader(phase: Phase, images: Images, config: Config) -> EpochLoader:
    """Return the loader of the training ``images`` for ``phase`` in a run of ``config``."""
    return images.train.loader(
        images.mean,
        images.std,
        batch_size=config.batch_size,
        views=phase.views,
        strong_copies=config.strong_copies,
        share=ranks.share(),
    )


def phase_optimizer(phase: Phase, config: Config) -> Settings:
    """Return the settings of the optimizer for ``phase`` in a run of ``config``.

    Settings that the phase replaces and this optimizer lacks have no effect.

    Raises:
        UserError: the settings of the phase and those of the run exclude each other.
    """
    own = config.optimizer.model_dump()
    replaced = {name: value for name, value in phase.optimizer.items() if name in own}
    if not replaced:
        return config.optimizer
    try:
        return type(config.optimizer).model_validate(own | replaced)
    except ValidationError as error:
        # After the semicolon is what to change in the optimizer; here the method's setting counts.
        reason = error.errors()[0]["msg"].removeprefix("Value error, ").partition(";")[0]
        settings = " and ".join(f"method.{name}" for name in replaced)
        raise UserError(
            f"method={config.method.name}, phase {phase.name}: {reason}; change the setting of "
            f"the optimizer, or {settings}"
        ) from None


def passes_of(phase: Phase, config: Config) -> int:
    """Return the number of views of each image that ``phase`` trains on."""
    copies = 2 if config.strong_copies else 1
    return phase_schedule(phase, config).epochs * phase.views.count * copies


def departures_of(phase: Phase, config: Config) -> dict[str, Any]:
    """Return the settings of the run that ``phase`` replaces, by dotted key."""
    before, after = config.optimizer.model_dump(), phase_optimizer(phase, config).model_dump()
    found = {f"optimizer.{key}": after[key] for key in before if after[key] != before[key]}
    schedule = phase_schedule(phase, config)
    if schedule.epochs != config.schedule.epochs:
        found["schedule.epochs"] = schedule.epochs
    if schedule.lr != config.optimizer.lr:
        found["optimizer.lr"] = schedule.lr
    if phase.schedule is not None and phase.schedule.milestones != config.schedule.milestones:
        found["schedule.milestones"] = phase.schedule.milestones
    return found


def departures_note(phase: Phase, config: Config) -> str:
    """Return ``, with key=value instead of value, ...`` for what ``phase`` replaces, or ""."""
    run = flatten(config.model_dump(include={"optimizer", "schedule"}))
    texts = [
        f"{key}={json.dumps(value)} instead of {json.dumps(run[key])}"
        for key, value in departures_of(phase, config).items()
    ]
    return f", with {', '.join(texts)}" if texts else ""
