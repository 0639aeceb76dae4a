"""Reading a torch file from anywhere without running anything that it brings along."""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sskd.errors import UserError

# NumPy's scalars in a file: their type's name, and how struct reads one.
_SCALARS = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q"}


class _Dtype:
    """What a file's ``numpy.dtype`` becomes.

    NumPy's own takes any state that a file gives it, and some of them crash the process.
    """

    def __init__(self, name: str, *_: object) -> None:
        self.code = _SCALARS[name]

    def __setstate__(self, state: tuple[object, ...]) -> None:
        version, order, *rest = state
        if version != 3 or order not in ("<", ">") or rest != [None, None, None, -1, -1, 0]:
            raise pickle.UnpicklingError("not the state of a plain number's type")
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
# Torch does not compress what it writes; a file that someone packed again hardly shrinks. Small
# files that would fill the memory do.
_MOST_EXPANSION = 10
# Torch looks through its own messages, which quote what the file wants to call, in a time that
# grows with the square of their length: minutes for 300,000 characters. A value may be longer.
_LONGEST = 10_000
_LONGEST_TOLD = 100
_NAMES = ("GLOBAL", "INST")
_CALLS = ("REDUCE", "NEWOBJ")
# What tensors are made of, and no more.
_HARMLESS = (
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.\w*Storage"
)
_MARK, _NAME, _VALUE = "mark", "name", "value"
# Bytes of a pickle: it has names and shapes, and the tensors' bytes stand elsewhere.
_MOST_PICKLED = 2**24
_LEGACY_PICKLES = 5  # in a row, in front of the tensors' bytes, which may look like anything


def load_torch_file(path: Path) -> Any:
    """Return what a torch file holds, on the CPU, built of tensors and plain values alone.

    Raises ``UserError`` where the file is damaged, or asks for anything else to be built.
    """
    try:
        # A stream, because of a path torch would take the name for what tells the format.
        # A warning, of another protocol for one, would only tell what is told in an error's line.
        with (
            path.open("rb") as stream,
            torch.serialization.safe_globals(_ALLOWED_GLOBALS),
            warnings.catch_warnings(action="ignore"),
        ):
            refuse_bombs(stream, path)
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: permission denied") from error
    except Exception as error:  # torch has a dozen types of error for a damaged file
        wanted = _refused_globals(path, error)
        if not wanted:
            raise unreadable(path) from error
        if all(re.fullmatch(_HARMLESS, name) for name in wanted):
            raise UserError(
                f"{path} is pickled by another protocol than torch.save's own, which cannot be "
                "read without running it; save it again without pickle_protocol"
            ) from error
        raise UserError(
            f"{path} asks for code, which weights do not need: {', '.join(wanted[:5])}; "
            "it was refused without being run"
        ) from error


def refuse_bombs(file: BinaryIO, path: Path) -> None:
    """Raise UserError for a torch file that would fill the memory or take hours to refuse.

    ``path`` is what the error calls ``file``.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
        if unpacked > _MOST_EXPANSION * file.seek(0, io.SEEK_END):
            raise UserError(
                f"{path} would unpack to {unpacked >> 20} MiB, far more than its own size, which "
                "no checkpoint does; fetch it again from where it is published"
            )
    stream = io.BytesIO(_pickled_bytes(file))
    for _ in range(_LEGACY_PICKLES):
        _refuse_long_words(stream, path)


def _refuse_long_words(stream: io.BytesIO, path: Path) -> None:
    """Raise UserError where the next pickle in ``stream`` breaks off, or may have one quoted."""
    start, started, longest = stream.tell(), False, 0
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            started = True
            length = len(argument) if isinstance(argument, str | bytes) else 0
            if opcode.name in _NAMES and length > _LONGEST:
                raise UserError(
                    f"{path} holds a name of {length} characters; no valid checkpoint has that; "
                    "download it again"
                )
            longest = max(longest, length)
    except ValueError as error:  # the end of the file, or bytes that are no instruction
        if not started:
            return
        if stream.tell() >= _MOST_PICKLED:
            raise UserError(
                f"{path} is damaged, or holds more than {_MOST_PICKLED >> 20} MiB beside "
                "its tensors; fetch it again, or save the state dict alone"
            ) from error
        raise unreadable(path) from error
    end = stream.tell()
    stream.seek(start)
    if longest > _LONGEST and _calls_a_value(stream):
        raise UserError(
            f"{path} holds a text of {longest} characters and asks for something to be called that "
            "it does not name; no valid checkpoint has that; download it again"
        )
    stream.seek(end)


def _calls_a_value(stream: io.BytesIO) -> bool:
    """Return whether the next pickle, which is whole, calls anything but what it imports by name.

    It is followed instruction by instruction, as ``pickletools.dis`` does; nothing is built.
    """
    stack: list[str] = []
    memo: dict[Any, str] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in _CALLS and stack[-2:-1] != [_NAME]:
            return True
        if opcode.name.endswith("PUT"):
            memo[argument] = stack[-1] if stack else _VALUE
        elif opcode.name.endswith("GET"):
            stack.append(memo.get(argument, _VALUE))
        else:
            _move(stack, opcode)
    return False


def _move(stack: list[str], opcode: pickletools.OpcodeInfo) -> None:
    """Take from ``stack`` what the instruction takes, and put on it what it puts there."""
    taken = list(opcode.stack_before)
    if pickletools.markobject in taken:
        while stack and stack.pop() != _MARK:
            pass
        taken = taken[: taken.index(pickletools.markobject)]
    if taken:
        del stack[-len(taken) :]
    made = _NAME if opcode.name == "GLOBAL" else _VALUE
    stack += [_MARK if each is pickletools.markobject else made for each in opcode.stack_after]


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
        with contextlib.suppress(OSError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error):
            return _imports(path)
    return []


def _imports(path: Path) -> list[str]:
    """List the names that the file's pickles import, by parsing them."""
    names: dict[str, None] = {}
    strings: list[str] = []
    memo: list[str] = []
    with path.open("rb") as file:
        pickled = _pickled_bytes(file)
    for opcode, argument in _instructions(io.BytesIO(pickled)):
        if opcode == "STACK_GLOBAL":
            names[".".join(text[-_LONGEST_TOLD:] for text in strings[-2:])] = None
        elif opcode in ("GLOBAL", "INST"):
            names[str(argument).replace(" ", ".")] = None
        elif isinstance(argument, str):
            strings.append(argument)
        elif opcode == "MEMOIZE":
            memo += strings[-1:] or [""]
        elif opcode.endswith("GET") and argument < len(memo):
            strings.append(memo[argument])
    return list(names)


def _instructions(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield the instructions of pickles that stand in a row, up to what is none."""
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                yield opcode.name, argument
    except ValueError:  # the end of the file, or bytes that are no instruction
        return


def _pickled_bytes(file: BinaryIO) -> bytes:
    """Return the pickles of a torch file; of the legacy format the tensors' first bytes, too."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return file.read(_MOST_PICKLED)
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return b"".join(archive.open(name).read(_MOST_PICKLED) for name in names)
