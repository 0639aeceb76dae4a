"""Telling which network a set of weights belongs to, by its tensors alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sskd.models.architectures import ARCHITECTURES


def recognise(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Tell the architecture and the number of classes from the tensors' names and shapes."""
    shapes = tensor_shapes(state)
    for name, layout in _layouts(tuple(ARCHITECTURES)).items():
        *_, weight, bias = layout  # every network registers its classifier last
        classes = shapes.get(bias, ())[:1]
        if classes and shapes == layout | {weight: classes + layout[weight][1:], bias: classes}:
            return name, classes[0]
    return None


def tensor_shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor by its name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


class _WithoutNormal(TorchFunctionMode):
    """Leaves out normal initialisation: on the meta device it fills nothing, and takes a second."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))


@cache
def _layouts(names: tuple[str, ...]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of the tensors of each architecture in ``names``, with one class."""
    with torch.device("meta"), _WithoutNormal():
        return {name: tensor_shapes(ARCHITECTURES[name](1).state_dict()) for name in names}
