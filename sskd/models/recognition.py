"""Finding the architecture of a state dict by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sskd.models.architectures import ARCHITECTURES, build_model, takes_image_size
from sskd.models.image_size import LARGE_IMAGE

Shapes = dict[str, tuple[int, ...]]
# The sizes at which a network that depends on the images has other tensors.
_SIZES = (32, LARGE_IMAGE)


def recognise(state: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Return the architecture and the number of classes of ``state``; None if it is unknown."""
    shapes = tensor_shapes(state)
    for name, layout in _architecture_shapes(tuple(ARCHITECTURES)):
        *_, weight, bias = layout  # every network registers its classifier last
        classes = shapes.get(bias, ())[:1]
        if classes and shapes == layout | {weight: classes + layout[weight][1:], bias: classes}:
            return name, classes[0]
    return None


def tensor_shapes(state: Mapping[str, Tensor]) -> Shapes:
    """Return the shape of each tensor by its name."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


class _SkipNormalInit(TorchFunctionMode):
    """Skips normal initialisation, which takes a second and fills nothing on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if func is Tensor.normal_ else func(*args, **(kwargs or {}))


@cache
def _architecture_shapes(names: tuple[str, ...]) -> list[tuple[str, Shapes]]:
    """Return the shapes of the tensors of the architectures ``names``, with one class, in order.

    An architecture is returned for each of the ``_SIZES`` if it depends on the image size.
    """
    with torch.device("meta"), _SkipNormalInit():
        return [
            (name, tensor_shapes(build_model(name, 1, size).state_dict()))
            for name in names
            for size in (_SIZES if takes_image_size(name) else _SIZES[:1])
        ]
