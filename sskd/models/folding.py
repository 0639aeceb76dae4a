"""Folding the BatchNorms of a frozen network into the convolutions in front of them."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Return a network with the same features as ``network`` in eval mode, in fewer operations.

    In eval mode a BatchNorm is a fixed scale and shift of each channel, which can be included in
    the weights and the bias of the convolution in front of it (Jacob et al., CVPR 2018, section
    3.2). If another operation reads the output of the convolution, both layers stay. All features
    agree up to rounding.

    ``network`` is put in eval mode and is otherwise unchanged; layers that are not folded are
    shared. A network that cannot be traced, because its forward depends on pixel values, is
    returned unchanged.
    """
    network.eval()
    try:
        traced = fx.symbolic_trace(network)
    except (fx.proxy.TraceError, TypeError):
        return network
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
    (before,) = node.args
    return (
        isinstance(before, fx.Node)
        and _calls(before, nn.Conv2d, layers)
        and len(before.users) == 1
        and len(graph.find_nodes(op="call_module", target=before.target)) == 1
    )


def _calls(node: fx.Node, kind: type[nn.Module], layers: dict[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(layers[str(node.target)], kind)
