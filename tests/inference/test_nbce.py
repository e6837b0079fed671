from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tevo.contracts import State
from tevo.inference.nbce import NBCE, entropies, filtered
from tevo.testing.tolerances import RUNGS, relative_rms


class Table(nn.Module):
    """A model whose prediction depends on the last word of what it read first."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def init_state(self, batch: int) -> State:
        return torch.zeros(batch, dtype=torch.long)

    def step(
        self, tokens: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        # a context stays what decides, whatever follows it
        assert isinstance(state, Tensor)
        state = torch.where(state > 0, state, tokens[:, -1]) if tokens.shape[1] else state
        return self.logits[state][:, None].expand(-1, tokens.shape[1], -1), state


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def test_the_mean_with_beta_of_k_less_one_is_exact_bayes_for_independent_contexts() -> None:
    # p(T | S_1..k) ~ p(T) prod p(S_i | T): a table of contexts that are independent given the word
    prior, given = drawn(7).softmax(0), drawn(3, 7, 5).softmax(-1)  # V; k V texts
    seen = [2, 0, 4]
    posteriors = torch.stack([prior * given[i, :, s] for i, s in enumerate(seen)])
    exact = prior * torch.stack([given[i, :, s] for i, s in enumerate(seen)]).prod(0)
    singles = (posteriors / posteriors.sum(-1, keepdim=True)).log()
    logits = torch.zeros(6, 7, dtype=torch.float64)
    logits[1:4], logits[5] = singles, prior.log()
    reader = NBCE(model=Table(logits), mean=True, beta=2.0, top_p=1.0)
    scores, _ = reader.step(torch.tensor([[5]]), reader.start([torch.tensor([[i]]) for i in (1, 2, 3)]))
    assert relative_rms(scores.softmax(-1)[0, 0], exact / exact.sum()) <= RUNGS["F64"]


def test_without_information_in_the_contexts_it_is_the_model() -> None:
    model = Table(drawn(1, 7).expand(9, 7))
    for beta in (0.0, 0.25, 3.0):
        reader = NBCE(model=model, beta=beta, top_p=1.0)
        scores, _ = reader.step(torch.tensor([[5]]), reader.start([torch.tensor([[1]]), torch.tensor([[2, 3]])]))
        assert relative_rms(scores.softmax(-1)[0, 0], model.logits[0].softmax(-1)) <= RUNGS["F64"]


def test_the_only_informative_context_is_the_one_that_speaks() -> None:
    logits = torch.zeros(9, 7, dtype=torch.float64)
    logits[4, 6] = 8.0
    reader = NBCE(model=Table(logits))
    state = reader.start([torch.tensor([[1]]), torch.tensor([[3, 4]]), torch.tensor([[2]])])
    scores, (chosen, _) = reader.step(torch.tensor([[5]]), state)
    assert int(scores[0, 0].argmax()) == 6
    assert isinstance(chosen, Tensor) and int(chosen) == 2


def test_the_context_chosen_before_is_kept_within_its_bonus() -> None:
    logp = drawn(1, 3, 7).log_softmax(-1)
    plain = entropies(logp, torch.zeros(1).long(), 0.1)
    other = 3 - (int(plain[0, 1:].argmin()) + 1)
    gap = float((plain[0, 1] - plain[0, 2]).abs())
    for eta, wanted in ((0.9 * gap, 3 - other), (1.1 * gap, other)):
        assert int(entropies(logp, torch.tensor([other]), eta)[0, 1:].argmin()) + 1 == wanted


def test_the_likeliest_word_survives_any_filter() -> None:
    logp = filtered(drawn(5, 7), 1e-9)
    assert bool((logp.isfinite().sum(-1) == 1).all())


def test_a_part_that_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(ValueError, match="expected beta >= 0 and 0 < top_p <= 1"):
        NBCE(model=Table(drawn(2, 2)), top_p=0.0)
