"""Schedules: the published ones, and shorter ones in the same proportions."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from conftest import Compose

from sskd import CONF
from sskd.methods import METHODS, Phase
from sskd.schedule import PhaseSettings, Schedule
from sskd.training.phase_settings import departures_note, departures_of, passes_of, phase_schedule


def published(composed: Compose, *overrides: str) -> tuple[Schedule, Schedule]:
    """Return the schedules of SSKD's student and of its head phase."""
    config = composed("method=sskd", *overrides)
    unused: dict[str, Any] = {"trains": None, "loss": None, "weights": {}}
    head = Phase("ss_head", schedule=config.method.ss_head, **unused)
    return phase_schedule(Phase("distill", **unused), config), phase_schedule(head, config)


def test_the_published_schedule_is_the_default(composed: Compose) -> None:
    student, head = published(composed)
    rates = [student.lr_at(epoch) for epoch in range(student.epochs)]
    expected = [0.05] * 150 + [0.005] * 30 + [0.0005] * 30 + [0.00005] * 30
    assert rates == pytest.approx(expected)
    rates = [head.lr_at(epoch) for epoch in range(head.epochs)]
    assert rates == pytest.approx([0.05] * 30 + [0.005] * 15 + [0.0005] * 15)


def test_the_short_schedule_is_a_tenth_of_it(composed: Compose) -> None:
    student, head = published(composed, "schedule=short")
    rates = [student.lr_at(epoch) for epoch in range(student.epochs)]
    assert rates == pytest.approx([0.05] * 15 + [0.005] * 3 + [0.0005] * 3 + [0.00005] * 3)
    assert head.epochs == 6
    assert [head.lr_at(epoch) for epoch in (2, 3, 5)] == pytest.approx([0.05, 0.005, 0.0005])


def test_a_phase_has_at_least_one_epoch() -> None:
    run = Schedule.from_shares(1, 0.01, [0.5], 0.1)
    phase = run.phase(PhaseSettings(lr=None, epochs=0.125, milestones=[]))
    assert (phase.epochs, phase.lr, phase.lr_at(0)) == (1, 0.01, 0.01)


def test_the_architecture_decides_the_learning_rate(composed: Compose) -> None:
    slow = {"MobileNetV2", "ShuffleV1", "ShuffleV2"}
    for student in ("resnet8x4", "vgg8", "wrn_40_1", *sorted(slow)):
        lr = composed(f"arch@student={student}").optimizer.lr
        assert lr == (0.01 if student in slow else 0.05)
    assert composed("pair=vgg13-MobileNetV2", "optimizer.lr=0.2").optimizer.lr == 0.2


@pytest.mark.parametrize("copies", [(), ("augmentation=weak_and_strong",)])
def test_the_sweeps_over_budgets_have_equal_passes(
    composed: Compose, copies: tuple[str, ...]
) -> None:
    """The files say that half of the epochs have the same passes with strong copies."""
    for name in ("budget", "budget_views"):
        text = (CONF.parent / "sweeps" / f"{name}.yaml").read_text()
        params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
        for method in params["method"].split(","):
            passes = []
            for epochs in map(int, params["schedule.epochs"].split(",")):
                halved = epochs // 2 if copies else epochs
                config = composed(f"method={method}", f"schedule.epochs={halved}", *copies)
                unused: dict[str, Any] = {"trains": None, "loss": None, "weights": {}}
                phase = Phase("distill", views=METHODS[method].views, **unused)
                passes.append(passes_of(phase, config))
            assert passes == [240, 480, 960], (name, method)


def test_a_phase_names_what_it_replaces(composed: Compose) -> None:
    config = composed("method=mlld", "pair=resnet32x4-ShuffleV1")
    unused: dict[str, Any] = {"trains": None, "loss": None, "weights": {}}
    assert departures_note(Phase("distill", **unused), config) == ""
    own = Phase("distill", schedule=config.method.distill, optimizer={"nesterov": True}, **unused)
    # LS's authors train ShuffleNets for 960 epochs; the learning rate is that of the network.
    assert departures_of(own, config) == {
        "optimizer.nesterov": True,
        "schedule.epochs": 960,
        "schedule.milestones": [0.15625, 0.1875, 0.21875],
    }
    config = composed("method=mlld", "pair=wrn_40_2-wrn_16_2")
    own = Phase("distill", schedule=config.method.distill, **unused)
    assert departures_note(own, config) == (
        ", with schedule.epochs=480 instead of 240, optimizer.lr=0.025 instead of 0.05, "
        "schedule.milestones=[0.3125, 0.375, 0.4375] instead of [0.625, 0.75, 0.875]"
    )
