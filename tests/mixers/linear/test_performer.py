from __future__ import annotations

import pytest
import torch

from tevo.mixers.linear.performer import Performer, PerformerReLU, orthogonal_features, positive_features
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.testing import relative_rms


def test_features_are_orthogonal_in_groups_with_normal_lengths() -> None:
    w = orthogonal_features(10, 4, generator=torch.Generator().manual_seed(0))
    for start in (0, 4, 8):
        group = w[start : start + 4]
        products = group @ group.T
        torch.testing.assert_close(products, products.diag().diag(), rtol=0, atol=1e-12)
    many = orthogonal_features(4000, 4, generator=torch.Generator().manual_seed(1)).square().sum(1)
    # five standard errors of a chi-squared variable of 4 degrees
    assert abs(float(many.mean()) - 4) < 5 * (8 / 4000) ** 0.5


def test_directions_of_features_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.stack([orthogonal_features(4, 4, generator=generator) for _ in range(3000)]).mean(0)
    # of a normal vector's entries; five standard errors
    assert float(means.abs().max()) < 5 / 3000**0.5


def test_products_of_features_have_the_exponential_as_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    draws = 3000
    products = torch.stack(
        [
            positive_features(q, w) @ positive_features(k, w)
            for w in (orthogonal_features(8, 4, generator=generator) for _ in range(draws))
        ]
    )
    wanted = float((q @ k / 2).exp())
    assert abs(float(products.mean()) - wanted) < 5 * float(products.std()) / draws**0.5


def test_more_features_come_nearer_to_softmax_attention() -> None:
    torch.manual_seed(0)
    exact = SoftmaxAttention(dim=12, heads=3).double()
    # short queries and keys: the estimate's variance grows exponentially with their lengths
    x = 0.3 * torch.randn(2, 13, 12, dtype=torch.float64)
    errors = []
    for features in (16, 256, 4096):
        mixer = Performer(dim=12, heads=3, features=features).double()
        mixer.heads.load_state_dict(exact.heads.state_dict())
        errors.append(sum(relative_rms(mixer(x), exact(x)) for _ in range(8) if mixer.redraw() is None) / 8)
    # errors fall as the root of the number of features: by 4 each time, give or take the luck of the draws
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 2


@pytest.mark.parametrize("cls", [Performer, PerformerReLU])
def test_features_are_saved_and_redrawn_on_demand(cls: type[Performer]) -> None:
    torch.manual_seed(0)
    one, two = cls(dim=12, heads=3, features=5), cls(dim=12, heads=3, features=5)
    assert not torch.equal(one.w, two.w)
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.w, two.w)
    two.redraw(torch.Generator().manual_seed(0))
    assert not torch.equal(one.w, two.w)


def test_large_keys_and_queries_give_finite_values() -> None:
    torch.manual_seed(0)
    mixer = Performer(dim=64, heads=1)
    y = mixer(30 * torch.randn(2, 13, 64))
    assert bool(y.isfinite().all())


def test_refuses_no_features() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Performer(dim=12, heads=3, features=0)
