from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.objectives.electra import Electra, ElectraEncoder, replaced_token_loss
from tevo.taps import record
from tevo.testing import RUNGS, relative_rms


def built(**options: object) -> tuple[Electra, ElectraEncoder]:
    torch.manual_seed(0)
    model = ElectraEncoder(vocab=11, dim=12, depth=1, heads=3, length=40, hidden_dim=7).double()
    objective = Electra(vocab=11, dim=12, depth=1, mask_token=3, special=(0, 1), **options).double()  # type: ignore[arg-type]
    return objective, model


def tokens(b: int, n: int, *, low: int = 0) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(low, 11, (b, n), generator=generator), generator


def test_chosen_tokens_are_distinct_never_special_never_padding_and_as_many_as_the_rate_says() -> None:
    objective, _ = built()
    ids, generator = tokens(50, 40)
    mask = torch.arange(40)[None] < torch.arange(1, 51)[:, None].clamp(max=40)
    batch = objective.corrupt(ids, mask=mask, generator=generator)
    for row in range(50):
        chosen = batch["positions"][row][batch["chosen"][row]]
        assert len(set(chosen.tolist())) == len(chosen)
        assert bool(mask[row][chosen].all()) and not bool((ids[row][chosen] <= 1).any())
        real = int(mask[row].sum())
        possible = int((mask[row] & (ids[row] > 1)).sum())
        assert len(chosen) == min(max(1, round(0.15 * real)), possible)
        shown = batch["masked"][row] != ids[row]
        assert set(shown.nonzero()[:, 0].tolist()) <= set(chosen.tolist())
        assert bool((batch["masked"][row][shown] == 3).all())


def test_a_share_of_the_chosen_tokens_is_shown() -> None:
    objective, _ = built()
    ids, generator = tokens(2000, 40, low=4)
    batch = objective.corrupt(ids, generator=generator)
    shown = (batch["masked"].gather(1, batch["positions"]) != 3).double().mean()
    # five standard errors of 12,000 draws
    assert abs(float(shown) - 0.15) < 5 * (0.15 * 0.85 / 12000) ** 0.5


def test_a_uniform_generator_replaces_k_times_one_minus_one_over_v() -> None:
    objective, model = built()
    with torch.no_grad():
        objective.norm.weight.zero_()
        objective.norm.bias.zero_()
    ids, generator = tokens(2000, 20)
    batch = objective.corrupt(ids, generator=generator)
    with record() as seen, torch.no_grad():
        objective(model, batch)
    replaced = float((seen["corrupted"][0] != ids).double().sum())
    k = float(batch["chosen"].sum())
    assert abs(replaced - k * (1 - 1 / 11)) < 5 * (k * (1 / 11) * (10 / 11)) ** 0.5


def test_no_gradient_of_the_discriminators_loss_reaches_the_generator() -> None:
    objective, model = built()
    ids, generator = tokens(3, 20)
    batch = objective.corrupt(ids, generator=generator)
    own = [*objective.generator.parameters(), *objective.narrow.parameters(), objective.bias]
    gradients = []
    for weight in (0.0, 50.0):
        objective.weight = weight
        gradients.append(torch.autograd.grad(objective(model, batch).total, own))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_generator_does_not_see_what_was_masked() -> None:
    objective, model = built(keep=0.0)
    ids, generator = tokens(3, 20, low=4)
    batch = objective.corrupt(ids, generator=generator)
    other = dict(batch, tokens=ids.scatter(1, batch["positions"], 5))
    assert torch.equal(objective.predictions(model, batch), objective.predictions(model, other))


def test_padding_changes_nothing() -> None:
    objective, model = built()
    ids, generator = tokens(2, 20)
    batch = objective.corrupt(ids, generator=generator)
    padded = dict(batch)
    for name in ("tokens", "masked"):
        padded[name] = torch.cat([batch[name], torch.full((2, 7), 9)], 1)
    padded["mask"] = torch.arange(27)[None].expand(2, -1) < 20
    assert relative_rms(objective(model, padded).total, objective(model, batch).total) <= RUNGS["F64"]


def test_a_certain_discriminator_has_no_loss() -> None:
    replaced = torch.tensor([[True, False, True]])
    scores = torch.where(replaced, 1e3, -1e3)
    assert float(replaced_token_loss(scores, replaced, torch.ones(1, 3, dtype=torch.bool))) == 0
    assert float(replaced_token_loss(scores, replaced, torch.zeros(1, 3, dtype=torch.bool))) == 0


def test_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="0 <= mask_token < vocab"):
        Electra(vocab=11, dim=12, depth=1, mask_token=11)
    _, model = built()
    with pytest.raises(ValueError, match="rebuild with length>=41"):
        model(torch.zeros(1, 41, dtype=torch.long))
