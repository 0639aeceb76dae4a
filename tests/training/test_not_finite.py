"""Values that are not finite: the error names the first such term, and no accuracy is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Compose, random_images
from safetensors.torch import save_file
from torch import Tensor, nn

import sskd.methods.kd
from sskd.data import Images, Loader, Split
from sskd.errors import UserError
from sskd.evaluate.__main__ import main as evaluate
from sskd.methods import METHODS, LossOutput, Method, Phase
from sskd.models import build_model
from sskd.teachers.assembly import assemble
from sskd.train import train
from sskd.training.evaluation import NotFiniteError, predict
from sskd.training.meter import Meter
from sskd.training.not_finite import advise, all_finite, first_non_finite
from sskd.training.step import set_trainable, train_step

NAN, INF = math.nan, math.inf
TINY = (
    "dataset=digits", "dataset.fraction=0.02", "schedule.epochs=1", "batch_size=16",
    "arch@teacher=resnet8", "arch@student=resnet8",
)  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Return the settings of a run of two steps with an untrained teacher."""
    torch.manual_seed(3)
    torch.save(build_model("resnet8", 10).state_dict(), tmp_path / "finite.pth")
    return [*TINY, f"teacher.checkpoint={tmp_path / 'finite.pth'}"]


def step_metrics(**terms: float) -> dict[str, Tensor]:
    """Return the metrics of a step with these ``terms``, each of weight 1."""
    both = {
        f"{kind}/{k}": torch.tensor(v) for kind in ("loss", "weighted") for k, v in terms.items()
    }
    return {"loss": torch.tensor(sum(terms.values())), **both}


STEPS: dict[str, tuple[list[dict[str, float]], str]] = {
    "the second term first": (
        [{"ce": 1, "kd": 1}, {"ce": 1, "kd": NAN}, {"ce": NAN, "kd": NAN}],
        "the term 'kd' is not finite, in step 12",
    ),
    "infinite first": (
        [{"ce": 1, "kd": 1}, {"ce": 1, "kd": 1}, {"ce": INF, "kd": 1}, {"ce": 1, "kd": NAN}],
        "the term 'ce' is not finite, in step 13",
    ),
    "all at once": (
        [{"ce": 1, "kd": 1}, {"ce": NAN, "kd": NAN}],
        "the terms 'ce', 'kd' are not finite, in step 12 (all at once",
    ),
    "two of three": (
        [{"ce": 1, "kd": INF, "at": -INF}],
        "the terms 'kd', 'at' are not finite, in step 11",
    ),
    "finite": ([{"ce": 1, "kd": 1}, {"ce": 2, "kd": 0}], ""),
    "finite terms of an infinite sum": (
        [{"ce": 3e38, "kd": 3e38}],
        "the sum of the terms is not finite, in step 11",
    ),
}


def add(meter: Meter, images: int, **terms: float) -> None:
    meter.add(step_metrics(**terms), images)
    meter.count(images)


@pytest.mark.parametrize("kind", STEPS)
def test_the_error_names_the_first_term_and_step(kind: str) -> None:
    steps, message = STEPS[kind]
    meter = Meter()
    for terms in steps:
        add(meter, 1, **terms)
    found, _ = first_non_finite(meter, meter.read(), 10 + len(steps))
    assert found.startswith(message)
    assert bool(found) == bool(message)


def test_metrics_from_a_checkpoint_count_as_finite() -> None:
    before, meter = Meter(), Meter()
    add(before, 4, ce=1, kd=1)
    meter.load_state_dict(before.state_dict(), torch.device("cpu"))
    assert first_non_finite(meter, meter.read(), 1) == ("", [])
    add(meter, 4, ce=1, kd=1)
    add(meter, 4, ce=1, kd=NAN)
    found = first_non_finite(meter, meter.read(), 3)
    assert found == ("the term 'kd' is not finite, in step 3", ["kd"])


def build(composed: Compose, *words: str) -> tuple[Method, Images, list[Phase]]:
    images = random_images(16, 4)
    networks = ("arch@teacher=resnet8", "arch@student=resnet8")
    method = assemble(composed(*networks, *words), images)
    return method, images, list(method.phases())


def spoil_kd(monkeypatch: pytest.MonkeyPatch, value: float, after: int = 0) -> None:
    """Multiply the term of KD, and so its gradient, by ``value`` after ``after`` steps."""
    original, calls = sskd.methods.kd.kd_loss, 0

    def spoilt(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        nonlocal calls
        calls += 1
        loss = original(student, teacher, temperature)
        return loss * value if calls > after else loss

    monkeypatch.setattr(sskd.methods.kd, "kd_loss", spoilt)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("method", ["kd", "at", "rkd", "vid"])
def test_a_term_of_weight_0_does_not_spoil_the_others(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, method: str, value: float
) -> None:
    built, images, (*_, phase) = build(composed, f"method={method}", "method.weights.kd=0")
    spoil_kd(monkeypatch, value)
    batch = Loader(images.train, images.mean, images.std, batch_size=16).next_batch()
    set_trainable(phase, built)
    optimizer = torch.optim.SGD(phase.trains.parameters(), 0.01)
    found = train_step(phase, optimizer, batch, "fp32")
    assert found["loss"].isfinite()
    assert found["loss/kd"].item() != found["loss/kd"].item() or found["loss/kd"].isinf()
    assert found["weighted/kd"] == 0
    assert all_finite(built.student)


def test_a_term_of_weight_0_is_logged_without_gradient(composed: Compose) -> None:
    _, images, (*_, phase) = build(composed, "method=kd", "method.weights.kd=0")
    batch = Loader(images.train, images.mean, images.std, batch_size=16).next_batch()
    terms, _ = phase.losses(batch)
    assert terms["kd"] > 0
    assert not terms["kd"].requires_grad
    assert terms["ce"].requires_grad


@pytest.mark.parametrize("method", ["vanilla", "kd", "sskd"])
def test_weights_that_are_all_zero_are_refused(composed: Compose, method: str) -> None:
    words = [f"method.weights.{term}=0" for term in METHODS[method].terms]
    with pytest.raises(UserError, match="weights are 0; set one of them above 0"):
        build(composed, f"method={method}", *words)


def test_a_run_ignores_a_term_of_weight_0(
    composed: Compose, monkeypatch: pytest.MonkeyPatch, tiny: list[str]
) -> None:
    spoil_kd(monkeypatch, NAN)
    result = train(composed(*tiny, "method=kd", "method.weights.kd=0"))
    assert result.accuracy is not None
    with pytest.raises(UserError, match=r"epoch 1: the term 'kd' is not finite, in step 1; try"):
        train(composed(*tiny, "method=kd"))


ADVICE: dict[str, tuple[list[str], int, list[str], str]] = {
    "fp32": (
        ["method=kd"], -1, ["kd"],
        "try a smaller optimizer.lr, or a smaller method.weights.kd",
    ),
    "several terms": (["method=kd"], -1, ["ce", "kd"], "try a smaller optimizer.lr"),
    "bf16": (
        ["method=at", "precision=bf16"], -1, ["at"],
        "try a smaller optimizer.lr, or a smaller method.weights.at, or precision=fp32",
    ),
    "without a teacher": (["method=vanilla"], -1, ["ce"], "try a smaller optimizer.lr"),
    "a phase": (["method=ab"], 0, ["ab"], "try a smaller optimizer.lr"),
    "a phase with its own rate": (
        ["method=sskd"], 0, ["contrast"], "try a smaller method.ss_head.lr",
    ),
    "FT's phase": (
        ["method=ft", "precision=bf16"], 0, ["reconstruction"],
        "try a smaller method.paraphraser.lr, or precision=fp32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADVICE)
def test_the_advice_fits_the_run(composed: Compose, kind: str) -> None:
    words, number, terms, message = ADVICE[kind]
    config = composed("arch@teacher=resnet8", "arch@student=resnet8", *words)
    phases = list(assemble(config, random_images(16, 4)).phases())
    assert advise(config, phases[number], terms) == message


@pytest.mark.parametrize(
    ("method", "phase", "term"),
    [("ab", "boundary", "ab"), ("fsp", "flow", "fsp"), ("ft", "paraphraser", "reconstruction"),
     ("sskd", "ss_head", "contrast")],
)  # fmt: skip
def test_a_first_phase_names_its_term(
    composed: Compose,
    monkeypatch: pytest.MonkeyPatch,
    tiny: list[str],
    method: str,
    phase: str,
    term: str,
) -> None:
    kind = METHODS[method]
    original = kind.phases

    def phases(self: Method) -> Iterator[Phase]:
        first, *rest = original(self)

        def spoilt(batch: Any, loss: Callable[..., LossOutput] = first.loss) -> LossOutput:
            terms, metrics = loss(batch)
            return LossOutput({name: value * NAN for name, value in terms.items()}, metrics)

        yield replace(first, loss=spoilt)
        yield from rest

    monkeypatch.setattr(kind, "phases", phases)
    with pytest.raises(
        UserError, match=rf"phase {phase}.*the term '{term}' is not finite, in step 1"
    ):
        train(composed(*tiny, f"method={method}"))


def test_batch_norm_statistics_count_as_weights() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert all_finite(layers)
    statistics = layers[1].running_var
    assert isinstance(statistics, Tensor)
    statistics[2] = INF
    assert not all_finite(layers)


# ---- logits ----


def overflowing(classes: int = 10) -> nn.Module:
    """Return a network of finite weights whose logits are not finite."""
    torch.manual_seed(0)
    network = build_model("resnet8", classes)
    with torch.no_grad():
        network.fc.weight.fill_(3e38)  # type: ignore[union-attr,operator]
        network.fc.bias.fill_(3e38)  # type: ignore[union-attr,operator]
    return network


class Spoilt(nn.Module):
    """Returns logits that are ``value`` for bright images."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        bright = x.mean((1, 2, 3), keepdim=False)[:, None] > 0
        logits = torch.where(bright, self.value, torch.zeros(len(x), 5))
        return type("Features", (), {"logits": logits})


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_error_names_the_first_image(value: float) -> None:
    images = random_images(8, 10)
    bright = [each.float().mean().item() > 0.4 * 255 for each in images.test.images]
    first, others = bright.index(True), sum(bright) - 1
    message = f"the net: the logits of image {first} of 10 .*and those of {others} other images"
    with pytest.raises(NotFiniteError, match=message):
        predict(Spoilt(value), images.test, images, "the net")
    assert predict(Spoilt(1.0), images.test, images).isfinite().all()


@pytest.mark.parametrize(
    ("count", "end"),
    [
        (1, "not finite"),
        (2, "not finite, and those of 1 other image"),
        (3, "not finite, and those of 2 other images"),
        (10, "not finite, and those of 9 other images"),
    ],
)
def test_the_error_counts_the_other_images(count: int, end: str) -> None:
    images = random_images(8, 10)
    pixels = torch.zeros_like(images.test.images)
    pixels[:count] = 255
    test = Split(pixels, images.test.labels)
    with pytest.raises(NotFiniteError, match=rf"image 0 of 10 \(counting from 0\) are {end}$"):
        predict(Spoilt(NAN), test, images)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".th"])
def test_logits_that_are_not_finite_have_no_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    path = tmp_path / f"net{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(overflowing().state_dict(), path)
    assert evaluate([str(path), "dataset=digits"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{path}: resnet8, digits test set: the logits of image 0 of " in err


@pytest.mark.parametrize("words", [[], ["teacher.precompute=true"]])
def test_a_teacher_that_is_not_finite_is_an_error(
    composed: Compose, tmp_path: Path, words: list[str]
) -> None:
    path = tmp_path / "teacher.pth"
    torch.save(overflowing().state_dict(), path)
    config = composed(*TINY, "method=kd", f"teacher.checkpoint={path}", *words)
    with pytest.raises(UserError, match=r"the teacher.* are not finite.*; use another teacher"):
        train(config)
    assert not list((tmp_path / "runs").rglob("distill/**/result.json"))


def test_a_teacher_of_weight_0_must_be_finite_too(composed: Compose, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pth"
    torch.save(overflowing().state_dict(), path)
    words = ["method=kd", "method.weights.kd=0", f"teacher.checkpoint={path}"]
    with pytest.raises(UserError, match=r"the teacher resnet8, test set: the logits of image 0"):
        train(composed(*TINY, *words))
    assert not list((tmp_path / "runs").rglob("result.json"))


def test_metrics_with_other_names_are_refused() -> None:
    meter = Meter()
    meter.add({"a": torch.tensor(1.0)}, 1)
    meter.count(1)
    with pytest.raises(UserError, match="changed from \\['a'\\] to \\['b'\\] between two steps"):
        meter.add({"b": torch.tensor(3.0)}, 1)
    assert meter.read() == {"a": 1.0}


def test_the_advice_names_no_setting_of_another_phase(composed: Compose) -> None:
    """Two phases may have equal schedules; a schedule may come from no setting at all."""
    config = composed("method=sskd")
    schedule = config.method.ss_head
    own = Phase("ss_head", nn.Linear(1, 1), lambda _: LossOutput({}, {}), {}, schedule=schedule)
    assert "a smaller method.ss_head.lr" in advise(config, own)
    copied = replace(own, name="warm", schedule=schedule.model_copy())
    assert "a smaller rate of phase warm" in advise(config, copied)
