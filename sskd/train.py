"""The story of a run: resolve it, load, assemble, open its folder, train each phase, finish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sskd.config import Config
from sskd.data import load_images, refuse_missing
from sskd.device import choose_device, reset_peak_memory, to_device
from sskd.output import say
from sskd.runs.folder import archive_run
from sskd.runs.identity import full_config
from sskd.runs.run import Run
from sskd.runs.status import forced_in_this_sweep
from sskd.teachers.assembly import assemble, check_compatible
from sskd.teachers.find import find_teacher, missing_teacher, run_location
from sskd.teachers.phases import run_shared_phase
from sskd.teachers.precompute import precompute
from sskd.tracking.environment import check_environment, is_agents
from sskd.tracking.tracker import Tracker, report_finished
from sskd.training.acceleration import fold_teacher
from sskd.training.preview import save_views
from sskd.training.result import last_top1, measure_result
from sskd.training.trainer import Trainer, phase_schedule


def train(config: Config) -> dict[str, Any]:
    """Carry one run from its configuration to its result; a finished run is returned as it is."""
    _, result = carry_out(config)
    return result


def carry_out(
    config: Config, *, wait: bool = False, commanded: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Do what ``train`` does, and return the run's folder and its result.

    Args:
        wait: wait for another process that is at work on the same run, instead of an error.
        commanded: it is what the command is for, and not one of several, or on the way to it;
            under ``wandb agent`` the agent's W&B run is this one's.
    """

    # ---- what is to be done, and where ----
    check_environment(config.wandb.mode)
    agents = commanded and is_agents()
    device = choose_device(config.device)
    if missing := missing_teacher(config):
        refuse_missing(config.dataset)  # else the teacher would be reported, and then the data
        check_compatible(config)  # before anyone trains a teacher for them
        if config.teacher and config.teacher.train:
            carry_out(missing, wait=True, commanded=False)
    found = find_teacher(config)
    folder, changed = run_location(config)
    run = Run(folder, full_config(config, found.digest if found else None))
    force = config.force and not forced_in_this_sweep(folder)  # a job that comes back goes on
    if not force and (result := run.finished()) is not None:
        say(f"{run.folder}: finished already, last top-1 {last_top1(result, run.folder):.2f}")
        if agents:
            report_finished(run, config, result)
        return folder, result

    # ---- data, networks, method ----
    reset_peak_memory(device)
    images = load_images(config.dataset, run.config["dataset"].get("digest")).to(device)
    method = assemble(config, images, found)
    to_device(method, device)
    fold_teacher(method, device)
    student = method.student

    if force:
        archive_run(run.folder)
    with run.open(wait=wait):
        if (result := run.finished()) is not None:  # by another process, in the meantime
            if agents:
                report_finished(run, config, result)
            return folder, result

        # ---- training, phase by phase, on from the last checkpoint ----
        phases = list(method.phases())
        epochs = {phase.name: phase_schedule(phase, config).epochs for phase in phases}
        state = run.checkpoint(epochs)
        run.plan(epochs)
        first = list(epochs).index(state["stage"]) if state else 0
        with Tracker(run, config, agents=agents) as tracker:
            tracker.picture("views", save_views(run.folder, images, config, method.views))
            for line in run.metrics:
                tracker.log(line)
            if found and config.teacher and config.teacher.precompute:
                method.precomputed = precompute(method, images, config, found)
            for phase in phases[first:]:
                if phase.teacher_only and found:
                    for line in run_shared_phase(phase, method, images, config, found):
                        run.log(line)
                        tracker.log(line)
                    continue
                trained = student if phase is phases[-1] else None
                fit = Trainer(phase, method, method, images, run, config, trained, tracker.log)
                position = fit.train(state if state and state["stage"] == phase.name else None)

            # ---- the result ----
            result = measure_result(run, config, changed, images, method, position)
            tracker.summarise(result)
            result = run.finish(student, result)
    top1 = result["top1"]
    say(f"{run.folder}: last top-1 {top1['last']:.2f}, best {top1['best']:.2f}")
    return folder, result
