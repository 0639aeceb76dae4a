"""Layers of a frozen network that an NVIDIA GPU computes in one kernel instead of several."""

from __future__ import annotations

import copy
import operator
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sskd.models.folding import outputs_agree
from sskd.precision import computing, exact

_RELU_FUNCTIONS = (F.relu, torch.relu)
_TOLERANCE = 1e-5  # of the features, relative to a tensor's largest entry


class FusedConvolution(nn.Conv2d):
    """``relu(layer(x))`` or ``relu(layer(x) + summand)``, with the weights of ``layer``.

    An NVIDIA GPU computes it in one kernel if no gradient passes through it. A convolution with a
    bias and a ReLU is otherwise three kernels, and the sum a fourth.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        kernel: Any = layer.kernel_size
        shape = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        super().__init__(layer.in_channels, layer.out_channels, kernel, **shape, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, input: Tensor, summand: Tensor | None = None) -> Tensor:
        """Return the map [N, C, H, W] of ``input``; ``summand`` has the shape of the result."""
        if not _has_kernel(input):
            found = self._conv_forward(input, self.weight, self.bias)
            return F.relu(found if summand is None else found + summand)
        # Autocast does not know these functions.
        is_cast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if is_cast else input.dtype
        x, weight = input.to(dtype), self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        stride, dilation, groups = self.stride, self.dilation, self.groups
        padding = cast(tuple[int, int], self.padding)
        if summand is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        return torch.cudnn_convolution_add_relu(
            x, weight, summand.to(dtype), 1.0, bias, stride, padding, dilation, groups
        )


class FrozenBatchNorm(nn.Module):
    """``layer(x)`` in eval mode, with the standard deviations computed once.

    In bf16 PyTorch otherwise copies the running mean and computes the standard deviations again.
    """

    inverse_std: Tensor

    def __init__(self, layer: nn.BatchNorm2d) -> None:
        super().__init__()
        self.layer = layer
        assert layer.running_var is not None
        inverse_std = (layer.running_var + layer.eps).rsqrt()
        self.register_buffer("inverse_std", inverse_std, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised map of ``x`` [N, C, H, W]."""
        layer = self.layer
        if not _has_kernel(x):
            normalised: Tensor = layer(x)
            return normalised
        assert layer.running_mean is not None
        return torch.batch_norm_elemt(
            x, layer.weight, layer.bias, layer.running_mean, self.inverse_std, layer.eps
        )


def _has_kernel(x: Tensor) -> bool:
    """Return whether the kernels of this module exist for ``x``: without a gradient, on a GPU."""
    return x.device.type == "cuda" and not (torch.is_grad_enabled() and x.requires_grad)


def fuse_layers(network: nn.Module, precision: str = "fp32", images: int = 2) -> nn.Module:
    """Return a network with the same features as ``network`` on its GPU, in fewer kernels.

    ``network`` is a result of ``fold_batch_norms``, in eval mode on an NVIDIA GPU. It is returned
    itself if it could not be traced, if the features differ by more than 1e-5 of the largest, or if
    cuDNN has no kernel for a batch of ``images`` in ``precision``.
    """
    if not isinstance(network, fx.GraphModule):
        return network
    try:
        fused = _fuse(network)
        if not _agree(fused, network):
            return network
        x = _noise(network, images)
        with torch.no_grad(), computing(precision, x.device):
            fused(x)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # of cuDNN, which does not support each shape and type on each GPU
        return network
    return fused


def _fuse(network: fx.GraphModule) -> fx.GraphModule:
    fused = fx.GraphModule(network, copy.deepcopy(network.graph))
    for relu in list(fused.graph.nodes):
        if _is_relu(relu, fused) and (found := _convolution_before(relu.args[0], fused)):
            convolution, summands = found
            target = str(convolution.target)
            layer = cast(nn.Conv2d, fused.get_submodule(target))
            fused.set_submodule(target, FusedConvolution(layer))
            with fused.graph.inserting_before(relu):
                node = fused.graph.call_module(target, (*convolution.args, *summands))
            relu.replace_all_uses_with(node)
            fused.graph.erase_node(relu)
    for name, layer in list(fused.named_modules()):
        if isinstance(layer, nn.BatchNorm2d) and layer.affine and layer.running_var is not None:
            fused.set_submodule(name, FrozenBatchNorm(layer))
    fused.graph.eliminate_dead_code()
    fused.recompile()
    return fused


def _is_relu(node: fx.Node, network: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(network.get_submodule(str(node.target)), nn.ReLU)
    return node.op == "call_function" and node.target in _RELU_FUNCTIONS


def _convolution_before(
    node: fx.Node, network: fx.GraphModule
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """Return the convolution whose output, or a sum with it, is ``node``; and the other summand.

    Return None if there is none, or if something else reads its output or the sum.
    """
    if _can_fuse(node, network):
        return node, ()
    if node.target is operator.add and len(node.users) == 1:
        first, second = node.args
        for convolution, summand in ((first, second), (second, first)):
            if isinstance(summand, fx.Node) and _can_fuse(convolution, network):
                return convolution, (summand,)
    return None


def _can_fuse(node: object, network: fx.GraphModule) -> TypeGuard[fx.Node]:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    if len(node.users) != 1 or node.kwargs:
        return False
    layer = network.get_submodule(str(node.target))
    used_once = len(network.graph.find_nodes(op="call_module", target=node.target)) == 1
    # PyTorch has kernels of its own for convolutions of single channels.
    plain = isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    return used_once and plain and isinstance(layer.padding, tuple)


@torch.no_grad()
def _agree(fused: nn.Module, network: nn.Module) -> bool:
    x = _noise(network, 2)
    with exact(x.device):
        return outputs_agree(fused(x), network(x), _TOLERANCE)


def _noise(network: nn.Module, images: int) -> Tensor:
    parameter = next(network.parameters())
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return x.to(parameter).to(memory_format=torch.channels_last)
