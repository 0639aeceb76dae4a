"""First phases that depend on the teacher alone: computed once, then found by every student."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from sskd.config import Config
from sskd.data import Images
from sskd.errors import UserError
from sskd.files import read_bounded
from sskd.methods import Stage
from sskd.models import weights_digest
from sskd.output import say
from sskd.paths import below
from sskd.runs.identity import describe, identity
from sskd.runs.names import MOST_RESULT, WEIGHTS
from sskd.runs.run import Run
from sskd.teachers.find import Teacher
from sskd.training.trainer import Fit, stage_schedule


def share_phase(
    stage: Stage, method: nn.Module, images: Images, config: Config, teacher: Teacher
) -> list[dict[str, Any]]:
    """Train ``stage`` or find its result, load it into ``stage.trains``, return its metrics.

    The phase has a run's folder of its own, named after everything that it depends on: the
    teacher's weights, the seed, the data and the phase's settings; of the student nothing but a
    learning rate that the phase may take from it.
    """
    settings = phase_settings(stage, config, teacher, images.digest)
    folder = phase_folder(config, settings)
    with Run(folder, settings).open(wait=True) as run:
        result = run.finished()
        if result is None:
            state = run.checkpoint([stage.name])
            run.plan({stage.name: stage_schedule(stage, config).epochs})
            position = Fit(stage, method, stage.trains, images, run, config).train(state)
            digest = weights_digest(stage.trains)
            told = {"kind": "phase", "stage": stage.name, "seconds": position.seconds}
            run.finish(stage.trains, {**told, "digest": digest})
        else:
            say(f"{folder}: reused")
            _load_result(stage.trains, folder / WEIGHTS, result.get("digest"))
        return run.read_metrics()


def _load_result(module: nn.Module, path: Path, digest: object) -> None:
    """Load what a finished phase has left; ``digest`` is None in results that tell none."""
    most = 2 * sum(tensor.nbytes for tensor in module.state_dict().values()) + MOST_RESULT
    try:
        state = load(read_bounded(path, most))
        whole = digest in (None, weights_digest(state))
        module.load_state_dict(state)
    except (OSError, ValueError, SafetensorError, RuntimeError):
        whole = False
    if not whole:
        raise damaged(path)


def damaged(path: Path) -> UserError:
    """Return the error that a file of a shared phase is damaged."""
    return UserError(
        f"{path}: is damaged; remove the folder {path.parent}, and the same command makes it anew"
    )


def phase_settings(
    stage: Stage, config: Config, teacher: Teacher, data_digest: str | None = None
) -> dict[str, Any]:
    """Return everything that the result of a teacher-only ``stage`` depends on.

    ``data_digest`` is as in ``describe``.
    """
    values = identity(describe(config, data_digest=data_digest, defaults=False))
    schedule = asdict(stage_schedule(stage, config))
    optimizer = {k: v for k, v in values["optimizer"].items() if k != "lr"}
    return {
        "phase": stage.name,
        "method": config.method.name,
        "teacher": {"name": values["teacher"]["name"], "digest": teacher.digest},
        "schedule": schedule | {"milestones": list(schedule["milestones"])},
        "optimizer": optimizer,
        "views": stage.views,
        "weights": dict(stage.weights),
        "settings": dict(stage.settings),
        **{key: values[key] for key in ("dataset", "seed", "batch_size", "precision")},
    }


def phase_folder(config: Config, settings: dict[str, Any]) -> Path:
    """Return where the result of the teacher-only phase with these ``settings`` lies."""
    assert config.teacher is not None
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = f"seed{settings['seed']}-{digest}" if "seed" in settings else digest
    what = ["phases", config.teacher.name, settings["phase"], name]
    return below(Path(config.runs), config.dataset.name, *what)
