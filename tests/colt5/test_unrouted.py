"""Layers without routing: they have the weights of the layer that they stand for, and compute what those compute alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from tests.colt5.test_training import SMALL

from tevo.colt5 import training
from tevo.colt5.layers import (
    ConditionalAttention,
    ConditionalFeedForward,
    ConditionalLayer,
    LocalAttention,
    RelativeBias,
)
from tevo.colt5.routers import Budget, Router
from tevo.colt5.unrouted import LightLayer, LongLayer


def conditional(*, radius: int = 3) -> ConditionalLayer:
    torch.manual_seed(0)
    share = Budget(1 / 4)
    attention = ConditionalAttention(
        dim=12,
        light_heads=1,
        heavy_heads=2,
        head_dim=5,
        radius=radius,
        q_router=Router(dim=12, budget=share),
        kv_router=Router(dim=12, budget=share),
        light_bias=RelativeBias(heads=1),
        heavy_bias=RelativeBias(heads=2),
    )
    feed_forward = ConditionalFeedForward(dim=12, light_dim=7, heavy_dim=33, router=Router(dim=12, budget=share))
    return ConditionalLayer(dim=12, attention=attention, feed_forward=feed_forward).double()


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_light_layer_is_the_layer_where_nothing_heavy_is_added() -> None:
    layer = conditional()
    with torch.no_grad():
        layer.attention.heavy.out.weight.zero_()
        layer.feed_forward.heavy.out.weight.zero_()
    x, mask = tokens(29), torch.arange(29) < torch.tensor([[29], [17]])
    torch.testing.assert_close(LightLayer(of=layer)(x, mask=mask), layer(x, mask=mask), rtol=0, atol=1e-12)


def test_every_head_of_the_long_layer_is_one_of_the_layers_heads_in_the_window() -> None:
    layer = conditional()
    heavy, long = layer.attention.heavy, LongLayer(of=layer).double()
    local = LocalAttention(dim=12, heads=2, head_dim=5, radius=3, bias=heavy.bias).double()
    with torch.no_grad():
        local.qkv.weight.copy_(torch.cat([heavy.q.weight, heavy.kv.weight]))
        local.out.weight.copy_(heavy.out.weight)
    # with fewer tokens than a block there are no summaries
    x = tokens(15)
    torch.testing.assert_close(long.attention(x), layer.attention.light(x) + local(x), rtol=0, atol=1e-12)
    # with more there are
    x = tokens(33)
    more = long.attention(x) - layer.attention.light(x) - local(x)
    assert float(more.detach().abs().max()) > 1e-3
    assert long.feed_forward.out.in_features == 2 * layer.feed_forward.light.out.in_features


def test_the_new_feed_forward_is_as_loud_as_the_light_one() -> None:
    layer = conditional()
    with torch.no_grad():
        layer.feed_forward.light.out.weight.mul_(0.1)
    loud = LongLayer(of=layer).feed_forward.out.weight.std()
    torch.testing.assert_close(loud.double(), layer.feed_forward.light.out.weight.std())


@pytest.mark.parametrize(("routing", "name"), [("none", "LightLayer"), ("longt5", "LongLayer")])
def test_models_without_routing_learn_and_refuse_forced_tokens(routing: str, name: str) -> None:
    task = training.build_task(SMALL)
    torch.manual_seed(0)
    model = training.build_model(replace(SMALL, routing=routing), task)
    rows = task.batch("valid", 0, 0, 2)
    model(rows["inputs"], rows["shown"]).square().mean().backward()
    for one, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, one
    with pytest.raises(ValueError, match=f"{name} got forced or forbidden tokens"):
        model.model.encoder(rows["inputs"], forced=rows["inputs"] > 3)
