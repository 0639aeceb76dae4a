"""Settings of the C library's allocator that make training on a CPU faster (glibc on Linux)."""

from __future__ import annotations

import contextlib
import ctypes
import functools

# mallopt(3): M_MMAP_MAX, no block outside the heap; M_TRIM_THRESHOLD and M_TOP_PAD, in bytes.
_MALLOC_OPTIONS = {-4: 0, -1: 2**31 - 1, -2: 2**26}
_HEAP = 3 * 2**29  # bytes; below M_TRIM_THRESHOLD, so that the heap keeps them
_LARGE_PAGE = 2**21  # bytes
_MADV_HUGEPAGE = 14  # madvise(2)


@functools.cache
def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for those of the next step.

    By default glibc returns large blocks to the system, which hands them out again filled with
    zeros, page by page: a tenth of a step of SSKD (benchmarks/LOG.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC_OPTIONS.items():
            set_option(option, value)
    ask_for_large_pages()


def trim_heap() -> None:
    """Return the free memory of the heap to the system."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def ask_for_large_pages() -> None:
    """Ask Linux to back the tensor heap with 2 MiB huge pages.

    A step of SSKD or KD then takes some 5 % less time (benchmarks/LOG.md). The system allocates a
    page only when it is used.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        allocate, advise = library.malloc, library.madvise
        allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if block := allocate(_HEAP):
            first = -(-block // _LARGE_PAGE) * _LARGE_PAGE
            advise(first, _HEAP - _LARGE_PAGE, _MADV_HUGEPAGE)
            library.free(block)
