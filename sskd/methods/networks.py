"""The two networks that a method compares, and the sizes and modules that it reads off them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from sskd.data import Images
from sskd.errors import UserError
from sskd.models import Features


@dataclass(frozen=True)
class Networks:
    """A student, its teacher, and the data that the student is trained on.

    ``teacher`` is None for a method that needs no teacher. ``heads`` is the state of the modules
    that the teacher was trained with, if it has some (``Method.heads``).
    """

    student: nn.Module
    teacher: nn.Module | None
    data: Images
    heads: Mapping[str, Tensor] | None = None

    def probe(self) -> tuple[Features, Features]:
        """Return the features of one zero image, the student's and the teacher's."""
        assert self.teacher is not None
        return probe_features(self.student, self.data), probe_features(self.teacher, self.data)

    def stage_shapes(self) -> list[tuple[torch.Size, torch.Size]]:
        """Return the shapes ``[c, h, w]`` of each stage's map, the student's and the teacher's.

        Raises:
            UserError: the networks do not have the same number of stages.
        """
        student, teacher = (features.stages for features in self.probe())
        if len(student) != len(teacher):
            raise UserError(
                f"compares the networks stage by stage, and the teacher has {len(teacher)} stages, "
                f"the student {len(student)}; choose networks with the same number of stages"
            )
        return [(s.shape[1:], t.shape[1:]) for s, t in zip(student, teacher, strict=True)]


def probe_features(network: nn.Module, data: Images) -> Features:
    """Return ``network``'s features of one zero image of ``data``'s size, to read shapes from."""
    with torch.no_grad():
        return _forward_zeros(network, data)


def _forward_zeros(network: nn.Module, data: Images) -> Features:
    was_training = network.training
    parameter = next(network.parameters())
    shape = (1, 3, data.image_size, data.image_size)
    image = torch.zeros(shape, device=parameter.device, requires_grad=torch.is_grad_enabled())
    features: Features = network.eval()(image.clone())  # which a network may change in place
    network.train(was_training)
    return features


def classifier_of(network: nn.Module, data: Images) -> nn.Linear:
    """Return the linear layer of ``network`` that maps the pooled feature to the logits.

    Raises:
        UserError: there is none.
    """
    found: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        found.append((layer, inputs[0], output))

    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    hooks = [layer.register_forward_hook(record) for layer in layers]
    features = probe_features(network, data)
    for hook in hooks:
        hook.remove()
    for layer, pooled, logits in found:
        if pooled is features.pooled and logits is features.logits:
            return layer
    raise UserError(
        f"needs a linear classifier between the pooled feature and the logits, and "
        f"{type(network).__name__} has none; choose networks that have one"
    )


def last_layers(
    network: nn.Module, data: Images, outputs: Callable[[Features], Iterable[Tensor]]
) -> list[nn.Module | None]:
    """Return the last layer with parameters that each of ``outputs`` of the features depends on.

    The last is the one that depends on the most others. So it is not that of a shortcut, which may
    be computed after the residual. None: the output depends on no layer.
    """
    layers: dict[Node | None, nn.Module] = {}

    def record(layer: nn.Module, _: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            layers[output.grad_fn] = layer

    modules = [module for module in network.modules() if list(module.parameters(recurse=False))]
    hooks = [module.register_forward_hook(record) for module in modules]
    features = _forward_zeros(network, data)
    for hook in hooks:
        hook.remove()
    places = {node: len(_nodes_behind(node) & layers.keys()) for node in layers}
    found = []
    for output in outputs(features):
        behind = _nodes_behind(output.grad_fn)
        last = max((n for n in layers if n in behind), key=places.__getitem__, default=None)
        found.append(layers.get(last))
    return found


def _nodes_behind(root: Node | None) -> set[Node]:
    """Return ``root`` and the nodes of the autograd graph that it depends on."""
    found: set[Node] = set()
    pending = [root]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found.add(node)
            pending += [before for before, _ in node.next_functions]
    return found


def modules_behind(
    network: nn.Module, data: Images, outputs: Callable[[Features], Iterable[Tensor]]
) -> list[nn.Module]:
    """Return the modules of ``network`` that ``outputs`` of its features depend on.

    They are the largest modules all of whose parameters receive a gradient from the outputs.

    Raises:
        ValueError: some parameter receives a gradient and is in none of those modules.
    """
    parameters = list(network.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    network.requires_grad_(True)
    total = torch.stack([output.sum() for output in outputs(_forward_zeros(network, data))]).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter in frozen:
        parameter.requires_grad_(False)
    unused = {id(p) for p, grad in zip(parameters, gradients, strict=True) if grad is None}
    modules = _modules_without(network, unused)
    if sum(len(list(module.parameters())) for module in modules) + len(unused) < len(parameters):
        raise ValueError(
            "the outputs depend on a parameter of a module that also holds parameters they do not "
            "depend on"
        )
    return modules


def _modules_without(module: nn.Module, unused: set[int]) -> list[nn.Module]:
    if unused.isdisjoint(id(parameter) for parameter in module.parameters()):
        return [module]
    return [part for child in module.children() for part in _modules_without(child, unused)]
