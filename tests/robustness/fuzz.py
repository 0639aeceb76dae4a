"""Damage files of every kind that the suite reads, at random; each must be read or refused.

    python tests/robustness/fuzz.py --minutes 10

Valid files (checkpoints in each layout, and the JSON and YAML of a run) are changed at random and
read, in processes with a limit on their memory and on the time that each file takes. A finding is
an exception that does not refuse the file, a crash, a hang, or a sign that code was run: a process,
a connection, an unexpected import, a file written elsewhere. The file and the reason of each
finding are kept in ``--findings``; the exit status is then 1. The last line is a row of a table.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT),
    *(str(ROOT / f"tests{folder}") for folder in ("", "/report", "/robustness")),
]
SECONDS_A_FILE, SECONDS_A_PROCESS = 10, 25.0
MEMORY = 12 << 30  # addresses, not pages: torch alone takes several GiB of them
READ, REFUSED = "read", "refused"
# Python's audit events that no reader may cause.
FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.spawn", "os.posix_spawn", "os.kill", "os.putenv"),
    *("subprocess.", "socket.", "ctypes.dlopen", "pickle.find_class", "urllib."),
)
LAZY = ("torch", "numpy", "omegaconf", "encodings")  # import their submodules at first use


def write_valid_files(folder: Path) -> dict[str, bytes]:
    """Write one valid file of each kind into ``folder``; return the contents by name."""
    import numpy as np
    import torch
    from report_runs import put_run, put_status
    from safetensors.torch import save_file

    from sskd.models import build_model
    from sskd.runs.checkpoint_file import save_checkpoint

    state = {f"module.{k}": v for k, v in build_model("resnet8", 2).state_dict().items()}
    small = {"conv1.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2).half()}
    facts = {"opt": argparse.Namespace(a=[1]), "acc": np.float32(7), "epoch": torch.tensor([3])}
    torch.save({"model": state}, folder / "network.pth")
    torch.save({"state_dict": small, **facts}, folder / "facts.pth")
    old: dict[str, Any] = {"_use_new_zipfile_serialization": False}
    torch.save({"model": small, **facts}, folder / "legacy.pth", **old)
    both = {"student": small, "model_ema": dict(small), "args": "a" * 20_000}
    torch.save(both, folder / "both.pth")
    save_file(small, folder / "net.safetensors", metadata={"about": '{"epoch": 3, "acc": "7.5"}'})
    save_checkpoint(folder / "last.pt", {"stage": "distill", "lines": 2, "model": small})
    put_status(put_run(folder, "run", [10.0, 20.0]), "failed", error="it broke")
    (folder / "run/config.yaml").write_text(json.dumps({"dataset": {"name": "a"}, "seed": 0}))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read(path: Path) -> str:
    """Let its readers read the file; return ``READ`` or ``REFUSED``; other errors are findings."""
    from sskd.errors import CorruptFileError, UserError
    from sskd.models import read_checkpoint
    from sskd.runs.checkpoint_file import load_checkpoint
    from sskd.runs.comparison import explain_difference
    from sskd.runs.folder import read_config_file, read_result
    from sskd.runs.result import RunResult

    try:
        if path.name == "last.pt":
            load_checkpoint(path)
        elif path.suffix in (".pth", ".safetensors"):
            read_checkpoint(path)
        elif path.name == "config.yaml":
            explain_difference(read_config_file(path), {"seed": 0})
        else:
            read_report_of(path)
            read_result(path.parent, RunResult)
    except (UserError, CorruptFileError) as error:
        if not str(error).isprintable():
            raise AssertionError("a refusal of several lines") from error
        return REFUSED
    return READ


def read_report_of(path: Path) -> None:
    """Read a run's folder as the report does, and make the tables."""
    from sskd.report.metrics import read_metrics
    from sskd.report.render import render_text
    from sskd.report.report import read_report
    from sskd.runs.status import failed_in_this_sweep

    warnings: list[str] = []
    report = read_report(path.parent.parent, warnings.append)
    read_metrics(path.parent, warnings.append)
    assert report.csv()
    assert all(render_text(table, 80) for table in report.tables("best"))
    assert len(warnings) <= 2, "more than one warning for each file"
    failed_in_this_sweep(path.parent)


class Guard:
    """Records forbidden audit events."""

    def __init__(self, folder: str) -> None:
        self.events: list[str] = []
        self.folder = folder
        homes = [str(sys.modules[name].__file__) for name in ("os", *LAZY) if name in sys.modules]
        self.code = ("<frozen", *(str(Path(home).parent) for home in homes))
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN) or self.is_foreign(event, *arguments):
            self.events.append(f"{event} {arguments!r}"[:200])

    def is_foreign(self, event: str, first: Any = None, second: Any = None, *_: object) -> bool:
        if event == "import":
            return first not in sys.modules and not first.startswith(LAZY)
        if event in ("compile", "exec"):
            known = str(getattr(first, "co_filename", second)).startswith(self.code)
            return not known and not importing()  # the import itself is recorded
        writes = event == "open" and isinstance(first, str) and set(str(second)) & set("wax+")
        changes = event in ("os.remove", "os.rename", "os.mkdir", "os.chmod", "shutil.rmtree")
        return bool(writes or changes) and not str(first).startswith(self.folder)


def importing() -> bool:
    """Return whether an import is on the call stack."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
    return False


def child(place: str, seed: int, seconds: float, findings: Path) -> None:
    """Read corrupt files for ``seconds``; print the counts of ``READ`` and ``REFUSED`` as JSON."""
    folder, chance = Path(place), random.Random(seed)
    tempfile.tempdir = place  # torch makes a folder there for files of one old layout
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from damage import change_file

    files = write_valid_files(folder)
    for name in files:  # also imports what is imported at first use
        assert read(folder / name) == READ, name
    guard = Guard(place)
    compile("1", "<foreign>", "eval")
    assert guard.events, "the guard records nothing"
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        name = chance.choice(list(files))
        data = change_file(name, files[name], chance)
        (folder / name).write_bytes(data)
        (folder / "current").write_text(name)
        guard.events.clear()
        faulthandler.dump_traceback_later(SECONDS_A_FILE, exit=True)
        reasons: list[str] = []
        try:
            counts[read(folder / name)] += 1
        except BaseException as error:
            reasons = [*guard.events, *traceback.format_exception(error)]
        faulthandler.cancel_dump_traceback_later()
        if reasons := reasons or list(guard.events):
            keep(findings, name, data, "\n".join(reasons))
        (folder / name).write_bytes(files[name])
    print(json.dumps(counts))


def keep(findings: Path, name: str, data: bytes, reason: str) -> None:
    """Save the file and the reason of a finding."""
    number = len(list(findings.glob("*.txt")))
    (findings / f"{number:03d}-{Path(name).name}").write_bytes(data)
    (findings / f"{number:03d}.txt").write_text(f"{name}\n{reason}\n", errors="replace")


def try_files(seed: int, seconds: float, findings: Path) -> Counter[str]:
    """Run one process on random files; its crash or hang is a finding."""
    with tempfile.TemporaryDirectory() as place:
        words = ["--child", place, "--seed", str(seed), "--seconds", str(seconds)]
        command = [sys.executable, __file__, *words, "--findings", str(findings)]
        try:
            limit = seconds + SECONDS_A_FILE + 120
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
            if done.returncode == 0:
                return Counter(json.loads(done.stdout.splitlines()[-1]))
            reason = f"ended with status {done.returncode}:\n{done.stderr}"
        except subprocess.TimeoutExpired:
            reason = "hung"
        current = Path(place, "current")
        name = current.read_text() if current.exists() else "current"
        keep(findings, name, Path(place, name).read_bytes() if name != "current" else b"", reason)
        return Counter()


def try_for(minutes: float, seed: int, findings: Path) -> int:
    """Read corrupt files until the time is up; return 1 if there is a finding."""
    findings.mkdir(parents=True)  # it must not hold the findings of an earlier run
    started, counts, found = time.monotonic(), Counter[str](), 0
    while (left := 60 * minutes - (time.monotonic() - started)) > 0:
        counts += try_files(seed, min(SECONDS_A_PROCESS, left), findings)
        seed, found = seed + 1, len(list(findings.glob("*.txt")))
        rate = counts.total() / (time.monotonic() - started)
        done = f"{counts.total()} files, {rate:.0f} a second, {counts[REFUSED]} refused"
        summary = f"{done}, {counts[READ]} read, {found} findings"
        print(f"{summary}, {max(left - SECONDS_A_PROCESS, 0) / 60:.1f} min left", flush=True)
    print(f"| random files | {minutes:g} min | {summary} | {findings if found else 'none'} |")
    return 1 if found else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Read randomly corrupted files.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--findings", type=Path, help="a folder that does not exist yet; default: a temporary one"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    findings = options.findings or Path(tempfile.mkdtemp(prefix="fuzz-"), "findings")
    if options.child:
        child(options.child, options.seed, options.seconds, findings)
    else:
        sys.exit(try_for(options.minutes, options.seed, findings))
