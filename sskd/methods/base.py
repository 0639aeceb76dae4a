"""What a distillation method is: a module with named losses, trained in one or more phases."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sskd.data import Batch, Images
from sskd.device import chunks
from sskd.errors import UserError
from sskd.models import VECTOR_FIELDS, Features, partial_features
from sskd.schedule import PhaseSettings

P = ParamSpec("P")
R = TypeVar("R")


class LossOutput(NamedTuple):
    """What one batch gives.

    ``terms`` are the losses by name, scalars and UNWEIGHTED: the loop multiplies, so that
    runs with other weights compare. ``metrics`` are figures to watch, scalars without a
    gradient. Both are averaged over the epoch on the device.
    """

    terms: dict[str, Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One training phase of a method.

    Attributes:
        name: the prefix of its metrics.
        trains: what gets gradients and train mode; everything else is frozen in eval mode.
        loss: the losses of one batch.
        weights: a weight for each term of ``loss``.
        views: rotated views of each image in a batch (1 to 4).
        phase: its schedule in relation to the run's; None: the run's own.
        teacher_only: it depends on the teacher alone, so that one result, computed once,
            serves every student of that teacher with the same settings.
        settings: the method's settings that the result of a ``teacher_only`` phase depends on,
            beside its weights, views and phase.
    """

    name: str
    trains: nn.Module
    loss: Callable[[Batch], LossOutput]
    weights: Mapping[str, float]
    views: int = 1
    schedule: PhaseSettings | None = None
    teacher_only: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def weigh(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``terms`` times their weights; ValueError unless each has its weight.

        What has a weight of 0 is left out, not multiplied: 0 times NaN is NaN, and so would be
        the gradient.
        """
        if terms.keys() != self.weights.keys():
            raise ValueError(
                f"phase {self.name}: its terms are {sorted(terms)}, "
                f"its weights {sorted(self.weights)}"
            )
        return {
            name: self.weights[name] * term if self.weights[name] else torch.zeros_like(term)
            for name, term in terms.items()
        }

    def losses(self, batch: Batch) -> LossOutput:
        """Return ``loss`` of the batch, without a gradient of the terms that have a weight of 0."""
        terms, metrics = self.loss(batch)
        kept = {k: term if self.weights.get(k) else term.detach() for k, term in terms.items()}
        return LossOutput(kept, metrics)


class Method(nn.Module, ABC):
    """A student, its teacher, and how the one learns from the other.

    A subclass names its ``terms``, takes its own settings as keyword-only arguments (their
    annotations are the types and ranges that the configuration is checked against, see
    ``sskd.config.method_settings``; ``**shared`` passes its base class's on) and implements
    ``loss``. What it puts beside the student and trains with it (regressors, embeddings) it
    names in ``adapters``. Its constructor refuses networks that it cannot take, with a
    UserError. ``teacher_outputs`` names the fields of the teacher's ``Features`` that its losses
    read by ``teacher_features``; others may be None there.
    """

    views: ClassVar[int] = 1
    needs_teacher: ClassVar[bool] = True
    evaluated_phase: ClassVar[str] = "distill"  # the name of the last of its phases
    terms: ClassVar[tuple[str, ...]]
    teacher_outputs: ClassVar[tuple[str, ...]] = Features._fields

    # Without a teacher the attribute is None; only methods that need none may see that.
    teacher: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        data: Images,
        *,
        weights: Mapping[str, float],
    ) -> None:
        super().__init__()
        if not any(weights.values()):
            raise UserError("method.weights are all 0, so that nothing would be learnt")
        self.student = student
        self.weights = dict(weights)
        self.adapters: tuple[nn.Module, ...] = ()
        # The teacher's outputs looked up instead of computed (sskd.teachers.outputs).
        self.precomputed: Callable[[Batch], Features] | None = None
        self.register_module("teacher", teacher)
        if teacher is not None:
            teacher.requires_grad_(False)

    def phases(self) -> Iterable[Phase]:
        """Yield the phases in order; the last one trains the student and is evaluated."""
        trained = nn.ModuleList([self.student, *self.adapters])
        yield Phase("distill", trained, self.loss, self.weights, self.views)

    @torch.no_grad()
    def teacher_features(self, batch: Batch) -> Features:
        """Return what the teacher makes of ``batch``, without a gradient."""
        if self.precomputed is not None:
            return self.precomputed(batch)
        return forward_in_chunks(self.teacher, batch.x, self.teacher_outputs)

    @abstractmethod
    def loss(self, batch: Batch) -> LossOutput:
        """Return the losses of one batch of the last phase."""


def forward_in_chunks(network: nn.Module, x: Tensor, fields: Sequence[str]) -> Features:
    """Return ``fields`` of the network's features of ``x``, in eval mode, and perhaps the others.

    A large batch goes through in parts, which is faster, where no maps have to be put together.
    """
    parts = chunks(x)
    if len(parts) == 1 or not set(fields) <= set(VECTOR_FIELDS):
        whole: Features = network(x)
        return whole
    asked = [network(part) for part in parts]
    return partial_features(
        {name: torch.cat([getattr(each, name) for each in asked]) for name in fields}
    )


def state_without_teacher(module: nn.Module) -> dict[str, Tensor]:
    """Return ``module``'s state without its teacher's, which never changes."""
    return {k: v for k, v in module.state_dict().items() if not k.startswith("teacher.")}


def load_state_without_teacher(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what ``state_without_teacher`` returned, strictly."""
    absent, unexpected = module.load_state_dict(state, strict=False)
    wrong = [name for name in absent if not name.startswith("teacher.")] + list(unexpected)
    if wrong:
        raise ValueError(f"the checkpoint's state does not fit, in {', '.join(wrong)}")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` compute in float32 whatever comes in, inside autocast too."""

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
    """Return [..., d] scaled to length 1 in its last dimension; vectors of zeros stay as they are.

    Unlike ``F.normalize``, which divides those by a tiny number, and their gradients too.
    """
    length = vectors.norm(dim=-1, keepdim=True)
    return vectors / length.where(length > 0, 1)


def top1(scores: Tensor, target: Tensor) -> Tensor:
    """Return the percentage of rows of ``scores`` [N, C] that are largest at ``target`` [N]."""
    return 100 * (scores.detach().argmax(1) == target).float().mean()
