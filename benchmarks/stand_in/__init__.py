"""A GPU without a card: PyTorch's host code runs, kernels are counted and not executed.

    python -m benchmarks.stand_in SCRIPT ARGUMENTS...
    python -m benchmarks.stand_in -m MODULE ARGUMENTS...

Each call of CUDA, cuDNN and cuBLAS succeeds, and the memory of the device is memory of the host.
So a machine without a GPU shows how many kernels a training step launches, how often the host
waits, and whether the step can be captured as a graph: a call that CUDA forbids during a capture
raises the same error, with the name of the function. In such a process::

    reset()
    step()
    print(counts(), kernels())

``torch.cuda.set_sync_debug_mode("error")`` raises where a step waits, as on a card.

The contents of tensors are arbitrary, because no kernel writes them. So a step runs, and a whole
run does not: its losses are not finite. The host code is that for an H100 (capability 9.0, with
bf16). A library call counts as one, although cuDNN and cuBLAS may start several kernels. Kernels
that are compiled while the program runs (NVRTC, Triton, ``torch.compile``) and linear algebra
(cuSOLVER) are not supported.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What the host asked of the device since ``reset``.

    ``launches`` are kernels, and replays of graphs. ``library_calls`` are the calls of cuBLAS,
    cuDNN and others that compute. ``syncs`` are calls by which the host waits. ``illegal`` are
    calls that CUDA refuses during a capture. ``outside`` is work that is queued during a capture on
    a stream that is not captured, so that the graph lacks it.
    """

    launches: int
    library_calls: int
    syncs: int
    device_to_host: int
    host_to_device: int
    device_to_device: int
    memsets: int
    mallocs: int
    illegal: int
    outside: int


def is_active() -> bool:
    """Return whether this process runs on the stand-in."""
    return hasattr(ctypes.CDLL(None), "stand_in_counts")


def reset() -> None:
    """Set all counters to zero and forget the kernels."""
    ctypes.CDLL(None).stand_in_reset()


def counts() -> Counts:
    """Return the counters."""
    library = ctypes.CDLL(None)
    library.stand_in_names.restype = ctypes.c_char_p
    names = library.stand_in_names().decode().split()
    values = (ctypes.c_long * len(names))()
    library.stand_in_counts(values)
    return Counts(**dict(zip(names, values, strict=True)))


def kernels() -> dict[str, int]:
    """Return how often each kernel and each function of a library was launched.

    The names are those of C++ if ``c++filt`` is installed, and mangled otherwise.
    """
    library = ctypes.CDLL(None)
    library.stand_in_kernels.restype = ctypes.c_char_p
    text = library.stand_in_kernels().decode()
    if program := shutil.which("c++filt"):
        done = subprocess.run(
            [program, "-p"], input=text, capture_output=True, text=True, check=True
        )
        text = done.stdout
    found: dict[str, int] = {}
    for line in text.splitlines():
        count, _, name = line.partition(" ")
        found[name] = found.get(name, 0) + int(count)
    return found
