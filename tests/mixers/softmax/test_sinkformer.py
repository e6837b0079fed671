from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.mixers.softmax.sinkformer import Sinkhorn, sinkhorn
from tevo.mixers.softmax.softmax import SoftmaxAttention


def draw(n: int, m: int) -> Tensor:
    return torch.randn(2, 3, n, m, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(("n", "m"), [(13, 13), (13, 7), (7, 13)])
def test_in_the_limit_rows_sum_to_one_and_columns_to_rows_over_columns(n: int, m: int) -> None:
    a = sinkhorn(draw(n, m), 301)
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 3, n, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(a.sum(-2), torch.full((2, 3, m), n / m, dtype=torch.float64), rtol=1e-10, atol=0)


def test_one_step_is_softmax() -> None:
    s = draw(13, 7)
    torch.testing.assert_close(sinkhorn(s, 1), s.softmax(-1), rtol=1e-13, atol=0)


def test_addends_of_rows_and_columns_leave_the_limit_unchanged() -> None:
    s, more = draw(5, 7), draw(5, 7)
    moved = s + more[..., :1] + more[..., :1, :]
    torch.testing.assert_close(sinkhorn(moved, 401), sinkhorn(s, 401), rtol=1e-9, atol=1e-12)


def test_symmetric_scores_have_a_symmetric_limit() -> None:
    s = draw(7, 7)
    a = sinkhorn(s + s.mT, 401)
    torch.testing.assert_close(a, a.mT, rtol=1e-9, atol=1e-12)


def test_without_the_rows_and_columns_of_padding_the_rest_is_as_if_there_were_none() -> None:
    s = draw(9, 9)
    real = torch.tensor([[True] * 9, [False, True, True, True, True, True, True, False, False]])
    a = sinkhorn(s, 3, real[:, None, :, None] & real[:, None, None, :])
    alone = sinkhorn(s[1:, :, 1:7, 1:7], 3)
    torch.testing.assert_close(a[1:, :, 1:7, 1:7], alone, rtol=1e-12, atol=0)
    assert float(a[1].sum()) == pytest.approx(float(alone.sum()), rel=1e-12)


def test_the_true_gradient_is_that_of_finite_differences_and_the_released_one_is_not() -> None:
    s = draw(3, 4)[:1, :1].requires_grad_()
    assert torch.autograd.gradcheck(lambda t: sinkhorn(t, 4), s, fast_mode=True)
    cotangent = draw(3, 4)[1:, :1]
    (true,) = torch.autograd.grad(Sinkhorn(iterations=4)(s), s, cotangent)
    (released,) = torch.autograd.grad(Sinkhorn(iterations=4, released_gradient=True)(s), s, cotangent)
    assert float((true - released).abs().max()) > 1e-2


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations=0"):
        Sinkhorn(iterations=0)


def test_attention_that_is_causal_refuses_it_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="causal=True with the normaliser Sinkhorn, which has no causal form"):
        SoftmaxAttention(dim=12, heads=3, causal=True, normaliser=Sinkhorn())
    SoftmaxAttention(dim=12, heads=3, normaliser=Sinkhorn())
