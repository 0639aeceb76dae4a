"""The methods that ``method=`` chooses from, one file each."""

from __future__ import annotations

from typing import Any

from torch import nn

from sskd.data import Images
from sskd.methods.base import Method, Stage, Step, load_own_state, own_state
from sskd.methods.kd import KD
from sskd.methods.sskd import SSKD
from sskd.methods.vanilla import Vanilla

METHODS: dict[str, type[Method]] = {
    "vanilla": Vanilla,
    "kd": KD,
    "sskd": SSKD,
}


def build_method(
    settings: Any, student: nn.Module, teacher: nn.Module | None, data: Images
) -> Method:
    """Return the method that checked ``settings`` (``sskd.config.method_settings``) describe."""
    own = {name: getattr(settings, name) for name in type(settings).model_fields}
    weights = own.pop("weights").model_dump()
    return METHODS[own.pop("name")](student, teacher, data, weights=weights, **own)


__all__ = [
    "METHODS",
    "Method",
    "Stage",
    "Step",
    "build_method",
    "load_own_state",
    "own_state",
]
