"""The networks for ImageNet: torchvision's weights, and first layers by the size of the images."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import Compose, random_images
from torch import Tensor, nn

from sskd.errors import UserError
from sskd.models import ARCHITECTURES, Features, build_model, load_weights, recognise, save_weights
from sskd.runs.folder import write_config_file
from sskd.runs.names import CONFIG
from sskd.teachers.assembly import assemble, check_compatible
from sskd.trained import TrainedNetwork

# Of the documentation of torchvision 0.13 and later, for 1,000 classes.
RESNETS = {
    "ResNet18": ("resnet18", 11_689_512),
    "ResNet34": ("resnet34", 21_797_672),
    "ResNet50_224": ("resnet50", 25_557_032),
}
MOBILENET_PARAMETERS = 4_231_976  # of the pytorch-mobilenet repository
LIBRARY = Path(__file__).parents[2] / "docs" / "library.md"


def drawn(network: nn.Module) -> nn.Module:
    """Give a network on the meta device random weights and statistics."""
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            bound = (6 / tensor[0].numel()) ** 0.5
            tensor.uniform_(-bound, bound, generator=generator)
        elif tensor.is_floating_point():
            low = 0.5 if name.endswith(("running_var", "weight")) else -0.2
            tensor.uniform_(low, low + 0.4, generator=generator)
        else:
            tensor.zero_()
    return network.eval()


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_computes_what_torchvisions_does(name: str) -> None:
    published, parameters = RESNETS[name]
    with torch.device("meta"):
        network = build_model(name, 1000, 224).eval()
        other = torchvision.models.get_model(published)
    other = drawn(other)
    maps = {}
    for stage in ("maxpool", "layer1", "layer2", "layer3", "layer4"):
        other.get_submodule(stage).register_forward_hook(
            lambda _, __, output, stage=stage: maps.update({stage: output})
        )
    network.load_state_dict(other.state_dict(), assign=True)
    other.load_state_dict(network.state_dict())
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    with torch.inference_mode():
        image = torch.randn(1, 3, 224, 224)
        found, logits = network(image), other(image)
    torch.testing.assert_close(found.logits, logits)
    for one, expected in zip([found.stem, *found.stages], maps.values(), strict=True):
        torch.testing.assert_close(one, expected)


def test_mobilenet_has_the_published_parameters() -> None:
    with torch.device("meta"):
        network = build_model("MobileNetV1", 1000, 224)
        classifier = [tuple(tensor.shape) for tensor in network.state_dict().values()][-2:]
    assert sum(parameter.numel() for parameter in network.parameters()) == MOBILENET_PARAMETERS
    assert classifier == [(1000, 1024), (1000,)]


def documented_sizes() -> list[tuple[int, int, int]]:
    """Return a size of images, the side of the first stage's map and that of the last, by row."""
    row = r"^\| (\d+) to (\d+) \|.*\| (\d+) to (\d+) \| (\d+) to (\d+) \|$"
    found = re.findall(row, LIBRARY.read_text(), re.MULTILINE)
    return [tuple(map(int, r[end::2])) for r in found for end in (0, 1)]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["ResNet18", "MobileNetV1"])
def test_maps_have_the_documented_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.init, "kaiming_normal_", lambda weight, **_: weight)
    sizes = documented_sizes()
    assert [size for size, _, _ in sizes] == [32, 63, 64, 127, 128, 256]
    for size, first, last in sizes:
        with torch.device("meta"):
            found: Features = build_model(name, 5, size)(torch.empty(1, 3, size, size))
        assert (found.stages[0].shape[-1], found.last_map.shape[-1]) == (first, last)
        assert 4 <= last <= 8


@pytest.mark.parametrize(
    ("name", "size", "prefix"), [("ResNet18", 224, ""), ("MobileNetV1", 32, "module.")]
)
def test_published_files_load(name: str, size: int, prefix: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        network, other, few = (build_model(name, n, size) for n in (1000, 1000, 10))
        small = build_model("ResNet18", 1000, 64)
    expected = drawn(network).state_dict()
    assert recognise(expected) == (name, 1000)
    # Files of 2018 and earlier have no counters of batches.
    kept = {key: value for key, value in expected.items() if not key.endswith("tracked")}
    path = tmp_path / "published.pth"
    torch.save({prefix + key: value for key, value in kept.items()}, path)
    load_weights(other.to_empty(device="cpu"), path)
    assert all(torch.equal(value, expected[key]) for key, value in other.state_dict().items())
    message = f"holds a {name} with 1000 classes, not a {name} with 10 classes: use weights for 10"
    with pytest.raises(UserError, match=message):
        load_weights(few, path)
    if name == "ResNet18":
        with pytest.raises(UserError, match=r"for images of another size; set dataset\.size"):
            load_weights(small, path)


def test_small_images_have_another_recognised_stem() -> None:
    with torch.device("meta"):
        states = [build_model("ResNet18", 7, size).state_dict() for size in (32, 224)]
    assert states[0]["conv1.weight"].shape != states[1]["conv1.weight"].shape
    assert [recognise(state) for state in states] == [("ResNet18", 7)] * 2


def test_only_functions_that_need_the_size_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def sized(classes: int, image_size: int) -> tuple[int, int]:
        return classes, image_size

    def optional(classes: int, image_size: int = 5) -> tuple[int, int]:
        return classes, image_size

    entries = {"sized": sized, "chosen": partial(sized, image_size=9), "optional": optional}
    for name, entry in (entries | {"built_in": int}).items():
        monkeypatch.setitem(ARCHITECTURES, name, entry)
    found = [build_model(name, 3, 64) for name in (*entries, "built_in")]
    assert found == [(3, 64), (3, 9), (3, 5), 3]


def test_a_run_builds_networks_for_its_images(composed: Compose) -> None:
    pair = ("method=kd", "arch@teacher=MobileNetV1", "arch@student=MobileNetV1")
    method = assemble(composed(*pair), random_images(2, 2, size=64))
    for network in (method.student, method.teacher):
        with torch.inference_mode():
            assert network(torch.zeros(1, 3, 64, 64)).last_map.shape[-2:] == (4, 4)


@pytest.mark.parametrize("arch", [None, "MobileNetV1"])
def test_a_run_is_rebuilt_for_its_images(
    arch: str | None, composed: Compose, tmp_path: Path
) -> None:
    config = composed("dataset=digits", "dataset.size=64", "arch@student=MobileNetV1")
    write_config_file(tmp_path / CONFIG, config.model_dump())
    with torch.device("meta"):
        network = build_model("MobileNetV1", 10, 64)
        smaller = build_model("MobileNetV1", 10, 32).eval()
    save_weights(tmp_path / "model.safetensors", drawn(network), {})
    smaller.load_state_dict(network.state_dict(), assign=True)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        found: Tensor = TrainedNetwork(tmp_path, arch=arch).network(image).logits
        assert torch.equal(found, network(image).logits)
        assert not torch.allclose(found, smaller(image).logits)


@pytest.mark.parametrize(
    ("teacher", "student", "size", "line"),
    [
        ("ResNet18", "resnet8", 96, "resnet8 is designed for images of 32 pixels, and these have "
         "96: its maps are up to 9 times as large; networks for large images are ResNet18, "),
        ("vgg8", "MobileNetV1", 224, "vgg8 is designed .* up to 49 times as large"),
        ("ResNet18", "MobileNetV1", 224, None),
        ("wrn_16_1", "resnet8", 64, None),
    ],
)  # fmt: skip
def test_networks_for_small_images_are_reported(
    teacher: str, student: str, size: int, line: str | None,
    composed: Compose, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = (f"arch@teacher={teacher}", f"arch@student={student}", f"dataset.size={size}")
    with torch.device("meta"):
        for _ in range(2):
            check_compatible(composed("method=kd", "dataset=folder", *words))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (line is not None)
    assert line is None or re.match(f"warning: {line}", lines[0])
