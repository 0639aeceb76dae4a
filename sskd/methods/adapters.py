"""What methods put between two networks, with every size read off the networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sskd.data import Images
from sskd.errors import UserError
from sskd.models import Features


def probe_features(network: nn.Module, data: Images) -> Features:
    """Return ``network``'s features of one zero image of ``data``'s size, to read shapes from."""
    with torch.no_grad():
        return _forward_zeros(network, data)


def _forward_zeros(network: nn.Module, data: Images) -> Features:
    was_training = network.training
    parameter = next(network.parameters())
    image = torch.zeros(1, 3, data.image_size, data.image_size, device=parameter.device)
    features: Features = network.eval()(image)
    network.train(was_training)
    return features


def stage_shapes(
    student: nn.Module, teacher: nn.Module, data: Images
) -> list[tuple[torch.Size, torch.Size]]:
    """Return the shapes ``[c, h, w]`` of each stage's map, the student's and the teacher's.

    Raises:
        UserError: the networks do not have the same number of stages.
    """
    ours, theirs = probe_features(student, data).stages, probe_features(teacher, data).stages
    if len(ours) != len(theirs):
        raise UserError(
            f"compares the networks stage by stage, and the teacher has {len(theirs)} stages, "
            f"the student {len(ours)}; choose networks with the same number"
        )
    return [(s.shape[1:], t.shape[1:]) for s, t in zip(ours, theirs, strict=True)]


def modules_behind(
    network: nn.Module, data: Images, outputs: Callable[[Features], Iterable[Tensor]]
) -> list[nn.Module]:
    """Return the parts of ``network`` that ``outputs`` of its features depend on.

    They are its largest modules all of whose parameters reach one of the outputs. Raises
    ValueError where those do not hold every parameter that does.
    """
    parameters = list(network.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    network.requires_grad_(True)
    total = torch.stack([output.sum() for output in outputs(_forward_zeros(network, data))]).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter in frozen:
        parameter.requires_grad_(False)
    unused = {id(p) for p, grad in zip(parameters, gradients, strict=True) if grad is None}
    parts = _parts_without(network, unused)
    if sum(len(list(part.parameters())) for part in parts) + len(unused) < len(parameters):
        raise ValueError("a parameter of its own lies beside modules that the outputs do not need")
    return parts


def _parts_without(module: nn.Module, unused: set[int]) -> list[nn.Module]:
    if unused.isdisjoint(id(parameter) for parameter in module.parameters()):
        return [module]
    return [part for child in module.children() for part in _parts_without(child, unused)]


def pool_to_smaller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps ``[B, c, h, w]`` to the smaller one's height and width.

    The channels of either stay as they are.
    """
    (height, width), other = first.shape[2:], second.shape[2:]
    if (height, width) == other:
        return first, second
    size = min(height, other[0]), min(width, other[1])
    return F.adaptive_avg_pool2d(first, size), F.adaptive_avg_pool2d(second, size)


def conv_regressor(student: torch.Size, teacher: torch.Size) -> nn.Sequential:
    """Return a convolution and a BatchNorm that map the student's maps to the teacher's shape.

    Romero et al., ICLR 2015, section 2.2, with the kernels of the CRD benchmark: transposed
    4x4 of stride 2 for maps half as large as the teacher's, 3x3 of stride 2 for maps twice as
    large, else a kernel as large as the difference and one, without padding.

    Args:
        student: ``[c, h, w]`` of the student's maps.
        teacher: ``[c, h, w]`` of the teacher's.

    Raises:
        UserError: the student's maps are smaller than the teacher's, and not by half.
    """
    (channels, size, _), (wanted, target, _) = student, teacher
    convolution: nn.Module
    if 2 * size == target:
        convolution = nn.ConvTranspose2d(channels, wanted, 4, stride=2, padding=1)
    elif size == 2 * target:
        convolution = nn.Conv2d(channels, wanted, 3, stride=2, padding=1)
    elif size >= target:
        convolution = nn.Conv2d(channels, wanted, 1 + size - target)
    else:
        raise UserError(
            f"cannot map the student's {size}x{size} to the teacher's {target}x{target}: a "
            "student's map may be half as large or larger; choose other networks"
        )
    return nn.Sequential(convolution, nn.BatchNorm2d(wanted))


class ProjectionHead(nn.Sequential):
    """SSKD's projection head on the pooled feature: Linear(d, d), ReLU, Linear(d, d)."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
