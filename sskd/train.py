"""The steps of a run: resolve it, load data and networks, train each phase, record the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sskd.config import Config, parse_config
from sskd.data import Images, load_images, refuse_missing
from sskd.device import choose_device, reset_peak_memory, to_device, tune_device
from sskd.distributed import ranks
from sskd.distributed.group import failure_reported
from sskd.errors import UserError
from sskd.methods import Method, Phase, fault_of_phases
from sskd.output import say
from sskd.precision import resolve_precision
from sskd.runs.folder import archive_run
from sskd.runs.own_code import warn_of_changed_code
from sskd.runs.plan import RunPlan
from sskd.runs.result import RunResult
from sskd.runs.run import Run
from sskd.runs.status import forced_in_this_sweep
from sskd.teachers.assembly import assemble, check_compatible
from sskd.teachers.find import missing_teacher, resolve_plan
from sskd.teachers.phases import find_or_train_phase
from sskd.teachers.precompute import find_or_compute_outputs
from sskd.teachers.side_by_side import share_forward
from sskd.tracking.environment import check_environment, started_by_agent
from sskd.tracking.opening import report_finished, tracker_of
from sskd.training.acceleration import fold_teacher, fuse_teacher
from sskd.training.data_parallel import check_division, divide
from sskd.training.phase_settings import check_phase, phase_schedule
from sskd.training.preview import save_views
from sskd.training.result import last_top1, measure_result
from sskd.training.trainer import Trainer
from sskd.turns import shared


def train(config: Config) -> RunResult:
    """Train the run of ``config`` to its end; return the result, also of a finished run."""
    return carry_out(config)[1]


def carry_out(
    config: Config, *, wait: bool = False, from_command_line: bool = True
) -> tuple[RunPlan, RunResult]:
    """Do what ``train`` does; return the run's plan too.

    Args:
        wait: wait for another process that is working on the same run, instead of an error.
        from_command_line: the command line asks for this run alone, so under ``wandb agent`` it is
            the agent's W&B run. A teacher trained on the way and a job of a sweep are not.
    """
    # ---- the plan ----
    under_agent = from_command_line and started_by_agent()
    device = _checked_device(config)
    _train_missing_teacher(config, device)
    plan = _resolve_plan(config)
    run = Run(plan.folder, plan.full_config)
    force = _is_forced(config, plan)
    if not force and (result := ranks.from_first(lambda: run.finished(RunResult))):
        say(f"{plan.folder}: already finished, last top-1 {last_top1(result, plan.folder):.2f}")
        warn_of_changed_code(plan.folder, config, result)
        return _reuse(run, plan, result, under_agent=under_agent)

    # ---- data, networks, method ----
    plan = plan.computed_in(resolve_precision(config.precision, device))
    tune_device(device)
    reset_peak_memory(device)
    images = _images_on(device, plan)
    method, phases = _assemble(plan, images, device)

    # ---- training ----
    if force:
        ranks.from_first(lambda: archive_run(plan.folder))
    with run.open(wait=wait):
        if result := ranks.from_first(
            lambda: run.finished(RunResult)
        ):  # another process was faster
            return _reuse(run, plan, result, under_agent=under_agent)
        result = _train_phases(run, plan, phases, images, method=method, under_agent=under_agent)
    say(f"{plan.folder}: last top-1 {result.top1.last:.2f}, best {result.top1.best:.2f}")
    return plan, result


def _checked_device(config: Config) -> torch.device:
    """Return the device of the run; raise UserError if W&B, or several ranks, cannot be used."""
    check_environment(config.wandb.mode)
    check_division(config)
    return choose_device(config.device)


def _is_forced(config: Config, plan: RunPlan) -> bool:
    """Return whether to train from scratch; a requeued job resumes."""
    return config.force and not ranks.from_first(lambda: forced_in_this_sweep(plan.folder))


def _train_missing_teacher(config: Config, device: torch.device) -> None:
    """Train the teacher first if its run is missing and ``teacher.train`` is true."""
    missing = _missing_teacher(config)
    if missing is None:
        return
    refuse_missing(config.dataset)  # report missing data first
    check_compatible(config)  # before training a teacher for an incompatible pair
    if config.teacher and config.teacher.train:
        resolve_precision(config.precision, device)
        resolve_precision(missing.precision, device, "teacher.precision")
        carry_out(missing, wait=True, from_command_line=False)


def _missing_teacher(config: Config) -> Config | None:
    """Return ``missing_teacher`` of ``config``, for all ranks as the first one finds its files."""

    def find() -> dict[str, Any] | None:
        missing = missing_teacher(config)
        return None if missing is None else missing.model_dump()

    found = ranks.from_first(find)
    return None if found is None else parse_config(found)


def _resolve_plan(config: Config) -> RunPlan:
    """Return the plan of the run, for all ranks as the first one finds its files."""
    found = ranks.from_first(
        lambda: {k: v for k, v in vars(resolve_plan(config)).items() if k != "config"}
    )
    return RunPlan(config=config, **found)


def _reuse(
    run: Run, plan: RunPlan, result: RunResult, *, under_agent: bool
) -> tuple[RunPlan, RunResult]:
    """Return the result of a finished run; log it to the W&B run of an agent first."""
    if under_agent and ranks.is_first():
        report_finished(run, plan.computed_in(result.precision or plan.config.precision), result)
    return plan, result


def _images_on(device: torch.device, plan: RunPlan) -> Images:
    """Return the images of the run on ``device``; jobs of this process share them."""
    settings, digest = plan.config.dataset, plan.data_digest
    key = ("images", settings.model_dump_json(), digest, device)

    def load() -> Images:
        return shared(key, lambda: load_images(settings, digest).to(device))

    return ranks.after_first(load)  # which may have to download or convert them


def _assemble(
    plan: RunPlan, images: Images, device: torch.device
) -> tuple[Method, Sequence[Phase]]:
    """Return the method on ``device`` and its phases; UserError if these cannot be trained."""
    method = assemble(plan.config, images, plan.teacher)
    fold_teacher(method)
    to_device(method, device)
    divide(method, plan.config)
    fuse_teacher(method, plan.config, device)
    share_forward(method, plan, device)
    phases = list(method.phases())
    if fault := fault_of_phases(phases):
        raise UserError(f"method={plan.config.method.name}: {fault}")
    for phase in phases:
        check_phase(phase, plan.config)
    return method, phases


def _train_phases(
    run: Run,
    plan: RunPlan,
    phases: Sequence[Phase],
    images: Images,
    *,
    method: Method,
    under_agent: bool,
) -> RunResult:
    """Train each phase from the last checkpoint on, and record the result."""
    config = plan.config
    epochs = {phase.name: phase_schedule(phase, config).epochs for phase in phases}
    checkpoint = run.checkpoints.load(epochs)
    run.announce(epochs)
    current = checkpoint["stage"] if checkpoint else phases[0].name
    with tracker_of(run, plan, under_agent=under_agent) as tracker, failure_reported():
        if path := ranks.is_first() and save_views(run, images, config, method.views):
            tracker.picture("views", path)
        run.metrics.subscribe(tracker.log)
        if config.teacher and config.teacher.precompute:
            find_or_compute_outputs(method, images, plan)
        for phase in phases[list(epochs).index(current) :]:
            if phase.teacher_only and plan.teacher:
                for line in find_or_train_phase(phase, method, images, plan):
                    run.metrics.log(line)
                continue
            trainer = Trainer(
                phase=phase,
                method=method,
                checkpointed=method,
                images=images,
                run=run,
                config=config,
                eval_model=method.deployed if phase is phases[-1] else None,
            )
            state = trainer.train(checkpoint if checkpoint and phase.name == current else None)
        result = measure_result(run, plan, images=images, method=method, state=state)
        tracker.summarise(result)
        return run.finish(method.deployed, result, method.heads)
