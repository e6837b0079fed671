"""Multi-query attention: what shared keys and values mean."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.mixers.softmax.multi_head import MultiHead
from tevo.mixers.softmax.multi_query_attention import MultiQuery
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.testing.tolerances import RUNGS, relative_rms


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_equals_multi_head_attention_whose_heads_of_a_group_are_equal(groups: int) -> None:
    torch.manual_seed(0)
    shared, full = MultiQuery(dim=18, heads=6, groups=groups), MultiHead(dim=18, heads=6)
    with torch.no_grad():
        full.q.weight.copy_(shared.q.weight)
        full.out.weight.copy_(shared.out.weight)
        # heads 0..h/g-1 take group 0, and so on
        kv = shared.kv.weight.unflatten(0, (2, groups, 1, 3)).expand(-1, -1, 6 // groups, -1, -1)
        full.kv.weight.copy_(kv.flatten(0, 3))
    x, y = draw(2, 13, 18), draw(2, 7, 18, seed=2)
    one = SoftmaxAttention(dim=18, heads=shared).double()(x, y)
    other = SoftmaxAttention(dim=18, heads=full).double()(x, y)
    assert relative_rms(one, other) <= RUNGS["F64"]


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_grouped_queries_of_torch(groups: int) -> None:
    torch.manual_seed(0)
    heads = MultiQuery(dim=12, heads=4, groups=groups).double()
    x = draw(2, 13, 12)
    q, k, v = heads.split(x, x)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    ours = SoftmaxAttention(dim=12, heads=heads, causal=True)(x)
    assert relative_rms(ours, heads.merge(o)) <= RUNGS["F64"]


def test_the_cache_holds_one_head_per_group() -> None:
    mixer = SoftmaxAttention(dim=12, heads=MultiQuery(dim=12, heads=6, groups=2), causal=True).double()
    with torch.no_grad():
        _, state = mixer.step(draw(2, 5, 12), mixer.init_state(2))
    assert [tuple(leaf.shape) for leaf in state[:2]] == [(2, 2, 5, 2), (2, 2, 5, 2)]


def test_keys_start_as_those_of_multi_head_attention() -> None:
    torch.manual_seed(0)
    few, many = MultiQuery(dim=256, heads=8), MultiHead(dim=256, heads=8)
    # 2 x 32 x 256 draws: the sample deviation is within 3 % of the true one at more than four standard errors
    assert float(few.kv.weight.detach().std() / many.kv.weight.detach().std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("groups", [0, 4])
def test_refuses_groups_that_do_not_divide_the_heads(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups={groups} key heads among heads=6"):
        MultiQuery(dim=12, heads=6, groups=groups)
