"""Every number of every setting has two bounds, and what is beyond them is one line."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from conftest import Command, Compose
from hydra import compose, initialize_config_dir

from sskd import CONF
from sskd.config import config_model, parse_config, read_config
from sskd.errors import UserError
from sskd.methods import METHODS
from sskd.optimizers import OPTIMIZERS

FLOAT32 = torch.finfo(torch.float32)
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
DIGITS = "9" * 400


def numbers(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each number of a JSON schema, in lists and unions too, and where it stands."""
    if isinstance(schema, dict):
        if schema.get("type") in ("number", "integer"):
            yield path, schema
        for key, value in schema.items():
            yield from numbers(value, f"{path}.{key}")
    if isinstance(schema, list):
        for value in schema:
            yield from numbers(value, path)


SCHEMAS = {
    (method, optimizer): config_model(
        {"method": {"name": method}, "optimizer": {"name": optimizer}}
    ).model_json_schema()
    for method in METHODS
    for optimizer in OPTIMIZERS
}


@pytest.mark.parametrize("choice", SCHEMAS, ids="-".join)
def test_every_number_has_a_lower_and_an_upper_bound(choice: tuple[str, str]) -> None:
    found = list(numbers(SCHEMAS[choice]))
    assert len(found) > 20
    for path, schema in found:
        lower = [schema[key] for key in LOWER if key in schema]
        upper = [schema[key] for key in UPPER if key in schema]
        assert (len(lower), len(upper)) == (1, 1), path
        most = FLOAT32.max if schema["type"] == "number" else 2**63
        assert -most <= lower[0] < upper[0] <= most, path
        if schema["type"] == "number":  # the product of two still is a number
            assert math.isfinite(torch.tensor(upper[0], dtype=torch.float32).square())


def test_a_number_without_bounds_would_be_noticed() -> None:
    class Loose(config_model({"method": {"name": "kd"}, "optimizer": {"name": "sgd"}})):  # type: ignore[misc]
        share: list[float] | None = None

    loose = [
        path
        for path, schema in numbers(Loose.model_json_schema())
        if not set(schema) & {*LOWER, *UPPER}
    ]
    assert loose == [".properties.share.anyOf.items"]


def test_the_published_settings_are_far_within(composed: Compose) -> None:
    for method in METHODS:
        composed("dataset=digits", f"method={method}", "batch_size=65536")
    composed("schedule.epochs=20000", "method=pkt", "method.weights.pkt=3e7", "optimizer.lr=100")


# Beyond its bound, which the message names: the setting, what chooses it, the value, the bound.
BEYOND: list[tuple[str, str, str, str]] = [
    ("schedule.gamma", "", "1e300", "less than or equal to 10"),
    ("schedule.gamma", "", DIGITS, "less than or equal to 10"),
    ("schedule.epochs", "", DIGITS, "less than or equal to 1000000"),
    ("schedule.epochs", "", "10000000", "less than or equal to 1000000"),
    ("schedule.milestones.0", "", DIGITS, "less than or equal to 1"),
    ("method.temperature", "method=kd", "1e300", "less than or equal to 1000000000000"),
    ("method.temperature", "method=kd", "1e-300", "at least 1e-30"),
    ("method.temperature", "method=sskd", DIGITS, "less than or equal to 1000000000000"),
    ("method.ss_temperature", "method=sskd", "1e39", "less than or equal to 1000000000000"),
    ("method.dimension", "method=crd", "100000000000", "less than or equal to 65536"),
    ("method.dimension", "method=cc", DIGITS, "less than or equal to 65536"),
    ("method.negatives", "method=crd", DIGITS, "less than or equal to 1000000000"),
    ("method.contrast_temperature", "method=crd", "1e300", "less than or equal to 1000000000000"),
    ("method.rate", "method=ft", "100", "less than or equal to 4"),
    ("method.stage", "method=fitnet", DIGITS, "less than or equal to 1000000000"),
    ("method.margin", "method=ab", "1e300", "less than or equal to 1000000000000"),
    ("method.boundary.epochs", "method=ab", "1e300", "less than or equal to 100"),
    ("method.ss_head.lr", "method=sskd", "1e300", "less than or equal to 1000000"),
    ("method.variance", "method=vid", "1e300", "less than or equal to 1000000000000"),
    ("method.distance_weight", "method=rkd", DIGITS, "less than or equal to 1000000000000"),
    ("method.weights.ce", "method=kd", "1e39", "less than or equal to 1000000000000"),
    ("optimizer.lr", "", DIGITS, "less than or equal to 1000000"),
    ("optimizer.lr", "", "1e-45", "at least 1e-30"),
    ("optimizer.weight_decay", "optimizer=adamw", "1e300", "less than or equal to 1000000000000"),
    ("optimizer.momentum", "", DIGITS, "less than 1"),
    ("optimizer.betas.0", "optimizer=adamw", "1", "less than 1"),
    ("batch_size", "", DIGITS, "less than or equal to 1000000000"),
    ("seed", "", DIGITS, "less than 9223372036854775808"),
    ("dataset.seed", "", DIGITS, "less than 9223372036854775808"),
    ("teacher.seed", "", DIGITS, "less than 9223372036854775808"),
    ("teacher.epochs", "", DIGITS, "less than or equal to 1000000"),
    ("teacher.base_lr", "", "1e300", "less than or equal to 1000000"),
    ("dataset.size", "", DIGITS, "less than or equal to 256"),
    ("dataset.mean.0", "", DIGITS, "less than or equal to 1000"),
    ("dataset.std.0", "", "1e300", "less than or equal to 1000000000000"),
    ("dataset.fraction", "", "-" + DIGITS, "greater than 0"),
    ("checkpoint_minutes", "", "1e300", "less than or equal to 1000000000000"),
    ("checkpoint_minutes", "", "1e400", "should be a finite number"),
]  # fmt: skip


def put(values: Any, path: str, value: Any) -> None:
    """Set what ``path`` names in nested ``values``; a list is filled with it."""
    *parents, last = path.split(".")
    for parent in parents[:-1]:
        values = values[parent]
    if last.isdigit():
        length = {"betas": 2, "milestones": 1}.get(parents[-1], 3)
        values[parents[-1]] = [value] * length
    else:
        (values[parents[-1]] if parents else values)[last] = value


@cache
def composed_once(*words: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base=None):
        return read_config(compose("student", [*words])).model_dump()


@pytest.mark.parametrize(("path", "choice", "value", "bound"), BEYOND, ids=lambda text: text[:30])
def test_a_number_beyond_its_bound_is_one_line(
    path: str, choice: str, value: str, bound: str
) -> None:
    values = copy.deepcopy(composed_once("dataset=digits", *filter(None, [choice])))
    given = int(value) if value.strip("-").isdigit() else float(value)
    put(values, path, given)
    with pytest.raises(UserError) as caught:
        parse_config(values)
    first = str(caught.value).split("; ")[0]
    assert first.startswith(f"{path}: ")
    assert bound in first
    assert value[:20] in first or f"{given}" in first
    assert len(first) < 150


@pytest.mark.parametrize("word", [f"schedule.epochs={DIGITS}", "schedule.gamma=1e300"])
def test_the_command_says_it_in_one_line(command: Command, word: str) -> None:
    status, out, err = command("dataset=digits", word)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {word.partition('=')[0]}: should be less than or equal to 10")
    assert not command.runs.exists()


@pytest.mark.parametrize("key", ["schedule.epochs", "optimizer.lr"])
def test_a_number_of_thousands_of_digits_is_one_line(command: Command, key: str) -> None:
    status, out, err = command("dataset=digits", f"{key}={'9' * 5000}")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"error: {key}: ")
    assert "5000 digits" in err
    assert len(err) < 300


def test_more_milestones_than_anyone_means_are_refused(command: Command) -> None:
    status, _, err = command("dataset=digits", f"schedule.milestones=[{','.join(['0.5'] * 400)}]")
    assert (status, err.count("\n")) == (1, 1)
    assert "schedule.milestones: should have at most 30 items" in err
    assert len(err) < 300
