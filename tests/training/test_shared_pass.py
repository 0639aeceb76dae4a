"""Jobs that share the teacher's pass train as they do alone; a CPU computes what a graph would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import Compose, random_images
from test_graph import RATES, phases_of, tensors

from sskd.commands.threads import run_in_threads
from sskd.config import Config
from sskd.data import ONE_VIEW, Loader, Views
from sskd.methods import KD, METHODS, Outputs
from sskd.methods.kd import kd_loss
from sskd.training.graph import GraphedStep
from sskd.training.shared_pass import SharedFeatures
from sskd.training.step import WARMUP_STEPS, set_trainable
from sskd.turns import outside_turn

EPOCHS, WHOLE_BATCHES = len(RATES), 5  # and a smaller one
OTHER_VIEW = Views(one_crop=True)  # has the shape of ONE_VIEW


@pytest.fixture
def config(composed: Compose) -> Callable[..., Config]:
    def compose(method: str) -> Config:
        networks = ("arch@teacher=resnet8", "arch@student=resnet8")
        return composed(*networks, f"method={method}", "batch_size=4")

    return compose


class Job:
    """The last phase of a method, trained by a graph that a CPU replaces by its function."""

    def __init__(
        self, config: Config, *, shared: object = None, seed: int = 0, views: Views | None = None
    ) -> None:
        torch.manual_seed(0)
        parts: dict[str, Any] = phases_of(config)[-1]
        if views:
            parts["loader"].views = views
        self.method = parts["method"]
        self.method.shared_teacher = shared
        self._seed, self._config, self._parts = seed, config, parts
        self.passes: list[int] = []
        self.start = threading.Barrier(1)  # of all jobs
        self.method.teacher.register_forward_hook(lambda _, x, *more: self.passes.append(len(x[0])))

    def __call__(self) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        """Train; return the metrics of each epoch, and all tensors at the end."""
        step = GraphedStep(
            **self._parts, precision=self._config.precision, capture=lambda work: work
        )
        with outside_turn():
            self.start.wait()
        torch.manual_seed(0)
        metrics = []
        for epoch in range(EPOCHS):
            set_trainable(step.phase, step.method)
            step.optimizer.param_groups[0]["lr"] = RATES[epoch]
            step.loader.begin_epoch(100 * self._seed + epoch)
            step.meter.reset()
            while step.loader.position < step.loader.steps:
                step.take()
            metrics.append(step.meter.read())
        return metrics, tensors(step)


SHARING = ("kd", "fitnet", "crd", "sskd")


def start_together(jobs: Sequence[Job]) -> None:
    barrier = threading.Barrier(len(jobs))
    for job in jobs:
        job.start = barrier


def test_jobs_that_share_train_as_alone(config: Callable[..., Config]) -> None:
    configs = [config(method) for method in SHARING]
    alone = [Job(each)() for each in configs]
    jobs = [Job(each, shared="one teacher") for each in configs]
    start_together(jobs)
    together = run_in_threads(dict(enumerate(jobs)), len(jobs))
    for (metrics, expected), (found_metrics, found) in zip(alone, together, strict=True):
        assert found_metrics == metrics
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    # SSKD has four views of each image. Each job computes the first steps, the smaller batch of
    # each epoch, and before each of the two captures the features of one batch.
    own = WARMUP_STEPS + EPOCHS + 2
    replayed = EPOCHS * WHOLE_BATCHES - WARMUP_STEPS
    assert len(jobs[-1].passes) == own + replayed
    shared = sum(len(job.passes) for job in jobs[:-1]) - 3 * own
    assert replayed <= shared <= replayed + 4  # a thread may start late


class Mirrored(KD):
    """Compares the predictions for mirrored images too."""

    def feature_terms(self, outputs: Outputs) -> dict[str, torch.Tensor]:
        mirrored = outputs.batch._replace(x=outputs.batch.x.flip(3))
        student, teacher = self.student(mirrored.x).logits, self.teacher_features(mirrored).logits
        return {"kd": kd_loss(student, teacher, self.temperature)}


def test_features_of_other_images_are_computed(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "kd", Mirrored)
    expected, _ = Job(config("kd"))()
    jobs = [Job(config("kd"), shared="one teacher") for _ in range(2)]
    start_together(jobs)
    for metrics, _ in run_in_threads(dict(enumerate(jobs)), 2):
        assert metrics == expected


def test_a_job_that_fails_costs_no_other(config: Callable[..., Config]) -> None:
    expected, _ = Job(config("kd"))()
    jobs = [Job(config("kd"), shared="one teacher") for _ in range(2)]
    start_together(jobs)
    student = jobs[0].method.student

    def fail(*_: object) -> None:
        if len(jobs[0].passes) > WARMUP_STEPS + 1:
            raise RuntimeError("no such thing")

    student.register_forward_hook(fail)
    works: dict[int, Callable[[], object]] = {0: lambda: failed(jobs[0]), 1: jobs[1]}
    error, found = run_in_threads(works, 2)
    assert str(error) == "no such thing"
    assert isinstance(found, tuple)
    assert found[0] == expected


def failed(job: Job) -> RuntimeError:
    with pytest.raises(RuntimeError) as raised:
        job()
    return raised.value


def test_jobs_with_other_batches_share_nothing(config: Callable[..., Config]) -> None:
    jobs = [Job(config("kd"), shared="one teacher", seed=seed) for seed in (0, 1)]
    expected = [Job(config("kd"), seed=seed)() for seed in (0, 1)]
    found = run_in_threads(dict(enumerate(jobs)), 2)
    assert [metrics for metrics, _ in found] == [metrics for metrics, _ in expected]
    assert expected[0][0] != expected[1][0]
    steps = EPOCHS * (WHOLE_BATCHES + 1)
    assert [len(job.passes) for job in jobs] == [steps + 2, steps + 2]


def test_jobs_with_other_views_share_nothing(config: Callable[..., Config]) -> None:
    jobs = [
        Job(config("kd"), shared="one teacher", views=views) for views in (ONE_VIEW, OTHER_VIEW)
    ]
    start_together(jobs)
    run_in_threads(dict(enumerate(jobs)), 2)
    steps = EPOCHS * (WHOLE_BATCHES + 1)
    assert [len(job.passes) for job in jobs] == [steps + 2, steps + 2]


def test_the_latest_batches_of_each_job_are_kept(config: Callable[..., Config]) -> None:
    job = Job(config("kd"))
    features = job.method.teacher(torch.randn(2, 3, 32, 32))
    shared, target = SharedFeatures(), features._replace(logits=torch.zeros_like(features.logits))
    shared.jobs.add(job)
    for batch in range(3):
        features.logits.data.fill_(batch)
        shared.keep(features, batch)
    names = ("logits",)
    assert [shared.copy_to(target, batch, names) for batch in range(3)] == [False, True, True]
    assert target.logits.unique().tolist() == [2.0]
    assert shared.copy_to(target, 1, names)
    assert target.logits.unique().tolist() == [1.0]


def test_a_batch_can_be_seen_before_it_is_drawn() -> None:
    images = random_images(10, 4)
    loader = Loader(images.train, images.mean, images.std, batch_size=4, views=Views(2))
    loader.next_batch()
    seen, drawn = loader.peek(4), loader.next_batch()
    assert all(torch.equal(one, other) for one, other in zip(seen, drawn, strict=True))
    assert not torch.equal(drawn.indices, loader.peek(2).indices)
