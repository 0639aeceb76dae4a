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
from sskd.methods import Phase
from sskd.models import weights_digest
from sskd.output import say
from sskd.paths import safe_join
from sskd.runs.identity import full_config, identity
from sskd.runs.names import MOST_RESULT, WEIGHTS
from sskd.runs.run import Run
from sskd.teachers.find import TeacherWeights
from sskd.training.trainer import Trainer, phase_schedule


def run_shared_phase(
    phase: Phase, method: nn.Module, images: Images, config: Config, teacher: TeacherWeights
) -> list[dict[str, Any]]:
    """Train ``phase`` or find its result, load it into ``phase.trains``, return its metrics.

    The phase has a run's folder of its own, named after everything that it depends on: the
    teacher's weights, the seed, the data and the phase's settings; of the student nothing but a
    learning rate that the phase may take from it.
    """
    settings = phase_settings(phase, config, teacher, images.digest)
    folder = phase_folder(config, settings)
    with Run(folder, settings).open(wait=True) as run:
        result = run.finished()
        if result is None:
            state = run.checkpoint([phase.name])
            run.plan({phase.name: phase_schedule(phase, config).epochs})
            position = Trainer(phase, method, phase.trains, images, run, config).train(state)
            digest = weights_digest(phase.trains)
            told = {"kind": "phase", "stage": phase.name, "seconds": position.seconds}
            run.finish(phase.trains, {**told, "digest": digest})
        else:
            say(f"{folder}: reused")
            _load_result(phase.trains, folder / WEIGHTS, result.get("digest"))
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
        raise corrupt_file_error(path)


def corrupt_file_error(path: Path) -> UserError:
    """Return the error that a file of a shared phase is damaged."""
    return UserError(
        f"{path}: is damaged; remove the folder {path.parent}, and the same command makes it anew"
    )


def phase_settings(
    phase: Phase, config: Config, teacher: TeacherWeights, data_digest: str | None = None
) -> dict[str, Any]:
    """Return everything that the result of a teacher-only ``phase`` depends on.

    ``data_digest`` is as in ``full_config``.
    """
    values = identity(full_config(config, data_digest=data_digest, defaults=False))
    schedule = asdict(phase_schedule(phase, config))
    optimizer = {k: v for k, v in values["optimizer"].items() if k != "lr"}
    return {
        "phase": phase.name,
        "method": config.method.name,
        "teacher": {"name": values["teacher"]["name"], "digest": teacher.digest},
        "schedule": schedule | {"milestones": list(schedule["milestones"])},
        "optimizer": optimizer,
        "views": phase.views,
        "weights": dict(phase.weights),
        "settings": dict(phase.settings),
        **{key: values[key] for key in ("dataset", "seed", "batch_size", "precision")},
    }


def phase_folder(config: Config, settings: dict[str, Any]) -> Path:
    """Return where the result of the teacher-only phase with these ``settings`` lies."""
    assert config.teacher is not None
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = f"seed{settings['seed']}-{digest}" if "seed" in settings else digest
    what = ["phases", config.teacher.name, settings["phase"], name]
    return safe_join(Path(config.runs), config.dataset.name, *what)
