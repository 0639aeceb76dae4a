"""The process of a command: its exit status, and one line about the error that ended it.

Importing this takes no time: the commands answer ``--help`` before torch is loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from sskd.commands.advice import refuse_invalid_choices, refuse_missing_keys
from sskd.commands.following import follow, other_ranks
from sskd.commands.hydra_errors import USER_ERRORS, crash_message, user_message
from sskd.distributed.environment import is_distributed, is_follower
from sskd.errors import Interrupted, JobError, UnfinishedError, exit_status
from sskd.invocation import resolvers as resolvers  # registers them
from sskd.invocation.names import rerun_hint, with_packaged_sweeps
from sskd.output import complain, output_status, steady_output

_FULL_ERROR = "HYDRA_FULL_ERROR"


def run_command(main: Callable[[], object]) -> int:
    """Run a Hydra command's ``main`` and return its exit status.

    0: finished; in a sweep, every job. 1: failed; one line says why. 75: nothing is wrong, but
    other processes work on the runs that have not finished. 128 + n: stopped by signal n.
    """
    sys.argv = [sys.argv[0], *with_packaged_sweeps(sys.argv[1:])]
    shows_traceback = os.environ.get(_FULL_ERROR) == "1"
    os.environ[_FULL_ERROR] = "1"  # Hydra then raises, instead of printing several lines
    with steady_output(), _noted_interrupts() as interrupts:
        try:
            if is_follower():
                return follow()
            with other_ranks():
                refuse_missing_keys(sys.argv[1:])
                refuse_invalid_choices(sys.argv[1:])
                main()
        except Interrupted as stop:
            saved = "" if is_distributed() else "the state is saved; "  # or a rank has died
            complain(f"{stop}: {saved}{rerun_hint()} resumes the run")
            return 128 + stop.signum
        except KeyboardInterrupt:
            return _end_interrupted()
        except Exception as error:
            return _end_interrupted() if interrupts else _report(error, shows_traceback)
    return 0


def run_tool(main: Callable[[], int | None]) -> int:
    """Run the ``main`` of a command without Hydra and return its exit status.

    That is what ``main`` returns; 1 after an error, about which one line is printed; 128 + n
    if signal n stopped it, such as 130 after Ctrl-C.
    """
    with steady_output():
        try:
            status = main()
        except USER_ERRORS as error:
            complain(f"error: {user_message(error)}")
            return 1
        except Interrupted as stop:
            complain(str(stop))
            return 128 + stop.signum
        except KeyboardInterrupt:
            complain("\nstopped")
            return 130
        return status or output_status()


def _report(error: Exception, shows_traceback: bool) -> int:
    """Print the line about ``error`` and return its exit status, or raise it again.

    It is raised if the user asked for tracebacks, or if it is a fault of the suite.
    """
    if isinstance(error, UnfinishedError | JobError):  # already reported
        return error.status
    if shows_traceback:
        raise error
    line = user_message(error) if isinstance(error, USER_ERRORS) else crash_message(error)
    if line is None:
        raise error
    complain(f"error: {line}")
    return exit_status(error)


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Yield a list that gets an entry for each SIGINT that raises KeyboardInterrupt.

    A library can turn that exception into an error: if it stops OmegaConf inside of a list, the
    cleanup of OmegaConf raises AttributeError.
    """
    interrupts: list[int] = []
    in_main_thread = threading.current_thread() is threading.main_thread()
    # A background job of a shell ignores SIGINT, and must not handle it.
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return

    def note(signum: int, frame: FrameType | None) -> None:
        interrupts.append(signum)
        signal.default_int_handler(signum, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_interrupted() -> int:
    # W&B might wait for its server, and Python for a job in a thread.
    if {"wandb", "sskd.commands.threads"} & sys.modules.keys():
        _end_at_once(130)
    return 130


def _end_at_once(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
