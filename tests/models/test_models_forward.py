"""Each family's forward pass, compared with one written from the state dict alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sskd.models import Features, build_model

State = dict[str, Tensor]


def conv(state: State, name: str, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    padding = weight.shape[-1] // 2
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding, groups=groups)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    def of_channel(suffix: str) -> Tensor:
        return state[f"{name}.{suffix}"][:, None, None]

    scale = of_channel("weight") / (of_channel("running_var") + 1e-5).sqrt()
    return (x - of_channel("running_mean")) * scale + of_channel("bias")


def conv_norm(
    state: State, number: int, prefix: str, x: Tensor, stride: int = 1, groups: int = 1
) -> Tensor:
    convolved = conv(state, f"{prefix}conv{number}", x, stride, groups)
    return norm(state, f"{prefix}bn{number}", convolved)


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def shuffle(x: Tensor, groups: int) -> Tensor:
    channels = x.shape[1]
    order = [(i % groups) * (channels // groups) + i // groups for i in range(channels)]
    return x[:, order]


def finish(
    state: State, classifier: str, last: Tensor, stem: Tensor, maps: list[tuple[Tensor, Tensor]]
) -> Features:
    pooled = last.flatten(2).mean(2)
    logits = pooled @ state[f"{classifier}.weight"].T + state[f"{classifier}.bias"]
    stages, preacts = zip(*maps, strict=True)
    return Features(
        logits=logits, pooled=pooled, stem=stem, stages=stages, preacts=preacts, last_map=last
    )


def resnet20(state: State, x: Tensor) -> Features:
    x = stem = relu(conv_norm(state, 1, "", x))
    maps = []
    for layer, stride in ((1, 1), (2, 2), (3, 2)):
        for index in range(3):
            at, first = f"layer{layer}.{index}.", stride if index == 0 else 1
            out = conv_norm(state, 2, at, relu(conv_norm(state, 1, at, x, first)))
            if first == 2:
                x = norm(state, f"{at}downsample.1", conv(state, f"{at}downsample.0", x, 2))
            preact = out + x
            x = relu(preact)
        maps.append((x, preact))
    return finish(state, "fc", x, stem, maps)


def resnet50(state: State, x: Tensor) -> Features:
    x = stem = relu(conv_norm(state, 1, "", x))
    maps = []
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for index in range(blocks):
            at, stride = f"layer{layer}.{index}.", 2 if layer > 1 and index == 0 else 1
            out = relu(conv_norm(state, 1, at, x))
            out = relu(conv_norm(state, 2, at, out, stride))
            out = conv_norm(state, 3, at, out)
            if index == 0:
                x = norm(state, f"{at}shortcut.1", conv(state, f"{at}shortcut.0", x, stride))
            preact = out + x
            x = relu(preact)
        maps.append((x, preact))
    return finish(state, "linear", x, stem, maps)


def wrn_16_2(state: State, x: Tensor) -> Features:
    x = stem = conv(state, "conv1", x)
    stages = []
    for block, stride in ((1, 1), (2, 2), (3, 2)):
        for index in range(2):
            at, first = f"block{block}.layer.{index}.", stride if index == 0 else 1
            active = relu(norm(state, f"{at}bn1", x))
            out = relu(norm(state, f"{at}bn2", conv(state, f"{at}conv1", active, first)))
            x = conv(state, f"{at}convShortcut", active, first) if index == 0 else x
            x = x + conv(state, f"{at}conv2", out)
        stages.append(x)
    following = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
    maps = [(s, norm(state, bn, s)) for s, bn in zip(stages, following, strict=True)]
    return finish(state, "fc", relu(maps[-1][1]), stem, maps)


def vgg13(state: State, x: Tensor) -> Features:
    maps = []
    for block in range(5):
        if block in (1, 2, 3) or (block == 4 and x.shape[-1] == 8):
            x = F.max_pool2d(x, 2)
        out = relu(norm(state, f"block{block}.1", conv(state, f"block{block}.0", x)))
        preact = norm(state, f"block{block}.4", conv(state, f"block{block}.3", out))
        x = relu(preact)
        maps.append((x, preact))
    return finish(state, "classifier", x, maps[0][0], maps[1:])


def mobilenet_v2(state: State, x: Tensor) -> Features:
    x = stem = relu(norm(state, "conv1.1", conv(state, "conv1.0", x, 2)))
    maps = []
    strides, counts = (1, 1, 2, 2, 1, 2, 1), (1, 2, 3, 4, 3, 3, 1)
    for group, (stride, count) in enumerate(zip(strides, counts, strict=True)):
        for index in range(count):
            at = f"blocks.{group}.{index}.conv."
            out = relu(norm(state, f"{at}1", conv(state, f"{at}0", x)))
            wide = out.shape[1]
            out = conv(state, f"{at}3", out, stride if index == 0 else 1, groups=wide)
            out = relu(norm(state, f"{at}4", out))
            out = norm(state, f"{at}7", conv(state, f"{at}6", out))
            x = x + out if x.shape == out.shape else out
        if group in (1, 2, 4, 6):
            maps.append((x, x))
    last = relu(norm(state, "conv2.1", conv(state, "conv2.0", x)))
    return finish(state, "classifier.0", last, stem, maps)


def mobilenet_v1(state: State, x: Tensor) -> Features:
    size = x.shape[-1]
    strides = {0: 2 if size >= 128 else 1, 2: 2 if size >= 64 else 1, 4: 2, 6: 2, 12: 2}
    x = relu(norm(state, "model.0.1", conv(state, "model.0.0", x, strides[0])))
    maps = []
    for block in range(1, 14):
        out = conv(state, f"model.{block}.0", x, strides.get(block, 1), groups=x.shape[1])
        out = relu(norm(state, f"model.{block}.1", out))
        preact = norm(state, f"model.{block}.4", conv(state, f"model.{block}.3", out))
        x = relu(preact)
        if block in (1, 3, 5, 11, 13):  # the last ones at their resolution
            maps.append((x, preact))
    return finish(state, "fc", x, maps[0][0], maps[1:])


def shuffle_v1(state: State, x: Tensor) -> Features:
    x = stem = relu(conv_norm(state, 1, "", x))
    maps = []
    for layer, blocks in enumerate((4, 8, 4), start=1):
        for index in range(blocks):
            at, stride = f"layer{layer}.{index}.", 2 if index == 0 else 1
            groups = 1 if (layer, index) == (1, 0) else 3
            out = shuffle(relu(conv_norm(state, 1, at, x, 1, groups)), groups)
            out = relu(conv_norm(state, 2, at, out, stride, out.shape[1]))
            out = conv_norm(state, 3, at, out, 1, 3)
            # The zero padding counts in this average.
            halved = F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=2)
            preact = torch.cat([out, halved], 1) if index == 0 else out + x
            x = relu(preact)
        maps.append((x, preact))
    return finish(state, "linear", x, stem, maps)


def shuffle_v2(state: State, x: Tensor) -> Features:
    x = stem = relu(conv_norm(state, 1, "", x))
    maps = []
    for layer, blocks in enumerate((4, 8, 4), start=1):
        at = f"layer{layer}.0."
        left = conv_norm(state, 1, at, x, 2, x.shape[1])
        left = relu(conv_norm(state, 2, at, left))
        right = relu(conv_norm(state, 3, at, x))
        right = conv_norm(state, 4, at, right, 2, right.shape[1])
        right = relu(conv_norm(state, 5, at, right))
        x = shuffle(torch.cat([left, right], 1), 2)
        for index in range(1, blocks):
            at, half = f"layer{layer}.{index}.", x.shape[1] // 2
            passed, out = x[:, :half], relu(conv_norm(state, 1, f"{at}", x[:, half:]))
            before = conv_norm(state, 3, at, conv_norm(state, 2, at, out, 1, half))
            preact = torch.cat([passed, before], 1)
            x = shuffle(torch.cat([passed, relu(before)], 1), 2)
        maps.append((x, preact))
    return finish(state, "linear", relu(conv_norm(state, 2, "", x)), stem, maps)


REFERENCES: dict[str, Callable[[State, Tensor], Features]] = {
    "resnet20": resnet20,
    "ResNet50": resnet50,
    "wrn_16_2": wrn_16_2,
    "vgg13": vgg13,
    "MobileNetV2": mobilenet_v2,
    "MobileNetV1": mobilenet_v1,
    "ShuffleV1": shuffle_v1,
    "ShuffleV2": shuffle_v2,
}


def draw_batch_norms(state: State) -> None:
    """Give every BatchNorm different statistics and a different affine map, so that each one has
    an effect and none can be confused with another."""
    for name in [name for name in state if name.endswith("running_mean")]:
        prefix = name.removesuffix("running_mean")
        state[name].normal_(0, 0.3)
        state[f"{prefix}bias"].normal_(0, 0.3)
        state[f"{prefix}running_var"].uniform_(0.5, 2)
        state[f"{prefix}weight"].uniform_(0.5, 1.5)


@pytest.mark.parametrize(
    ("name", "size"),
    [*((name, 32) for name in REFERENCES), ("vgg13", 64), ("MobileNetV1", 128)],
)
def test_forward_agrees_with_the_reference(name: str, size: int) -> None:
    torch.manual_seed(0)
    model = build_model(name, 10, size).double().eval()
    state = model.state_dict()
    draw_batch_norms(state)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.inference_mode():
        found, expected = model(images), REFERENCES[name](state, images)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
