"""Folding the BatchNorms of a frozen network into the convolutions in front of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# The largest difference that rounding may make, relative to a tensor's largest entry. It is some
# hundred times what the suite's networks show, and far below what another forward makes.
_TOLERANCE = 1e-3


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Return a network with the same features as ``network`` in eval mode, in fewer operations.

    In eval mode a BatchNorm is a fixed scale and shift of each channel, which can be included in
    the weights and the bias of the convolution in front of it (Jacob et al., CVPR 2018, section
    3.2). If another operation reads the output of the convolution, both layers stay. All features
    agree up to rounding.

    ``network`` is put in eval mode and is otherwise unchanged; layers that are not folded are
    shared. A network that cannot be traced is returned unchanged, and so is one whose trace
    computes something else: its forward depends on pixel values or on the type of its input.
    """
    network.eval()
    try:
        folded = _fold(network)
        return folded if _agree(folded, network) else network
    except Exception:  # of the network's own forward, which tracing calls with a stand-in
        return network


def _fold(network: nn.Module) -> fx.GraphModule:
    traced = fx.symbolic_trace(network)
    layers = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        if _can_fold(node, layers, traced.graph):
            (convolution,) = node.args
            fused = fuse_conv_bn_eval(layers[convolution.target], layers[node.target])
            traced.set_submodule(convolution.target, fused)
            node.replace_all_uses_with(convolution)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def _can_fold(node: fx.Node, layers: dict[str, nn.Module], graph: fx.Graph) -> bool:
    """Return whether ``node`` is a BatchNorm and the only reader of a convolution's output."""
    if not _calls(node, nn.BatchNorm2d, layers) or len(node.args) != 1:
        return False
    if layers[str(node.target)].running_mean is None:  # it normalises by its batch
        return False
    (before,) = node.args
    return (
        isinstance(before, fx.Node)
        and _calls(before, nn.Conv2d, layers)
        and len(before.users) == 1
        and len(graph.find_nodes(op="call_module", target=before.target)) == 1
    )


def _calls(node: fx.Node, kind: type[nn.Module], layers: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(layers[str(node.target)], kind)


@torch.no_grad()
def _agree(folded: nn.Module, network: nn.Module) -> bool:
    """Return whether both networks have the same outputs for two random images, up to rounding.

    Copies on the CPU compute them, so that nothing of the networks changes, and a GPU's faster
    multiplication does not count as a difference.
    """
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.random.fork_rng(devices=[]):  # a forward may draw random numbers
        found, expected = (copy.deepcopy(each).cpu()(images) for each in (folded, network))
    return outputs_agree(found, expected, _TOLERANCE)


def outputs_agree(found: Any, expected: Any, tolerance: float) -> bool:
    """Return whether two outputs of networks, which may be nested, have the same tensors.

    A difference may be ``tolerance`` times the largest entry of its tensor.
    """
    ones, others = list(_tensors(found)), list(_tensors(expected))
    return 0 < len(ones) == len(others) and all(
        one.shape == other.shape and _is_close(one.double(), other.double(), tolerance)
        for one, other in zip(ones, others, strict=True)
    )


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if len(finite) else 0.0
    # A network whose outputs are not finite is reported when it is evaluated.
    return torch.allclose(found, expected, rtol=0, atol=tolerance * largest, equal_nan=True)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of ``output``, which may be nested."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
