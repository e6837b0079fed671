"""RWKV-4: attention is replaced by a decayed exponential average of values, the feed-forward by a gated one.

    x~_t(mu) = mu x_t + (1 - mu) x_{t-1}                                                          (1)  token shift
    k_t = W_k x~_t(mu_k),  v_t = W_v x~_t(mu_v),  r_t = W_r x~_t(mu_r)                            (2)
    wkv_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same with v = 1)        (3)
    TimeMix_t = W_o (sigmoid(r_t) wkv_t)                                                          (4)
    ChannelMix_t = sigmoid(W_r' x~_t(mu_r')) (W_v' relu(W_k' x~_t(mu_k'))^2)                      (5)
    x <- x + TimeMix(LN_1(x));  x <- x + ChannelMix(LN_2(x))                                      (6)

w = exp(decay) > 0 and u are learned per feature. The first block of a stack normalises its input before anything else,
the last one its output. Cost O(n d^2); state 5 d numbers: the last input of both mixers, and of (3) the numerator, the
denominator and the exponent that is taken out of them.

Source: 2305.13048, section 3 and appendix.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State
from tevo.functional.exponential import WkvState, sequential_wkv, wkv, wkv_state
from tevo.functional.masks import check_mask, refuse_context, to_front

CARD = Card(
    id="rwkv",
    role="block",
    summary="Replaces attention by a decayed exponential average of values and the feed-forward by a gated, shifted one.",
    equations=(
        r"k_t = W_k(\mu_k x_t + (1 - \mu_k) x_{t-1})\quad\text{and } v_t, r_t \text{ likewise}",
        r"wkv_t = \frac{\sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t}"
        r"{\sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t}}",
        r"x \leftarrow x + W_o(\sigma(r_t) \odot wkv_t)",
        r"x \leftarrow x + \sigma(r'_t) \odot W'_v \max(k'_t, 0)^2",
    ),
    exports={"rwkv": "RWKV"},
    cost="n",
    flops="10 * n * d * d + 4 * n * d * (hidden_dim or 4 * d) + 6 * n * d",
    state="5 * d",
    parameters=(
        "5 * d * d + 2 * d * (hidden_dim or 4 * d) + 11 * d + 2 * d * ((index == 0)"
        " + (1 if depth and index == depth - 1 else 0))"
    ),
    memory="n",
    claims=("causal", "padding", "exact_state", "nan_contained"),
    examples=(
        {"dim": 12},
        {"dim": 5, "hidden_dim": 7, "depth": 3, "index": 0},
        {"dim": 7, "depth": 3, "index": 2},
        {"dim": 3, "depth": 1, "index": 0},
    ),
    equals=("transformers 5.23.0 RwkvForCausalLM: logits, both mixers, state; values in tests/golden/rwkv_a.npz",),
    departures=(
        "Versions 1 to 3 are not built: version 4 supersedes them and is the one the paper describes.",
        "Padding is left out of the averages and the token shift, which the official code cannot do; without a mask "
        "nothing changes.",
    ),
    notes=(
        "All matrices but two of each block start at zero, so that a new block returns its input. The authors train with "
        "embeddings of scale 1e-4, without weight decay, and with a penalty on the largest logit (L2Wrap)."
    ),
)


def token_shift(x: Tensor, last: Tensor) -> Tensor:
    """The tokens before those of ``x`` (b, n, d), of which the first is ``last`` (b, d)."""
    return torch.cat([last[:, None].to(x.dtype), x], 1)[:, :-1]


def mixed(x: Tensor, earlier: Tensor, mu: Tensor) -> Tensor:
    """Equation (1)."""
    return earlier + (x - earlier) * mu


def channel_mix(k: Tensor, r: Tensor, value: nn.Module) -> Tensor:
    """Equation (5) after its first two products: k (b, n, hidden), r (b, n, d)."""
    return r.sigmoid() * value(F.relu(k).square())


class RWKV(nn.Module):
    """A block of RWKV-4.

    Args:
        dim: width d.
        hidden_dim: width inside the channel mixer; by default 4 dim.
        causal: there is no other form.
        dropout: probability with which a sublayer's output feature is dropped in training.
        depth: blocks in the stack.
        index: which of them this is, from 0: the first has a norm before it, the last a norm after it, and initial
            decays and shifts depend on it. Without these facts there are no such norms.
    """

    def __init__(
        self,
        *,
        dim: int,
        hidden_dim: int | None = None,
        causal: bool = True,
        dropout: float = 0.0,
        depth: int | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError("RWKV has no bidirectional form, got causal=False; use causal=True")
        self.dropout = dropout
        self.first = nn.LayerNorm(dim) if index == 0 else None
        self.time_norm = nn.LayerNorm(dim)
        self.time = TimeMix(dim=dim, depth=depth or 1, index=index or 0)
        self.channel_norm = nn.LayerNorm(dim)
        self.channel = ChannelMix(dim=dim, hidden_dim=hidden_dim, depth=depth or 1, index=index or 0)
        self.last = nn.LayerNorm(dim) if depth is not None and index == depth - 1 else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); the order is that of the tensor, whatever ``at`` says."""
        return self.step(x, self.init_state(x.shape[0]), mask=mask, at=at)[0]

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """The last input of the time mixer (b, d), its sums (3 times b d), the last input of the channel mixer (b, d)."""
        refuse_context("RWKV", context)
        like = self.time.decay
        return like.new_zeros(batch, len(like)), wkv_state(batch, like), like.new_zeros(batch, len(like))

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); padding anywhere in it leaves the state as it is."""
        check_mask("RWKV", mask, x.shape[0], x.shape[1])
        if mask is None:
            return self._advance(x, state, None)
        # real tokens to the front, in their order: then padding has no successor that it could reach
        x, count, back = to_front(x, mask)
        y, state = self._advance(x, state, count)
        return y.take_along_dim(back, 1), state

    def _advance(self, x: Tensor, state: State, count: Tensor | None) -> tuple[Tensor, State]:
        """``count`` (b,): how many tokens, from the front, are real; None means all."""
        assert isinstance(state, tuple)
        time_last, sums, channel_last = state
        assert isinstance(time_last, Tensor) and isinstance(channel_last, Tensor)
        x = x if self.first is None else self.first(x)
        y = self.time_norm(x)
        mixed, sums = self.time(y, time_last, sums, count)
        time_last = ending(y, time_last, count)
        x = x + F.dropout(mixed, self.dropout, self.training)
        y = self.channel_norm(x)
        x = x + F.dropout(self.channel(y, channel_last), self.dropout, self.training)
        channel_last = ending(y, channel_last, count)
        return x if self.last is None else self.last(x), (time_last, sums, channel_last)


def ending(x: Tensor, last: Tensor, count: Tensor | None) -> Tensor:
    """The last real token (b, d) of ``x`` (b, n, d), or ``last`` where there is none."""
    both = torch.cat([last[:, None].to(x.dtype), x], 1)
    return both[:, -1] if count is None else both.take_along_dim(count[:, None, None], 1)[:, 0]


class TimeMix(nn.Module):
    """Equations (2) to (4); arguments as for :class:`RWKV`."""

    def __init__(self, *, dim: int, depth: int, index: int) -> None:
        super().__init__()
        self.depth, self.index = depth, index
        self.mix_k = nn.Parameter(torch.empty(dim))
        self.mix_v = nn.Parameter(torch.empty(dim))
        self.mix_r = nn.Parameter(torch.empty(dim))
        self.decay = nn.Parameter(torch.empty(dim))
        self.bonus = nn.Parameter(torch.empty(dim))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the released code: zero matrices but an orthogonal value; half-lives spread over features and depth."""
        d = len(self.decay)
        later, earlier = self.index / max(1, self.depth - 1), 1 - self.index / self.depth
        place = torch.arange(d) / d
        with torch.no_grad():
            self.decay.copy_(-5 + 8 * (torch.arange(d) / max(1, d - 1)) ** (0.7 + 1.3 * later))
            self.bonus.copy_(math.log(0.3) + 0.5 * ((torch.arange(d) + 1) % 3 - 1))
            self.mix_k.copy_(place**earlier)
            self.mix_v.copy_(place**earlier + 0.3 * later)
            self.mix_r.copy_(place ** (0.5 * earlier))
        nn.init.orthogonal_(self.value.weight)
        for linear in (self.key, self.receptance, self.output):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, last: Tensor, sums: State, count: Tensor | None) -> tuple[Tensor, WkvState]:
        """``x`` (b, n, d) after ``last`` (b, d) gives (b, n, d), and the sums after the ``count`` first tokens."""
        numerator, denominator, top = sums
        assert isinstance(numerator, Tensor) and isinstance(denominator, Tensor) and isinstance(top, Tensor)
        earlier, n = token_shift(x, last), x.shape[1]
        k, v = self.key(mixed(x, earlier, self.mix_k)), self.value(mixed(x, earlier, self.mix_v))
        r = self.receptance(mixed(x, earlier, self.mix_r))
        if count is not None:
            k = k.masked_fill(torch.arange(n, device=x.device)[:, None] >= count[:, None, None], -math.inf)
        w = self.decay.to(numerator.dtype).exp()
        average = sequential_wkv if n == 1 else wkv
        y, (numerator, denominator, top) = average(
            k, v, decay=w, bonus=self.bonus, state=(numerator, denominator, top)
        )  # (eq. 3)
        if count is not None:
            # padding weighs nothing but has let the exponent decay
            top = top + (n - count)[:, None] * w.detach()
        return self.output(r.sigmoid() * y), (numerator, denominator, top)


class ChannelMix(nn.Module):
    """Equation (5); arguments as for :class:`RWKV`."""

    def __init__(self, *, dim: int, hidden_dim: int | None, depth: int, index: int) -> None:
        super().__init__()
        self.depth, self.index = depth, index
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.mix_k = nn.Parameter(torch.empty(dim))
        self.mix_r = nn.Parameter(torch.empty(dim))
        self.key = nn.Linear(dim, hidden_dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the released code: zero matrices but an orthogonal key, scaled by sqrt(hidden / d) if that is above 1."""
        d = len(self.mix_k)
        with torch.no_grad():
            for mu in (self.mix_k, self.mix_r):
                mu.copy_((torch.arange(d) / d) ** (1 - self.index / self.depth))
        nn.init.orthogonal_(self.key.weight, gain=max(1.0, self.key.out_features / d) ** 0.5)
        for linear in (self.receptance, self.value):
            nn.init.zeros_(linear.weight)

    def forward(self, x: Tensor, last: Tensor) -> Tensor:
        """``x`` (b, n, d) after ``last`` (b, d) gives (b, n, d)."""
        earlier = token_shift(x, last)
        r = self.receptance(mixed(x, earlier, self.mix_r))
        return channel_mix(self.key(mixed(x, earlier, self.mix_k)), r, self.value)
