"""How a test starts a command in a process of its own, at a tenth of the price.

A new Python that imports torch costs 5 to 9 seconds of a core. Here a server, one of each pytest
process, has imported all of it and forks; a start costs about 0.1 seconds::

    done = run("train_student.py", "dataset=digits", "method=vanilla", f"runs={runs}")
    assert done.returncode == 0, done.stderr

    process = Started("-m", "sskd.report", str(runs))     # at work beside the test
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()

The words are those after ``python``: a script, ``-m MODULE`` or ``-c CODE``, and its arguments.
Process id, signals, exit status, standard streams, folder and environment are as of
``subprocess.Popen``, and so are ``wait``, ``poll``, ``communicate`` and the others. Digits have few
test images, as they do in the tests' own process (few_digits.py).

The process is not for what Python itself does at its start and end: which modules a command
imports, a stream that is closed. Such a test starts ``sys.executable``, and says why. The tests of
each command keep one such start, so that the real entry is tested. A test that needs no process at
all is cheaper still: see the fixture ``command`` in conftest.py.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from multiprocessing import forkserver, get_context, reduction
from pathlib import Path
from types import ModuleType
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL

_context = get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])


def forked(target: Any, *arguments: object) -> Any:
    """Start a ``multiprocessing.Process`` in which torch and the suite have been imported."""
    with contextlib.chdir(Path(__file__).parent):  # a server that starts now finds preloaded.py
        forkserver.ensure_running()
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


class Started:
    """A command at work in a process of its own, with the interface of ``subprocess.Popen``."""

    def __init__(
        self,
        *words: str,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        stdin: int = DEVNULL,
        stdout: int = PIPE,
        stderr: int = PIPE,
        start_new_session: bool = False,
    ) -> None:
        self.args = [sys.executable, *words]
        self.stdin: IO[str] | None
        ours, theirs = _streams(stdin, stdout, stderr)
        self.stdin, self.stdout, self.stderr = ours
        environment = dict(os.environ if env is None else env)
        plan = (words, str(cwd), environment, start_new_session)
        self._process = forked(_become, *plan, [_Descriptor(number) for number in theirs])
        for number in set(theirs):
            os.close(number)

    @property
    def pid(self) -> int:
        number = self._process.pid
        assert isinstance(number, int)
        return number

    @property
    def returncode(self) -> int | None:
        """Return the exit status, or minus the signal that ended it; None while it is at work."""
        status: int | None = self._process.exitcode
        return status

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal, if there is anyone to get it."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(
        self, input: str | None = None, timeout: float | None = None
    ) -> tuple[str, str]:
        """Wait for the end; return what was printed, "" for a stream that is no pipe."""
        deadline = None if timeout is None else time.monotonic() + timeout
        readers = [_Reader(stream) for stream in (self.stdout, self.stderr)]
        if self.stdin:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(input or "")
        for reader in readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if deadline is None else max(0, deadline - time.monotonic()))
        out, err = (reader.text for reader in readers)
        return out, err


def run(
    *words: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return its status and what it printed."""
    process = Started(*words, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


class _Reader(threading.Thread):
    """Reads a stream to its end, so that nobody has to wait for its pipe."""

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__(daemon=True)
        self._stream, self.text = stream, ""
        self.start()

    def run(self) -> None:
        if self._stream:
            with self._stream:
                self.text = self._stream.read()


class _Descriptor:
    """A file descriptor that another process gets as a number of its own."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (reduction.DupFd(self._number),)


def _detach(handed: Any) -> int:
    number = handed.detach()
    assert isinstance(number, int)
    return number


def _streams(*asked: int) -> tuple[list[IO[str] | None], list[int]]:
    """Return our ends of the standard streams, None for one that is no pipe, and the process's."""
    ours: list[IO[str] | None] = []
    theirs: list[int] = []
    for place, kind in enumerate(asked):
        end, mine = kind, None
        if kind == PIPE:
            reads, writes = os.pipe()
            mine = open(writes, "w") if place == 0 else open(reads)  # noqa: PTH123, SIM115
            end = reads if place == 0 else writes
        elif kind == DEVNULL:
            end = os.open(os.devnull, os.O_RDWR)
        elif kind == STDOUT:
            end = theirs[1]
        else:
            end = os.dup(kind)
        ours.append(mine)
        theirs.append(end)
    return ours, theirs


def _become(
    words: tuple[str, ...],
    cwd: str,
    environment: dict[str, str],
    new_session: bool,
    streams: list[int],
) -> None:
    """Be the command, in the forked process, from its first line to its exit status."""
    import torch

    if new_session:
        os.setsid()
    _use_streams(streams, unbuffered=bool(environment.get("PYTHONUNBUFFERED")))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job ignores it
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if Path(cwd) != ROOT:
        _forget_the_suite()
    status = _status(words)
    if status == -signal.SIGINT:  # as Python ends: by the signal, so that a shell knows
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def _use_streams(streams: list[int], unbuffered: bool) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for stream in set(streams):
        os.close(stream)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc] # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        before, raw = getattr(sys, name), io.FileIO(number, "w", closefd=False)
        wrapper = io.TextIOWrapper(
            raw if unbuffered else io.BufferedWriter(raw),
            encoding=before.encoding,
            errors=before.errors,
            line_buffering=name == "stderr" or os.isatty(number),
            write_through=unbuffered,
        )
        setattr(sys, name, wrapper)
        setattr(sys, f"__{name}__", wrapper)


def _forget_the_suite() -> None:
    """Let the suite be imported again, from another folder than the tests' own."""
    own = {"sskd", "hydra_plugins", "benchmarks", "conftest", "few_digits", "preloaded"}
    own |= {"train_student", "train_teacher", *(path.stem for path in ROOT.glob("tests/**/*.py"))}
    for name in [name for name in sys.modules if name.partition(".")[0] in own]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != str(ROOT)]


def _status(words: tuple[str, ...]) -> int:
    """Run what the words name, then what Python does at its end; return the exit status."""
    status = 0
    try:
        _execute(*words)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined] # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _execute(first: str, *rest: str) -> None:
    """Run a command's words in a main module of its own, which its own processes ask for too."""
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT / "tests"))]
    main = sys.modules["__main__"] = sys.modules["__mp_main__"] = ModuleType("__main__")
    if first == "-m":
        sys.argv, sys.path[0:0] = ["-m", *rest[1:]], [os.getcwd()]  # noqa: PTH109
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif first == "-c":
        sys.argv, sys.path[0:0] = ["-c", *rest[1:]], [""]
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv, sys.path[0:0] = [first, *rest], [str(Path(first).resolve().parent)]
        main.__file__ = str(Path(first).absolute())
        exec(compile(Path(first).read_bytes(), first, "exec"), main.__dict__)
