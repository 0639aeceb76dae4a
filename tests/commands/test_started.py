"""Commands that the tests start (starting.py) behave as those that Python starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from starting import PIPE, Started, run

ENDS = {
    "at its last line": "print(__name__, sys.argv[1:], os.getcwd(), os.environ['SAID'])",
    "with a status": "print('out'); print('err', file=sys.stderr); sys.exit(75)",
    "with a text": "sys.exit('what is wrong')",
    "with nothing": "sys.exit()",
    "with running threads": (
        "from threading import Timer; Timer(0.1, print, ['late']).start(); print('early')"
    ),
    "with exit functions": "import atexit; atexit.register(print, 'bye'); sys.exit(3)",
    "by SIGTERM": "print('unflushed'); os.kill(os.getpid(), 15)",
    "by SIGKILL": "print('flushed', flush=True); os.kill(os.getpid(), 9)",
    "at once": "print('unflushed'); os._exit(4)",
    "after it has read its input": "print(sys.stdin.read(), sys.stdin.isatty())",
}


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_as_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, unbuffered: str
) -> None:
    monkeypatch.setenv("SAID", "é")
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    words = ("-c", f"import os, sys; {ENDS[end]}", "a b", "")
    own = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, input="text", capture_output=True, text=True
    )
    process = Started(*words, cwd=tmp_path, stdin=PIPE)
    out, err = process.communicate("text", timeout=60)
    assert (process.returncode, out, err) == (own.returncode, own.stdout, own.stderr)


@pytest.mark.parametrize(
    ("code", "last"),
    [("1 / 0", "ZeroDivisionError: "), ("raise KeyboardInterrupt", "KeyboardInterrupt")],
)
def test_an_exception_is_printed_as_by_python(code: str, last: str) -> None:
    own = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = run("-c", code)
    assert found.returncode == own.returncode
    assert found.stderr.startswith("Traceback (most recent call last):\n")
    assert found.stderr.splitlines()[-1] == own.stderr.splitlines()[-1]
    assert last in found.stderr


def test_a_signal_ends_it_as_pythons() -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = Started("-c", code)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert process.poll() is None
        os.kill(process.pid, signum)
        assert process.wait(timeout=60) == -signum
    process.send_signal(signal.SIGTERM)  # to nobody


def test_it_has_torch_and_its_own_main_module(tmp_path: Path) -> None:
    """Else each start would take as long as Python's, and no test would fail."""
    (tmp_path / "said.py").write_text(
        "import sys, neighbour; print(__name__, sys.argv[1:], {'torch', 'wandb'} <= {*sys.modules})"
    )
    (tmp_path / "neighbour.py").write_text("")
    for words in (("said.py",), ("-m", "said")):
        found = run(*words, "x", cwd=tmp_path)
        assert (found.stdout, found.stderr) == ("__main__ ['x'] True\n", "")


def test_its_processes_import_its_main_module(tmp_path: Path) -> None:
    (tmp_path / "said.py").write_text(
        "from multiprocessing import get_context\n"
        "class Made: pass\n"
        "if __name__ == '__main__':\n"
        "    with get_context('spawn').Pool(1) as pool:\n"
        "        print(type(pool.apply(Made)) is not None)\n"
    )
    for words in (("said.py",), ("-m", "said")):
        found = run(*words, cwd=tmp_path, timeout=60)
        assert (found.stdout, found.stderr) == ("True\n", "")


def test_a_missing_module_is_reported_as_by_python() -> None:
    own = subprocess.run([sys.executable, "-m", "nowhere"], capture_output=True, text=True)
    found = run("-m", "nowhere")
    assert (found.returncode, found.stderr) == (own.returncode, own.stderr)


def test_it_runs_the_suite_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "sskd").mkdir()
    (tmp_path / "sskd" / "__init__.py").write_text("print('another')")
    assert run("-c", "import sskd", cwd=tmp_path).stdout == "another\n"
