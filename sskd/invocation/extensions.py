"""Methods, networks and datasets of a user, beside those of the suite.

An extension is a file or a module that registers them in the suite's dicts when it is imported::

    METHODS["dist"] = DIST

The environment variable ``SSKD_EXTENSIONS`` names it, or an entry point of the group
``sskd.extensions`` in the package that holds it. A configuration cannot: an untrusted one
must not run code. The commands import the extensions before they read the configuration.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig

from sskd.errors import UserError
from sskd.files import expanded

VARIABLE = "SSKD_EXTENSIONS"
GROUP = "sskd.extensions"

_SUITE = Path(__file__).resolve().parents[1]

_loaded: list[str] = []
_added: dict[str, list[str]] = {}
_digests: dict[tuple[str, str], str] = {}


class _Table(NamedTuple):
    """One of the suite's dicts: the group of configuration that chooses from it, and its values."""

    group: str
    entries: dict[str, Any]
    is_valid: Callable[[Any], bool]
    expected: str


def load_extensions() -> None:
    """Import each extension that the environment or an installed package names, once a process.

    Raises:
        UserError: one cannot be imported, or registers a name that is taken or a value of a wrong
            type.
    """
    _refuse_setting()
    installed = [entry.module for entry in entry_points(group=GROUP)]
    named = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    for name in [*installed, *named]:
        if name not in _loaded:
            _load(name)
            _loaded.append(name)


def _refuse_setting() -> None:
    """Raise UserError if a configuration sets the variable, which would let it run code."""
    if HydraConfig.initialized() and VARIABLE in (HydraConfig.get().job.env_set or {}):
        raise UserError(
            f"hydra.job.env_set.{VARIABLE}: a configuration cannot load code; set the variable in "
            "the environment of the command"
        )


def extension_names(group: str) -> list[str]:
    """Return the names that the loaded extensions have added to ``group``, such as ``method``."""
    return _added.get(group, [])


def extension_digests(choices: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the SHA-256 of the code of those ``choices`` that an extension has added.

    A choice is a group and a name: ``("method", "dist")`` has the key ``method=dist``. The digest
    is that of the file that defines it, when the extension was imported.
    """
    found = {f"{group}={name}": _digests.get((group, name)) for group, name in choices}
    return {key: digest for key, digest in found.items() if digest is not None}


def _load(name: str) -> None:
    tables = _tables()
    before = [dict(table.entries) for table in tables]
    try:
        module = _import(name)
        for table, entries in zip(tables, before, strict=True):
            _check(name, table, entries)
    except UserError:
        for table, entries in zip(tables, before, strict=True):
            table.entries.clear()
            table.entries.update(entries)
        raise
    for table, entries in zip(tables, before, strict=True):
        added = table.entries.keys() - entries.keys()
        _added.setdefault(table.group, []).extend(added)
        for key in added:
            if files := _sources(table.entries[key], module):
                content = b"".join(path.read_bytes() for path in files)
                _digests[table.group, key] = hashlib.sha256(content).hexdigest()


def _sources(value: Any, module: ModuleType) -> list[Path]:
    """Return the user's files that define ``value``, which the extension ``module`` has added."""
    parts = list(value) if isinstance(value, tuple) else [value]  # the functions of a Reader
    if isinstance(value, partial):
        parts = [value.func, module]  # the arguments are those of the user
    files = {path for part in parts if (path := _source(part))}
    return sorted(files or {path for path in [_source(module)] if path})


def _source(part: Any) -> Path | None:
    """Return the file that defines ``part``; None if that is unknown, or is the suite's."""
    if not (inspect.ismodule(part) or inspect.isclass(part) or inspect.isroutine(part)):
        part = type(part)
    try:
        path = Path(inspect.getsourcefile(part) or inspect.getfile(part)).resolve()
    except (TypeError, OSError):  # it is built in
        return None
    return None if path.is_relative_to(_SUITE) or not path.is_file() else path


def _tables() -> list[_Table]:
    # Importing these takes seconds, which a command without extensions may not need.
    from sskd.data.sources import SOURCES, Reader
    from sskd.methods import METHODS, Method
    from sskd.models import ARCHITECTURES

    def is_method(value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, Method)

    def is_reader(value: Any) -> bool:
        return isinstance(value, Reader)

    return [
        _Table("method", METHODS, is_method, "a subclass of sskd.methods.Method"),
        _Table("arch", ARCHITECTURES, callable, "a function of the number of classes"),
        _Table("dataset", SOURCES, is_reader, "an sskd.data.sources.Reader"),
    ]


def _check(extension: str, table: _Table, before: dict[str, Any]) -> None:
    """Raise UserError unless ``extension`` has only added valid entries to ``table``."""
    for name, value in before.items():
        if table.entries.get(name) is not value:
            raise UserError(f"{extension}: the {table.group} '{name}' exists; choose another name")
    for name in table.entries.keys() - before.keys():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(
                f"{extension}: {table.group} {name!r}: a name has letters, digits and '_', and "
                "begins with a letter"
            )
        if not table.is_valid(table.entries[name]):
            raise UserError(f"{extension}: {table.group} '{name}' should be {table.expected}")


def _import(name: str) -> ModuleType:
    is_file = name.endswith(".py") or os.sep in name
    path = expanded(name).absolute() if is_file else None
    if path and not path.is_file():
        raise UserError(f"{VARIABLE}: {path}: there is no such file")
    try:
        return importlib.import_module(name) if path is None else _run_file(path)
    except (Exception, SystemExit) as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{_place(error, path) or name}: cannot be imported ({cause})") from error


def _run_file(path: Path) -> ModuleType:
    """Import the file ``path``, whose folder need not be on Python's path."""
    spec = importlib.util.spec_from_file_location(f"sskd_extension_{len(_loaded)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _place(error: BaseException, path: Path | None) -> str:
    """Return the file and the line of ``error``: those in ``path``, else those that raised it."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in (__file__, importlib.__file__)
        and not frame.filename.startswith("<frozen")
    ]
    inside = [frame for frame in frames if path and frame.filename == str(path)]
    last = (inside or frames)[-1:]
    return "".join(f"{frame.filename}:{frame.lineno}" for frame in last)
