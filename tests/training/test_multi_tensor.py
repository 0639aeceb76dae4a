"""Work on many tensors at once, compared with PyTorch's own for each of them."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sskd.models import build_model
from sskd.training.multi_tensor import CastWeights, batch_norms_counted_together


class Two(nn.Module):
    """A trained network that computes twice, and a frozen one.

    A layer of the trained one also computes in float32, its weight is also read by itself, and a
    subclass of a layer uses its weight in another way.
    """

    trained: Any

    def __init__(self) -> None:
        super().__init__()
        self.trained = build_model("resnet8", 5).train()
        self.trained.add_module("scaled", Scaled(64, 5))
        self.frozen = build_model("resnet8", 5).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            first, second = self.trained(x), self.trained(-x)
            gap = first.logits - self.frozen(x).logits + self.trained.scaled(first.pooled)
            with torch.autocast("cpu", enabled=False):
                again = self.trained.fc(second.pooled.float())
        assert again.dtype == torch.float32
        terms = (gap, second.pooled, again, self.trained.fc.weight)
        return torch.stack([term.float().square().mean() for term in terms]).sum()


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * (1 + 1e-3))


@pytest.mark.usefixtures("pytorchs_convolutions")
def test_weights_cast_at_once_have_autocasts_gradients() -> None:
    torch.manual_seed(0)
    plain = Two()
    cast = copy.deepcopy(plain)
    x = torch.randn(4, 3, 32, 32)
    weights = CastWeights(cast, cast.trained)
    optimizers = [torch.optim.SGD(each.trained.parameters(), 0.1) for each in (plain, cast)]
    for _ in range(2):
        losses = []
        blocks: list[AbstractContextManager[None]] = [nullcontext(), weights.in_place()]
        for module, optimizer, block in zip((plain, cast), optimizers, blocks, strict=True):
            optimizer.zero_grad()
            with block:
                losses.append(module(x))
                losses[-1].backward()
            optimizer.step()
        assert losses[0] == losses[1]
        same = zip(plain.named_parameters(), cast.parameters(), strict=True)
        for (name, expected), found in same:
            assert torch.equal(expected, found), name
            if expected.grad is not None:
                assert found.grad is not None, name
                assert torch.equal(expected.grad, found.grad), name
    assert all(parameter.dtype == torch.float32 for parameter in cast.parameters())


def test_a_layer_may_take_its_input_by_name_or_be_missing() -> None:
    layer = nn.Linear(3, 2)
    with CastWeights(layer, layer).in_place(), torch.autocast("cpu", torch.bfloat16):
        layer(input=torch.randn(4, 3)).float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    alone = Scaled(3, 2)
    with CastWeights(alone, alone).in_place(), torch.autocast("cpu", torch.bfloat16):
        assert alone(torch.randn(4, 3)).dtype == torch.bfloat16


def test_an_error_leaves_the_own_weights_and_counters() -> None:
    network: Any = build_model("resnet8", 5)
    before = network.state_dict(keep_vars=True)
    weights = CastWeights(network, network)
    used: list[torch.dtype] = []
    network.bn1.register_forward_pre_hook(lambda *_: used.append(network.conv1.weight.dtype))
    network.conv1.register_forward_hook(lambda layer, *_: used.append(layer.weight.dtype))
    with weights.in_place(), torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(1, 3, 8, 8))
    assert used == [torch.bfloat16, torch.float32]
    with pytest.raises(KeyError), weights.in_place(), batch_norms_counted_together(network):
        raise KeyError
    after = network.state_dict(keep_vars=True)
    assert all(after[name] is tensor for name, tensor in before.items())


def test_batch_norms_count_each_of_their_batches() -> None:
    torch.manual_seed(0)
    network = build_model("resnet8", 5).train()
    averaged = nn.BatchNorm2d(3, momentum=None)  # divides by its counter
    module = nn.ModuleList([network, averaged])
    plain = copy.deepcopy(module)
    x = torch.randn(4, 3, 8, 8)
    for each, block in ((plain, nullcontext()), (module, batch_norms_counted_together(module))):
        with block:
            each[1](x)
            each[0](each[1](x))
            each[0].eval()(x)
            each[0].train()(x)
    for (name, expected), found in zip(plain.named_buffers(), module.buffers(), strict=True):
        assert torch.equal(expected, found), name
    assert network.state_dict()["bn1.num_batches_tracked"] == 2
