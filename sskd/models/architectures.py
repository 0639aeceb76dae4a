"""The architectures by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from sskd.errors import UserError, did_you_mean
from sskd.models.imagenet_resnet import ImageNetResNet
from sskd.models.mobilenet_v1 import MobileNetV1
from sskd.models.mobilenet_v2 import MobileNetV2
from sskd.models.resnet import BasicBlock, ResNet
from sskd.models.resnet50 import Bottleneck, ResNet50
from sskd.models.shufflenet_v1 import ShuffleNetV1
from sskd.models.shufflenet_v2 import ShuffleNetV2
from sskd.models.vgg import VGG
from sskd.models.wide_resnet import WideResNet

_ImageNetBottleneck = partial(Bottleneck, shortcut_name="downsample")

# Each is a function of the number of classes, and of the keyword ``image_size`` if it has one.
ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet8": partial(ResNet, depth=8, widths=(16, 16, 32, 64)),
    "resnet14": partial(ResNet, depth=14, widths=(16, 16, 32, 64)),
    "resnet20": partial(ResNet, depth=20, widths=(16, 16, 32, 64)),
    "resnet32": partial(ResNet, depth=32, widths=(16, 16, 32, 64)),
    "resnet44": partial(ResNet, depth=44, widths=(16, 16, 32, 64)),
    "resnet56": partial(ResNet, depth=56, widths=(16, 16, 32, 64)),
    "resnet110": partial(ResNet, depth=110, widths=(16, 16, 32, 64)),
    "resnet8x4": partial(ResNet, depth=8, widths=(32, 64, 128, 256)),
    "resnet32x4": partial(ResNet, depth=32, widths=(32, 64, 128, 256)),
    "ResNet50": ResNet50,
    "wrn_16_1": partial(WideResNet, depth=16, widening=1),
    "wrn_16_2": partial(WideResNet, depth=16, widening=2),
    "wrn_40_1": partial(WideResNet, depth=40, widening=1),
    "wrn_40_2": partial(WideResNet, depth=40, widening=2),
    "vgg8": partial(VGG, convolutions=(1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, convolutions=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, convolutions=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, convolutions=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, convolutions=(2, 2, 4, 4, 4)),
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleNetV1,
    "ShuffleV2": ShuffleNetV2,
    "ResNet18": partial(
        ImageNetResNet, block=BasicBlock, blocks=(2, 2, 2, 2), widths=(64, 128, 256, 512)
    ),
    "ResNet34": partial(
        ImageNetResNet, block=BasicBlock, blocks=(3, 4, 6, 3), widths=(64, 128, 256, 512)
    ),
    "ResNet50_224": partial(
        ImageNetResNet,
        block=_ImageNetBottleneck,
        blocks=(3, 4, 6, 3),
        widths=(256, 512, 1024, 2048),
    ),
    "MobileNetV1": MobileNetV1,
}


def build_model(name: str, num_classes: int, image_size: int = 32) -> nn.Module:
    """Build the named network with newly initialised weights; its forward returns ``Features``.

    Args:
        image_size: pixels of a side, which decide the first layers of the networks for ImageNet.
            The others ignore it.

    Raises:
        UserError: no architecture has that name.
    """
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(
            f"no architecture '{name}'{did_you_mean(name, ARCHITECTURES)} (there are: {known})"
        )
    sized = {"image_size": image_size} if takes_image_size(name) else {}
    return ARCHITECTURES[name](num_classes, **sized)


def takes_image_size(name: str) -> bool:
    """Return whether the layers of the named network depend on the size of the images.

    Its function then has a parameter ``image_size`` without a default.
    """
    try:
        parameters = inspect.signature(ARCHITECTURES[name]).parameters
    except (TypeError, ValueError):  # it is built in
        return False
    size = parameters.get("image_size")
    return size is not None and size.default is inspect.Parameter.empty
