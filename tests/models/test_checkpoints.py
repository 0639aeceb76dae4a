"""Reading weights: all published layouts, and files that are corrupt or hold something else."""

from __future__ import annotations

import argparse
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sskd.errors import UserError
from sskd.models import (
    build_model,
    load_weights,
    read_checkpoint,
    save_weights,
)

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(1)
    return build_model("resnet8", 100).state_dict()


@pytest.fixture(scope="module")
def mobile() -> State:
    torch.manual_seed(2)
    return build_model("MobileNetV2", 100).state_dict()


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def refusal(action: Callable[..., Any], *args: Any) -> str:
    """Return the message of the UserError that the call must raise; it is one line."""
    with pytest.raises(UserError) as caught:
        action(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


HEAD = {"proj_head.0.weight": torch.zeros(64, 64), "proj_head.0.bias": torch.zeros(64)}
LAYOUTS: dict[str, tuple[Callable[[State], dict[str, Any]], float | None, int | None]] = {
    "CRD": (lambda s: {"epoch": 240, "model": s, "accuracy": 60.25}, 60.25, 240),
    "CRD last": (
        lambda s: {
            "opt": argparse.Namespace(model_s="resnet8", lr_decay_epochs=[150, 180]),
            "model": s,
            "accuracy": torch.tensor(60.5),
        },
        60.5,
        None,
    ),
    "CRD of NumPy": (
        lambda s: {"epoch": np.int64(7), "model": s, "accuracy": np.float32(60.5)},
        60.5,
        7,
    ),
    "SSKD": (lambda s: {"epoch": 200, "state_dict": s, "acc": torch.tensor([61.5])}, 61.5, 200),
    "SSKD student": (
        lambda s: {"state_dict": prefixed(s, "backbone.") | HEAD, "best_acc": np.float64(62.125)},
        62.125,
        None,
    ),
    "DataParallel": (lambda s: {"model": prefixed(s, "module."), "epoch": 3}, None, 3),
    "bare": (lambda s: dict(s), None, None),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_every_torch_layout_is_read(name: str, zipped: bool, state: State, tmp_path: Path) -> None:
    wrap, accuracy, epoch = LAYOUTS[name]
    path = tmp_path / "net.pth"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(str(path))
    assert same(checkpoint.state, state)
    assert (checkpoint.accuracy, checkpoint.epoch) == (accuracy, epoch)
    assert checkpoint.path == path
    model = build_model("resnet8", 100)
    load_weights(model, path)
    assert same(dict(model.state_dict()), state)


def test_a_scalar_from_numpy_1_is_read(state: State, tmp_path: Path) -> None:
    """NumPy 1 wrote the same constructor under another name."""
    buffer = io.BytesIO()
    content = {"model": state, "accuracy": np.float64(70.5)}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    old = buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != buffer.getvalue()
    (tmp_path / "old.pth").write_bytes(old)
    assert read_checkpoint(tmp_path / "old.pth").accuracy == 70.5


def test_the_metadata_of_safetensors_are_read(state: State, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    model = build_model("resnet8", 100)
    model.load_state_dict(state)
    save_weights(path, model.to(memory_format=torch.channels_last), {"accuracy": "60.5"})
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.state, state)
    assert (checkpoint.accuracy, checkpoint.epoch) == (60.5, None)
    save_file(state, path, metadata={"epoch": "12"})
    assert (read_checkpoint(path).accuracy, read_checkpoint(path).epoch) == (None, 12)
    save_file(state, path)
    assert (read_checkpoint(path).accuracy, read_checkpoint(path).epoch) == (None, None)


def test_both_classifiers_of_mobilenet_are_read(mobile: State, tmp_path: Path) -> None:
    plain = {name.replace("classifier.0.", "classifier."): mobile[name] for name in mobile}
    assert plain.keys() != mobile.keys()
    torch.save({"state_dict": plain, "acc": 65.0}, tmp_path / "mobile.pth")
    model = build_model("MobileNetV2", 100)
    load_weights(model, tmp_path / "mobile.pth")
    assert same(dict(model.state_dict()), mobile)


def test_a_vgg_keeps_its_classifier_names(tmp_path: Path) -> None:
    vgg = build_model("vgg8", 10).state_dict()
    torch.save(vgg, tmp_path / "vgg.pth")
    assert same(read_checkpoint(tmp_path / "vgg.pth").state, dict(vgg))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    kept: float, zipped: bool, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "cut.pth"
    torch.save({"model": state}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert f"{path} cannot be read as a checkpoint; it is probably truncated" in refusal(
        read_checkpoint, path
    )


def test_files_that_are_not_checkpoints_are_refused(state: State, tmp_path: Path) -> None:
    page = tmp_path / "page.pth"
    page.write_text("<html>404: not found</html>")
    assert "cannot be read as a checkpoint" in refusal(read_checkpoint, page)
    cut = tmp_path / "cut.safetensors"
    save_file(state, cut)
    cut.write_bytes(cut.read_bytes()[:-9])
    assert "cannot be read as a checkpoint" in refusal(read_checkpoint, cut)
    missing = refusal(read_checkpoint, "absent/net.pth")
    assert "no checkpoint at absent/net.pth" in missing
    assert str(Path.cwd() / "absent/net.pth") in missing
    assert f"{tmp_path} is a folder" in refusal(read_checkpoint, tmp_path)


class RunsCode:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def save_zipped(content: object, path: Path, protocol: int) -> None:
    torch.save(content, path, pickle_protocol=protocol)


def save_legacy(content: object, path: Path, protocol: int) -> None:
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def save_pickle(content: object, path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps(content, protocol))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("write", [save_zipped, save_legacy, save_pickle])
def test_code_in_a_pickle_is_not_run(
    write: Callable[..., None], protocol: int, tmp_path: Path
) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pth"
    pickle.loads(pickle.dumps(RunsCode(canary)))
    canary.rmdir()  # the pickle really runs the code
    write({"model": RunsCode(canary)}, path, protocol)
    message = refusal(read_checkpoint, path)
    assert not canary.exists()
    assert str(path) in message
    assert f" {os.mkdir.__module__}.mkdir;" in message
    assert "refused without being run" in message


def test_the_class_of_a_pickled_network_is_named(tmp_path: Path) -> None:
    torch.save({"model": build_model("resnet8", 10)}, tmp_path / "whole.pth")
    assert "sskd.models.resnet.ResNet" in refusal(read_checkpoint, tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "note": "hello"}, "found: epoch, note"),
        ({"model": {}}, "found: model"),
        ({"model": {"conv1.weight": torch.zeros(1), "step": 3}}, "found: model"),
        ({}, "found: nothing"),
        ([torch.zeros(2)], "holds a list, not a state dict"),
    ],
)
def test_a_file_without_weights_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "odd.pth")
    found = refusal(read_checkpoint, tmp_path / "odd.pth")
    assert str(tmp_path / "odd.pth") in found
    assert message in found
