"""Properties of any input: readers return a value or raise a one-line error; choices and draws."""

from __future__ import annotations

import copy
import io
import json
import math
import string
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from report_runs import RESULT, epoch_line
from safetensors.torch import save
from torch import Tensor

from sskd import CONF
from sskd.config import Config, parse_config, read_config
from sskd.data import LabelledImages, Split
from sskd.data.images import add_label_noise, hold_out, keep_fraction
from sskd.errors import CorruptFileError, UserError, did_you_mean
from sskd.methods.crd import draw_negatives
from sskd.methods.sskd import keep_rows
from sskd.models import read_checkpoint
from sskd.overrides import as_override, flatten
from sskd.report.metrics import read_metrics
from sskd.report.results import FinishedRun, parse_result
from sskd.runs.checkpoint_file import load_checkpoint, save_checkpoint
from sskd.runs.epoch_line import EpochLine

# The same examples in each run, as many as take a few seconds.
some = settings(max_examples=150, deadline=None, derandomize=True, database=None)
few = settings(some, max_examples=60)

TEXT = st.text(max_size=12)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(
        ["", "kd", "sskd", "auto", "fp32", "off", "~", "..", "a\nb", "${seed}", "???"]
    )
)
KEYS = st.sampled_from(["name", "weights", "seed", "arch", "teacher", "lr"]) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


# ---- the configuration ----


@cache
def real() -> dict[str, Any]:
    """Return the composed configuration of a student as plain values."""
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("student", ["dataset=digits", "method=sskd"])
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def places(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every setting and of every group."""
    found = []
    for key, value in values.items():
        found.append((*above, key))
        if isinstance(value, Mapping):
            found += places(value, (*above, key))
    return found


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the real configuration with 1 to 3 changes: values replaced, keys added or removed."""
    values = copy.deepcopy(real())
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from(places(real())))
        node: Any = values
        for part in above:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            continue
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "remove":
            node.pop(key, None)
        else:
            node[key if change == "replace" else draw(KEYS)] = draw(VALUES)
    return values


def assert_one_line(error: Exception, path: Path = Path()) -> None:
    assert str(error)
    assert str(error).isprintable()
    assert path == Path() or str(path) in str(error)


@some
@given(configurations())
def test_changed_values_are_read_or_refused(values: dict[str, Any]) -> None:
    values.pop("weighting", None)
    try:
        assert isinstance(parse_config(values), Config)
    except UserError as error:
        assert_one_line(error)


@some
@given(configurations())
def test_a_changed_composition_is_read_or_refused(values: dict[str, Any]) -> None:
    try:
        assert isinstance(read_config(OmegaConf.create(values)), Config)
    except UserError as error:
        assert_one_line(error)


def test_the_unchanged_configuration_is_valid() -> None:
    assert read_config(OmegaConf.create(real())).dataset.name == "digits"


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)  # every setting is finite
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | FINITE | WORDS


@some
@given(PLAIN | st.lists(st.integers() | FINITE))
def test_an_override_reads_back_as_its_value(value: Any) -> None:
    found = OverridesParser.create().parse_override(as_override("a.b", value))
    assert found.key_or_group == "a.b"
    assert found.value() == value
    assert type(found.value()) is type(value)


NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=3)


@some
@given(
    st.recursive(
        st.dictionaries(NAMES, st.integers() | st.lists(st.integers(), max_size=2), max_size=3),
        lambda inner: st.dictionaries(NAMES, inner, max_size=3),
    )
)
def test_flat_settings_can_be_nested_again(values: dict[str, Any]) -> None:
    """Only groups without settings are lost."""
    nested: dict[str, Any] = {}
    for key, value in flatten(values).items():
        *above, last = key.split(".")
        node = nested
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value

    def without_empty(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        kept = {key: without_empty(value) for key, value in node.items()}
        return {key: value for key, value in kept.items() if value != {}}

    assert nested == without_empty(values)


@some
@given(st.text(min_size=1), st.lists(st.text(min_size=1), max_size=5))
def test_the_suggestion_is_one_of_the_choices(word: str, choices: list[str]) -> None:
    suggestion = did_you_mean(word, choices)
    assert suggestion == "" or suggestion in {f"; did you mean '{choice}'?" for choice in choices}
    assert did_you_mean(word, [*choices, word]) in (f"; did you mean '{word}'?", suggestion)


# ---- checkpoints ----


@cache
def checkpoints() -> dict[str, bytes]:
    """Return a small checkpoint in each format, by the name of its file."""
    state = {"conv1.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}
    whole = {"model": state, "epoch": 3, "accuracy": 71.5}
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(whole, zipped)
    torch.save(whole, legacy, _use_new_zipfile_serialization=False)
    return {
        "zip.pth": zipped.getvalue(),
        "legacy.pth": legacy.getvalue(),
        "net.safetensors": save(state, metadata={"about": json.dumps({"epoch": 3})}),
    }


@st.composite
def mutated(draw: st.DrawFn, whole: bytes) -> bytes:
    """Draw a file with 1 to 4 changes: bytes set, removed or repeated, or the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(1, 32))
        change = draw(st.sampled_from(["set", "cut", "repeat", "end"]))
        if change == "set":
            data[start : start + 4] = draw(st.binary(min_size=1, max_size=4))
        elif change == "cut":
            del data[start : start + length]
        elif change == "repeat":
            data[start:start] = data[start : start + length]
        else:
            del data[start:]
    return bytes(data)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "net.safetensors"])
def test_a_changed_checkpoint_is_read_or_refused(name: str) -> None:
    @few
    @given(mutated(checkpoints()[name]))
    def check(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(data)
            try:
                state = read_checkpoint(path).state
            except UserError as error:
                assert_one_line(error, path)
            else:
                assert state
                assert all(isinstance(tensor, Tensor) for tensor in state.values())

    check()


@pytest.fixture(scope="module")
def checkpoint_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("checkpoint_file") / "last.pt"
    save_checkpoint(path, {"stage": "distill", "model": {"fc.bias": torch.ones(3)}, "lines": 2})
    content = load_checkpoint(path)
    assert (content["stage"], content["lines"]) == ("distill", 2)
    return path.read_bytes()


def is_refused_or_the_same(folder: Path, data: bytes) -> bool:
    path = folder / "last.pt"
    path.write_bytes(data)
    try:
        content = load_checkpoint(path)
    except CorruptFileError:
        return True
    bias = content.pop("model")["fc.bias"]
    return torch.equal(bias, torch.ones(3)) and content == {"stage": "distill", "lines": 2}


@some
@given(st.data())
def test_no_change_of_a_checkpoint_changes_its_content(
    checkpoint_file: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert is_refused_or_the_same(folder, data.draw(mutated(checkpoint_file)))


@some
@given(st.data())
def test_a_checkpoint_that_is_cut_off_is_corrupt(
    checkpoint_file: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "last.pt"
    path.write_bytes(checkpoint_file[: data.draw(st.integers(0, len(checkpoint_file) - 1))])
    with pytest.raises(CorruptFileError):
        load_checkpoint(path)


# ---- choices and draws ----


@some
@given(
    st.integers(1, 8).flatmap(
        lambda width: st.lists(
            st.tuples(
                st.lists(st.integers(-2, 2), min_size=width, max_size=width),
                st.integers(0, width - 1),
            ),
            min_size=1,
            max_size=12,
        )
    ),
    st.floats(0, 1),
)
def test_kept_rows_follow_the_definition(rows: list[tuple[list[int], int]], ratio: float) -> None:
    """The definition is applied row by row. Scores are small integers, so there are ties."""
    ranks = [sum(score > scores[target] for score in scores) for scores, target in rows]
    wrong = [index for index, rank in enumerate(ranks) if rank > 0]
    kept = set(range(len(rows))) - set(wrong)
    for _ in range(math.floor(ratio * len(wrong))):
        best = min((index for index in wrong if index not in kept), key=lambda index: ranks[index])
        kept.add(best)
    scores = torch.tensor([scores for scores, _ in rows], dtype=torch.float32)
    target = torch.tensor([target for _, target in rows])
    assert keep_rows(scores, target, ratio).tolist() == [i in kept for i in range(len(rows))]


LABELS = st.lists(st.integers(0, 3), min_size=2, max_size=30).filter(
    lambda made: len(set(made)) > 1
)


@some
@given(LABELS, st.data())
def test_negatives_are_of_other_classes_without_repeats(
    labels: list[int], data: st.DataObject
) -> None:
    others = len(labels) - max(Counter(labels).values())
    count = data.draw(st.integers(1, others))
    classes = data.draw(st.lists(st.sampled_from(labels), min_size=1, max_size=6))
    drawn = draw_negatives(torch.tensor(labels), torch.tensor(classes), count).tolist()
    assert len(drawn) == len(classes)
    for label, row in zip(classes, drawn, strict=True):
        assert len(set(row)) == len(row) == count
        assert all(0 <= position < len(labels) for position in row)
        assert all(labels[position] != label for position in row)


CLASSES = 4
SEEDS = st.integers(0, 2**31)
SHARES = st.floats(0.01, 0.99)


def numbered(labels: list[int]) -> Split:
    """Return images whose first pixel holds their position."""
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(labels))
    return Split(images, torch.tensor(labels))


def numbers(split: LabelledImages) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def nearest_even(value: float) -> int:
    """Round half to even, as IEEE 754 does."""
    low = math.floor(value)
    if value - low == 0.5:
        return low + low % 2
    return low if value - low < 0.5 else low + 1


@some
@given(LABELS, SHARES, SHARES, SEEDS)
def test_a_fraction_is_part_of_a_larger_fraction(
    labels: list[int], one: float, other: float, seed: int
) -> None:
    small, large = (
        keep_fraction(numbered(labels), CLASSES, share, seed) for share in sorted((one, other))
    )
    assert set(numbers(small)) <= set(numbers(large))
    for share, split in zip(sorted((one, other)), (small, large), strict=True):
        assert numbers(split) == sorted(set(numbers(split)))
        assert split.labels.tolist() == [labels[number] for number in numbers(split)]
        expected = {key: max(1, nearest_even(share * n)) for key, n in Counter(labels).items()}
        assert Counter(split.labels.tolist()) == expected


@some
@given(LABELS, SHARES, SEEDS)
def test_held_out_and_kept_images_are_all_images(
    labels: list[int], share: float, seed: int
) -> None:
    sizes = Counter(labels)
    names = tuple(f"class {label}" for label in range(CLASSES))
    expected = {label: max(1, nearest_even(share * sizes[label])) for label in range(CLASSES)}
    if any(expected[label] >= sizes[label] for label in range(CLASSES)):
        with pytest.raises(UserError, match="give a smaller dataset"):
            hold_out(numbered(labels), names, share, seed)
        return
    left, taken = hold_out(numbered(labels), names, share, seed)
    assert taken is not None
    assert Counter(taken.labels.tolist()) == expected
    assert sorted(numbers(left) + numbers(taken)) == list(range(len(labels)))
    for split in (left, taken):
        assert numbers(split) == sorted(numbers(split))
        assert split.labels.tolist() == [labels[number] for number in numbers(split)]


@some
@given(LABELS, SHARES, SHARES, SEEDS)
def test_wrong_labels_stay_wrong_with_more_noise(
    labels: list[int], one: float, other: float, seed: int
) -> None:
    little, much = sorted((one, other))
    noisy = {}
    for noise in (little, much):
        split = add_label_noise(numbered(labels), CLASSES, noise, seed)
        assert numbers(split) == list(range(len(labels)))
        found = split.labels.tolist()
        assert set(found) <= set(range(CLASSES))
        noisy[noise] = {i: new for i, new in enumerate(found) if new != labels[i]}
        wrong = Counter(labels[i] for i in noisy[noise])
        assert all(wrong[key] == nearest_even(noise * n) for key, n in Counter(labels).items())
    assert noisy[little].items() <= noisy[much].items()


# ---- files that the report reads ----

JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*RESULT, "stage", "epoch"]) | TEXT, inner, max_size=6)
    ),
    max_leaves=12,
)


@st.composite
def records(draw: st.DrawFn, whole: Mapping[str, Any]) -> str:
    """Draw the text of a record with changes of its fields, and perhaps of its characters."""
    values = dict(whole) | draw(st.dictionaries(st.sampled_from([*whole]) | TEXT, JSON, max_size=3))
    text = json.dumps(values)
    if draw(st.booleans()):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 5)))
        text = text[:start] + draw(TEXT) + text[end:]
    return text


@some
@given(records(RESULT) | JSON.map(json.dumps) | st.text())
def test_a_changed_result_is_read_or_refused(text: str) -> None:
    try:
        result = parse_result(text, Path("run"))
    except ValueError as error:
        assert_one_line(error)
        return
    assert result is None or isinstance(result, FinishedRun)
    if result:
        shown = (result.last, result.best, result.teacher_top1 or 0.0, result.agreement or 0.0)
        assert all(0 <= figure <= 100 for figure in shown)
        names = (result.dataset, result.student, result.method, *map(str, result.difference))
        assert all(name.isprintable() and name for name in names)


@some
@given(st.lists(records(epoch_line("distill", 1, 50.0)) | JSON.map(json.dumps) | TEXT, max_size=4))
def test_changed_metrics_are_read_or_warned_about(lines: list[str]) -> None:
    warnings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "metrics.jsonl")
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
        found = read_metrics(Path(folder), warnings.append)
        assert len(warnings) <= 1
        assert all(str(path) in warning for warning in warnings)
        written = path.read_bytes().splitlines()
    assert all(isinstance(line, EpochLine) for line in found)
    assert warnings or len(found) == len(written)
    assert all(math.isfinite(value) for line in found for value in line.metrics.values())


def test_valid_records_are_read() -> None:
    """The properties above would also be true of a reader that refuses everything."""
    result = parse_result(json.dumps(RESULT), Path("run"))
    assert result is not None
    assert (result.last, result.best, result.seed) == (70.0, 71.0, 0)
