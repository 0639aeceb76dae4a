"""Loading weights into a network, recognising networks, finding files, and digests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.models import (
    ARCHITECTURES,
    build_model,
    find_checkpoint,
    load_weights,
    read_checkpoint,
    recognise,
    save_weights,
    takes_image_size,
    weights_digest,
)

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(1)
    return build_model("resnet8", 100).state_dict()


@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("name", ["resnet56", "wrn_40_2", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_published_names_load_strictly(name: str, key: str, tmp_path: Path) -> None:
    folder = os.environ.get("SSKD_REFERENCE")
    if not folder:
        pytest.skip("SSKD_REFERENCE names no folder with architectures.json")
    reference = json.loads((Path(folder) / "architectures.json").read_text())[name]
    published = {tensor: torch.rand(shape) for tensor, shape in reference["state_dict"].items()}
    torch.save({key: published, "epoch": 240}, tmp_path / "net.pth")
    model = build_model(name, 100)
    load_weights(model, tmp_path / "net.pth")
    parameters = dict(model.named_parameters())
    assert all(torch.equal(published[tensor], parameters[tensor]) for tensor in parameters)


def test_another_network_is_named(state: State, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(state, path)
    model = build_model("resnet14", 100)
    before = weights_digest(model)
    message = "net.pth holds a resnet8 with 100 classes, not a resnet14 with 100 classes: name the"
    with pytest.raises(UserError, match=f"{message} architecture resnet8"):
        load_weights(model, path)
    assert weights_digest(model) == before
    message = "net.pth holds a resnet8 with 100 classes, not a resnet8 with 10 classes: use weights"
    with pytest.raises(UserError, match=f"{message} for 10 classes"):
        load_weights(build_model("resnet8", 10), path)


def test_the_tensors_that_do_not_fit_are_named(state: State, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    changed = {**state, "extra": torch.zeros(1), "conv1.weight": torch.zeros(16, 3, 5, 5)}
    del changed["bn1.weight"], changed["bn1.bias"]
    torch.save(changed, path)
    with pytest.raises(UserError) as caught:
        load_weights(build_model("resnet8", 100), path)
    assert str(caught.value) == (
        f"{path} does not fit: missing: 2 (first 'bn1.weight'); not expected: 1 (first 'extra'); "
        "of another shape: 1 (first 'conv1.weight'); name a file that contains the weights of this "
        "network"
    )
    with pytest.raises(UserError, match=r"missing: 2 \(first 'weight'\)"):
        load_weights(nn.Linear(2, 2), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, state: State, tmp_path: Path
) -> None:
    broken = {name: tensor.clone() for name, tensor in state.items()}
    broken["layer2.0.conv1.weight"][0, 0, 0, 0] = value
    torch.save(broken, tmp_path / "net.pth")
    model = build_model("resnet8", 100)
    before = weights_digest(model)
    with pytest.raises(UserError, match=r"not finite, in 'layer2\.0\.conv1\.weight'"):
        load_weights(model, tmp_path / "net.pth")
    assert weights_digest(model) == before


@pytest.mark.parametrize(
    ("name", "classes"), [("wrn_40_1", 10), ("ShuffleV2", 7), ("vgg11", 1), ("resnet8x4", 100)]
)
def test_a_network_and_its_classes_are_recognised(name: str, classes: int) -> None:
    assert recognise(build_model(name, classes).state_dict()) == (name, classes)


def test_other_state_dicts_are_not_recognised(state: State) -> None:
    assert recognise({}) is None
    assert recognise({**state, "extra": torch.zeros(1)}) is None
    assert recognise({**state, "fc.bias": torch.zeros(99)}) is None
    assert recognise({**state, "fc.bias": torch.tensor(0.0)}) is None


def test_a_checkpoint_is_found_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "ckpt").mkdir(parents=True)
    (run / "last.pth").touch()
    (run / "best.txt").touch()
    with pytest.raises(
        UserError, match=r"no best checkpoint .*/run or .*best\.txt, ckpt, last\.pth"
    ):
        find_checkpoint(run)
    (run / "ckpt" / "best.pth").touch()
    assert find_checkpoint(run) == run / "ckpt" / "best.pth"
    (run / "resnet8_best.safetensors").touch()
    assert find_checkpoint(str(run)) == run / "resnet8_best.safetensors"
    assert find_checkpoint(run / "last.pth") == run / "last.pth"
    (run / "best.pt").touch()
    with pytest.raises(UserError, match=r"more than one .*: best\.pt, resnet8_best\.safetensors;"):
        find_checkpoint(run)
    with pytest.raises(UserError, match=r"no checkpoint at .*absent"):
        find_checkpoint(tmp_path / "absent")


def test_the_digest_covers_names_dtypes_shapes_and_values(state: State, tmp_path: Path) -> None:
    digest = weights_digest(state)
    assert len(digest) == 64
    assert weights_digest(dict(reversed(state.items()))) == digest
    model = build_model("resnet8", 100)
    model.load_state_dict(state)
    assert weights_digest(model.to(memory_format=torch.channels_last)) == digest
    for suffix, save in ((".pth", torch.save), (".safetensors", save_file)):
        save(state, tmp_path / f"net{suffix}")
        assert weights_digest(read_checkpoint(tmp_path / f"net{suffix}").state) == digest

    strided = torch.stack([state["fc.bias"], torch.zeros(100)], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert weights_digest({**state, "fc.bias": strided}) == digest

    weight = state["fc.weight"]
    flipped = weight.clone()
    flipped[0, 0] = -flipped[0, 0]
    changes = [
        {"fc.weight": flipped},
        {"fc.weight": weight.double()},
        {"fc.weight": weight.reshape(64, 100)},
        {"fc.other": torch.zeros(0)},
    ]
    assert digest not in [weights_digest({**state, **change}) for change in changes]


# test_imagenet_networks.py loads the others.
@pytest.mark.parametrize("name", [n for n in sorted(ARCHITECTURES) if not takes_image_size(n)])
def test_every_network_loads_from_both_layouts(name: str, tmp_path: Path) -> None:
    """Other tests compare the names and shapes themselves with the published ones."""
    torch.manual_seed(0)
    state = build_model(name, 7).state_dict()
    path = tmp_path / f"{name}.pth"
    for layout in ({"model": state, "accuracy": 1.0}, {"state_dict": state, "acc": 1.0}):
        torch.save(layout, path)
        model = build_model(name, 7)
        load_weights(model, path)
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_weights_are_saved_at_a_path_in_text(tmp_path: Path) -> None:
    saved, loaded = nn.Linear(2, 1), nn.Linear(2, 1)
    save_weights(str(tmp_path / "net.safetensors"), saved, {})
    load_weights(loaded, str(tmp_path / "net.safetensors"))
    assert torch.equal(loaded.weight, saved.weight)
