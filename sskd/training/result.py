"""Measures the result of a run at its end."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sskd
from sskd.data import Images
from sskd.device import peak_memory
from sskd.distributed import ranks
from sskd.errors import UserError
from sskd.methods import Method
from sskd.models import weights_digest
from sskd.runs.names import RESULT
from sskd.runs.own_code import code_digests
from sskd.runs.plan import RunPlan
from sskd.runs.recipe import follows_weighting
from sskd.runs.result import HoldoutTop1, RunResult, Top1, Top5, WeightsDigests
from sskd.runs.run import Run
from sskd.runs.weightings import RECIPE
from sskd.training.evaluation import accuracy, agreement, mean_kl, predict, top5_accuracy
from sskd.training.phase_settings import departures_of, passes_of
from sskd.training.state import TrainingState


def measure_result(
    run: Run, plan: RunPlan, *, images: Images, method: Method, state: TrainingState
) -> RunResult:
    """Return the result of a run whose last phase ended in ``state``; complete on rank 0 only."""
    config, student, phases = plan.config, method.deployed, list(method.phases())
    logits = predict(student, images.test, images, f"{plan.folder}: the student, test set")
    best = run.checkpoints.load_best(state.best_epoch)
    best_digest = None if best is None else weights_digest(best)
    result = RunResult(
        kind="distill" if config.teacher else "scratch",
        dataset=config.dataset.name,
        dataset_source=config.dataset.source,
        dataset_digest=plan.data_digest,
        student=config.student.name,
        method=config.method.name,
        seed=config.seed,
        recipe=RECIPE,
        follows_weighting=follows_weighting(config),
        difference=dict(plan.difference),
        holdout_top1=_holdout(run),
        epoch=state.epoch,
        seconds=sum(line.metrics.get("seconds", 0.0) for line in run.metrics.lines),
        images_per_second=state.images / max(state.seconds, 1e-9),
        parameters=sum(parameter.numel() for parameter in student.parameters()),
        digest=WeightsDigests(weights_digest(student), best_digest, _digest_of(method.heads)),
        precision=config.precision,
        tf32=config.precision == "tf32",
        compile=config.compile,
        precomputed=method.precomputed is not None,
        passes=sum(passes_of(phase, config) for phase in phases if not phase.teacher_only),
        departures=departures_of(phases[-1], config),
        extensions=code_digests(config),
        **_accuracies(run, logits, images.test.labels, state),
        **_circumstances(images),
    )
    if plan.teacher is None:
        return result
    return replace(result, **_beside_teacher(plan, images, method, logits))


def _beside_teacher(
    plan: RunPlan, images: Images, method: Method, student_logits: Tensor
) -> dict[str, Any]:
    """Return the fields of a result about the teacher and the student's agreement with it."""
    teacher = plan.config.teacher
    assert teacher is not None
    assert plan.teacher is not None
    name = f"{plan.folder}: the teacher {teacher.name}, test set"
    logits = predict(method.teacher, images.test, images, name)
    return {
        "teacher": teacher.name,
        "teacher_digest": plan.teacher.digest,
        "teacher_epoch": teacher.epoch,
        "teacher_top1": accuracy(logits, images.test.labels),
        "teacher_top5": top5_accuracy(logits, images.test.labels),
        "agreement": agreement(student_logits, logits),
        "kl": mean_kl(student_logits, logits),
    }


def _digest_of(module: nn.Module | None) -> str | None:
    return None if module is None else weights_digest(module)


def last_top1(result: RunResult, folder: Path) -> float:
    """Return the last top-1 of the ``result`` in ``folder``, in percent; UserError for none."""
    if result.top1.last is None:
        raise UserError(f"{folder / RESULT}: has no accuracy; start from scratch with force=true")
    return result.top1.last


def _accuracies(run: Run, logits: Tensor, labels: Tensor, state: TrainingState) -> dict[str, Any]:
    """Return the fields about the test accuracies of the last and the best epoch.

    ``logits`` are those of the last epoch. Both fields of the best epoch are of the best top-1.
    """
    last, last_top5 = accuracy(logits, labels), top5_accuracy(logits, labels)
    at_best = (
        line.metrics["test/top5"]
        for line in run.metrics.lines
        if line.epoch == state.best_epoch and "test/top5" in line.metrics
    )
    return {
        "top1": Top1(last, state.best_top1, state.best_epoch),
        # A run that an earlier version began may lack the line's value.
        "top5": None if last_top5 is None else Top5(last_top5, next(at_best, None)),
        "accuracy": last,
    }


def _holdout(run: Run) -> HoldoutTop1 | None:
    """Return the held-out accuracies, and the test accuracy of the best held-out epoch."""
    scored = [line for line in run.metrics.lines if "holdout/top1" in line.metrics]
    if not scored:
        return None
    best = max(scored, key=lambda line: line.metrics["holdout/top1"])
    return HoldoutTop1(
        last=scored[-1].metrics["holdout/top1"],
        best=best.metrics["holdout/top1"],
        best_epoch=best.epoch,
        test_top1_at_best=best.metrics.get("test/top1"),
    )


def _circumstances(images: Images) -> dict[str, Any]:
    device = images.train.device
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
        "ranks": ranks.count(),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": peak_memory(device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **({"cudnn": torch.backends.cudnn.version()} if on_gpu else {}),
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
        described = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
