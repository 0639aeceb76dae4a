"""The texts of an export: its card, the code that loads it, and hubconf.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, /, **values: Any) -> str:
    """Return the file ``template`` of ``templates/`` with ``values``."""
    environment = Environment(
        loader=PackageLoader(__package__, "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shape": _shape, "percent": _percent, "thousands": "{:,}".format}
    return environment.get_template(template).render(values)


def _shape(sizes: Sequence[object]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
