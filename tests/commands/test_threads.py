"""Jobs in threads of one process: each ends as it does alone, and fails alone; signals stop all."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import outcome
from conftest import Command, SmallTeacher
from crashes import at_step
from faults import SMALL
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from test_tracking import history

import sskd.data.augmenter
import sskd.train
import sskd.turns
from sskd.commands.threads import run_in_threads
from sskd.errors import Interrupted
from sskd.models import build_model
from sskd.runs.status import read_status
from sskd.seeding import OwnGenerators
from sskd.teachers.side_by_side import RememberedForward
from sskd.turns import Turns, outside_turn, pass_turn, shared

THREADS = ("-m", *SMALL, "hydra/launcher=threads", "hydra.launcher.n_jobs=3")


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sskd.turns, "_SHORTEST_TURN", 0.0)


def states(runs: Path) -> list[str]:
    return sorted(str(read_status(path.parent).state) for path in runs.rglob("status.json"))


def test_jobs_stopped_together_end_as_each_does_alone(
    command: Command, monkeypatch: pytest.MonkeyPatch, small_teacher: SmallTeacher, tmp_path: Path
) -> None:
    """CRD draws random numbers in each step; SSKD has a first phase, so its steps are others."""
    # Without noise all classes have the same size, and CRD takes all images of other classes.
    noise = ("dataset.label_noise=0.3", "teacher.label_noise=0")
    jobs = ("method=crd,sskd", "seed=0,1", "schedule.epochs=1", "teacher.epochs=3", *noise)
    with monkeypatch.context() as patch:
        # After the three epochs of the teacher, of five steps each.
        steps = at_step(patch, 17, lambda: os.kill(os.getpid(), signal.SIGTERM))
        status, out, err = command(*THREADS, *jobs)
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM: the state is saved" in err
    assert 17 <= steps() <= 17 + 3
    found = states(command.runs)
    assert "stopped" in found
    assert set(found) <= {"stopped", "queued", "finished"}
    assert out.count("waiting for another job of this process") == 2  # which trains the teacher
    status, _, err = command(*THREADS, *jobs)
    assert (status, err) == (0, "")
    together, command.runs = command.runs, tmp_path / "alone"
    small_teacher.put(command.runs)
    assert command("-m", *SMALL, *jobs)[0] == 0
    assert outcome(together) == outcome(command.runs)


def test_a_job_that_fails_stops_no_other(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no such thing")

    with monkeypatch.context() as patch:
        at_step(patch, 1, fail)  # of the teacher, which the second job then does not try again
        status, out, err = command(*THREADS, "method=kd,at,vanilla", "schedule.epochs=1")
    assert status == 1
    assert states(command.runs) == ["failed", "failed", "failed", "finished"]
    assert "1 of 3 jobs have finished" in out
    assert "#0 Traceback (most recent call last):\n#0 " in err
    assert "#0 error: no such thing\n" in err
    assert "already failed in this sweep: no such thing" in err
    assert "Error executing job" not in err


def test_jobs_share_the_images_and_report_to_runs_of_their_own(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    for module, name in ((sskd.train, "load_images"), (sskd.data.augmenter, "Cropper")):
        original = getattr(module, name)

        def counted(what: Any, *more: Any, original: Any = original, **named: Any) -> Any:
            loaded.append(len(what) if isinstance(what, torch.Tensor) else 0)
            return original(what, *more, **named)

        monkeypatch.setattr(module, name, counted)
    words = ("method=vanilla", "seed=0,1", "schedule.epochs=2", "wandb.mode=offline")
    assert command(*THREADS, *words)[0] == 0
    assert sorted(loaded) == [0, 8, 8, 40]  # 8 are those of the picture
    reported = sorted(command.runs.rglob("*.wandb"))
    assert len(reported) == 2
    for path in reported:
        folder = path.parents[2]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        steps = [step for step in history(path) if step["_step"] > 0]
        assert [step["train/loss"] for step in steps] == [line["loss"] for line in lines]
        assert '"peak_memory_mib": null' in (folder / "result.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs=0: should be 1 or more"),
        (["hydra.launcher.n_jobs=many"], "hydra.launcher.n_jobs='many': should be 1 or more"),
        (["hydra.job.chdir=true"], "use hydra.job.chdir=false, or hydra/launcher=processes"),
    ],
)
def test_a_wrong_setting_launches_nothing(command: Command, words: list[str], message: str) -> None:
    status, out, err = command(*THREADS, "method=vanilla", *words)
    assert status == 1
    assert message in err
    assert "starts in" not in out


@pytest.mark.usefixtures("short_turns")
def test_the_turn_goes_to_whoever_has_waited_longest() -> None:
    order: list[int] = []
    arrived: set[int] = set()

    def job(number: int) -> Callable[[], int]:
        def work() -> int:
            arrived.add(number)
            while len(arrived) < 3:
                pass_turn()
            for _ in range(20):
                pass_turn()
                order.append(number)
            return number

        return work

    assert run_in_threads({n: job(n) for n in range(3)}, 3) == [0, 1, 2]
    together = order[:58]  # until the first one has ended
    assert all(len(set(together[k : k + 3])) == 3 for k in range(len(together) - 2))


@pytest.mark.usefixtures("short_turns")
def test_a_job_keeps_its_random_numbers_and_settings() -> None:
    def job(seed: int) -> Callable[[], list[float]]:
        def work() -> list[float]:
            settings: Any = HydraConfig.instance()
            settings.cfg = OmegaConf.create({"seed": seed})
            torch.manual_seed(seed)
            drawn = []
            for _ in range(20):
                pass_turn()
                drawn.append(torch.rand(()).item())
            assert settings.cfg.seed == seed
            return drawn

        return work

    before, settings = torch.get_rng_state(), HydraConfig.instance().cfg
    found = run_in_threads({n: job(n) for n in range(3)}, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert HydraConfig.instance().cfg is settings
    for seed, drawn in enumerate(found):
        generator = torch.Generator().manual_seed(seed)
        assert drawn == [torch.rand((), generator=generator).item() for _ in range(20)]


class Failing:
    """Global values of a job that cannot be kept or set; ``at`` names what fails."""

    def __init__(self, at: str) -> None:
        self._at = at

    def save(self) -> None:
        if self._at == "save":
            raise RuntimeError(self._at)

    def restore(self) -> None:
        if self._at == "restore":
            raise RuntimeError(self._at)


@pytest.mark.parametrize("at", ["save", "restore"])
def test_a_job_that_fails_in_a_change_ends_its_turn(at: str) -> None:
    turns = Turns(received=lambda: None)
    with pytest.raises(RuntimeError, match=at), turns.job(Failing(at)), outside_turn():
        pass
    other = threading.Thread(target=turns.take, daemon=True)
    other.start()
    other.join(timeout=5)
    assert not other.is_alive()


class State:
    """Stands in for a state of a GPU's generator, which a generator refers to."""

    def __init__(self, value: int = 0) -> None:
        self.value = value


class GpuGenerator:
    def __init__(self, state: State) -> None:
        self.state = state

    def clone_state(self) -> GpuGenerator:
        return GpuGenerator(State(self.state.value))

    def graphsafe_get_state(self) -> GpuGenerator:
        return GpuGenerator(self.state)

    def graphsafe_set_state(self, other: GpuGenerator) -> None:
        self.state = other.state


@pytest.mark.parametrize("used_before", [True, False])
def test_no_two_jobs_share_a_state_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, used_before: bool
) -> None:
    default = GpuGenerator(State(7))
    if used_before:
        monkeypatch.setattr(torch.cuda, "default_generators", (default,))
    outside, *jobs = (OwnGenerators() for _ in range(4))
    seen: list[list[State]] = [[], [], []]
    for turn in range(3):
        for number, own in enumerate(jobs):
            own.restore()
            monkeypatch.setattr(torch.cuda, "default_generators", (default,))
            seen[number].append(default.state)
            if turn == 0:
                default.state.value = number
            own.save()
    assert [[state.value for state in states] for states in seen] == [[0] * 3, [1] * 3, [2] * 3]
    # A graph keeps the state with which it was captured.
    assert all(len(set(map(id, states))) == 1 for states in seen)
    outside.restore()
    assert id(default.state) not in {id(states[0]) for states in seen}


@pytest.fixture
def _interruptible() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(("presses", "error"), [(1, Interrupted), (2, KeyboardInterrupt)])
def test_ctrl_c_once_or_twice(presses: int, error: type[BaseException]) -> None:
    ended = []

    def press() -> None:
        with outside_turn():
            training.wait()
            for _ in range(presses):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)

    def train() -> None:
        try:
            with outside_turn():
                training.wait()
            while sskd.turns.received_signal() is None or presses == 2:
                pass_turn()
        finally:
            ended.append("train")

    training = threading.Barrier(3)
    jobs = {0: train, 1: press, 2: train, 3: lambda: ended.append("never started")}
    with pytest.raises(KeyboardInterrupt) as stop:
        run_in_threads(jobs, 3)
    assert stop.type is error
    assert ended == ["train", "train"]


def test_jobs_share_an_object_while_one_uses_it() -> None:
    made: list[str] = []

    class Large:
        def __init__(self, name: str) -> None:
            made.append(name)

    def use() -> int:
        mine = shared(("images", "a"), lambda: Large("a"))
        with outside_turn():
            both.wait()
        return id(mine)

    both = threading.Barrier(2)
    first, second = run_in_threads({0: use, 1: use}, 2)
    assert first == second
    assert made == ["a"]
    turns = Turns(received=lambda: None)
    with turns.job(OwnGenerators()):
        shared("b", lambda: Large("b"))
        shared("b", lambda: Large("b"))  # nothing refers to the first one any more
    assert shared("b", lambda: Large("b")) is not shared("b", lambda: Large("b"))
    assert made == ["a", *"bbbb"]


def test_a_teacher_computes_the_batch_of_several_jobs_once() -> None:
    """But not for another batch, other outputs or another precision."""
    network = build_model("resnet8", 10).eval()
    passes: list[int] = []
    network.register_forward_hook(lambda *_: passes.append(1))
    forward = RememberedForward()
    first, second, third = (torch.randn(4, 3, 32, 32) for _ in range(3))
    with torch.no_grad():
        for x in (first, first.clone(), second, first, second):
            assert torch.equal(forward(network, x, ["logits"]).logits, network(x).logits)
        assert len(passes) == 5 + 2
        with torch.autocast("cpu", torch.bfloat16):
            assert forward(network, first, ["logits"]).logits.dtype == torch.bfloat16
        forward(network, third, ["logits"])
        forward(network, first, ["logits"])  # two batches later it is forgotten
        assert len(passes) == 7 + 3
        many = torch.randn(65, 3, 32, 32)  # more than a network computes at once
        assert not forward(network, many, ["logits"]).stages
        assert forward(network, many, ["stages"]).stages
