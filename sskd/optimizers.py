"""The optimizers, by their names on the command line (``optimizer=``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from sskd.settings import LearningRate, NonNegative, Settings, ShareBelowAll


class SGDSettings(Settings):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"]
    lr: LearningRate
    momentum: ShareBelowAll
    weight_decay: NonNegative
    nesterov: bool

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError(
                "nesterov=true needs a momentum above 0; set optimizer.momentum=0.9, or "
                "optimizer.nesterov=false"
            )
        return self


class AdamWSettings(Settings):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019)."""

    name: Literal["adamw"]
    lr: LearningRate
    betas: Annotated[list[ShareBelowAll], Field(min_length=2, max_length=2)]
    weight_decay: NonNegative


class OptimizerChoice(NamedTuple):
    """The class of an optimizer, and the class of its settings.

    ``published_rates``: the learning rates that papers give for phases are meant for it.
    """

    build: Callable[..., torch.optim.Optimizer]
    settings: type[Settings]
    published_rates: bool = False


OPTIMIZERS: dict[str, OptimizerChoice] = {
    "sgd": OptimizerChoice(torch.optim.SGD, SGDSettings, published_rates=True),
    "adamw": OptimizerChoice(torch.optim.AdamW, AdamWSettings),
}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def build_optimizer(
    settings: Any, parameters: Iterable[torch.nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """Return the optimizer with ``settings`` for ``parameters``, at the learning rate ``lr``."""
    values = settings.model_dump(exclude={"name", "lr"})
    # fused: one kernel for all parameters instead of several for each.
    return OPTIMIZERS[settings.name].build(parameters, lr=lr, fused=True, **values)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load ``state`` into ``optimizer``, and check what PyTorch does not.

    Raises:
        ValueError: it is the state of another kind of optimizer, or of other parameters.
    """
    before = [{**group, "params": None} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for expected, group in zip(before, optimizer.param_groups, strict=True):
        for name, value in expected.items():
            if name != "params" and _kind(group.get(name, value)) != _kind(value):
                raise ValueError(f"the optimizer's {name} is {group[name]!r}")
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if not isinstance(value, torch.Tensor) or value.shape not in (parameter.shape, ()):
                raise ValueError(f"the optimizer's {name} does not have its parameter's shape")


def _kind(value: object) -> str:
    """Return the kind of a setting's value; None is a flag that PyTorch sets itself."""
    if value is None or isinstance(value, bool):
        return "flag"
    return "number" if isinstance(value, int | float) else type(value).__name__
