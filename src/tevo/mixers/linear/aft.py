"""AFT: attention is replaced, feature by feature, by an average of values weighted by e^(key + learned position bias).

    y_t = sigmoid(q_t) * sum_s e^{k_s + w_ts} v_s / sum_s e^{k_s + w_ts},    s <= t where causal       (1)

full: w = a b^T is learned for all pairs of positions; local: w_ts = 0 where |t - s| >= window, and all tokens still
contribute; simple: w = 0. With E = e^{w - max w} and K = e^{k - max k} both sums are matrix products E (K v), E K     (2)

The causal form of (2) may not take the maximum over later keys. It halves the sequence again and again: the queries of
each right half see all keys of the left half, in one product with the left half's own maximum; blocks of at most 8
tokens are left, which are summed directly. Where all exponents lie close together, one product does. Letters: T queries,
S keys of a product.

Cost O(n^2 d) FLOPs but O(n d) memory beside w (full, local), O(n d) (simple). State: keys and values of all past tokens
(full, local), 3 d numbers (simple).

Source: 2105.14103, sections 3 and 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.cache import append
from tevo.functional.exponential import sequential_wkv, wkv, wkv_state
from tevo.functional.masks import blank, check_mask, positions_of, refuse_context
from tevo.taps import tap

CARD = Card(
    id="aft",
    role="mixer",
    summary="Replaces attention, feature by feature, by values averaged with weights e^(key + learned position bias).",
    equations=(
        r"y_t = \sigma(q_t) \odot \frac{\sum_s e^{k_s + w_{ts}} \odot v_s}{\sum_s e^{k_s + w_{ts}}}",
        r"w = a b^\top\ \text{(full)},\quad w_{ts} = 0\ \text{for}\ |t - s| \ge \text{window (local)},\quad "
        r"w = 0\ \text{(simple)}",
    ),
    exports={"aft": "AFTFull", "aft_local": "AFTLocal", "aft_simple": "AFTSimple"},
    cost="n^2",
    flops="8 * n * d * (hidden_dim or d) + 2 * n * n * (rank or 0) + 4 * n * n * (hidden_dim or d)",
    state="2 * n * (hidden_dim or d)",
    parameters=(
        "4 * d * (hidden_dim or d) + bias * (3 * (hidden_dim or d) + d)"
        " + (2 * rank * length if rank else length * length)"
    ),
    memory="n^2",
    claims=("bidirectional", "causal", "padding", "exact_state", "nan_contained"),
    examples=(
        {"part": "aft", "dim": 12, "length": 37, "rank": 5},
        {"part": "aft", "dim": 7, "hidden_dim": 5, "length": 13, "rank": None, "bias": True},
        {"part": "aft", "dim": 3, "length": 61, "rank": 1},
        {"part": "aft_local", "dim": 12, "length": 37, "rank": 5, "window": 4},
        {"part": "aft_local", "dim": 5, "length": 13, "rank": None, "window": 1},
        {"part": "aft_local", "dim": 7, "length": 29, "rank": 3, "window": 40},
        {"part": "aft_simple", "dim": 12, "hidden_dim": 5},
        {"part": "aft_simple", "dim": 7, "bias": True},
        {"part": "aft_simple", "dim": 3, "hidden_dim": 8},
    ),
    reduces_to=("aft_local with window >= length is aft", "aft with w = 0, and aft_local, are aft_simple"),
    equals=(
        "aft-pytorch 9a89696 AFTFull, AFTSimple (bidirectional); loops in 40-digit arithmetic for the causal and local "
        "forms; values in tests/golden/aft_a.npz",
    ),
    departures=(
        "aft_local computes the dense n x n products of aft with w set to zero outside the window: same output at O(n^2 d) "
        "instead of O(n w d).",
        "AFT-conv, the form for images, is not built.",
    ),
    notes=(
        "FLOPs are those of the bidirectional form; the causal one needs between half and all of the last term. In float32 a "
        "bias more than 80 below the largest of its row counts as minus infinity."
    ),
    variants={
        "aft_simple": {
            "cost": "n",
            "flops": "8 * n * d * (hidden_dim or d)",
            "state": "3 * (hidden_dim or d)",
            "parameters": "4 * d * (hidden_dim or d) + bias * (3 * (hidden_dim or d) + d)",
            "memory": "n",
        },
    },
)

# blocks that are summed directly have half to all of this many tokens
_DIRECT = 8

# float32 reaches down to e^-87
_SPREAD = 80.0

# numerator, denominator, and the exponent that is taken out of both; each broadcastable to (b, T, d)
Sums = tuple[Tensor, Tensor, Tensor]


def aft(q: Tensor, sums: Sums) -> Tensor:
    """Equation (1) from its two sums; zero where no key was seen."""
    numerator, denominator, _ = sums
    return q.sigmoid() * (numerator / denominator.masked_fill(denominator == 0, 1.0)).to(q.dtype)


def all_keys(w: Tensor, k: Tensor, v: Tensor) -> Sums:
    """Equation (2): every query sees every key.

    Args:
        w: (#b, ..., T, S).
        k: (b, ..., S, d); -inf leaves a key out.
        v: (b, ..., S, d).
    """
    # maxima are constants to autograd, because the ratio does not depend on them
    top_w, top_k = w.detach().amax(-1, keepdim=True), _finite(k.detach().amax(-2, keepdim=True))
    weights, keys = (w - top_w).exp(), (k - top_k).exp()
    both = torch.cat([keys * v, keys], -1)  # b ... S 2d
    if w.shape[0] == 1:
        # the batch as further columns of one product: the weights are not repeated
        product = torch.einsum("...ts,b...sd->b...td", weights[0], both)
    else:
        product = weights @ both
    numerator, denominator = product.chunk(2, -1)
    return numerator, denominator, top_w + top_k


def earlier_keys(w: Tensor, k: Tensor, v: Tensor) -> Sums:
    """Query t sees the keys s <= t: w (#b, n, n), k and v (b, n, d)."""
    n = k.shape[1]
    if _narrow(w, k):
        return all_keys(w.masked_fill(_later(n, k.device), -torch.inf), k, v)
    levels = max(0, (2 * n // _DIRECT).bit_length() - 1)
    size = -(-n // 2**levels)
    if pad := size * 2**levels - n:
        w, k, v = F.pad(w, (0, pad, 0, pad)), F.pad(k, (0, 0, 0, pad), value=-torch.inf), F.pad(v, (0, 0, 0, pad))
    sums = _within_blocks(w, k, v, size)
    for level in range(levels):
        sums = _right_from_left(sums, w, k, v, size * 2**level)
    return sums[0][:, :n], sums[1][:, :n], sums[2][:, :n]


def merged(one: Sums, other: Sums) -> Sums:
    """The sums over the keys of both."""
    top = torch.maximum(one[2], other[2])
    a, b = (one[2] - top).exp(), (other[2] - top).exp()
    return one[0] * a + other[0] * b, one[1] * a + other[1] * b, top


def _within_blocks(w: Tensor, k: Tensor, v: Tensor, size: int) -> Sums:
    """Causal sums over the query's own block of ``size`` tokens, without a product of matrices."""
    parts = (-1, size)
    w = w.unflatten(2, parts).unflatten(1, parts).diagonal(0, 1, 3).movedim(-1, 1)  # #b blocks T S
    k, v = k.unflatten(1, parts), v.unflatten(1, parts)  # b blocks S d
    later = _later(size, k.device)[..., None]
    s = (w[..., None] + k[:, :, None]).masked_fill(later, -torch.inf)  # b blocks T S d
    top = _finite(s.detach().amax(3))
    weights = (s - top[..., None, :]).exp()
    # masked once more: a weight of zero would let a later NaN through
    numerator = (weights * v[:, :, None]).masked_fill(later, 0.0).sum(3)
    return numerator.flatten(1, 2), weights.sum(3).flatten(1, 2), top.flatten(1, 2)


def _right_from_left(sums: Sums, w: Tensor, k: Tensor, v: Tensor, size: int) -> Sums:
    """Add to the sums of each second block of ``size`` tokens those over the block before it."""
    pairs = (-1, 2, size)
    w = w.unflatten(2, pairs).unflatten(1, pairs)[:, :, 1, :, :, 0]  # #b pairs T pairs S
    w = w.diagonal(0, 1, 3).movedim(-1, 1)  # #b pairs T S
    left = all_keys(w, k.unflatten(1, pairs)[:, :, 0], v.unflatten(1, pairs)[:, :, 0])
    halves = [x.unflatten(1, pairs).unbind(2) for x in sums]
    right = merged((halves[0][1], halves[1][1], halves[2][1]), left)
    first, second, third = (torch.stack([half[0], x], 2).flatten(1, 3) for half, x in zip(halves, right, strict=True))
    return first, second, third


def _later(n: int, device: torch.device) -> Tensor:
    """(n, n): which keys come after the query."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)


def _narrow(w: Tensor, k: Tensor) -> bool:
    """Whether no exponent of (2) can get lost under the largest, so that one maximum, even a later one, serves all.

    Not asked of a compiler, nor where the answer would have to be waited for.
    """
    if torch.compiler.is_compiling() or k.device.type != "cpu" or k.numel() == 0:
        return False
    with torch.no_grad():
        # padding is minus infinity; a NaN compares as false
        lowest = k.masked_fill(k == -torch.inf, torch.inf).amin(1)
        return bool((k.amax(1) - lowest).max() + w.amax() - w.amin() < _SPREAD)


def _finite(top: Tensor) -> Tensor:
    """The maximum over no key: finite, so that a difference of maxima is never NaN."""
    return top.clamp_min(torch.finfo(top.dtype).min / 4)


class _AFT(TokenMixer):
    """What the forms share: projections, the gate, the masked keys."""

    def __init__(self, *, dim: int, hidden_dim: int | None, causal: bool, bias: bool) -> None:
        super().__init__()
        self.hidden_dim = dim if hidden_dim is None else hidden_dim
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * self.hidden_dim, bias=bias)
        self.out = nn.Linear(self.hidden_dim, dim, bias=bias)

    def reset_parameters(self) -> None:
        """The paper states no rule for the projections: Xavier uniform for each of the four, zero biases."""
        for linear, parts in ((self.qkv, 3), (self.out, 1)):
            for weight in linear.weight.chunk(parts):
                nn.init.xavier_uniform_(weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _project(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Q (b, n, hidden), and k and v in at least float32, k minus infinity for padding."""
        check_mask(type(self).__name__, mask, x.shape[0], x.shape[1])
        q, k, v = self.qkv(blank(x, mask)).chunk(3, -1)
        wide = torch.promote_types(k.dtype, torch.float32)
        k = k if mask is None else k.masked_fill(~mask[..., None], -torch.inf)
        return q, k.to(wide), v.to(wide)

    def _only_itself(self, context: Tensor | None) -> None:
        refuse_context(type(self).__name__, context)

    def _only_causal(self) -> None:
        if not self.causal:
            name = type(self).__name__
            raise ValueError(f"{name}(causal=False) has no state; build it with causal=True")


class _Biased(_AFT):
    """The forms with a learned bias for each pair of positions."""

    window: int | None

    def __init__(
        self, *, dim: int, length: int, hidden_dim: int | None, rank: int | None, causal: bool, bias: bool
    ) -> None:
        super().__init__(dim=dim, hidden_dim=hidden_dim, causal=causal, bias=bias)
        self.length = length
        columns = length if rank is None else rank
        self.a = nn.Parameter(torch.empty(length, columns))
        self.b = None if rank is None else nn.Parameter(torch.empty(length, columns))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Position biases from normal factors of standard deviation 0.01, as in the paper (section 4)."""
        super().reset_parameters()
        nn.init.normal_(self.a, std=0.01)
        if self.b is not None:
            nn.init.normal_(self.b, std=0.01)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n), ``at`` (#b, n) give (b, n, d)."""
        self._only_itself(context)
        q, k, v = self._project(x, mask)
        n = x.shape[1]
        if n == 0:
            return self.out(q * (k + v).to(q.dtype))
        if at is None:
            at = positions_of(mask, n, device=x.device)
        w = self._bias(at, at).to(k.dtype)
        return self.out(aft(q, earlier_keys(w, k, v) if self.causal else all_keys(w, k, v)))

    def _bias(self, q_at: Tensor, k_at: Tensor) -> Tensor:
        """W (#b, n, m) of queries at ``q_at`` (#b, n) and keys at ``k_at`` (#b, m)."""
        if not torch.compiler.is_compiling() and q_at.device.type == "cpu" and q_at.numel():
            last = int(q_at.max())
            if last >= self.length:
                raise ValueError(
                    f"{type(self).__name__} was built for length={self.length} tokens, got position {last}; rebuild it "
                    f"with length >= {last + 1}"
                )
        rows = F.embedding(q_at, self.a)  # #b n rank
        if self.b is None:
            w = rows.take_along_dim(k_at[:, None, :], 2)
        else:
            w = rows @ F.embedding(k_at, self.b).mT
        if self.window is not None:
            w = w * ((q_at[:, :, None] - k_at[:, None, :]).abs() < self.window)
        return tap("position bias", w)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Caches with spare room: k and v (b, cap, hidden), positions (b, cap); entries and next position (b,)."""
        self._only_causal()
        self._only_itself(context)
        empty = self.a.new_zeros(batch, 0, self.hidden_dim, dtype=torch.promote_types(self.a.dtype, torch.float32))
        count = torch.zeros(batch, dtype=torch.long, device=empty.device)
        return empty, empty, count[:, None][:, :0], count, count

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); the caches of ``state`` are written in place where no gradient needs them."""
        k_cache, v_cache, at_cache, count, following = state
        assert isinstance(k_cache, Tensor) and isinstance(v_cache, Tensor) and isinstance(at_cache, Tensor)
        assert isinstance(count, Tensor) and isinstance(following, Tensor)
        b, n = x.shape[:2]
        if n == 0:
            return self.forward(x), state
        q, k, v = self._project(x, mask)
        past = int(count[0]) if b else 0
        if at is None:
            at = positions_of(mask, n, following, device=x.device)
        at = at.expand(b, n)
        sums = earlier_keys(self._bias(at, at).to(k.dtype), k, v)
        if past:
            w = self._bias(at, at_cache[:, :past]).to(k.dtype)
            sums = merged(sums, all_keys(w, k_cache[:, :past], v_cache[:, :past]))
        k_cache, _ = append(k_cache, k, past, dim=1)
        v_cache, _ = append(v_cache, v, past, dim=1)
        at_cache, _ = append(at_cache, at, past, dim=1)
        following = following + (n if mask is None else mask.sum(1))
        return self.out(aft(q, sums)), (k_cache, v_cache, at_cache, count + n, following)


class AFTFull(_Biased):
    """AFT with a position bias for every pair of tokens.

    Args:
        dim: width d.
        length: greatest number of tokens T.
        hidden_dim: width of queries, keys and values; by default dim.
        rank: columns of a and b in w = a b^T; None learns w itself.
        causal: a token sees itself and earlier ones.
        bias: whether the projections have biases.
    """

    window = None

    def __init__(
        self,
        *,
        dim: int,
        length: int,
        hidden_dim: int | None = None,
        rank: int | None = 128,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim=dim, length=length, hidden_dim=hidden_dim, rank=rank, causal=causal, bias=bias)


class AFTLocal(_Biased):
    """AFT whose position bias is zero between tokens that are far apart; they still see each other.

    Args:
        window: least distance without a bias, in tokens, >= 1; the paper's language models use 32.
        dim, length, hidden_dim, rank, causal, bias: as for :class:`AFTFull`.
    """

    def __init__(
        self,
        *,
        dim: int,
        length: int,
        hidden_dim: int | None = None,
        rank: int | None = 128,
        window: int = 32,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim=dim, length=length, hidden_dim=hidden_dim, rank=rank, causal=causal, bias=bias)
        if window < 1:
            raise ValueError(f"AFTLocal got window={window}, expected >= 1 (1 leaves the bias of a token with itself)")
        self.window = window


class AFTSimple(_AFT):
    """AFT without a position bias: a running average in its causal form.

    Args:
        dim, hidden_dim, causal, bias: as for :class:`AFTFull`.
    """

    def __init__(self, *, dim: int, hidden_dim: int | None = None, causal: bool = False, bias: bool = False) -> None:
        super().__init__(dim=dim, hidden_dim=hidden_dim, causal=causal, bias=bias)
        self.reset_parameters()

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); positions play no part."""
        self._only_itself(context)
        if self.causal:
            return self.step(x, self.init_state(len(x)), mask=mask, at=at)[0]
        q, k, v = self._project(x, mask)
        if x.shape[1] == 0:
            return self.out(q * (k + v).to(q.dtype))
        weights = (k - _finite(k.detach().amax(1, keepdim=True))).exp()
        sums = (weights * v).sum(1, keepdim=True), weights.sum(1, keepdim=True)
        return self.out(aft(q, (*sums, sums[1])))

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Numerator, denominator and the exponent taken out of both, (b, hidden) each."""
        self._only_causal()
        self._only_itself(context)
        return wkv_state(batch, self.out.weight[0])

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d)."""
        numerator, denominator, top = state
        assert isinstance(numerator, Tensor) and isinstance(denominator, Tensor) and isinstance(top, Tensor)
        q, k, v = self._project(x, mask)
        average = sequential_wkv if x.shape[1] == 1 else wkv
        y, after = average(k, v, decay=k.new_zeros(k.shape[-1]), bonus=None, state=(numerator, denominator, top))
        return self.out(q.sigmoid() * y.to(q.dtype)), after
