"""First phases that depend on the teacher alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from sskd.config import Config
from sskd.data import Images, Views
from sskd.distributed import ranks
from sskd.methods import Method, Phase
from sskd.models import weights_digest
from sskd.runs.epoch_line import EpochLine
from sskd.runs.identity import full_config, identity
from sskd.runs.names import MOST_RESULT, WEIGHTS
from sskd.runs.own_code import code_before_student
from sskd.runs.plan import RunPlan, TeacherWeights
from sskd.runs.result import SharedResult
from sskd.runs.run import Run
from sskd.teachers.shared import corrupt_file_error, find_or_compute, read_intact
from sskd.training.phase_settings import phase_schedule
from sskd.training.trainer import Trainer

_OF_SEVERAL_RANKS = ("sync_batch_norm", "gather_batch")
_LATER_VIEWS = ("transformed", "jigsaws")


def find_or_train_phase(
    phase: Phase, method: Method, images: Images, plan: RunPlan
) -> list[EpochLine]:
    """Load the result of a teacher-only ``phase`` into ``phase.trains``; return its epochs.

    The phase is trained if no run with the same settings has done so. Its folder's name has a hash
    of everything that it depends on: the teacher's weights, the seed, the data, the phase's
    settings and the code of extensions. Of the student, only its learning rate counts, and only if
    the phase is trained with that rate.
    """
    assert plan.teacher is not None
    settings = phase_settings(phase, plan.config, plan.teacher, images.digest)
    train = partial(_train, phase=phase, method=method, images=images, config=plan.config)
    run, result = find_or_compute(plan.config, settings, train)
    _load_weights(phase.trains, run.folder / WEIGHTS, result.digest)
    return ranks.from_first(run.metrics.read)


def _train(run: Run, *, phase: Phase, method: Method, images: Images, config: Config) -> None:
    state = run.checkpoints.load([phase.name])
    run.announce({phase.name: phase_schedule(phase, config).epochs})
    trainer = Trainer(
        phase=phase,
        method=method,
        checkpointed=phase.trains,
        images=images,
        run=run,
        config=config,
    )
    seconds = trainer.train(state).seconds
    digest = weights_digest(phase.trains)
    run.finish(phase.trains, SharedResult(stage=phase.name, seconds=seconds, digest=digest))


def _load_weights(module: nn.Module, path: Path, digest: str | None) -> None:
    """Load the weights of a finished phase; results of the first version have no ``digest``."""
    most = 2 * sum(tensor.nbytes for tensor in module.state_dict().values()) + MOST_RESULT
    state = ranks.from_first(lambda: read_intact(path, most, digest))
    if state is None:
        raise corrupt_file_error(path)
    try:
        module.load_state_dict(state)
    except RuntimeError:
        raise corrupt_file_error(path) from None


def phase_settings(
    phase: Phase, config: Config, teacher: TeacherWeights, data_digest: str | None = None
) -> dict[str, Any]:
    """Return everything that the result of a teacher-only ``phase`` depends on.

    ``data_digest`` is as in ``full_config``.
    """
    values = identity(full_config(config, data_digest=data_digest, defaults=False))
    schedule = asdict(phase_schedule(phase, config))
    own = values["optimizer"]
    optimizer = {k: phase.optimizer.get(k, v) for k, v in own.items() if k != "lr"}
    # Without an extension there is no key, so that folders of earlier versions are found.
    code = code_before_student(config)
    return {
        **({"code": code} if code else {}),
        **({"augmentation": config.augmentation} if config.strong_copies else {}),
        **{name: True for name in _OF_SEVERAL_RANKS if getattr(config, name)},
        "phase": phase.name,
        "method": config.method.name,
        "teacher": {"name": values["teacher"]["name"], "digest": teacher.digest},
        "schedule": schedule | {"milestones": list(schedule["milestones"])},
        "optimizer": optimizer,
        "views": _views_setting(phase.views),
        "weights": dict(phase.weights),
        "settings": dict(phase.settings),
        **{key: values[key] for key in ("dataset", "seed", "batch_size", "precision")},
    }


def _views_setting(views: Views) -> Any:
    """Return ``views`` as a setting; a number if nothing but the rotations is set.

    Versions that had only rotations named folders after that number. Later versions added fields;
    one that is not set is left out, so that the folders of the versions before it are found.
    """
    if views == Views(views.rotations):
        return views.rotations
    values = {k: v for k, v in asdict(views).items() if v or k not in _LATER_VIEWS}
    return json.loads(json.dumps(values))  # with lists, as the file of the folder has them
