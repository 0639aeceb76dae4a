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

# Symbols of CUDA's libraries: some have a version such as @libcublas.so.13.
_NEEDED = re.compile(r"@lib(?:cu|nv)|^(?:cu[A-Z]|cuFile|nccl|nvshmem|cusparseLt)")
# Functions that write a new handle to their first argument, and those that give one a stream.
_CREATES = re.compile(r"^(?!cufft|cuda|cu[A-Z])\w*Create")
_SETS_STREAM = re.compile(r"^cu(?:blas|dnn|sparse|solver)\w*SetStream")
# Functions that start kernels: all of a library that computes but those that only keep its books.
_COMPUTES = re.compile(r"^(?:cublas|cudnn|cusparse|cusolver|cufftXtExec|cufftExec)")
_KEEPS_BOOKS = re.compile(
    r"Create|Destroy|Set|Get|Init|Heuristic|AlgoCheck|Finalize|Query|Find|Restore"
    r"|(?i:buffer_?size)|_preprocess|_analysis|cusparse(?:CsrSet|DnMat|SpMat)"
)


def built() -> Path:
    """Return the folder that holds the library; build it if there is none for these sources.

    Raises:
        UserError: PyTorch is built without CUDA, or the compiler or a header is missing.
    """
    torch_folder = _torch_folder()
    folder = _own_folder() / _key()
    if not (folder / LIBRARY).exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            _build(Path(temporary), torch_folder)
            _move(Path(temporary), folder)
    return folder


def _torch_folder() -> Path:
    spec = find_spec("torch")
    folder = Path(((spec and spec.submodule_search_locations) or [""])[0])
    if not (folder / "lib" / "libtorch_cuda.so").exists():
        raise UserError(
            "the stand-in GPU needs a PyTorch that is built with CUDA; this one has no "
            "libtorch_cuda.so: install torch from the default index of PyPI, on Linux"
        )
    return folder


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


def _move(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary / "out", folder)  # noqa: PTH104
    except OSError:  # another process was faster
        if not (folder / LIBRARY).exists():
            raise


def _build(temporary: Path, torch_folder: Path) -> None:
    out = temporary / "out"
    out.mkdir()
    includes = [str(SOURCE), *map(str, _header_folders(torch_folder.parent))]
    compiler = _program("g++")
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-w", *(f"-I{each}" for each in includes)]
    objects = []
    for path in sorted(SOURCE.glob("*.cc")):
        objects.append(str(temporary / f"{path.stem}.o"))
        _run([*command, "-c", str(path), "-o", objects[-1]])
    stubs = temporary / "stubs.cc"
    stubs.write_text(stubs_of(_needed(torch_folder) - _symbols(objects, "--defined-only")))
    _run([*command, "-shared", str(stubs), *objects, "-o", str(out / LIBRARY), "-ldl"])
    (out / DRIVER).symlink_to(LIBRARY)


def _header_folders(packages: Path) -> list[Path]:
    for folder, header in HEADERS.items():
        if not (packages / folder / header).exists():
            raise UserError(
                f"the stand-in GPU needs {folder}/{header}, which PyTorch for CUDA 13 installs; "
                f"{packages} does not have it: install torch from the default index of PyPI"
            )
    return [packages / folder for folder in HEADERS]


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"the stand-in GPU needs {name}; install it: apt-get install g++")
    return found


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr)
        raise UserError(f"the stand-in GPU cannot be built: {Path(command[0]).name}: {first}")
    return done.stdout


def _symbols(paths: Iterable[str], which: str) -> set[str]:
    listed = _run([_program("nm"), which, *paths])
    return {line.split()[-1] for line in listed.splitlines() if len(line.split()) >= 2}


def _needed(torch_folder: Path) -> set[str]:
    """Return the names of the symbols of CUDA's libraries that PyTorch's libraries need."""
    libraries = map(str, sorted((torch_folder / "lib").glob("*.so")))
    listed = _run([_program("nm"), "-D", "--undefined-only", *libraries])
    symbols = {line.split()[-1] for line in listed.splitlines() if line.startswith(" ")}
    return {symbol.partition("@")[0] for symbol in symbols if _NEEDED.search(symbol)}


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
    elif _COMPUTES.match(name) and not _KEEPS_BOOKS.search(name):
        return f'int {name}(void *handle) {{ return library_call("{name}", handle); }}'
    else:
        arguments, body = "", ""
    return f"int {name}({arguments}) {{ {body} return 0; }}"
