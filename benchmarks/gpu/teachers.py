"""A teacher, folded and fused, and the network itself: the differences of their features."""

from __future__ import annotations

import torch

from benchmarks.gpu.differences import CPU, relative
from benchmarks.gpu.steps import IMAGES, images_of
from benchmarks.gpu.worker import Values
from benchmarks.workload import CLASSES, set_statistics
from sskd.device import to_device
from sskd.models import Features, build_model, fold_batch_norms, fuse_layers
from sskd.models.fusing import FusedConvolution
from sskd.precision import computing


@torch.no_grad()
def compare_teacher(name: str, device_name: str, precision: str) -> Values:
    """Compare a network, and the same folded and fused, with itself in float32 on the CPU.

    ``features`` is the largest difference of the fused one, ``plain`` that of the network.
    """
    torch.manual_seed(0)
    device, network = torch.device(device_name), build_model(name, CLASSES)
    set_statistics(network, images_of(IMAGES))
    folded = fold_batch_norms(network)
    x = torch.randn(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with computing("fp32", CPU):
        expected = network(x)
    for each in (network, folded):
        to_device(each, device)
    fused = fuse_layers(folded, precision, len(x)) if device.type == "cuda" else folded
    with computing(precision, device):
        plain, faster = (
            difference_of_features(each(x.to(device)), expected) for each in (network, fused)
        )
    kernels = sum(isinstance(module, FusedConvolution) for module in fused.modules())
    return {"features": faster, "plain": plain, "fused": kernels}


def difference_of_features(found: Features, expected: Features) -> float:
    """Return the largest difference over the logits and the stages."""
    pairs = zip([found.logits, *found.stages], [expected.logits, *expected.stages], strict=True)
    return max(relative(one, other) for one, other in pairs)
