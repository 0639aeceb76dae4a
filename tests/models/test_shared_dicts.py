"""Checkpoints whose dicts contain themselves or each other, and folders of many files."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from test_foreign_checkpoints import DIGEST, STATE, is_read, refusal

from sskd.errors import UserError
from sskd.models import find_checkpoint, read_checkpoint, weights_digest


def recursive(key: str) -> dict[str, Any]:
    holder: dict[str, Any] = {}
    holder[key] = holder
    return holder


def mutual() -> dict[str, Any]:
    one: dict[str, Any] = {}
    one["top1"] = {"acc1": one}
    return one


RECURSIVE = {
    "acc": recursive("acc"),
    "accuracy": recursive("top1"),
    "best_acc1": [recursive("best_acc")],
    "top1": mutual(),
}


@pytest.mark.parametrize("key", RECURSIVE)
def test_a_recursive_accuracy_is_ignored(key: str, tmp_path: Path) -> None:
    is_read({"state_dict": STATE, key: RECURSIVE[key]}, tmp_path / "net.pth")
    assert read_checkpoint(tmp_path / "net.pth").accuracy is None


def test_a_file_that_contains_itself_is_read(tmp_path: Path) -> None:
    content: dict[str, Any] = {"state_dict": STATE}
    content["acc"] = content["model"] = content
    is_read(content, tmp_path / "net.pth")


@pytest.mark.parametrize(("depth", "stated"), [(1, 61.5), (2, 61.5), (3, None), (500, None)])
def test_an_accuracy_is_at_most_two_dicts_deep(
    depth: int, stated: float | None, tmp_path: Path
) -> None:
    value: Any = 61.5
    for _ in range(depth):
        value = {"top1": value}
    path = tmp_path / "net.safetensors"
    about = json.dumps({"accuracy": value})
    path.write_bytes(save(STATE, metadata={"about": about}))
    assert read_checkpoint(path).accuracy == stated
    assert weights_digest(read_checkpoint(path).state) == DIGEST


def test_a_network_under_a_million_keys_is_read_once(tmp_path: Path) -> None:
    inner = dict.fromkeys(map(str, range(1000)), STATE)
    path = tmp_path / "net.pth"
    started = time.process_time()
    is_read(dict.fromkeys(map(str, range(1000)), inner), path)
    empty: dict[int, Any] = {key: {} for key in range(1000)}
    torch.save(dict.fromkeys(range(1000), empty), path)
    assert "holds no state dict" in refusal(path)
    assert time.process_time() - started < 20


def test_more_than_a_hundred_networks_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({f"epoch{n}": dict(STATE) for n in range(100)}, path)
    assert weights_digest(read_checkpoint(path).state) == DIGEST
    torch.save({"epochs": {f"epoch{n}": dict(STATE) for n in range(101)}}, path)
    assert "holds 101 state dicts, more than 100; save the one that you need" in refusal(path)


def test_long_names_of_networks_are_shortened(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    other = {**STATE, "fc.bias": STATE["fc.bias"] + 1}
    torch.save({"a" * 5000: STATE, "b" * 5000: other}, path)
    message = refusal(path)
    assert f"'{'a' * 100}' (resnet8 with 10 classes), '{'b' * 100}' (resnet8" in message
    torch.save({f"epoch{n}": {**STATE, "fc.bias": STATE["fc.bias"] + n} for n in range(99)}, path)
    assert "holds several networks that fit: 'epoch0'" in refusal(path)


OTHER_FILES = {
    "x_best.safetensors": ["training_best.bin"],
    "resnet8_best.pth": ["best.tar", "best.ckpt"],
    "student.best.pt": ["optimizer_best.th", "scheduler.bin"],
    "net_best.PTH": ["net_best.ckpt"],
}


@pytest.mark.parametrize("expected", OTHER_FILES)
@pytest.mark.parametrize("where", ["", "ckpt"])
def test_rare_suffixes_do_not_compete_with_usual_ones(
    expected: str, where: str, tmp_path: Path
) -> None:
    (tmp_path / "ckpt").mkdir()
    for name in (expected, *OTHER_FILES[expected]):
        (tmp_path / (where if name == expected else "") / name).touch()
    assert find_checkpoint(tmp_path) == tmp_path / where / expected


def test_rare_suffixes_are_used_alone(tmp_path: Path) -> None:
    for name in ("net_last.pth", "net_best.ckpt"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path) == tmp_path / "net_best.ckpt"
    (tmp_path / "net_best.bin").touch()
    with pytest.raises(UserError, match=r"more than one best .*: net_best\.bin, net_best\.c"):
        find_checkpoint(tmp_path)
