"""Processes that work on requests, one batch each, and return the results in order."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch.utils.data import DataLoader, Dataset

from sskd.distributed.environment import LOCAL_WORLD_SIZE
from sskd.errors import UserError, one_line
from sskd.turns import outside_turn

MOST_WORKERS = 16
PREFETCH = 2  # batches that each worker makes ahead
_IGNORED = {signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}  # by the processes
# A process that is not forked imports PyTorch first, for seconds. On macOS a fork is not safe.
_START = "fork" if sys.platform == "linux" else None
# Of the errors that PyTorch raises if a process has ended.
_DEATH = re.compile(
    r"(DataLoader worker|Pin memory thread) .*(exited unexpectedly|is killed by signal)"
)
T = TypeVar("T")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    with suppress(AttributeError):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """Return the number of workers, 1 to 16: the cores divided by torchrun's processes here."""
    processes = os.environ.get(LOCAL_WORLD_SIZE, "1")
    share = available_cores() // max(1, int(processes) if processes.isdecimal() else 1)
    return min(MOST_WORKERS, max(1, share))


class _Requests:
    """The requests of the running pass."""

    def __init__(self) -> None:
        self.left: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.left)


class Workers:
    """Processes, ``count`` of them or none, that look up requests in ``work`` one after another.

    ``work[request]`` returns tensors, or the message of a UserError. With a GPU as ``device`` the
    tensors are in pinned memory. The processes start with the first pass, and stay for later ones
    until the object is freed or the program ends. If not ``persistent``, they end with the pass.
    """

    def __init__(
        self,
        work: Dataset[Any],
        count: int,
        device: torch.device,
        *,
        persistent: bool = True,
    ) -> None:
        self._requests, self._count = _Requests(), count
        self._pass: Iterator[Any] | None = None
        self._loader: DataLoader[Any] | None = DataLoader(
            work,
            batch_size=None,  # a request is a whole batch
            sampler=self._requests,
            collate_fn=_unchanged,
            num_workers=count,
            multiprocessing_context=_START if count else None,
            prefetch_factor=PREFETCH if count else None,
            persistent_workers=persistent and count > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # not the global one, which belongs to the run
        )

    def results(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Yield the result of each request, in order; one pass at a time.

        Raises:
            UserError: a result is an error, or a process ended.
        """
        assert self._loader is not None
        self._requests.left = requests
        with self._deaths_reported(), _blocked_signals(), _same_child_handler():
            self._pass = iter(self._loader)
        _open.add(self)
        # Once and last, so that it runs before what PyTorch has registered for the new processes.
        atexit.unregister(_close_all)
        atexit.register(_close_all)
        while self._pass is not None:
            with self._deaths_reported():
                result = _next(self._pass)
            if result is None:
                return
            if isinstance(result, str):
                raise UserError(result)
            yield result

    def close(self) -> None:
        """End the processes."""
        self._loader = self._pass = None

    @contextmanager
    def _deaths_reported(self) -> Iterator[None]:
        """Raise UserError if a process has ended; any other error is a fault of the suite."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            # Otherwise the error would keep the ended pass, and processes that are forked later
            # would try to end its workers.
            traceback.clear_frames(error.__traceback__)
            if self._count == 0 or not _is_death(error):
                raise
            raise UserError(
                f"a process that decodes images ended ({one_line(error)[:200]}); if the memory is "
                "full, set a smaller dataset.workers=N, or 0 for none"
            ) from error


_open: WeakSet[Workers] = WeakSet()


def _close_all() -> None:
    for each in list(_open):
        each.close()


def _next(results: Iterator[T]) -> T | None:
    """Return the next result, while other jobs of this process work; None at the end."""
    with outside_turn():
        return next(results, None)


def _is_death(error: Exception) -> bool:
    """Return whether PyTorch has raised ``error`` because a process ended or cannot be started."""
    if str(error).startswith("Caught "):
        return False  # it was raised in a process, which lives
    if isinstance(error, ConnectionError | EOFError):
        return True  # from the pipe of a process
    if isinstance(error, OSError):
        return error.errno in {errno.ENOMEM, errno.EAGAIN}  # from a fork
    return bool(_DEATH.match(str(error)))


@contextmanager
def _same_child_handler() -> Iterator[None]:
    """Keep the handler of SIGCHLD.

    PyTorch's own raises an error wherever the main thread is, in a backward pass or while a
    checkpoint is written, if a worker is killed. A dead worker is noticed without it,
    because PyTorch checks every few seconds while it waits for a result.
    """
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        # PyTorch sets its handler in the main thread alone, as Python requires.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def _unchanged(result: T) -> T:
    return result


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Block the signals that stop a run, for this thread and the processes that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_IGNORED, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_parent(worker: int) -> None:
    """Ignore the signals that stop a run: it still needs its workers to save its state.

    A worker ends if its parent asks for it (SIGTERM), and within seconds after the end of its
    parent, which PyTorch checks.
    """
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_for_parent, daemon=True).start()
    else:  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
