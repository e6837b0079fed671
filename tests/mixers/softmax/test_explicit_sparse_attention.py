"""Explicit sparse attention: limits, ties, and what the dropped scores feel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.mixers.softmax.explicit_sparse_attention import ExplicitSparse, top_k_softmax


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("k", [7, 8, 100])
def test_equals_softmax_when_k_is_all_keys(k: int) -> None:
    s = draw(2, 3, 13, 7)
    assert torch.equal(top_k_softmax(s, k), s.softmax(-1))


def test_one_key_is_the_hard_maximum() -> None:
    s = draw(2, 3, 13, 7)
    assert torch.equal(top_k_softmax(s, 1), torch.nn.functional.one_hot(s.argmax(-1), 7).double())


def test_exactly_k_weights_of_a_row_are_not_zero() -> None:
    assert (top_k_softmax(draw(2, 3, 13, 7), 4) > 0).sum(-1).eq(4).all()


def test_scores_that_tie_with_the_kth_are_all_kept() -> None:
    s = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert (top_k_softmax(s, 2) > 0).tolist() == [True, True, True, True, False]


def test_dropped_scores_get_no_gradient_and_kept_ones_that_of_softmax() -> None:
    s = draw(5, 7).requires_grad_()
    cotangent = draw(5, 7, seed=2)
    weights = top_k_softmax(s, 3)
    (gradient,) = torch.autograd.grad(weights, s, cotangent)
    kept = weights > 0
    assert (gradient[~kept] == 0).all()
    w, g = weights[kept].reshape(5, 3), cotangent[kept].reshape(5, 3)
    wanted = w * (g - (w * g).sum(-1, keepdim=True))
    # three products and a sum in float64
    torch.testing.assert_close(gradient[kept].reshape(5, 3), wanted, rtol=1e-12, atol=1e-15)


def test_rows_with_fewer_than_k_keys_use_those_they_have() -> None:
    s = draw(1, 1, 5, 5)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    weights = top_k_softmax(s, 3, allowed)
    assert (weights > 0).sum(-1).flatten().tolist() == [1, 2, 3, 3, 3]
    assert (weights.masked_select(~allowed) == 0).all()


def test_refuses_no_keys() -> None:
    with pytest.raises(ValueError, match="topk=0"):
        ExplicitSparse(topk=0)
