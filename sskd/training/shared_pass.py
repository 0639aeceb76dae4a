"""The teacher's forward pass in a CUDA graph of its own, which jobs with the same batches share.

Jobs with the same teacher, data, seed and batch size train on the same batches, and take turns step
by step. The job that comes first to a batch computes the teacher's features, and the others copy
those that their method reads.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from sskd.methods.base import forward_in_chunks
from sskd.models import Features
from sskd.precision import computing
from sskd.streams import Fence
from sskd.training.step import Capture, TrainingStep
from sskd.turns import pass_turn, shared

# Of each job: one that is a step behind finds the features of its batch too.
_KEPT = 2


class SharedFeatures:
    """The features of the latest batches of several jobs. All of them have the same shapes."""

    def __init__(self) -> None:
        self.jobs: WeakSet[object] = WeakSet()
        self._kept: dict[Hashable, _Kept] = {}  # by batch, the oldest first

    def copy_to(self, features: Features, batch: Hashable, fields: Sequence[str]) -> bool:
        """Write the ``fields`` of ``batch`` into ``features``; return whether they were known."""
        kept = self._kept.get(batch)
        if kept is not None:
            kept.copy_to(features, fields)
        return kept is not None

    def keep(self, features: Features, batch: Hashable) -> None:
        """Keep a copy of ``features``, those of ``batch``, in the place of the oldest ones."""
        if len(self._kept) < _KEPT * len(self.jobs):
            kept = _Kept(features)
        else:
            kept = self._kept.pop(next(iter(self._kept)))
        kept.copy_from(features)
        self._kept[batch] = kept


class _Kept:
    """A copy of the features of a batch, written and read on the streams of different jobs."""

    def __init__(self, like: Features) -> None:
        self._features = _empty_like(like)
        self._device = like.logits.device
        self._written = Fence(self._device)
        self._read: list[Fence] = []

    def copy_from(self, features: Features) -> None:
        for fence in (self._written, *self._read):
            fence.hold_back()
        _copy(features, self._features, Features._fields)
        self._written, self._read = Fence(self._device), []

    def copy_to(self, features: Features, fields: Sequence[str]) -> None:
        self._written.hold_back()
        _copy(self._features, features, fields)
        self._read.append(Fence(self._device))


class SplitStep:
    """A training step of whole batches, as the graph of the teacher's pass and that of the rest.

    Args:
        capture: records the work of a graph.
        size: images in a batch.
        first: the features of a batch, which show the shapes of all others.
    """

    def __init__(self, step: TrainingStep, *, capture: Capture, size: int, first: Features) -> None:
        self._step, self._size = step, size
        self._method, self._loader = step.method, step.loader
        key = (self._method.shared_teacher, self._loader.views, *map(_layout, tree_leaves(first)))
        self._shared = shared(("features", *key), SharedFeatures)
        self._shared.jobs.add(self)
        self._features = _empty_like(first)
        self._compute_features = capture(self._write_features)
        self._train = capture(self._train_with_features)

    def __call__(self) -> None:
        """Train on the next batch, after a turn of each other job that may have the same one."""
        if len(self._shared.jobs) > 1:
            self._share_features()
        else:
            self._compute_features()
        self._train()

    def _share_features(self) -> None:
        pass_turn(at_once=True)
        batch = tuple(self._loader.state_dict().values())
        if not self._shared.copy_to(self._features, batch, self._method.teacher_outputs):
            self._compute_features()
            self._shared.keep(self._features, batch)

    def _write_features(self) -> None:
        features = teacher_features(self._step, self._size)
        _copy(features, self._features, Features._fields)

    def _train_with_features(self) -> None:
        batch, forward = self._loader.draw(self._size), self._method.teacher_forward

        def known_or_computed(network: nn.Module, x: Tensor, fields: Sequence[str]) -> Features:
            return self._features if x is batch.x else forward(network, x, fields)

        self._method.teacher_forward = known_or_computed
        try:
            self._step.train(batch)
        finally:
            self._method.teacher_forward = forward


@torch.no_grad()
def teacher_features(step: TrainingStep, size: int) -> Features:
    """Return the teacher's features of the next ``size`` images, which are not drawn yet."""
    x = step.loader.peek(size).x
    with computing(step.precision, x.device):
        return forward_in_chunks(step.method.teacher, x, step.method.teacher_outputs)


def shares_pass(step: TrainingStep) -> bool:
    """Return whether other jobs may need the teacher's features of the batches of ``step``.

    In other phases than the last one a method may use the teacher in its own way. A compiled loss
    contains the teacher's pass.
    """
    method = step.method
    return (
        method.shared_teacher is not None
        and method.precomputed is None
        and step.phase.name == method.evaluated_phase
        and not step.is_compiled
    )


def _layout(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype


def _empty_like(features: Features) -> Features:
    empty: Features = tree_map_only(Tensor, torch.empty_like, features)
    return empty


def _copy(source: Features, target: Features, fields: Sequence[str]) -> None:
    into, tensors = (
        tree_leaves([getattr(each, name) for name in fields]) for each in (target, source)
    )
    torch._foreach_copy_(into, tensors)
    for tensor in (*into, *tensors):
        if tensor.is_cuda:  # another job may free it, and its stream would use the memory again
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
