"""What holds for every network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.checks import require
from sskd.models import Features, build_model, fold_batch_norms, recognise


def check_features(name: str, classes: int = 10) -> None:
    """Check the shapes of the ``Features`` of the network ``name``, for 32 and 64 pixels a side."""
    for size in (32, 64):
        network = build_model(name, classes, size).eval()
        with torch.no_grad():
            features = network(torch.randn(2, 3, size, size))
        require(isinstance(features, Features), "its forward does not return Features")
        logits, pooled = _shape(features.logits), _shape(features.pooled)
        require(logits == (2, classes), f"logits have shape {logits}, not {(2, classes)}")
        require(len(pooled) == 2, f"pooled has shape {pooled}, not (2, d)")
        maps = [features.stem, *features.stages]
        require(all(each.ndim == 4 for each in maps), "stem and stages should be [B, c, h, w]")
        stages, preacts = (list(map(_shape, each)) for each in (features.stages, features.preacts))
        require(stages == preacts, f"stages {stages} and preacts {preacts} differ in shape")
        mean = features.last_map.mean(dim=(2, 3))
        agree = mean.shape == features.pooled.shape and torch.allclose(mean, features.pooled)
        require(agree, "pooled is not the mean of last_map over its positions")


def check_gradients(name: str) -> None:
    """Check that each parameter gets a finite gradient from the cross-entropy of a batch."""
    network = _network(name).train()
    F.cross_entropy(network(torch.randn(2, 3, 32, 32)).logits, torch.tensor([3, 7])).backward()
    for parameter_name, parameter in network.named_parameters():
        gradient = parameter.grad
        sound = gradient is not None and bool(gradient.isfinite().all())
        require(sound, f"{parameter_name} has no finite gradient")


def check_single_image(name: str) -> None:
    """Check that an image has the same features alone as in a batch, in eval mode."""
    network = _network(name).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        together, alone = network(images), network(images[1:])
    for left, right in zip(_flatten(together), _flatten(alone), strict=True):
        tolerance = 1e-4 * float(right.abs().max())
        close = torch.allclose(left[1:], right, rtol=1e-3, atol=tolerance)
        require(close, "the features of an image depend on the other images of its batch")


def check_teacher(name: str) -> None:
    """Check that the network has the same features as a frozen teacher, whose layers are folded.

    Batches and images have several sizes. Nothing of the network changes.
    """
    network = _network(name).requires_grad_(False)
    _set_statistics(network)
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    teacher = fold_batch_norms(network)
    for images, size in ((1, 32), (5, 32), (2, 64)):
        x = torch.randn(images, 3, size, size)
        with torch.inference_mode():
            found, expected = teacher(x), network(x)
        require(isinstance(found, Features), "a teacher does not return Features")
        for left, right in zip(_flatten(found), _flatten(expected), strict=True):
            close = torch.allclose(left, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))
            require(
                close,
                f"as a frozen teacher, the network has different features for {images} images of "
                f"{size} pixels a side",
            )
    for key, tensor in network.state_dict().items():
        require(torch.equal(tensor, state[key]), f"a teacher changes {key} in eval mode")


def _set_statistics(network: nn.Module) -> None:
    """Give each BatchNorm statistics as after training: new ones are zeros and ones."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None:
            assert layer.running_var is not None
            layer.running_mean.uniform_(-0.3, 0.3)
            layer.running_var.uniform_(0.5, 2.0)


def check_recognition(name: str) -> None:
    """Check that a checkpoint of the network is recognised: its classifier is registered last."""
    found = recognise(build_model(name, 7).state_dict())
    require(
        found == (name, 7),
        f"its tensors are recognised as {found}; the last layer that it registers should be its "
        "classifier, with a bias",
    )


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, 10)


def _flatten(features: Features) -> list[Tensor]:
    logits, pooled, stem, stages, preacts, last_map = features
    return [logits, pooled, stem, *stages, *preacts, last_map]


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
