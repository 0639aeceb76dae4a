"""Reading the instructions of the pickles in a torch file, without running any of them."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

# A pickle holds names and shapes; the bytes of the tensors are stored outside of it.
MAX_PICKLE_BYTES = 2**24
IMPORTS = ("GLOBAL", "INST")  # instructions whose argument is the name of a class or a function
_CALLS = ("REDUCE", "NEWOBJ")
_MARK, _NAME, _VALUE = "mark", "name", "value"
_MAX_SHOWN = 100  # characters of a name in a message


def read_pickles(file: BinaryIO) -> bytes:
    """Return the pickles of a torch file; in the legacy format, some tensor bytes follow them."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return file.read(MAX_PICKLE_BYTES)
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return b"".join(archive.open(name).read(MAX_PICKLE_BYTES) for name in names)


def imported_names(pickles: bytes) -> list[str]:
    """Return the names of all classes and functions that ``pickles`` import."""
    names: dict[str, None] = {}
    strings: list[str] = []
    memo: list[str] = []
    for opcode, argument in _instructions(io.BytesIO(pickles)):
        if opcode == "STACK_GLOBAL":
            names[".".join(text[-_MAX_SHOWN:] for text in strings[-2:])] = None
        elif opcode in IMPORTS:
            names[str(argument).replace(" ", ".")] = None
        elif isinstance(argument, str):
            strings.append(argument)
        elif opcode == "MEMOIZE":
            memo += strings[-1:] or [""]
        elif opcode.endswith("GET") and argument < len(memo):
            strings.append(memo[argument])
    return list(names)


def _instructions(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield the instructions of consecutive pickles, up to the first byte that is not one."""
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                yield opcode.name, argument
    except ValueError:  # the end of the file, or not an instruction
        return


def calls_a_value(stream: io.BytesIO) -> bool:
    """Return whether the next pickle, which is complete, calls an object that it did not import.

    The function tracks the stack as ``pickletools.dis`` does; no object is built.
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
            _update_stack(stack, opcode)
    return False


def _update_stack(stack: list[str], opcode: pickletools.OpcodeInfo) -> None:
    """Pop the operands of the instruction from ``stack``, and push its results."""
    popped = list(opcode.stack_before)
    if pickletools.markobject in popped:
        while stack and stack.pop() != _MARK:
            pass
        popped = popped[: popped.index(pickletools.markobject)]
    if popped:
        del stack[-len(popped) :]
    pushed = _NAME if opcode.name == "GLOBAL" else _VALUE
    stack += [_MARK if each is pickletools.markobject else pushed for each in opcode.stack_after]
