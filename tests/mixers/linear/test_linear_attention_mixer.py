from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tevo.mixers.linear.linear_attention import LinearAttention, causal_read, elu_features, read, summarise


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_features_are_elu_plus_one_with_its_gradient(generator: torch.Generator) -> None:
    x = 3 * torch.randn(50, dtype=torch.float64, generator=generator)
    x[0] = 0
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = elu_features(one), F.elu(two) + 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-14)


def test_features_of_very_negative_entries_do_not_vanish() -> None:
    assert float(elu_features(torch.tensor(-30.0))) > 0


def test_every_output_is_an_average_of_values(generator: torch.Generator) -> None:
    q, k = (elu_features(torch.randn(2, 3, n, 4, dtype=torch.float64, generator=generator)) for n in (5, 9))
    v = torch.ones(2, 3, 9, 4, dtype=torch.float64)
    torch.testing.assert_close(read(q, summarise(k, v), 0.0), v[:, :, :5], rtol=0, atol=1e-14)


@pytest.mark.parametrize(("n", "m"), [(5, 9), (9, 5), (7, 7), (4, 0), (0, 4)])
def test_causal_queries_are_aligned_with_the_last_keys(n: int, m: int, generator: torch.Generator) -> None:
    q, k = (elu_features(torch.randn(2, 3, length, 4, dtype=torch.float64, generator=generator)) for length in (n, m))
    v = torch.randn(2, 3, m, 4, dtype=torch.float64, generator=generator)
    weights = (q @ k.mT).tril(m - n)
    wanted = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(causal_read(q, k, v, 1e-6), wanted, rtol=0, atol=1e-13)


def test_the_state_of_a_context_is_read_and_never_written(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    mixer = LinearAttention(dim=12, heads=3).double()
    x, context = (torch.randn(2, n, 12, dtype=torch.float64, generator=generator) for n in (5, 9))
    mask = torch.arange(9)[None] < torch.tensor([[9], [4]])
    state = mixer.init_state(2, context=context, mask=mask)
    ys = []
    for t in range(5):
        y, state = mixer.step(x[:, t : t + 1], state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), mixer(x, context, mask=mask), rtol=0, atol=1e-14)


def test_half_precision_sums_in_float32(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    mixer = LinearAttention(dim=12, heads=3)
    x = torch.randn(1, 3001, 12, generator=generator)
    wanted = mixer(x)
    y = mixer.bfloat16()(x.bfloat16()).float()
    # a bfloat16 sum of 3001 positive features would stop growing at 256: only the projections' 8 bits may be lost
    torch.testing.assert_close(y, wanted, rtol=0, atol=2e-2)


def test_has_no_state_of_its_own_without_causality() -> None:
    with pytest.raises(ValueError, match="causal=True"):
        LinearAttention(dim=12, heads=3).init_state(1)
