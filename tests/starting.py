"""Starting a command in a new process, in a tenth of the usual time.

A new Python process takes 5 to 9 seconds of CPU time to import torch. Here, the pytest processes
share a server that has imported everything and forks, so that a start takes about 0.1 seconds::

    done = run("train_student.py", "dataset=digits", "method=vanilla", f"runs={runs}")
    assert done.returncode == 0, done.stderr

    process = Started("-m", "sskd.report", str(runs))     # runs in the background
    process.send_signal(signal.SIGKILL)
    out, err = process.communicate()

The arguments are those of ``python``: a script, ``-m MODULE`` or ``-c CODE``, and its arguments.
Process id, signals, exit status, standard streams, working directory, environment and methods are
those of ``subprocess.Popen``. The digits have few test images, as in the process of the tests
(few_digits.py).

This does not test what Python itself does at its start and end, such as which modules a command
imports, or a closed stream. Such a test starts ``sys.executable`` instead, and says why. The tests
of each command have one such start, so that its real entry point is tested. A test that needs no
process is cheaper still with the fixture ``command`` (conftest.py).
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
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
from functools import partial
from multiprocessing import current_process, forkserver, get_context, reduction
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
PIPE, STDOUT, DEVNULL = subprocess.PIPE, subprocess.STDOUT, subprocess.DEVNULL

_context = get_context("forkserver")
_context.set_forkserver_preload(["preloaded"])
_server: Any = forkserver._forkserver
_start_server = _server.ensure_running


def share_server(folder: Path) -> None:
    """Let the pytest processes that call this use one server, which the first of them starts.

    Without Linux's ``/proc``, or from Python 3.14 on, which gives a server a key, each has its own.

    Args:
        folder: exists, and is the same for all of these processes.
    """
    if not Path("/proc/self/fd").exists() or hasattr(_server, "_forkserver_authkey"):
        return
    _server.ensure_running = partial(_join_server, folder / "fork_server")


def _join_server(note: Path) -> None:
    """Use the server that ``note`` names, or start one and write its name there."""
    if _server._forkserver_address is not None:
        return
    with FileLock(f"{note}.lock"):
        with contextlib.suppress(OSError):  # there is none, or its last process has ended
            address, pipe = note.read_text().splitlines()
            # The server ends as soon as no process has the pipe open.
            _server._forkserver_alive_fd = os.open(pipe, os.O_WRONLY)
            _server._forkserver_address = address
            return
        # Otherwise its socket would be in a folder that is removed when this process ends.
        current_process()._config["tempdir"] = str(note.parent)  # type: ignore[attr-defined]
        _start_server()
        pipe = f"/proc/{os.getpid()}/fd/{_server._forkserver_alive_fd}"
        note.write_text(f"{_server._forkserver_address}\n{pipe}\n")


def forked(target: Any, *arguments: object) -> Any:
    """Start a ``multiprocessing.Process`` that has already imported torch and the suite."""
    with contextlib.chdir(Path(__file__).parent):  # where the server finds preloaded.py
        _server.ensure_running()
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


class Started:
    """A command that runs in a new process, with the interface of ``subprocess.Popen``."""

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
        parent_ends, child_ends = _streams(stdin, stdout, stderr)
        self.stdin, self.stdout, self.stderr = parent_ends
        environment = dict(os.environ if env is None else env)
        settings = (words, str(cwd), environment, start_new_session)
        descriptors = [_Descriptor(number) for number in child_ends]
        self._process = forked(_run_command, *settings, descriptors)
        for number in set(child_ends):
            os.close(number)

    @property
    def pid(self) -> int:
        number = self._process.pid
        assert isinstance(number, int)
        return number

    @property
    def returncode(self) -> int | None:
        """Return the exit status, or minus the signal that ended it; None while it runs."""
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
        """Send a signal, if the process still runs."""
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
        """Wait for the end; return output and errors, "" for a stream that is not a pipe."""
        deadline = None if timeout is None else time.monotonic() + timeout
        readers = [_Reader(stream) for stream in (self.stdout, self.stderr)]
        if self.stdin:
            with contextlib.suppress(BrokenPipeError), self.stdin:
                self.stdin.write(input or "")
        for reader in readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise self._unended(readers, timeout)
        self.wait(None if deadline is None else max(0, deadline - time.monotonic()))
        out, err = (reader.text for reader in readers)
        return out, err

    def _unended(self, readers: list[_Reader], timeout: float | None) -> TimeoutError:
        """Return the error of a command that has not ended, with the stacks of its threads."""
        status = self.returncode
        self.send_signal(signal.SIGABRT)
        for reader in readers:
            reader.join(5)
        texts = "\n".join(reader.text for reader in readers)
        return TimeoutError(f"after {timeout} s, {self.args} has the status {status}:\n{texts}")


def run(
    *words: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; return its status, output and errors."""
    process = Started(*words, cwd=cwd, env=env)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.wait(), out, err)


class _Reader(threading.Thread):
    """Reads a stream to its end, so that a full pipe blocks no process."""

    def __init__(self, stream: IO[str] | None) -> None:
        super().__init__(daemon=True)
        self._stream, self.text = stream, ""
        self.start()

    def run(self) -> None:
        if self._stream:
            with self._stream:
                for line in self._stream:
                    self.text += line


class _Descriptor:
    """A file descriptor that is duplicated when it is sent to another process."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _detach, (reduction.DupFd(self._number),)


def _detach(duplicate: Any) -> int:
    number = duplicate.detach()
    assert isinstance(number, int)
    return number


def _streams(*kinds: int) -> tuple[list[IO[str] | None], list[int]]:
    """Return both ends of the standard streams.

    The parent's end is None for a stream that is not a pipe; the child's end is a descriptor.
    """
    parent_ends: list[IO[str] | None] = []
    child_ends: list[int] = []
    for index, kind in enumerate(kinds):
        child_end, parent_end = kind, None
        if kind == PIPE:
            reads, writes = os.pipe()
            parent_end = open(writes, "w") if index == 0 else open(reads)  # noqa: PTH123, SIM115
            child_end = reads if index == 0 else writes
        elif kind == DEVNULL:
            child_end = os.open(os.devnull, os.O_RDWR)
        elif kind == STDOUT:
            child_end = child_ends[1]
        else:
            child_end = os.dup(kind)
        parent_ends.append(parent_end)
        child_ends.append(child_end)
    return parent_ends, child_ends


def _run_command(
    words: tuple[str, ...],
    cwd: str,
    environment: dict[str, str],
    new_session: bool,
    streams: list[int],
) -> None:
    """Run the command in the forked process, and end the process with its exit status."""
    import torch

    if new_session:
        os.setsid()
    _use_streams(streams, unbuffered=bool(environment.get("PYTHONUNBUFFERED")))
    faulthandler.enable(file=2)  # of a command that hangs
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a background job of a shell ignores it
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if Path(cwd) != ROOT:
        _unload_suite()
    status = _status(words)
    if status == -signal.SIGINT:  # Python too ends by the signal, so that a shell notices it
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


def _unload_suite() -> None:
    """Unload the modules of the suite, so that they are imported from the working directory."""
    names = {"sskd", "hydra_plugins", "benchmarks", "conftest", "few_digits", "preloaded"}
    names |= {"train_student", "train_teacher", *(path.stem for path in ROOT.glob("tests/**/*.py"))}
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != str(ROOT)]


def _status(words: tuple[str, ...]) -> int:
    """Run the command, then what Python does at its end; return the exit status."""
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
    """Run a command in a new main module, which its own child processes import too."""
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
