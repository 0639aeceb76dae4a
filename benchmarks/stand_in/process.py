"""Starting Python on the stand-in."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.stand_in.build import LIBRARY, built


def run_python(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by Python with ``arguments`` on the stand-in.

    Raises:
        UserError: the stand-in cannot be built here.
    """
    os.execve(sys.executable, [sys.executable, *arguments], environment())


def environment() -> dict[str, str]:
    """Return the environment in which a new process of Python loads the stand-in.

    Raises:
        UserError: the stand-in cannot be built here.
    """
    folder = built()
    first = {"LD_PRELOAD": folder / LIBRARY, "LD_LIBRARY_PATH": folder}
    return os.environ | {name: _before(name, path) for name, path in first.items()}


def _before(variable: str, path: Path) -> str:
    given = os.environ.get(variable)
    return f"{path}:{given}" if given else str(path)
