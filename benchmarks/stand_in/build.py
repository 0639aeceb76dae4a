"""Building the stand-in: a shared library from ``source/`` and generated stubs.

The stubs are the symbols of CUDA and its libraries that PyTorch's libraries need and ``source/``
does not define. ``nm`` lists both, so a new version of PyTorch needs no new list.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from sskd.errors import UserError

SOURCE = Path(__file__).parent / "source"
LIBRARY = "libstand_in.so"
DRIVER = "libcuda.so.1"  # what PyTorch loads by this name
HEADERS = {"nvidia/cu13/include": "cuda_runtime_api.h", "nvidia/cudnn/include": "cudnn.h"}

# Symbols of CUDA's libraries. Most have a version such as @libcublas.so.13.
_NEEDED = re.compile(r"@lib(?:cu|nv)|^(?:cu[A-Z]|cusparseLt|nccl|nvshmem)")
# Functions that write a new handle to their first argument, and those that give one a stream.
_CREATES = re.compile(r"^(?:cublas|cudnn|cusparse|cusolver|nvrtc)\w*Create")
_SETS_STREAM = re.compile(r"^(?:cublas|cudnn|cusparse|cusolver)\w*SetStream")
# Functions that start kernels: those of the libraries that compute, except for preparations.
_COMPUTES = re.compile(r"^(?:cublas|cudnn|cusparse|cusolver|cufft\w*Exec)")
_PREPARES = re.compile(
    r"Create|Destroy|Set|Get|Init|Heuristic|AlgoCheck|Finalize|Query|Find|Restore"
    r"|(?i:buffer_?size)|_preprocess|_analysis"
)


def built() -> Path:
    """Return the folder that holds the library; build it if there is none for these sources.

    Raises:
        UserError: PyTorch is built without CUDA, a program or a header is missing, or the compiler
            refuses the sources.
    """
    folder = _own_folder() / _key()
    if not (folder / LIBRARY).exists():
        check_requirements()
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _move(_build(Path(temporary)), folder)
    return folder


def check_requirements() -> None:
    """Raise UserError if this machine lacks what the build needs."""
    if not (_torch_folder() / "lib" / "libtorch_cuda.so").exists():
        raise UserError(
            "the stand-in GPU needs a PyTorch that is built with CUDA, and this one is not; "
            "install torch from the default index of PyPI, on Linux"
        )
    for program in ("g++", "nm"):
        if shutil.which(program) is None:
            raise UserError(f"the stand-in GPU needs {program}; install it: apt-get install g++")
    packages = _torch_folder().parent
    for folder, header in HEADERS.items():
        if not (packages / folder / header).exists():
            raise UserError(
                f"the stand-in GPU needs {folder}/{header}, which PyTorch for CUDA 13 installs in "
                f"{packages}; install torch from the default index of PyPI"
            )


def _torch_folder() -> Path:
    spec = find_spec("torch")  # an import takes seconds
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0] if locations else "")


def _own_folder() -> Path:
    """Return a folder in which nobody else can place a library that this user then loads."""
    folder = Path(tempfile.gettempdir(), f"sskd-stand-in-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{folder}: others can write to it; remove it, or set TMPDIR")
    return folder


def _key() -> str:
    digest = hashlib.sha256(version("torch").encode())
    for path in (Path(__file__), *sorted(SOURCE.rglob("*"))):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(temporary: Path) -> Path:
    """Build the library in ``temporary`` and return the folder that holds it."""
    out = temporary / "out"
    out.mkdir()
    packages = _torch_folder().parent
    folders = [SOURCE, *(packages / folder for folder in HEADERS)]
    compiler = ["g++", "-std=c++17", "-O1", "-fPIC", "-w", *(f"-I{folder}" for folder in folders)]
    objects = []
    for path in sorted(SOURCE.glob("*.cc")):
        objects.append(str(temporary / f"{path.stem}.o"))
        _run([*compiler, "-c", str(path), "-o", objects[-1]])
    stubs = temporary / "stubs.cc"
    stubs.write_text(stubs_of(_needed() - _symbols(objects, "--defined-only")))
    _run([*compiler, "-shared", str(stubs), *objects, "-o", str(out / LIBRARY), "-ldl"])
    (out / DRIVER).symlink_to(LIBRARY)
    return out


def _move(out: Path, folder: Path) -> None:
    try:
        out.rename(folder)
    except OSError:  # another process was faster
        if not (folder / LIBRARY).exists():
            raise


def _needed() -> set[str]:
    """Return the names of the symbols of CUDA's libraries that PyTorch's libraries need."""
    libraries = map(str, sorted((_torch_folder() / "lib").glob("*.so")))
    symbols = _symbols(libraries, "-D", "--undefined-only")
    return {symbol.partition("@")[0] for symbol in symbols if _NEEDED.search(symbol)}


def _symbols(paths: Iterable[str], *which: str) -> set[str]:
    listed = _run(["nm", "--format=posix", *which, *paths])
    return {line.split()[0] for line in listed.splitlines() if line and not line.endswith(":")}


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise UserError(f"the stand-in GPU cannot be built: {command[0]}: {first.strip()}")
    return done.stdout


def stubs_of(names: Iterable[str]) -> str:
    """Return C++ that defines a function for each of ``names``."""
    lines = ['#include "libraries.h"', "using namespace stand_in;", 'extern "C" {']
    return "\n".join([*lines, *map(_stub, sorted(names)), "}", ""])


def _stub(name: str) -> str:
    """Return the definition of a function that succeeds.

    The caller passes more arguments than the stub declares, which C's calling convention allows.
    """
    if _SETS_STREAM.match(name):
        arguments, body = "void *handle, CUstream_st *stream", "set_stream(handle, stream);"
    elif _CREATES.match(name):
        arguments, body = "void **handle", "*handle = new_handle();"
    elif _COMPUTES.match(name) and not _PREPARES.search(name):
        return f'int {name}(void *handle) {{ return library_call("{name}", handle); }}'
    else:
        arguments, body = "", ""
    return f"int {name}({arguments}) {{ {body} return 0; }}"
