"""What holds for every distillation method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sskd.checks import require
from sskd.checks.samples import first_batch, loader_of
from sskd.data import Images, Loader
from sskd.methods import (
    LossOutput,
    Method,
    Phase,
    fault_of_phases,
    load_state_without_teacher,
    state_without_teacher,
)
from sskd.models import Features
from sskd.seeding import generator_states, restore_generator_states
from sskd.training.step import set_trainable

Build = Callable[[], Method]
_OVERFITTING_STEPS = 60


def check_phases(method: Method, images: Images) -> None:
    """Check that each phase trains exactly the parameters that it names, and changes nothing else.

    The batch is all of the training ``images``. Its loss is finite, each of its terms has a weight,
    and the leaves of its autograd graph are exactly the parameters of ``phase.trains``.
    """
    fault = fault_of_phases(list(method.phases()))
    require(not fault, fault)
    *first, last = method.phases()
    named = [phase.name for phase in first if phase.name == method.evaluated_phase]
    require(
        last.name == method.evaluated_phase and not named,
        f"evaluated_phase is '{method.evaluated_phase}', but the last phase is '{last.name}'",
    )
    saved = {id(parameter) for parameter in method.parameters()}
    for phase in method.phases():
        set_trainable(phase, method)
        trained = {id(parameter) for parameter in phase.trains.parameters()}
        require(trained <= saved, f"phase {phase.name}: trains a module that is not the method's")
        own = trained | {id(buffer) for buffer in phase.trains.buffers()}
        frozen = {
            name: tensor.clone() for name, tensor in _tensors(method) if id(tensor) not in own
        }
        loss = _total(phase, phase.loss(first_batch(images, phase, len(images.train))))
        require(bool(loss.isfinite()), f"phase {phase.name}: the loss is not finite")
        _check_leaves(phase, method, _graph_leaves(loss))
        loss.backward()
        for name, parameter in phase.trains.named_parameters():
            gradient = parameter.grad
            sound = gradient is not None and bool(gradient.isfinite().all())
            require(sound, f"phase {phase.name}: {name} has no finite gradient")
        # The teacher, and what this phase does not train, including the statistics of BatchNorm.
        for name, tensor in _tensors(method):
            same = name not in frozen or torch.equal(tensor, frozen[name])
            require(same, f"phase {phase.name}: changes {name}, which it does not train")


def check_single_image(method: Method, images: Images) -> None:
    """Check that each phase has a finite loss of a batch of one image, as an epoch may end with."""
    for phase in method.phases():
        set_trainable(phase, method)
        loss = _total(phase, phase.loss(first_batch(images, phase, 1)))
        require(bool(loss.isfinite()), f"phase {phase.name}: the loss is not finite")


def check_overfits(method: Method, images: Images) -> None:
    """Check that 60 steps on one batch of all training ``images`` reach a top-1 of 100 percent."""
    output = LossOutput({}, {})
    for phase in method.phases():
        set_trainable(phase, method)
        batch = first_batch(images, phase, len(images.train))
        # Its steps do not depend on the scale of the loss.
        optimizer = torch.optim.Adam(phase.trains.parameters(), lr=0.01)
        for _ in range(_OVERFITTING_STEPS):
            output = phase.loss(batch)
            if output.metrics.get("top1") == 100:
                break
            _step(phase, optimizer, output)
        output = phase.loss(batch)
    require("top1" in output.metrics, "the last phase has no metric 'top1'")
    reached = float(output.metrics["top1"])
    require(reached == 100, f"reaches a top-1 of {reached:.1f} instead of 100 percent")


def check_state(build: Build) -> None:
    """Check that the state of a method, without its teacher, loads into another one.

    ``build`` returns equal methods. A buffer that is not persistent may be of the data: then it is
    equal in both of them, and ``check_resume`` checks that no step changes it.
    """
    first, second = build(), build()
    saved = state_without_teacher(first).keys()
    with torch.no_grad():
        for name, tensor in _tensors(first):
            if name in saved:
                tensor.add_(1)
    load_state_without_teacher(second, state_without_teacher(first))
    for (name, tensor), (_, loaded) in zip(_tensors(first), _tensors(second), strict=True):
        require(torch.equal(tensor, loaded), f"{name} is not in the state")


def check_resume(build: Build, images: Images) -> None:
    """Check that a phase which resumes from a checkpoint ends with the same bits.

    Else the method keeps something in a Python attribute that belongs into a buffer. ``build``
    returns equal methods; an epoch of ``images`` has three batches.
    """
    whole = build()
    batch_size = -(-len(images.train) // 3)
    for place, phase in enumerate(whole.phases()):
        loader = loader_of(images, phase, batch_size)
        optimizer = _start(whole, phase)
        _train(phase, optimizer, loader, 1)
        checkpoint = _checkpoint(whole, optimizer, loader)
        _train(phase, optimizer, loader, 2)

        resumed = build()
        again = list(resumed.phases())[place]
        loader = loader_of(images, again, batch_size)
        optimizer = _start(resumed, again)
        _restore(resumed, optimizer, loader, checkpoint)
        _train(again, optimizer, loader, 2)
        # These include the buffers that are not persistent.
        for (name, tensor), (_, ended) in zip(_tensors(whole), _tensors(resumed), strict=True):
            same = torch.equal(tensor, ended)
            require(same, f"phase {phase.name}: {name} differs after a resume")


def check_teacher_outputs(method: Method, images: Images) -> None:
    """Check that ``teacher_outputs`` names all that the last phase reads of the teacher.

    ``teacher.precompute`` stores these outputs alone.
    """
    if not method.needs_teacher:
        return
    phase = list(method.phases())[-1]
    set_trainable(phase, method)
    batch = first_batch(images, phase, 4)
    with torch.no_grad():
        features = _WatchedFeatures(method.teacher(batch.x))
    method.precomputed = lambda _: features
    try:
        phase.loss(batch)
    finally:
        method.precomputed = None
    undeclared = sorted(features.read - set(method.teacher_outputs))
    require(
        not undeclared,
        f"the loss reads {', '.join(undeclared)} of the teacher, which teacher_outputs "
        f"({', '.join(method.teacher_outputs)}) does not name",
    )


class _WatchedFeatures(Features):
    """Features that record the fields that are read of them."""

    def __new__(cls, features: Features) -> _WatchedFeatures:
        watched = super().__new__(cls, *features)
        object.__setattr__(watched, "read", set())
        return watched

    def __getattribute__(self, name: str) -> Any:
        if name in Features._fields:
            object.__getattribute__(self, "read").add(name)
        return super().__getattribute__(name)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _total(phase: Phase, output: LossOutput) -> Tensor:
    try:
        return torch.stack(list(phase.weigh(output.terms).values())).sum()
    except ValueError as error:
        require(False, str(error))
        raise


def _graph_leaves(root: Tensor) -> set[int]:
    """Return the ids of the tensors in which the autograd graph of ``root`` ends."""
    found, seen, pending = set(), set(), [root.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        pending += [following for following, _ in node.next_functions]
    return found


def _check_leaves(phase: Phase, method: Method, leaves: set[int]) -> None:
    trained = {id(parameter): name for name, parameter in phase.trains.named_parameters()}
    unused = sorted(name for key, name in trained.items() if key not in leaves)
    require(not unused, f"phase {phase.name}: no loss depends on {', '.join(unused)}")
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    extra = sorted(
        names.get(key, "a tensor outside of the method") for key in leaves - set(trained)
    )
    require(
        not extra, f"phase {phase.name}: the loss trains {', '.join(extra)}; see Method.adapters"
    )


def _optimizer(phase: Phase) -> torch.optim.Optimizer:
    return torch.optim.SGD(phase.trains.parameters(), lr=0.05, momentum=0.9)


def _step(phase: Phase, optimizer: torch.optim.Optimizer, output: LossOutput) -> None:
    optimizer.zero_grad()
    _total(phase, output).backward()
    optimizer.step()
    phase.after_step()


def _start(method: Method, phase: Phase) -> torch.optim.Optimizer:
    set_trainable(phase, method)
    torch.manual_seed(0)
    return _optimizer(phase)


def _train(phase: Phase, optimizer: torch.optim.Optimizer, loader: Loader, steps: int) -> None:
    for _ in range(steps):
        _step(phase, optimizer, phase.losses(loader.next_batch()))


def _checkpoint(method: Method, optimizer: torch.optim.Optimizer, loader: Loader) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "module": state_without_teacher(method),
            "optimizer": optimizer.state_dict(),
            "loader": loader.state_dict(),
            "generators": generator_states(torch.device("cpu")),
        }
    )


def _restore(
    method: Method, optimizer: torch.optim.Optimizer, loader: Loader, checkpoint: dict[str, Any]
) -> None:
    load_state_without_teacher(method, checkpoint["module"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    loader.load_state_dict(checkpoint["loader"])
    restore_generator_states(checkpoint["generators"], torch.device("cpu"))
