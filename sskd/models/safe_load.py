"""Reading a torch file from anywhere without running anything that it brings along."""

from __future__ import annotations

import argparse
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sskd.errors import UserError

# The published files hold an argparse.Namespace and accuracies as NumPy scalars, whose
# constructor has had two names. Nothing else is allowed.
_NUMPY_SCALAR = np.float64(0).__reduce__()[0]
_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float16DType,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    np.dtypes.Int32DType,
    np.dtypes.Int64DType,
    (_NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (_NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
]


def load_torch_file(path: Path) -> Any:
    """Return what a torch file holds, on the CPU, built of tensors and plain values alone.

    Raises ``UserError`` where the file is damaged, or asks for anything else to be built.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: permission denied") from error
    except Exception as error:  # torch has a dozen types of error for a damaged file
        wanted = _refused_globals(path, error)
        if not wanted:
            raise unreadable(path) from error
        raise UserError(
            f"{path} asks for code, which weights do not need: {', '.join(wanted)}; "
            "it was refused without being run"
        ) from error


def unreadable(path: Path) -> UserError:
    """The error for a file that is no whole checkpoint."""
    return UserError(
        f"{path} cannot be read as a checkpoint; it was probably cut short: fetch it again"
    )


def _refused_globals(path: Path, error: Exception) -> list[str]:
    """Tell what the file wanted to be imported, as far as that is why it was refused."""
    named = re.search(r"GLOBAL ([\w.]+\w)", str(error))
    if named:
        return [named[1]]
    # torch gives up at the first instruction of a newer pickle protocol, before any name.
    if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" in str(error):
        return _imports(path)
    return []


def _imports(path: Path) -> list[str]:
    """List the names that the file's pickles import, by parsing them."""
    names: dict[str, None] = {}
    strings: list[str] = []
    for opcode, argument in _instructions(io.BytesIO(_pickled_bytes(path))):
        if opcode == "STACK_GLOBAL":
            names[".".join(strings[-2:])] = None
        elif opcode in ("GLOBAL", "INST"):
            names[str(argument).replace(" ", ".")] = None
        elif isinstance(argument, str):
            strings.append(argument)
    return list(names)


def _instructions(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield the instructions of pickles that stand in a row, up to what is none."""
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                yield opcode.name, argument
    except ValueError:  # the end of the file, or bytes that are no instruction
        return


def _pickled_bytes(path: Path) -> bytes:
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
