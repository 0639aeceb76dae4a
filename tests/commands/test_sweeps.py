"""Sweeps: every job composes, only unfinished ones are launched, and failures are reported."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import time
from collections import Counter, defaultdict
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from breaking import outcome
from conftest import Command, Compose
from crashes import CrashError, at_step, crash
from faults import FEW, SMALL
from report_runs import RESULT
from starting import STDOUT, Started

import train_student
import train_teacher
from sskd.commands.sweep import Sweep
from sskd.config import Config
from sskd.report.published import TEACHER_RECIPE, all_published, display_name
from sskd.report.results import as_text, parse_result
from sskd.runs.lock import FolderLock
from sskd.runs.recipe import default_config, diff_from_recipe, teacher_config
from sskd.runs.status import SWEEP_VARIABLE, read_status
from sskd.runs.weightings import RECIPE, name_weighting
from sskd.schedule import Schedule
from sskd.teachers.find import run_location

ROOT = Path(train_student.__file__).resolve().parent
SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml"))
TINY = [*(word for word in SMALL if "epochs" not in word), "schedule.epochs=1"]
WITHOUT_TRAINING = [word for word in TINY if "teacher.train" not in word]


def published(name: str, *tables: str) -> tuple[set[tuple[str, str]], set[tuple[str, str, str]]]:
    """Return the (teacher, student) pairs of published tables, and them with their methods."""
    with resources.files("sskd.report").joinpath(name).open(encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["table"] in tables]
    cells = {(line["teacher"], line["student"], line["row"].lower()) for line in lines}
    distilled = {cell for cell in cells if cell[2] not in ("teacher", "student")}
    return {cell[:2] for cell in cells}, distilled


def published_weights(table: str) -> dict[str, dict[str, float]]:
    """Return the weight of each term of each method in a published table."""
    weights: dict[str, dict[str, float]] = defaultdict(dict)
    with (Path(__file__).parent / "published_weights.csv").open(encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["table"] == table:
                weights[line["method"]][line["term"]] = float(line["weight"])
    return weights


# The sweeps that reproduce published tables: the file of these, and which of them.
TABLES = {
    "similar": ("published.csv", "similar"),
    "cross": ("published.csv", "cross"),
}


def weights_of(configs: list[Config]) -> dict[str, dict[str, float]]:
    """Return the weights that the sweep gives each method: the same on every pair."""
    found: dict[str, dict[str, float]] = {}
    for config in configs:
        if config.teacher:
            weights = config.method.weights.model_dump()
            assert found.setdefault(config.method.name, weights) == weights
    return found


def changes_of(config: Config) -> dict[str, str]:
    """Return what the report sees of a run: its difference from the recipe, its weighting named."""
    own = diff_from_recipe(config).items()
    texts = {key: as_text(value) for key, value in own if key not in TEACHER_RECIPE}
    return name_weighting(config.method.name, RECIPE, texts)


def published_changes(config: Config) -> dict[str, str]:
    """Return the changes of the published ImageNet runs of the method of ``config``."""
    (source,) = all_published("imagenet")
    variant = source.variants[display_name(config.method.name)] if config.teacher else ()
    return dict((*source.setting, *variant))


@pytest.fixture
def composed_jobs(command: Command, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that composes a sweep as its command does, and launches nothing."""

    def jobs_of(name: str, *words: str) -> Sweep:
        found: list[Sweep] = []
        monkeypatch.setattr(Sweep, "launch", lambda self, *_: found.append(self))
        script = train_teacher if name == "teachers" else train_student
        status, _, err = command("-cd", "sweeps", "-cn", name, *words, script=script)
        assert status == 1, err  # none of its jobs has finished
        return found[0]

    return jobs_of


def test_the_grid_is_both_tables() -> None:
    """So its jobs need not be composed again."""
    similar, cross, grid = (
        yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
        for name in ("similar", "cross", "grid")
    )
    pairs = [
        re.split(r",\s*", sweep["hydra"]["sweeper"]["params"].pop("pair").strip())
        for sweep in (similar, cross, grid)
    ]
    assert [sweep.pop("wandb")["tags"] for sweep in (similar, cross, grid)] == [
        ["similar"], ["cross"], ["grid"],
    ]  # fmt: skip
    assert pairs[0] + pairs[1] == pairs[2]
    assert similar == cross == grid


def pairs_of(name: str) -> list[str]:
    """Return the pairs of a sweep's own file; none if it has one pair for all jobs."""
    sweep = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    axes = sweep.get("hydra", {}).get("sweeper", {}).get("params") or {}
    return re.split(r",\s*", axes["pair"].strip()) if "pair" in axes else []


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "grid"])
def test_every_job_of_every_sweep_composes(composed_jobs: Any, name: str) -> None:
    """Of many pairs, the jobs of the first and the last one: all methods are the same on each."""
    own = pairs_of(name)
    assert all((ROOT / f"conf/pair/{pair}.yaml").is_file() for pair in own)
    few = own if len(own) < 4 else [own[0], own[-1]]
    jobs = composed_jobs(name, *([f"pair={','.join(few)}"] if few != own else [])).jobs
    assert len({job.folder for job in jobs}) == len(jobs) > 0
    for job in jobs:
        assert read_status(job.folder).state == "queued"
        assert job.config.wandb.tags in ([name], [])
    configs = [job.config for job in jobs]
    distilled = [(c.teacher.name, c.student.name, c.method.name) for c in configs if c.teacher]
    alone = sorted(c.student.name for c in configs if not c.teacher)
    composed_pairs = {tuple(pair.split("-")) for pair in few}
    if name in TABLES:
        pairs, expected = published(*TABLES[name])
        assert {tuple(pair.split("-")) for pair in own} == pairs
        assert set(distilled) == {cell for cell in expected if cell[:2] in composed_pairs}
        assert len(distilled) == 11 * len(few)
        assert len(expected) == 11 * len(pairs)
        assert alone == sorted({student for _, student in composed_pairs})
        assert not any(diff_from_recipe(config) for config in configs)
        assert weights_of(configs) == published_weights("sskd")
    if name == "teachers":
        pairs, _ = published("published.csv", "similar", "cross")
        assert alone == sorted({network for pair in pairs for network in pair})
        assert len(alone) == 13
    if name.startswith("crd_benchmark"):
        # FSP's figures are of six pairs only, so it has a sweep of its own.
        pairs, expected = published("published_crd_benchmark.csv", "similar", "cross")
        assert len(pairs) == 13
        facts = published_weights("crd_benchmark")
        methods = {"fsp"} if name.endswith("_fsp") else {*facts, "kd"} - {"fsp"}
        cells = {cell for cell in expected if cell[2] in methods}
        assert {tuple(pair.split("-")) for pair in own} == {cell[:2] for cell in cells}
        assert set(distilled) == {cell for cell in cells if cell[:2] in composed_pairs}
        assert {c.teacher.epoch for c in configs if c.teacher} == {"last"}
        assert weights_of(configs) == {method: facts[method] for method in methods}
    if name == "imagenet":
        _, expected = published("published_imagenet.csv", "similar")
        assert {*distilled, ("ResNet34", "ResNet18", "crd+kd")} == expected
        assert alone == ["ResNet18"]
        assert weights_of(configs) == published_weights("imagenet")
        for config in configs:
            schedule = Schedule.from_shares(lr=config.optimizer.lr, **config.schedule.model_dump())
            assert schedule == Schedule(100, 0.1, milestones=(30, 60, 90), gamma=0.1)
            assert (config.batch_size, config.optimizer.weight_decay) == (256, 5e-4)
            assert changes_of(config) == published_changes(config)
            if config.teacher:
                teacher = teacher_config(config)
                assert (teacher.batch_size, teacher.optimizer.lr) == (256, 0.1)
                assert teacher.schedule == config.schedule
    if name == "tiny_imagenet":
        own_changes = {"dataset.size": "64", "schedule.epochs": "50"}
        for config in configs:
            assert changes_of(config) == published_changes(config) | own_changes


def test_crd_with_kd_is_one_job_and_its_row(composed_jobs: Any) -> None:
    (job,) = composed_jobs("imagenet", "method=crd", "weighting=imagenet").jobs
    pair = {"teacher": "ResNet34", "student": "ResNet18", "method": job.config.method.name}
    record = RESULT | pair | {"difference": diff_from_recipe(job.config)}
    run = parse_result(json.dumps(record), job.folder)
    (source,) = all_published("imagenet")
    assert run is not None
    assert source.row_of(run) == "CRD+KD"
    assert source.is_comparable(run.setting)


def test_the_recipe_is_what_hydra_composes(composed: Compose) -> None:
    """Networks swapped into one composition give what composing with them gives."""
    for words in (
        ("pair=vgg13-MobileNetV2", "method=ft"),
        ("pair=resnet110-resnet32", "method=sskd", "dataset=digits"),
        ("arch@teacher=ResNet50", "arch@student=wrn_16_1", "method=ft"),
        ("pair=resnet32x4-ShuffleV1", "method=vanilla"),
    ):
        config = composed(*words, "runs=runs")
        assert default_config(config).model_dump() == config.model_dump(), words


def test_the_command_line_changes_a_sweep(composed_jobs: Any) -> None:
    narrow = composed_jobs("grid", "pair=vgg13-vgg8", "method=kd,sskd", "seed=range(3)").jobs
    found = {(c.config.method.name, c.config.seed) for c in narrow}
    assert found == {(method, seed) for method in ("kd", "sskd") for seed in range(3)}
    assert {c.config.teacher.name for c in narrow} == {"vgg13"}


def states(runs: Path) -> dict[str, str]:
    """Return the state of each run, by the part of its folder's path that names it."""
    return {
        path.parent.parent.name: str(read_status(path.parent).state)
        for path in runs.rglob("status.json")
    }


def test_a_missing_teacher_does_not_stop_the_others(command: Command) -> None:
    status, _, err = command("-m", *WITHOUT_TRAINING, "method=kd,vanilla,at")
    assert status == 1
    assert states(command.runs) == {"kd": "failed", "at": "failed", "resnet8": "finished"}
    listed = [line for line in err.splitlines() if line.startswith("  ")]
    assert len(listed) == 2
    assert all(
        "failed: " in line and "train it with `python train_teacher" in line for line in listed
    )
    (kept,) = command.runs.glob("digits/distill/*/kd/*/status.json")
    assert "UserError" in json.loads(kept.read_text())["traceback"]


def test_a_sweep_resumes_with_unfinished_jobs(command: Command) -> None:
    command("-m", *WITHOUT_TRAINING, "method=kd,vanilla")
    status, out, err = command("-m", *TINY, "method=kd,vanilla")
    assert (status, err) == (0, "")
    assert "2 jobs, 1 already finished" in out
    assert "2 of 2 jobs have finished" in out
    assert set(states(command.runs).values()) == {"finished"}
    status, out, err = command("-m", *TINY, "method=kd,vanilla")
    assert (status, out) == (0, "2 jobs, 2 already finished\n2 of 2 jobs have finished\n")


def test_a_teacher_that_fails_is_tried_once_a_sweep(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        steps = at_step(patch, 1, fail)
        status, _, err = command("-m", *TINY, "method=kd,at")
    assert (status, steps()) == (1, 1)
    assert states(command.runs) == {"resnet14": "failed", "kd": "failed", "at": "failed"}
    (teacher,) = command.runs.glob("digits/scratch/resnet14/*")
    assert f"{teacher}: already failed in this sweep: out of memory" in err
    assert command("-m", *TINY, "method=kd,at")[0] == 0


def test_a_job_of_another_process_is_no_failure(command: Command, composed: Compose) -> None:
    folder, _ = run_location(composed(*TINY, "method=vanilla", f"runs={command.runs}"))
    folder.mkdir(parents=True)
    lock = FolderLock(folder)
    lock.acquire()
    status, out, err = command("-m", *TINY, "method=vanilla,kd")
    assert status == 75
    assert "1 of 2 jobs have finished" in out
    assert f"  {folder}: another process works on it" in err
    assert "error" not in err
    assert not (folder / "status.json").exists()
    lock.release()
    assert command(*TINY, "method=vanilla")[0] == 0


def test_a_failed_job_with_an_old_result_is_unfinished(command: Command) -> None:
    assert command("-m", *TINY, "method=vanilla,kd")[0] == 0
    status, out, err = command("-m", *TINY, "method=vanilla,kd", "force=true", "device=cuda:9")
    assert status == 1
    assert "0 of 2 jobs have finished" in out
    assert err.count(": failed: device=cuda:9: there is no such device") == 2
    assert len(list(command.runs.glob("digits/*/*/**/result.json"))) == 3  # all are where they were


def test_force_starts_again_once_and_then_resumes(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["-m", *TINY, "method=vanilla", "checkpoint_minutes=1e-9"]
    assert command(*words)[0] == 0
    (result,) = command.runs.rglob("result.json")
    before = result.read_bytes()
    launched: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "launch", lambda self, left, *_: launched.extend(left))
        status, out, _ = command(*words, "force=true")
    assert (status, result.read_bytes()) == (1, before)  # no job has started
    assert "0 of 1 job has finished" in out
    queued = read_status(result.parent)
    # A job that was preempted and requeued starts with these words again.
    with monkeypatch.context() as patch:
        patch.setenv(SWEEP_VARIABLE, str(queued.sweep))
        with monkeypatch.context() as crashing:
            at_step(crashing, 3, crash)
            with pytest.raises(CrashError):
                command(*launched[0])
        steps = at_step(patch, 0, crash)
        assert command(*launched[0])[0] == 0
        assert steps() == 3  # of five; the third was not saved
        assert command(*launched[0])[0] == 0
    (old,) = result.parent.parent.glob(".old/*/result.json")
    assert old.read_bytes() == before
    assert result.read_bytes() != before
    assert read_status(result.parent).command == queued.command


def test_the_result_of_another_run_is_kept_and_reported(command: Command) -> None:
    assert command("-m", *TINY, "method=vanilla", "seed=0,1")[0] == 0
    other, corrupt = sorted(command.runs.rglob("result.json"))
    config = other.with_name("config.yaml")
    config.write_text(config.read_text().replace("batch_size: 9", "batch_size: 10"))
    corrupt.write_text("{")
    before = other.read_bytes()
    status, out, err = command("-m", *TINY, "method=vanilla", "seed=0,1")
    assert status == 1
    assert "0 of 2 jobs have finished" in out
    assert f"  {other.parent}: failed: holds a run of another configuration: batch_size" in err
    assert f"  {corrupt.parent}: failed: " in err
    assert "is not a result (" in err
    assert (other.read_bytes(), corrupt.read_text()) == (before, "{")


def test_a_mistake_in_one_job_launches_none(command: Command) -> None:
    status, _, err = command("-m", *TINY, "method=vanilla", "optimizer.lr=0.05,-1")
    assert (status, err.count("\n")) == (1, 1)
    assert "optimizer.lr: should be greater than 0" in err
    assert not list(command.runs.rglob("status.json"))


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_no_jobs_is_refused_at_once(command: Command, size: int) -> None:
    words = ["-m", *TINY, "method=vanilla"]
    assert command(*words)[0] == 0
    (result,) = command.runs.rglob("result.json")
    status, _, err = command(*words, "force=true", f"hydra.sweeper.max_batch_size={size}")
    assert (status, err.count("\n")) == (1, 1)
    assert f"hydra.sweeper.max_batch_size={size}: should be at least 1, or null" in err
    assert result.exists()


@pytest.mark.parametrize(
    ("words", "size"),
    [((), 20), (("hydra.sweeper.max_batch_size=3",), 3), (("hydra/launcher=processes",), None)],
)
def test_jobs_in_one_process_are_launched_in_batches(
    command: Command, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], size: int | None
) -> None:
    """Hydra's launcher keeps the configuration of each job until its batch has ended."""
    if any("launcher" in word for word in words):
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sizes: list[int | None] = []
    monkeypatch.setattr(Sweep, "launch", lambda self, left, size, launcher: sizes.append(size))
    command("-m", *TINY, "method=vanilla", *words)
    assert sizes == [size]


def test_a_student_alone_of_two_pairs_is_one_job(command: Command) -> None:
    words = [word for word in TINY if "arch@teacher" not in word]
    status, out, _ = command("-m", *words, "arch@teacher=resnet14,resnet20", "method=vanilla")
    assert status == 0
    assert "1 of 1 job has finished" in out


def sweep_process(runs: Path, *words: str) -> Started:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = ("train_student.py", "-m", *TINY, *words, f"runs={runs}")
    return Started(*command, env=environment, stderr=STDOUT)


def test_two_processes_share_a_sweep(tmp_path: Path) -> None:
    words = ("method=vanilla,kd,at,sskd,ft", "seed=0,1", *FEW[len(SMALL) :])
    both = [sweep_process(tmp_path / "shared", *words) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    started = Counter(
        line.split(" in ")[1]
        for text in outputs
        for line in text.splitlines()
        if " starts in " in line
    )
    assert set(started.values()) == {1}  # each run, teacher and first phase starts once
    results = list((tmp_path / "shared").rglob("result.json"))
    assert len(results) == len(started) == 10 + 1 + 4  # the jobs, the teacher, the first phases
    assert {process.returncode for process in both} <= {0, 75}


def wait_for_file(process: Started, runs: Path, pattern: str) -> Path:
    """Return the first file that ``pattern`` matches under ``runs``, as soon as there is one."""
    deadline = time.monotonic() + 300
    while not (found := sorted(runs.glob(pattern))):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return found[0]


def test_a_killed_sweep_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    words = ("method=kd,sskd,ft", "checkpoint_minutes=1e-9", *FEW[len(SMALL) :])
    undisturbed = sweep_process(tmp_path / "whole", *words)
    killed = tmp_path / "killed"
    # The teacher, the second student's first phase, and the third student in training.
    for waited_for in (
        "scratch/*/*/last.pt",
        "phases/*/ss_head/*/last.pt",
        "distill/*/ft/*/last.pt",
    ):
        process = sweep_process(killed, *words)
        wait_for_file(process, killed, f"digits/{waited_for}")
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = sweep_process(killed, *words)
    text, _ = last.communicate()
    assert last.returncode == 0, text
    undisturbed.communicate()
    assert undisturbed.returncode == 0
    assert outcome(killed) == outcome(tmp_path / "whole")


def launched_on_two_processes(runs: Path, *words: str) -> Started:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    return sweep_process(runs, "hydra/launcher=processes", "hydra.launcher.n_jobs=2", *words)


def test_processes_train_jobs_at_once_and_report_failures(tmp_path: Path) -> None:
    """The first two jobs need a teacher that diverges: the one that waits does not retry it."""
    runs = tmp_path / "runs"
    process = launched_on_two_processes(
        runs, "teacher.base_lr=1e6,0.05", "optimizer.weight_decay=5e-4,1e12", "method=kd,at"
    )
    text, _ = process.communicate()
    assert process.returncode == 1, text
    found = [read_status(path.parent) for path in runs.rglob("status.json")]
    # The teacher and two students; the other teacher, its four students and two that diverge.
    assert Counter(status.state for status in found) == {"finished": 3, "failed": 7}
    assert len({status.pid for status in found} - {process.pid}) == 2
    assert text.count("train: starts in ") == 2, text  # each teacher once
    assert "2 of 8 jobs have finished" in text
    assert text.count(": failed: phase ") == 2
    assert text.count(": already failed in this sweep: ") == 2 * 3  # at once, and at the end


def test_a_process_that_is_killed_costs_no_job(tmp_path: Path) -> None:
    """The pool ends all its processes then; processes of a pool are real ones."""
    runs, words = tmp_path / "runs", ("method=vanilla", "seed=0,1", "schedule.epochs=10")
    process = launched_on_two_processes(runs, *words)
    folder = wait_for_file(process, runs, "digits/scratch/*/*/last.pt").parent
    pid = read_status(folder).pid
    assert pid
    os.kill(pid, signal.SIGKILL)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert "warning: a process has died: " in text
    assert f"resumes in {folder}, " in text
    assert "2 of 2 jobs have finished" in text
