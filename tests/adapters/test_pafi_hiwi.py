from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tevo.adapters.pafi_hiwi import HiWi, PaFi, smallest
from tevo.models.causal_lm import CausalLM
from tevo.models.encoder import Encoder
from tevo.testing.tolerances import RUNGS, relative_rms


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(dim=12, depth=2, heads=3, hidden_dim=19).double()


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_exactly_k_are_chosen_where_values_are_tied() -> None:
    index = smallest([torch.tensor([[1.0, -1.0], [3.0, 1.0]]), torch.tensor([1.0, -0.5])], 3)
    assert sum(len(i) for i in index) == 3 and 1 in index[1].tolist() and 2 not in index[0].tolist()


def test_pafi_equals_descent_with_a_masked_gradient() -> None:
    ours, theirs = encoder(), encoder()
    adapter = PaFi(fraction=0.1)
    optimiser = torch.optim.SGD(adapter.attach(ours), lr=0.1)
    flat = torch.cat([p.detach().abs().flatten() for p in theirs.parameters()])
    k = round(0.1 * len(flat))
    limit = flat.sort().values[k - 1]
    # biases of zero are tied: the choice among them is the adapter's, and all of them lie within k here
    assert int((flat <= limit).sum()) == k
    masks = [(p.detach().abs() <= limit) for p in theirs.parameters()]
    for step in range(3):
        optimiser.zero_grad()
        (ours(drawn(step)) - drawn(9)).square().mean().backward()
        optimiser.step()
        theirs.zero_grad()
        (theirs(drawn(step)) - drawn(9)).square().mean().backward()
        with torch.no_grad():
            for p, mask in zip(theirs.parameters(), masks, strict=True):
                assert p.grad is not None
                p.sub_(0.1 * p.grad * mask)
    adapter.merge(ours)
    for (name, p), mask, base in zip(ours.named_parameters(), masks, encoder().parameters(), strict=True):
        assert relative_rms(p, theirs.get_parameter(name)) <= RUNGS["F64"]
        assert torch.equal(p[~mask], base[~mask])


def test_what_is_stored_is_k_values() -> None:
    model = CausalLM(vocab=11, dim=12, depth=2, heads=3, hidden_dim=19)
    total = sum(p.numel() for p in model.encoder.blocks.parameters())
    given = PaFi(fraction=0.005).attach(model)
    assert sum(p.numel() for p in given) == round(0.005 * total)
    assert not model.embedding.weight.requires_grad


def test_hiwi_adapts_the_biases_of_channel_mixers_and_a_head_stays_whole() -> None:
    model = CausalLM(vocab=11, dim=12, depth=2, heads=3, hidden_dim=19)
    HiWi(rank=4, also=("head.*",)).attach(model)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    under = {n.rsplit(".parametrizations.", 1)[0] for n in names}
    assert under == {f"encoder.blocks.{i}.channel.{part}" for i in range(2) for part in ("into", "out")} | {
        "head.weight"
    }


def test_an_adapted_model_can_be_copied_and_generates() -> None:
    model = CausalLM(vocab=11, dim=12, depth=1, heads=3).eval()
    HiWi(rank=4).attach(model)
    prompt = torch.tensor([[3, 1, 4]])
    wanted = model.generate(prompt, new_tokens=4, temperature=0)
    assert torch.equal(copy.deepcopy(model).generate(prompt, new_tokens=4, temperature=0), wanted)


def test_what_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of CausalLM is named like"):
        HiWi(rank=2).attach(CausalLM(vocab=11, dim=12, depth=1, heads=3, channel="gelu(bias=False)"))
    with pytest.raises(ValueError, match="nothing to merge"):
        PaFi().merge(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="fraction=0"):
        PaFi(fraction=0)
    with pytest.raises(ValueError, match="rank=0"):
        HiWi(rank=0)
