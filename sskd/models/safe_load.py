"""Reading weights from files of unknown origin: no code is run, and memory use is bounded.

All checks of such files, and of the tensors in them, are in this module.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sskd.errors import UserError
from sskd.models.pickle_scan import (
    IMPORTS,
    MAX_PICKLE_BYTES,
    calls_a_value,
    imported_names,
    read_pickles,
)

METADATA_KEY = "about"  # of the JSON in a safetensors file
# The largest network takes 100 MB in float32; copies and an optimizer's state multiply that.
MAX_BYTES = 2 << 30
# Dtypes of networks. A file may hold other tensors (sparse, quantised, complex, of 4 bits), which
# most operations do not support.
_DTYPES = frozenset(
    {
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    }
)
# A view can show a few stored values as terabytes, which a copy of it would really take. A network
# may be at most this many times larger than its file, or have 64 MiB.
_MAX_VIEW_EXPANSION, _SMALL = 10, 64 << 20
# Torch writes archives without compression, and real weights hardly compress. Only a small file
# that fills the memory has a high ratio.
_MAX_UNPACKED_RATIO = 10
# The error messages of torch quote what the file would call, and torch searches them in quadratic
# time: minutes for 300,000 characters. A string that is only a value may be longer.
_MAX_STRING = 10_000
_LEGACY_PICKLES = 5  # consecutive ones, in front of the bytes of the tensors
# The imports from which torch rebuilds tensors.
_TENSOR_NAMES = (
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.\w*Storage"
)
# NumPy's scalars in a file: the name of the type, and its format for struct.
_SCALARS = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q"}


class _Dtype:
    """Replaces ``numpy.dtype`` of a file.

    NumPy's class accepts any state from a file, and some states crash the process.
    """

    def __init__(self, name: str, *_: object) -> None:
        self.code = _SCALARS[name]

    def __setstate__(self, state: tuple[object, ...]) -> None:
        version, order, *rest = state
        if version != 3 or order not in ("<", ">") or rest != [None, None, None, -1, -1, 0]:
            raise pickle.UnpicklingError("not the state of a scalar type")
        self.code = f"{order}{self.code}"


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return struct.unpack(dtype.code, data)[0]


# The published files hold an argparse.Namespace and accuracies as NumPy scalars, whose
# constructor has had two names. Nothing else is allowed.
_ALLOWED_GLOBALS: list[Any] = [
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def load_weights_file(path: Path) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    """Return the content of a safetensors or torch file, on the CPU, and its metadata.

    The first bytes decide which of the two formats it is. The metadata of a torch file are its
    whole content.

    Raises:
        UserError: the file is too large, corrupt, not readable or not a dict, or would run code.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UserError(
            f"{path} has {size >> 20} MiB, more than the limit of {MAX_BYTES >> 20} MiB for a "
            "checkpoint; save the state dict alone"
        )
    try:
        if _is_safetensors(path):
            return _load_safetensors(path)
        content = _load_torch(path)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: permission denied") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a {type(content).__name__}, not a state dict; save model.state_dict() "
            "with torch.save"
        )
    return content, content


def find_unsupported_tensor(state: Mapping[str, Tensor], path: Path) -> str:
    """Describe the first tensor with an unsupported format or an impossible size; "" without one.

    ``path`` is the file of the tensors.
    """
    total, limit = 0, max(_MAX_VIEW_EXPANSION * path.stat().st_size, _SMALL)
    for name, tensor in state.items():
        dense = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not dense or tensor.dtype not in _DTYPES:
            return (
                f"holds '{name}' in an unsupported format ({tensor.dtype}, {tensor.layout}, on "
                f"'{tensor.device.type}')"
            )
        total += tensor.numel() * max(tensor.element_size(), 4)  # its size in float32
        if total > limit:
            return (
                f"holds fewer values for '{name}' than its shape {tuple(tensor.shape)} says: "
                f"{total >> 20} MiB so far, far more than the file's own size"
            )
    return ""


def refuse_bombs(file: BinaryIO, path: Path) -> None:
    """Raise UserError for a torch file that would fill the memory or take hours to refuse.

    ``path`` is the name of ``file`` in the error.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > _MAX_UNPACKED_RATIO * file.seek(0, io.SEEK_END):
            raise UserError(
                f"{path} would unpack to {unpacked >> 20} MiB, far more than its own size, which "
                "no checkpoint does; download it again from its publisher"
            )
    stream = io.BytesIO(read_pickles(file))
    for _ in range(_LEGACY_PICKLES):
        _refuse_long_strings(stream, path)


def _is_safetensors(path: Path) -> bool:
    """Return whether the file begins like a safetensors file: 8 bytes, then JSON."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _load_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        about = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else metadata
        return state, about if isinstance(about, dict) else {}
    except PermissionError:
        raise
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise _corrupt_error(path) from error


def _load_torch(path: Path) -> Any:
    """Return the content of a torch file, built of tensors and plain values alone."""
    try:
        # A stream, because torch chooses the format of a path by its name. Warnings, for example
        # about another pickle protocol, would only repeat the error.
        with (
            path.open("rb") as stream,
            torch.serialization.safe_globals(_ALLOWED_GLOBALS),
            warnings.catch_warnings(action="ignore"),
        ):
            refuse_bombs(stream, path)
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except (UserError, PermissionError):
        raise
    except Exception as error:  # torch raises a dozen types of error for a corrupt file
        refused = _refused_names(path, error)
        if not refused:
            raise _corrupt_error(path) from error
        if all(re.fullmatch(_TENSOR_NAMES, name) for name in refused):
            raise UserError(
                f"{path} is pickled with a protocol other than torch.save's default, which cannot "
                "be read safely; save it again without the argument pickle_protocol"
            ) from error
        raise UserError(
            f"{path} asks to run code, which weights do not need: {', '.join(refused[:5])}; "
            "it was refused without being run"
        ) from error


def _refuse_long_strings(stream: io.BytesIO, path: Path) -> None:
    """Raise UserError if the next pickle in ``stream`` is truncated or may call a long string."""
    start, has_started, longest = stream.tell(), False, 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            has_started = True
            length = len(argument) if isinstance(argument, str | bytes) else 0
            if opcode.name in IMPORTS and length > _MAX_STRING:
                raise UserError(
                    f"{path} holds a name of {length} characters; no valid checkpoint has that; "
                    "download it again"
                )
            longest = max(longest, length)
    except ValueError as error:  # the end of the file, or not an instruction
        if not has_started:
            return
        if stream.tell() >= MAX_PICKLE_BYTES:
            raise UserError(
                f"{path} is corrupt, or holds more than {MAX_PICKLE_BYTES >> 20} MiB in addition "
                "to its tensors; download it again, or save the state dict alone"
            ) from error
        raise _corrupt_error(path) from error
    end = stream.tell()
    stream.seek(start)
    if longest > _MAX_STRING and calls_a_value(stream):
        raise UserError(
            f"{path} holds a string of {longest} characters and calls an object that it does not "
            "import by name; no valid checkpoint has that; download it again"
        )
    stream.seek(end)


def _corrupt_error(path: Path) -> UserError:
    return UserError(
        f"{path} cannot be read as a checkpoint; it is probably truncated: download it again"
    )


def _refused_names(path: Path, error: Exception) -> list[str]:
    """Return the imports for which torch refused the file; none if it had another reason."""
    named = re.search(r"GLOBAL ([\w.]+\w)", str(error))
    if named:
        return [named[1]]
    # Torch stops at the first instruction of a newer pickle protocol, before any name.
    if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" in str(error):
        broken = (OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error)
        with contextlib.suppress(*broken), path.open("rb") as file:
            return imported_names(read_pickles(file))
    return []
