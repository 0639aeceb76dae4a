"""Whether a CUDA graph can contain a training step, without a GPU.

The step is computed on PyTorch's device ``meta``, whose tensors have a shape but no values. It
stands for the GPU, and the CPU for the host. PyTorch computes a few gradients, such as that of
``torch.prod``, with values only if there are values, so the check does not find that they wait for
a GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sskd.checks import require
from sskd.checks.samples import loader_of
from sskd.data import Images
from sskd.device import to_device
from sskd.errors import CheckError, one_line
from sskd.methods import Method, Phase
from sskd.teachers.outputs import Precomputed, can_precompute, layout_of
from sskd.training.meter import Meter
from sskd.training.step import TrainingStep, set_trainable

_DEVICE = torch.device("meta")
_BATCH_SIZE = 4
_ASSIGNMENTS = {torch.ops.aten.index_put, torch.ops.aten.index_put_}
# These take indices of the host, or copy from one device to the other.
_OF_TWO_DEVICES = {*_ASSIGNMENTS, torch.ops.aten.index, torch.ops.aten.copy_}
_OR_NOT = "or set capturable = False in the class"


def check_device(method: Method, images: Images) -> None:
    """Check that a CUDA graph can contain a training step of each phase.

    All tensors are on one device, the host needs none of their values, those that last from step to
    step stay in place, and each step computes with the same numbers of Python. With
    ``capturable = False`` only the first is checked, up to the first value that the host needs. A
    method that can use stored outputs of its teacher is checked with them too. ``method`` has no
    values afterwards.
    """
    stored = _stored_outputs(method, images) if can_precompute(method) else None
    to_device(method, _DEVICE)
    images = images.to(_DEVICE)
    for phase in method.phases():
        set_trainable(phase, method)
        step = _step(method, phase, images)
        before: dict[str, torch.UntypedStorage] = {}
        works: list[list[str]] = []
        # The first step also creates the optimizer's state.
        for outputs in [None] * 3 + [stored] * (2 if stored else 0):
            method.precomputed = outputs
            before = _memory(step)
            watch = _Watch(strict=method.capturable)
            fault = _fault_of(step, watch)
            require(not fault, f"phase {phase.name}: {fault}")
            works.append(watch.work)
        after = _memory(step)
        if method.capturable:
            _compare(phase, works[1], works[2])
            _compare(phase, works[-2], works[-1])
        moved = [name for name, memory in before.items() if after.get(name) is not memory]
        require(
            not moved or not method.capturable,
            f"phase {phase.name}: a step puts another tensor in the place of {', '.join(moved)}; "
            f"change it in place (copy_) in after_step, {_OR_NOT}",
        )


def _stored_outputs(method: Method, images: Images) -> Precomputed:
    layout = layout_of(method, images, "fp32")
    return Precomputed(torch.empty(layout.shape, device=_DEVICE), layout.widths)


def _step(method: Method, phase: Phase, images: Images) -> TrainingStep:
    # Not fused as in a run: PyTorch's fused kernels do not know the device.
    optimizer = torch.optim.SGD(phase.trains.parameters(), lr=0.1, momentum=0.9, foreach=True)
    return TrainingStep(
        phase=phase,
        method=method,
        optimizer=optimizer,
        loader=loader_of(images, phase, _BATCH_SIZE),
        meter=Meter(),
        precision="fp32",
    )


def _memory(step: TrainingStep) -> dict[str, torch.UntypedStorage]:
    """Return the memory of each tensor that lasts from step to step."""
    return {name: tensor.untyped_storage() for name, tensor in step.lasting_tensors().items()}


def _compare(phase: Phase, work: list[str], again: list[str]) -> None:
    """Raise CheckError if two steps computed with other numbers, or with other operations."""
    differing = (one for one, other in zip(work, again, strict=False) if one != other)
    found = next(differing, "" if len(work) == len(again) else "one has more operations")
    require(
        not found,
        f"phase {phase.name}: two steps differ in what Python decides ({found[:100]}), and a CUDA "
        f"graph would repeat one of them; draw random numbers with torch, and keep what changes "
        f"from step to step in a tensor, {_OR_NOT}",
    )


def _fault_of(step: TrainingStep, watch: _Watch) -> str:
    """Compute ``step``; return what is wrong with it, and in which line; "" if nothing is."""
    try:
        with _no_autocast(), watch:
            step.compute(_BATCH_SIZE)
    except CheckError as error:
        return f"{_line_of(error)} {error}"
    except Exception as error:  # the device has no values, so what needs one fails
        fault = f"{_line_of(error)} {_needs_values(one_line(error)[:100])}"
        return fault if watch.strict else ""
    return ""


class _Watch(TorchDispatchMode):
    """Raises CheckError for an operation that takes tensors of the device and of the host.

    If ``strict``, as for a step in a CUDA graph, also for any tensor of the host, and for an
    operation that needs values.

    Attributes:
        work: the operations, with their numbers.
    """

    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.work: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        taken = _tensors((args, kwargs))
        numbers = [each for each in tree_leaves((args, kwargs)) if isinstance(each, int | float)]
        self.work.append(f"{func} {numbers}" if numbers else str(func))
        if not self.strict:
            if _mixes(func, taken):
                raise CheckError(_uses_host(func))
            return func(*args, **kwargs)
        # The end of torch.tensor, which copies numbers from the host. Torch 2.11 and older do not
        # report it for a tensor of the device.
        copies = func.overloadpacket is torch.ops.aten.lift_fresh
        if copies or not all(map(_on_device, taken)):
            raise CheckError(_uses_host(func))
        if _assigns_by_mask(func, args):
            raise CheckError(_needs_values(func))
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            raise CheckError(_needs_values(func)) from error
        if not all(map(_on_device, _tensors(result))):
            raise CheckError(_uses_host(func))
        return result


def _needs_values(what: object) -> str:
    return (
        f"needs the values of a tensor ({what}); compute on the device, with shapes that do not "
        f"depend on values, such as with torch.where, {_OR_NOT}"
    )


def _uses_host(func: object) -> str:
    return (
        f"uses a tensor of the CPU ({func}); make it on the device, such as with torch.full and "
        "device=batch.x.device, or register it as a buffer"
    )


def _mixes(func: Any, taken: list[Tensor]) -> bool:
    """Return whether ``func`` fails on a GPU: single numbers of the host do not matter."""
    devices = {tensor.device for tensor in taken if tensor.ndim or _on_device(tensor)}
    return len(devices) > 1 and func.overloadpacket not in _OF_TWO_DEVICES


def _assigns_by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Return whether ``func`` counts the places that a mask selects; for one value it does not."""
    if func.overloadpacket not in _ASSIGNMENTS:
        return False
    _, indices, values = args[:3]
    masks = [index for index in _tensors(indices) if index.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and values.numel() != 1


def _tensors(values: object) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _on_device(tensor: Tensor) -> bool:
    return tensor.device == _DEVICE


def _line_of(error: BaseException) -> str:
    """Return ``FILE:LINE`` of the innermost frame that is neither PyTorch's nor of the checks."""
    others = {Path(torch.__file__).parent, Path(__file__).parent}
    frames = reversed(traceback.extract_tb(error.__traceback__))
    frame = next(each for each in frames if not others & set(Path(each.filename).parents))
    path = Path(frame.filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{frame.lineno}"


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Ignore autocast inside a ``with`` block: the device ``meta`` has none."""

    def nothing(*args: object, **kwargs: object) -> None:
        pass

    with patch.multiple(torch.autocast, __init__=nothing, __enter__=nothing, __exit__=nothing):
        yield
