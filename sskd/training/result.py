"""What a finished run says of itself."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sskd
from sskd.config import Config
from sskd.data import Images
from sskd.device import peak_memory
from sskd.errors import UserError
from sskd.methods import Method
from sskd.models import weights_digest
from sskd.runs.names import RESULT
from sskd.runs.run import Run
from sskd.runs.weightings import RECIPE
from sskd.training.evaluation import accuracy, agreement, mean_kl, predict
from sskd.training.trainer import TrainingState


def measure_result(
    run: Run,
    config: Config,
    changed: Mapping[str, Any],
    images: Images,
    method: Method,
    position: TrainingState,
) -> dict[str, Any]:
    """Return the result of a run whose last phase ended at ``position``.

    Accuracies are top-1 in percent, of the last and of the best epoch on the test set;
    agreement is in percent, the divergence in nats.
    """
    student = method.student
    logits = predict(student, images.test, images, f"{run.folder}: the student, test set")
    best = run.load_best(position.best_epoch)
    last = accuracy(logits, images.test.labels)
    result: dict[str, Any] = {
        "kind": "distill" if config.teacher else "scratch",
        "dataset": config.dataset.name,
        "dataset_source": config.dataset.source,
        "dataset_digest": run.config["dataset"].get("digest"),  # None: always the same content
        "teacher": config.teacher.name if config.teacher else None,
        "student": config.student.name,
        "method": config.method.name,
        "seed": config.seed,
        "recipe": RECIPE,
        "difference": dict(changed),
        "top1": {
            "last": last,
            "best": position.best_top1,
            "best_epoch": position.best_epoch,
        },
        "holdout_top1": _holdout(run),
        "teacher_digest": run.config["teacher"].get("digest") if config.teacher else None,
        "teacher_epoch": config.teacher.epoch if config.teacher else None,
        "teacher_top1": None,
        "agreement": None,
        "kl": None,
        "epoch": position.epoch,
        "accuracy": last,
        "seconds": sum(line["seconds"] for line in run.metrics),
        "images_per_second": position.images / max(position.seconds, 1e-9),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "digest": {
            "last": weights_digest(student),
            "best": None if best is None else weights_digest(best),
        },
        "precision": config.precision,
        "compile": config.compile,
        "precomputed": method.precomputed is not None,
        **_circumstances(images),
    }
    if config.teacher:
        of = f"{run.folder}: the teacher {config.teacher.name}, test set"
        teacher_logits = predict(method.teacher, images.test, images, of)
        result["teacher_top1"] = accuracy(teacher_logits, images.test.labels)
        result["agreement"] = agreement(logits, teacher_logits)
        result["kl"] = mean_kl(logits, teacher_logits)
    return result


def last_top1(result: Mapping[str, Any], folder: Path) -> float:
    """Return the last top-1 of a ``result`` that was read in ``folder``; UserError for none."""
    try:
        return percent(result["top1"]["last"])
    except (LookupError, TypeError, ValueError):
        raise UserError(
            f"{folder / RESULT}: has no accuracy; start again with force=true"
        ) from None


def percent(value: object) -> float:
    """Return ``value``, which was read from a file; ValueError if it is no percentage."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise ValueError("it is not a number from 0 to 100")
    return float(value)


def _holdout(run: Run) -> dict[str, float] | None:
    """Return the accuracy on held-out images, and on the test set where that is best."""
    scored = [line for line in run.metrics if "holdout/top1" in line]
    if not scored:
        return None
    best = max(scored, key=lambda line: line["holdout/top1"])
    return {
        "last": scored[-1]["holdout/top1"],
        "best": best["holdout/top1"],
        "best_epoch": best["epoch"],
        "test_top1_at_best": best["test/top1"],
    }


def _circumstances(images: Images) -> dict[str, Any]:
    device = images.train.images.device
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "threads": torch.get_num_threads(),
        "peak_memory_mib": peak_memory(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "sskd": sskd.__version__,
        },
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """Return the commit of this code, with ``-dirty`` after changes; None outside a checkout."""
    if not sskd.IN_CHECKOUT:  # an environment may be inside of another project's checkout
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    root = Path(__file__).resolve().parent
    try:
        told = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
