"""Top-k attention in chunks of queries: each query attends to its k best keys, in memory that does not grow as n m.

    I_i = the k keys of the largest scores q_i . k_j e^-1/2 that query i may see                     (1)
    o_i = sum over j in I_i of softmax_j(s_ij) v_j                                                   (2)

Scores are made for c queries at a time. For backward only the k scores and indices of each query are kept beside
q, k, v, and the weights are made from them again. Same function as explicit_sparse_attention where no scores tie; same
parameters as softmax attention, so that a trained model can be changed over. Cost O(n m d), memory O(c m + n k + (n + m) d);
while decoding, keys and values of all past tokens are kept.

The feed-forward is the same core: rows of W_1 are keys, columns of W_2 values, ReLU the weighing, no scale:

    FFN(x) = sum over the k largest of x . w_j of ReLU(x . w_j) u_j                                  (3)

Letters: c queries of a chunk, k kept keys, f width of the feed-forward.

Source: 2106.06899, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import ChannelMixer, Heads, State, TokenMixer
from tevo.functional.attention import spread
from tevo.functional.cache import append
from tevo.functional.masks import blank, check_mask
from tevo.functional.precision import island
from tevo.mixers.softmax.multi_head import MultiHead

CARD = Card(
    id="topk_attention",
    role="mixer",
    summary="Softmax over the k best keys of each query, in chunks of queries that keep k scores each for backward.",
    equations=(
        r"I_i = \operatorname{top\text{-}k}_j\, q_i^\top k_j / \sqrt{e}",
        r"o_i = \sum_{j \in I_i} \mathrm{softmax}_{j \in I_i}(q_i^\top k_j / \sqrt{e})\, v_j",
    ),
    exports={"topk_attention": "TopKAttention", "topk_feed_forward": "TopKFeedForward"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="4 * d * d",
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "equivariant"),
    examples=(
        {"part": "topk_attention", "dim": 12, "heads": 3, "topk": 4},
        {"part": "topk_attention", "dim": 10, "heads": 2, "topk": 2, "chunk": 5, "causal": True},
        {"part": "topk_attention", "dim": 7, "heads": 1, "topk": 40, "chunk": 8},
        {"part": "topk_feed_forward", "dim": 12, "topk": 5},
        {"part": "topk_feed_forward", "dim": 5, "hidden_dim": 7, "topk": 2, "chunk": 3},
        {"part": "topk_feed_forward", "dim": 3, "hidden_dim": 4, "topk": 9},
    ),
    reduces_to=("softmax at topk >= the number of keys", "explicit_sparse_attention where no scores tie"),
    equals=("ag1988/top_k_attention AttentionNoCache; values in tests/golden/topk_attention_a.npz",),
    departures=(
        "Chunks have c queries and the last one the rest; the released code makes floor(n / c) chunks, which can be longer. "
        "Values do not depend on it.",
        "A query without any allowed key gets zeros; the released code gives it uniform weights.",
        "No position seat: a bias of the scores would be as large as what the chunks save. Give positions to the embeddings.",
    ),
    notes="Gradients of gradients are refused. Keys of equal score are taken in no particular order.",
    variants={
        "topk_feed_forward": {
            "role": "channel",
            "cost": "n",
            "flops": "4 * n * d * (hidden_dim or 4 * d)",
            "state": "",
            "parameters": "2 * d * (hidden_dim or 4 * d)",
            "claims": ("token_wise",),
        }
    },
)


class Weighing(NamedTuple):
    """How kept scores (..., k) become weights, and how a gradient of weights becomes one of scores."""

    weights: Callable[[Tensor], Tensor]
    pull: Callable[[Tensor, Tensor], Tensor]


def _softmax(s: Tensor) -> Tensor:
    # keys that may not be seen are filled with the least number, which a row with fewer than k keys has to keep
    return s.softmax(-1).masked_fill(s == torch.finfo(s.dtype).min, 0.0)


def _softmax_pull(s: Tensor, da: Tensor) -> Tensor:
    a = _softmax(s)
    return a * (da - (a * da).sum(-1, keepdim=True))


def _relu_pull(s: Tensor, da: Tensor) -> Tensor:
    return da * (s > 0)


SOFTMAX = Weighing(_softmax, _softmax_pull)
RELU = Weighing(torch.relu, _relu_pull)


def top_k_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int,
    chunk: int,
    seen: Tensor | None = None,
    causal: bool = False,
    weighing: Weighing = SOFTMAX,
) -> Tensor:
    """Equations (1) and (2) without the scale.

    Args:
        q: (b, h, n, e).
        k: (b, h, m, e).
        v: (b, h, m, v).
        topk: kept keys of a query.
        chunk: queries whose scores are made at a time.
        seen: (b, m) bool, keys that may be seen.
        causal: query i of n sees the first m - n + i + 1 keys.
        weighing: how kept scores become weights.

    Returns:
        (b, h, n, v).
    """
    n, m = q.shape[2], k.shape[2]
    if q.numel() == 0 or m == 0:
        # keeps the graph, so that gradients are zeros rather than missing
        return q.new_zeros(*q.shape[:3], v.shape[-1]) + 0 * (q.sum() + k.sum() + v.sum())
    return _TopK.apply(q, k, v, seen, min(topk, m), chunk, causal and n > 1, weighing)[0]


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        seen: Tensor | None,
        topk: int,
        chunk: int,
        causal: bool,
        weighing: Weighing,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, m = q.shape[2], k.shape[2]
        outputs, tops, indices = [], [], []
        with island(q):
            for start in range(0, n, chunk):
                part = q[:, :, start : start + chunk]
                s = part @ k.mT  # b h c m
                least = torch.finfo(s.dtype).min
                if seen is not None:
                    s = s.masked_fill(~seen[:, None, None], least)
                if causal:
                    last = torch.arange(start, start + part.shape[2], device=q.device)[:, None] + m - n
                    s = s.masked_fill(torch.arange(m, device=q.device) > last, least)
                top, index = s.topk(topk, dim=-1)
                outputs.append(_dense(weighing.weights(_wide(top)).to(v.dtype), index, m) @ v)
                tops.append(top)
                indices.append(index)
        return torch.cat(outputs, 2), torch.cat(tops, 2), torch.cat(indices, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, _, _, ctx.chunk, _, ctx.weighing = inputs
        ctx.save_for_backward(q, k, v, output[1], output[2])
        ctx.mark_non_differentiable(output[1], output[2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, top, index = ctx.saved_tensors
        n, m = q.shape[2], k.shape[2]
        dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
        with island(q):
            for start in range(0, n, ctx.chunk):
                rows = slice(start, start + ctx.chunk)
                kept, where, given = _wide(top[:, :, rows]), index[:, :, rows], do[:, :, rows]
                da = (given @ v.mT).gather(-1, where)
                ds = _dense(ctx.weighing.pull(kept, _wide(da)).to(q.dtype), where, m)
                a = _dense(ctx.weighing.weights(kept).to(v.dtype), where, m)
                dq.append(ds @ k)
                dk += ds.mT @ q[:, :, rows]
                dv += a.mT @ given
        return torch.cat(dq, 2), dk, dv, None, None, None, None, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _dense(a: Tensor, index: Tensor, m: int) -> Tensor:
    """(..., k) at ``index`` of (..., m) zeros: a product with it is faster than gathering k rows for each query."""
    return a.new_zeros(*a.shape[:-1], m).scatter(-1, index, a)


class TopKAttention(TokenMixer):
    """Top-k attention.

    Args:
        dim: width d.
        heads: number of heads h, or a :class:`~tevo.contracts.Heads` module.
        causal: a token sees itself and earlier ones.
        topk: number k of keys that a query attends to, >= 1.
        chunk: number c of queries whose scores are made at a time, >= 1.
    """

    def __init__(
        self, *, dim: int, heads: int | Heads = 8, causal: bool = False, topk: int = 64, chunk: int = 1024
    ) -> None:
        super().__init__()
        _check("TopKAttention", topk, chunk)
        self.heads = MultiHead(dim=dim, heads=heads) if isinstance(heads, int) else heads
        self.causal, self.topk, self.chunk = causal, topk, chunk

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``context`` (b, m, d), ``mask`` (b, m) give (b, n, d); without positions ``at`` has no effect."""
        if context is None:
            check_mask("TopKAttention", mask, x.shape[0], x.shape[1])
            x = context = blank(x, mask)
        else:
            check_mask("TopKAttention", mask, context.shape[0], context.shape[1])
            context = blank(context, mask)
        q, k, v = self.heads.split(x, context)
        return self._attend(q, k, v, mask, causal=self.causal)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, causal: bool) -> Tensor:
        h, e = q.shape[1], q.shape[-1]
        k, v = spread(k, h), spread(v, h)
        o = top_k_attention(q * e**-0.5, k, v, topk=self.topk, chunk=self.chunk, seen=seen, causal=causal)
        return self.heads.merge(o)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Caches with spare room: k (b, g, cap, e), v (b, g, cap, v), mask (b, cap), count (b,).

        With ``context``: k, v and mask of it, which never change.
        """
        if context is not None:
            check_mask("TopKAttention", mask, context.shape[0], context.shape[1])
            _, k, v = self.heads.split(context[:, :0], blank(context, mask))
            return k, v, torch.ones_like(context[..., 0], dtype=torch.bool) if mask is None else mask
        if not self.causal:
            raise ValueError("TopKAttention(causal=False) has no state of its own; build it with causal=True")
        like = next(p for p in self.heads.parameters() if p.ndim == 2)
        empty = like.new_zeros(batch, 0, like.shape[1])
        _, k, v = self.heads.split(empty, empty)
        none = torch.zeros(batch, 0, dtype=torch.bool, device=like.device)
        return k, v, none, none.long().sum(1)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); the caches of ``state`` are written in place where no gradient needs them."""
        assert isinstance(state, tuple)
        check_mask("TopKAttention", mask, x.shape[0], x.shape[1])
        k_cache, v_cache, seen, *counts = (_tensor(leaf) for leaf in state)
        if not counts:
            q, _, _ = self.heads.split(x, x[:, :0])
            return self._attend(q, k_cache, v_cache, seen, causal=False), state
        b, n = x.shape[:2]
        x = blank(x, mask)
        past = int(counts[0][0]) if b else 0
        q, k, v = self.heads.split(x, x)
        new = mask if mask is not None else torch.ones(b, n, dtype=torch.bool, device=x.device)
        k_cache, keys = append(k_cache, k, past, dim=2)
        v_cache, values = append(v_cache, v, past, dim=2)
        seen, real = append(seen, new, past, dim=1)
        return self._attend(q, keys, values, real, causal=True), (k_cache, v_cache, seen, counts[0] + n)


def _tensor(leaf: State) -> Tensor:
    assert isinstance(leaf, Tensor)
    return leaf


def _check(owner: str, topk: int, chunk: int) -> None:
    if topk < 1 or chunk < 1:
        raise ValueError(f"{owner} got topk={topk}, chunk={chunk}; expected at least 1 each")


class TopKFeedForward(ChannelMixer):
    """ReLU feed-forward of which each token uses its k most active hidden units; no biases.

    Args:
        dim: width d.
        hidden_dim: number f of hidden units; by default 4 dim.
        topk: number k of units that a token uses, >= 1.
        chunk: number c of tokens whose units are computed at a time, >= 1.
    """

    def __init__(self, *, dim: int, hidden_dim: int | None = None, topk: int = 64, chunk: int = 1024) -> None:
        super().__init__()
        _check("TopKFeedForward", topk, chunk)
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        self.topk, self.chunk = topk, chunk
        self.into = nn.Linear(dim, hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform, as the plain feed-forward whose trained weights it takes."""
        for linear in (self.into, self.out):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d); tokens are independent, so a mask changes nothing."""
        q, k, v = x.flatten(0, 1), self.into.weight, self.out.weight.mT
        o = top_k_attention(
            q[None, None], k[None, None], v[None, None], topk=self.topk, chunk=self.chunk, weighing=RELU
        )
        return o[0, 0].unflatten(0, x.shape[:2])  # (eq. 3)
