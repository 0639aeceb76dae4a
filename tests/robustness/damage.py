"""Random changes of files, by their bytes or by the parts of their format."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

ODD: list[Any] = [
    *(None, True, -1, 0, 1e308, -0.0, 10**400, float("nan"), float("inf")),
    *("", "\0", "a\nb", "../x", "\ud800", "=1+1", "<b>", [], {}, {"": {}}),
]
LONG = "9" * 5000  # Python converts no number of more than 4300 digits


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """Change, move, repeat or remove some bits or bytes, or cut off the end."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at, other = (chance.randrange(len(changed) + 1) for _ in range(2))
        size = chance.choice((1, 2, 4, 8, 64, 1024))
        taken = changed[other : other + size]
        fill = chance.choice((b"\0", b"\xff", b"[", b"(", b"\n", bytes([chance.randrange(256)])))
        kind = chance.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and chance.random() < 0.3:
            del changed[at:]
        elif kind < 4:
            changed[at : at + size] = (chance.randbytes(size), taken, fill * size)[kind - 1]
        else:
            changed[at : at + size * (kind == 6)] = (taken, taken * 100, b"")[kind - 4]
    return bytes(changed)


def change_value(value: Any, chance: random.Random) -> Any:
    """Return ``value`` with a part of it, anywhere, replaced or under another name."""
    if not isinstance(value, dict | list) or not value or chance.random() < 0.15:
        return [value] * 5000 if chance.random() < 0.02 else chance.choice(ODD)
    key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed = change_value(value[key], chance)
    if isinstance(value, list):
        return [*value[:key], changed, *value[key + 1 :]]
    if chance.random() < 0.2:
        return {**value, chance.choice(("", "a\nb", "=x", "__class__")): changed}
    return {**value, key: changed}


def change_json(data: bytes, chance: random.Random) -> bytes:
    """Change a value in lines of JSON, sometimes to a huge number or a deep nesting."""
    if chance.random() < 0.02:
        return chance.choice((b"[", b'{"a":', b"- ", b"{a: ")) * chance.choice((900, 100_000))
    try:
        lines = [json.loads(data)]
    except ValueError:
        lines = [json.loads(line) for line in data.splitlines()]
    at = chance.randrange(len(lines))
    lines[at] = change_value(lines[at], chance)
    text = "\n".join(map(json.dumps, lines))
    return (text.replace("1", LONG) if chance.random() < 0.01 else text).encode()


def change_archive(data: bytes, chance: random.Random) -> bytes:
    """Change one part of a zip archive, usually the pickle, with checksums that fit."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w") as new:
        names = old.namelist()
        chosen = chance.choice([name for name in names if name.endswith("data.pkl")] * 9 + names)
        for name in names:
            part = old.read(name)
            new.writestr(name, change_bytes(part, chance) if name == chosen else part)
    return changed.getvalue()


def change_header(data: bytes, chance: random.Random) -> bytes:
    """Change the header of a safetensors file, with a length that fits."""
    length = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + length], chance)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def change_file(name: str, data: bytes, chance: random.Random) -> bytes:
    """Return changed content of the file ``name``, half of the time still in its format."""
    if name == "legacy.pth" or chance.random() < 0.5:
        return change_bytes(data, chance)
    by_suffix = {".pth": change_archive, ".pt": change_archive, ".safetensors": change_header}
    return by_suffix.get(Path(name).suffix, change_json)(data, chance)
