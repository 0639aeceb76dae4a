"""Frozen networks, with each BatchNorm that follows a convolution folded into it."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Return a network that computes what ``network`` does in eval mode, in fewer operations.

    In eval mode a BatchNorm is a fixed scale and shift of each channel, which the convolution
    in front of it takes into its weights and bias (Jacob et al., CVPR 2018, section 3.2). Where
    something else sees the convolution's own output, both stay. All features agree to rounding.

    ``network`` is put in eval mode and else not changed; layers that are not folded are shared.
    One whose forward cannot be traced, because it chooses by what an image holds, is returned
    as it is.
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
    """Tell whether ``node`` is a BatchNorm that alone sees the output of a convolution."""
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
