"""The base class of the methods: a module with named losses, trained in one or more phases."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sskd.data import ONE_VIEW, Batch, Views
from sskd.device import chunks
from sskd.errors import UserError
from sskd.methods.networks import Networks
from sskd.models import VECTOR_FIELDS, Features, partial_features
from sskd.schedule import PhaseSettings

P = ParamSpec("P")
R = TypeVar("R")
# Takes a network, its input, and the names of the features that it has to return.
TeacherForward = Callable[[nn.Module, Tensor, Sequence[str]], Features]


class LossOutput(NamedTuple):
    """The losses and metrics of one batch.

    ``terms`` are the losses by name, scalars and UNWEIGHTED: the training step multiplies, so that
    runs with different weights can be compared. ``metrics`` are scalars without a gradient, for
    monitoring. Both are averaged over the epoch on the device.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One training phase of a method.

    Attributes:
        name: the prefix of its metrics.
        trains: the module that gets gradients and train mode; all others are frozen in eval mode.
        loss: returns the losses of one batch.
        weights: a weight for each term of ``loss``.
        views: the views of each image in a batch.
        schedule: its schedule in relation to the run's; None: the run's schedule itself.
        teacher_only: its result depends on the teacher alone: it is computed once for all students
            of that teacher with the same settings.
        settings: the method's settings that the result of a ``teacher_only`` phase depends on,
            beside its weights, views and schedule.
        optimizer: settings of the optimizer that replace the run's, if it has them.
        after_step: is called after each step, when the backward pass no longer needs any tensor.
        warmup: for some terms, the share of the phase's epochs during which their weight rises
            linearly to the one in ``weights``.
        progress: of the method; needed for a warmup.
    """

    name: str
    trains: nn.Module
    loss: Callable[[Batch], LossOutput]
    weights: Mapping[str, float]
    views: Views = ONE_VIEW
    schedule: PhaseSettings | None = None
    teacher_only: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    after_step: Callable[[], None] = lambda: None
    warmup: Mapping[str, float] = field(default_factory=dict)
    progress: Tensor | None = None

    def weigh(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``terms`` times their weights, which are smaller during a warmup.

        A term of weight 0 becomes a constant 0 instead of a product: 0 times NaN is NaN, and its
        gradient would be NaN too.

        Raises:
            ValueError: a term has no weight, or a weight no term.
        """
        if terms.keys() != self.weights.keys():
            raise ValueError(
                f"phase {self.name}: the terms are {sorted(terms)}, but the weights are for "
                f"{sorted(self.weights)}; give each term exactly one weight"
            )
        return {
            name: self._weight(name) * term if self.weights[name] else torch.zeros_like(term)
            for name, term in terms.items()
        }

    def _weight(self, name: str) -> float | Tensor:
        if name not in self.warmup:
            return self.weights[name]
        assert self.progress is not None
        return self.weights[name] * (self.progress / self.warmup[name]).clamp(max=1)

    def losses(self, batch: Batch) -> LossOutput:
        """Return ``loss`` of the batch; terms of weight 0 carry no gradient."""
        terms, metrics = self.loss(batch)
        kept = {k: term if self.weights.get(k) else term.detach() for k, term in terms.items()}
        return LossOutput(kept, metrics)


def fault_of_phases(phases: Sequence[Phase]) -> str:
    """Return why a run cannot train these ``phases`` of a method; "" if it can."""
    names = [phase.name for phase in phases]
    for name in names:
        if names.count(name) > 1:
            return f"{names.count(name)} phases have the name '{name}'; give each phase another one"
    for phase in phases:
        if not _are_views(phase.views):
            return f"phase {phase.name}: its views are {phase.views!r}; use Views, such as Views(4)"
        if unknown := phase.warmup.keys() - phase.weights.keys():
            return f"phase {phase.name}: warmup names {sorted(unknown)}, which have no weight"
        if phase.warmup and phase.progress is None:
            return f"phase {phase.name}: a warmup needs progress=self.progress"
    if not names or phases[-1].teacher_only:
        return "the last phase must train the student: yield one with teacher_only=False at the end"
    return ""


def _are_views(value: object) -> bool:
    return isinstance(value, Views)  # an extension's phase may have a number


class Method(nn.Module, ABC):
    """A student, its teacher, and the losses by which the student learns from the teacher.

    A subclass

    - names its ``terms`` and implements ``loss``;
    - takes ``networks`` and, as keyword-only arguments, its settings. Their annotations are the
      types and ranges against which the configuration is checked (``sskd.config.method_settings``);
      ``**shared`` are the settings of its base classes;
    - raises a UserError in its constructor if it cannot be used with the two networks;
    - lists in ``adapters`` the modules that are trained together with the student (regressors,
      embeddings);
    - names in ``teacher_outputs`` the fields of the teacher's ``Features`` that its losses read
      from ``teacher_features``; the other fields may be None;
    - changes its buffers in place, and those that the backward pass needs in ``after_step``, so
      that a CUDA graph can contain its step. If it cannot, it sets ``capturable`` to False.
    """

    views: Views = ONE_VIEW  # of the last phase
    needs_teacher: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    has_heads: ClassVar[bool] = False  # ``heads`` is not None
    uses_heads: ClassVar[bool] = False  # of the teacher, if it was trained with some
    # The last phase, which trains the student; its accuracy is measured after each epoch of it.
    evaluated_phase: ClassVar[str] = "distill"
    terms: ClassVar[tuple[str, ...]]
    teacher_outputs: ClassVar[tuple[str, ...]] = Features._fields

    # None without a teacher, which only a method with ``needs_teacher = False`` accepts.
    teacher: nn.Module
    # The share of the phase's epochs that have begun, a scalar: k / n in the k-th of n epochs. A
    # CUDA graph reads the tensor, and would repeat a number of Python.
    progress: Tensor

    def __init__(self, networks: Networks, *, weights: Mapping[str, float]) -> None:
        super().__init__()
        if not any(weights.values()):
            raise UserError("all method.weights are 0; set one of them above 0")
        self.student = networks.student
        self.weights = dict(weights)
        self.adapters: tuple[nn.Module, ...] = ()
        # Of the last phase; see ``Phase``.
        self.warmup: Mapping[str, float] = {}
        self.schedule: PhaseSettings | None = None
        self.optimizer_settings: Mapping[str, Any] = {}
        self.register_buffer("progress", torch.ones(()), persistent=False)
        # If set, returns the teacher's outputs from a file instead (sskd.teachers.outputs).
        self.precomputed: Callable[[Batch], Features] | None = None
        # Gathers rows [B, ...] of one process into those of the whole batch, with a gradient.
        self.gather: Callable[[Tensor], Tensor] = lambda rows: rows
        # Computes the teacher's features; jobs in threads share this function
        # (sskd.teachers.side_by_side).
        self.teacher_forward: TeacherForward = forward_in_chunks
        # If jobs share a GPU: together with the epoch's seed, identifies the teacher's features.
        self.shared_teacher: Hashable = None
        self.register_module("teacher", networks.teacher)
        if networks.teacher is not None:
            networks.teacher.requires_grad_(False)

    def phases(self) -> Iterable[Phase]:
        """Yield the phases in order; the last one trains the student and is evaluated."""
        trained = nn.ModuleList([self.student, *self.adapters])
        yield Phase(
            self.evaluated_phase,
            trains=trained,
            loss=self.loss,
            weights=self.weights,
            views=self.views,
            schedule=self.schedule,
            optimizer=self.optimizer_settings,
            after_step=self.after_step,
            warmup=self.warmup,
            progress=self.progress,
        )

    @property
    def deployed(self) -> nn.Module:
        """The network that is evaluated, counted and saved as the result: the student.

        Its forward returns ``Features``. If it is another one, it consists of modules of the method
        and needs nothing else of the teacher.
        """
        return self.student

    @property
    def heads(self) -> nn.Module | None:
        """What was trained with the deployed network, for its students; saved beside it."""
        return None

    @torch.no_grad()
    def teacher_features(self, batch: Batch) -> Features:
        """Return the teacher's features of ``batch``, without a gradient; do not change them."""
        if self.precomputed is not None:
            return self.precomputed(batch)
        return self.teacher_forward(self.teacher, batch.x, self.teacher_outputs)

    def whole(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Return each of ``parts`` [B, ...] for the batch of all processes, if that is asked for.

        For terms that compare the images of a batch (``gather_batch``).
        """
        return tuple(map(self.gather, parts))

    @abstractmethod
    def loss(self, batch: Batch) -> LossOutput:
        """Return the losses of one batch of the last phase."""

    def after_step(self) -> None:
        """Change buffers after a step of the last phase: nothing here."""


def forward_in_chunks(network: nn.Module, x: Tensor, fields: Sequence[str]) -> Features:
    """Return the features of ``x``, in eval mode; only ``fields`` are guaranteed to be present.

    If all ``fields`` are vectors, a large batch is computed in chunks, which is faster. Maps would
    have to be concatenated, which is not.
    """
    if computes_whole(x, fields):
        whole: Features = network(x)
        return whole
    outputs = [network(part) for part in chunks(x)]
    return partial_features(
        {name: torch.cat([getattr(output, name) for output in outputs]) for name in fields}
    )


def computes_whole(x: Tensor, fields: Sequence[str]) -> bool:
    """Return whether ``forward_in_chunks`` computes all features of ``x`` at once."""
    return len(chunks(x)) == 1 or not set(fields) <= set(VECTOR_FIELDS)


def state_without_teacher(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of ``module`` without the teacher's, which never changes."""
    return {k: v for k, v in module.state_dict().items() if not k.startswith("teacher.")}


def load_state_without_teacher(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state that ``state_without_teacher`` returned.

    Raises:
        ValueError: a tensor is missing or not expected.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    wrong = [name for name in missing if not name.startswith("teacher.")] + list(unexpected)
    if wrong:
        raise ValueError(f"missing or unexpected in the checkpoint's state: {', '.join(wrong)}")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` compute in float32 for inputs of any precision, even inside autocast."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        def cast(value: object) -> object:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.float() if floating else value  # type: ignore[attr-defined]

        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            positional = [cast(value) for value in args]
            named = {key: cast(value) for key, value in kwargs.items()}
            return function(*positional, **named)  # type: ignore[arg-type]

    return wrapped


def unit_vectors(vectors: Tensor) -> Tensor:
    """Return [..., d] scaled to length 1 in its last dimension; vectors of zeros stay zero.

    ``F.normalize`` divides a vector of zeros, and its gradient, by a tiny number; this does not.
    """
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.where(length > 0, 1)


def top1(scores: Tensor, target: Tensor) -> Tensor:
    """Return the percentage of rows of ``scores`` [N, C] that are largest at ``target`` [N]."""
    return 100 * (scores.detach().argmax(1) == target).float().mean()
