"""Naive Bayes context extension: several contexts are continued by the same tokens, and their predictions are merged.

    l_i = log softmax(model(S_i, T)),  i = 0..k,  S_0 empty; all but the likeliest tokens of joint
          probability top_p are filtered: l_i = -inf, the others not normalised again                       (1)
    H_i = -sum_w exp(l_iw) max(l_iw, -100) - eta [i was chosen for the token before]                        (2)
    lbar = l_c, c = argmin_{i >= 1} H_i;  with ``mean``  lbar = (1/k) sum_{i >= 1} l_i                      (3)
    log p(T | S_1..k) = (1 + beta) lbar - beta l_0 + const,  or lbar where l_0 < -100                       (4)

No training. Of contexts that are independent given the text, mean with beta = k - 1 is exact Bayes. Cost and state of
k + 1 models.

Source: 2403.17552, spaces.ac.cn/archives/9617, and its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Inference, LanguageModel, State

CARD = Card(
    id="nbce",
    role="inference",
    summary="Contexts are continued side by side; the surest one's prediction is sharpened against that without context.",
    equations=(
        r"H_i = -\sum_w p_{iw} \log p_{iw} - \eta\,[i = c_{t-1}],\quad c_t = \arg\min_{i \ge 1} H_i",
        r"\log p(T \mid S_{1..k}) = (1 + \beta) \log p(T \mid S_{c_t}) - \beta \log p(T) + \text{const}",
    ),
    exports={"nbce": "NBCE"},
    cost="n^2",
    claims=("exact_state",),
    examples=({}, {"mean": True, "beta": 2.0}, {"top_p": 1.0, "eta": 0.0}, {"top_p": 0.4, "beta": 0.0}),
    reduces_to=("the model alone, after one context, with beta=0 and top_p=1",),
    equals=("bojone/NBCE 2362c6cc54d4, test.py; values in tests/golden/nbce_a.npz",),
    departures=(
        "The stay bonus also holds between the tokens of the question: any split of what follows the contexts gives the "
        "same scores. The released code chooses afresh for the first generated token, which with the bonus of 0.1 nats "
        "can keep another context there.",
        "Sampling (the released code: temperature 0.01) is the caller's.",
        "Contexts have a state each instead of a padded batch of k + 1 rows: positions are the same, no mask is needed.",
    ),
    notes="The question is stepped after the contexts, so that the empty context sees it too.",
)


def filtered(logits: Tensor, top_p: float) -> Tensor:
    """Equation (1): logits (..., V) as log-probabilities, -inf where likelier tokens have joint probability >= top_p."""
    logp = logits.log_softmax(-1)
    if top_p == 1:
        return logp
    ordered, order = logp.sort(-1, descending=True)
    p = ordered.exp()
    late = p.cumsum(-1) - p >= top_p
    # the likeliest token always stays
    late[..., 0] = False
    return logp.masked_fill(torch.zeros_like(late).scatter(-1, order, late), -torch.inf)


def entropies(logp: Tensor, before: Tensor, eta: float) -> Tensor:
    """Equation (2): ``logp`` (b, k + 1, V) and the context chosen ``before`` (b,), 0 for none, give (b, k + 1)."""
    stays = torch.arange(logp.shape[1], device=logp.device) == before[:, None]  # b k+1
    bonus = (stays & (before > 0)[:, None]).to(logp.dtype) * eta
    return -(logp.exp() * logp.clamp(-100, 0)).sum(-1) - bonus


def against_empty(pooled: Tensor, empty: Tensor, beta: float) -> Tensor:
    """Equation (4): (..., V) each."""
    # filtered tokens would give inf - inf
    unreliable = empty < -100
    return torch.where(unreliable, pooled, (1 + beta) * pooled - beta * empty.masked_fill(unreliable, 0.0))


class NBCE(Inference):
    """A language model that reads several contexts apart.

    Args:
        model: any language model.
        beta: weight of the contrast to the prediction without context, >= 0.
        eta: nats of entropy that the context chosen for the token before is favoured by.
        top_p: joint probability of the tokens that are kept of each prediction, in (0, 1].
        mean: contexts are pooled by their mean instead of the surest one.
    """

    def __init__(
        self, *, model: LanguageModel, beta: float = 0.25, eta: float = 0.1, top_p: float = 0.95, mean: bool = False
    ) -> None:
        super().__init__()
        if beta < 0 or not 0 < top_p <= 1:
            raise ValueError(f"NBCE got beta={beta} and top_p={top_p}; expected beta >= 0 and 0 < top_p <= 1")
        self.model, self.beta, self.eta, self.top_p, self.mean = model, beta, eta, top_p, mean

    @torch.no_grad()
    def start(self, contexts: Sequence[Tensor]) -> State:
        """Read the contexts, token ids (b, C_i); gives the context chosen last (b,), and k + 1 states, the empty first."""
        self.check_contexts(contexts)
        batch = len(contexts[0])
        states = [self.model.init_state(batch)]
        states += [self.model.step(tokens, self.model.init_state(batch))[1] for tokens in contexts]
        return torch.zeros(batch, dtype=torch.long, device=contexts[0].device), tuple(states)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """``tokens`` (b, n) after each context give log-probabilities (b, n, V) up to a constant, and the next state."""
        before, states = cast("tuple[Tensor, tuple[State, ...]]", state)
        logits, after = zip(*(self.model.step(tokens, own) for own in states), strict=True)
        logp = filtered(torch.stack(logits, 1), self.top_p)  # b k+1 n V
        if self.mean:
            return against_empty(logp[:, 1:].mean(1), logp[:, 0], self.beta), (before, after)
        pooled = [logp[:, 1, :0]]
        for t in range(tokens.shape[1]):
            now = logp[:, :, t]  # b k+1 V
            before = entropies(now, before, self.eta)[:, 1:].argmin(1) + 1  # (eq. 3)
            pooled.append(now.take_along_dim(before[:, None, None], 1))  # b 1 V
        return against_empty(torch.cat(pooled, 1), logp[:, 0], self.beta), (before, after)
