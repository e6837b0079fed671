from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.functional.linear_attention import causal_linear_attention
from tevo.mixers.linear.gated_linear_attention import (
    GatedLinearAttention,
    gated_linear_attention,
    plain_gated_linear_attention,
)
from tevo.testing import RUNGS, relative_rms


def parts(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, n, e, dtype=torch.float64, generator=generator) for e in (4, 4, 5, 4))
    return q, k, v, -g.square()


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 64])
def test_chunks_of_any_size_equal_the_recurrence(chunk: int) -> None:
    q, k, v, g = parts(13)
    state = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        gated_linear_attention(q, k, v, g, state, chunk=chunk),
        plain_gated_linear_attention(q, k, v, g, state),
    )
    assert all(relative_rms(a, b) <= RUNGS["F64"] for a, b in zip(ours, theirs, strict=True))


def test_without_fading_it_is_linear_attention() -> None:
    q, k, v, g = parts(13)
    ours, _ = gated_linear_attention(q, k, v, torch.zeros_like(g))
    assert relative_rms(ours, causal_linear_attention(q, k, v)[0] / 2) <= RUNGS["F64"]


def test_one_factor_a_head_is_linear_attention_with_decay() -> None:
    q, k, v, g = parts(13)
    ours, _ = gated_linear_attention(q, k, v, g[..., :1].expand_as(g))
    assert relative_rms(ours, causal_linear_attention(q, k, v, g=g[..., 0])[0] / 2) <= RUNGS["F64"]


def test_fading_at_once_reads_the_own_token_only_and_stays_finite() -> None:
    q, k, v, g = (t.requires_grad_() for t in parts(40))
    o, _ = gated_linear_attention(q, k, v, g - 1e4)
    own = (q * k).sum(-1, keepdim=True) * v / 2
    assert relative_rms(o, own) <= RUNGS["F64"]
    assert all(bool(t.isfinite().all()) for t in torch.autograd.grad(o.sum(), (q, k, v, g)))


def test_refuses_what_it_has_no_form_for() -> None:
    with pytest.raises(ValueError, match="build it with causal=True"):
        GatedLinearAttention(dim=12, heads=3, causal=False)
    with pytest.raises(ValueError, match="a tau above 0"):
        GatedLinearAttention(dim=12, heads=3, tau=0.0)
    with pytest.raises(ValueError, match="with itself only"):
        GatedLinearAttention(dim=12, heads=3)(torch.zeros(1, 2, 12), torch.zeros(1, 4, 12))
