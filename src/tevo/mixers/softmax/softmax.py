"""Softmax attention with its three finer seats: heads, position, normaliser.

    q, k, v = split(x, y)                                 heads
    s = score(turn(q), turn(k)) + bias(q, k)              position, normaliser
    o = merge(normalise(s) v)

With neutral seats this is ``softmax(q k^T / sqrt(e)) v`` on torch's fused kernel. Cost O(n m d); while decoding, keys and
values of all past tokens are kept.

Source: 1706.03762, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Heads, Normaliser, Position, State, TokenMixer
from tevo.functional.attention import attention, spread, weighted
from tevo.functional.cache import append
from tevo.functional.masks import blank, causal_mask, check_mask, positions_of
from tevo.mixers.softmax.multi_head import MultiHead
from tevo.taps import tap

CARD = Card(
    id="softmax",
    role="mixer",
    summary="Scaled dot-product attention: every token reads every token by softmax weights.",
    equations=(
        r"a_{ij} = \mathrm{softmax}_j\!\left(\frac{q_i^\top k_j}{\sqrt{e}} + b_{ij}\right)",
        r"o_i = \sum_j a_{ij} v_j",
    ),
    exports={"softmax": "SoftmaxAttention"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="4 * d * d",
    memory="n",
    claims=(
        "bidirectional",
        "causal",
        "cross",
        "padding",
        "position",
        "equivariant",
        "exact_state",
    ),
    examples=(
        {"dim": 12, "heads": 3, "causal": True},
        {"dim": 12, "heads": 3},
        {"dim": 4, "heads": 1, "causal": True},
        {"dim": 14, "heads": 7},
    ),
    equals=("torch.nn.functional.scaled_dot_product_attention", "torch.nn.MultiheadAttention"),
)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, bias: Tensor | None) -> Tensor:
    """The equation: q (b, h, n, e), k (b, g, m, e), v (b, g, m, v) give (b, h, n, v)."""
    return attention(q, k, v, allowed=allowed, bias=bias)


class SoftmaxAttention(TokenMixer):
    """Softmax attention.

    Args:
        dim: width d.
        heads: number of heads h, or a :class:`~tevo.contracts.Heads` module.
        causal: a token sees itself and earlier ones.
        position: relative or rotary positions; None sees no order.
        normaliser: how scores become weights; None is softmax. With ``causal`` it must have a causal form.
        memory: tokens of earlier segments that ``step`` keeps, as inputs without gradient; None keeps all of them, as
            keys and values.
        dropout: probability with which a weight is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int | Heads = 8,
        causal: bool = False,
        position: Position | None = None,
        normaliser: Normaliser | None = None,
        memory: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if memory is not None and (memory < 1 or not causal):
            raise ValueError(
                f"SoftmaxAttention got memory={memory} with causal={causal}; a segment memory needs causal=True and "
                "memory >= 1 (None keeps everything)"
            )
        if causal and normaliser is not None and not normaliser.causal_form:
            raise ValueError(
                f"SoftmaxAttention got causal=True with the normaliser {type(normaliser).__name__}, which has no causal form "
                "(a query's weights depend on other queries); build it with causal=False or with another normaliser"
            )
        self.heads = MultiHead(dim=dim, heads=heads) if isinstance(heads, int) else heads
        self.causal = causal
        self.position = position
        self.normaliser = normaliser
        self.memory = memory
        self.dropout = dropout
        # keys may be cached already turned unless the position also wants to see them before
        self._biased = position is not None and type(position).bias is not Position.bias
        self._turned = position is not None and type(position).turn is not Position.turn

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        at: Tensor | None = None,
        attend: Tensor | None = None,
    ) -> Tensor:
        """``x`` (b, n, d), ``context`` (b, m, d), ``mask`` (b, m), ``at`` (#b, n), ``attend`` (#b, n, m) bool."""
        n, queries = x.shape[1], None
        if context is None:
            check_mask("SoftmaxAttention", mask, x.shape[0], n)
            x, queries = blank(x, mask), mask
            context = x
            q_at = k_at = positions_of(mask, n, device=x.device) if at is None else at
        else:
            check_mask("SoftmaxAttention", mask, context.shape[0], context.shape[1])
            context = blank(context, mask)
            m = context.shape[1]
            k_at = torch.arange(m, device=x.device)[None]
            q_at = torch.arange(n, device=x.device)[None] + (m - n if self.causal else 0) if at is None else at
        q, k, v = self.heads.split(x, context)
        o = self._attend(q, k, v, q_at, k_at, mask=mask, queries=queries, attend=attend, causal=self.causal)
        return self.heads.merge(o)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_at: Tensor,
        k_at: Tensor,
        *,
        mask: Tensor | None,
        queries: Tensor | None,
        attend: Tensor | None,
        causal: bool,
        turn_keys: bool = True,
    ) -> Tensor:
        """Q (b, h, n, e), k (b, g, m, e), v (b, g, m, v) give (b, h, n, v).

        ``mask`` (b, m) tells real keys; ``queries`` (b, n) real queries, which matters to a normaliser alone.
        """
        allowed = None if mask is None else mask[:, None, None, :]  # b 1 1 m
        if attend is not None:
            allowed = attend[:, None] if allowed is None else allowed & attend[:, None]  # b 1 n m
        bias = None
        if self.position is not None:
            bias = self.position.bias(q, k, q_at, k_at) if self._biased else None
            if self._turned:
                turned_q, turned_k = self.position.turn(q, k, q_at, k_at)
                q, k = turned_q, turned_k if turn_keys else k
        if self.normaliser is None and not (self.training and self.dropout):
            return attention(q, k, v, allowed=allowed, bias=bias, causal=causal)
        normaliser = self.normaliser if self.normaliser is not None else Normaliser()
        if queries is not None:
            rows = queries[:, None, :, None]  # b 1 n 1
            allowed = rows if allowed is None else allowed & rows
        if causal and q.shape[2] > 1:
            triangle = causal_mask(q.shape[2], k.shape[2], q.device)
            allowed = triangle if allowed is None else allowed & triangle
        s = normaliser.score(q, spread(k, q.shape[1]))  # b h n m
        weights = tap("attention", normaliser(s if bias is None else s + bias, allowed))
        return weighted(F.dropout(weights, self.dropout, self.training), v)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Caches with spare room: k (b, g, cap, e), v (b, g, cap, v), positions and mask (b, cap), count (b,).

        With ``context``: k, v, positions and mask of it, which never change. With ``memory``: inputs (b, 0, d), mask.
        """
        like = next(self.parameters())
        if context is not None:
            check_mask("SoftmaxAttention", mask, context.shape[0], context.shape[1])
            context = blank(context, mask)
            k_at = torch.arange(context.shape[1], device=context.device).expand(batch, -1)
            _, k, v = self.heads.split(context[:, :0], context)
            seen = mask if mask is not None else k_at >= 0
            return k, v, k_at, seen
        if not self.causal:
            raise ValueError("SoftmaxAttention(causal=False) has no state of its own; build it with causal=True")
        none = torch.zeros(batch, 0, dtype=torch.bool, device=like.device)
        if self.memory is not None:
            return like.new_zeros(batch, 0, self._width()), none, none.long()
        empty = like.new_zeros(batch, 0, self._width())
        _, k, v = self.heads.split(empty, empty)
        return k, v, none.long(), none, none.long().sum(1)

    def _width(self) -> int:
        """d, as the first projection sees it."""
        return next(p for p in self.heads.parameters() if p.ndim == 2).shape[1]

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); the caches of ``state`` are written in place where no gradient needs them."""
        assert isinstance(state, tuple)
        check_mask("SoftmaxAttention", mask, x.shape[0], x.shape[1])
        if len(state) == 4:
            return self._step_cross(x, state, at), state
        if self.memory is not None:
            return self._step_segment(x, state, mask, at)
        k_cache, v_cache, at_cache, seen, count = (_tensor(leaf) for leaf in state)
        b, n = x.shape[:2]
        x = blank(x, mask)
        past = int(count[0]) if b else 0
        if at is None:
            at = positions_of(mask, n, seen[:, :past].sum(1), device=x.device)
        at = at.expand(b, n)
        q, k, v = self.heads.split(x, x)
        cache_turned = self._turned and not self._biased
        if cache_turned:
            assert self.position is not None
            _, k = self.position.turn(q, k, at, at)
        new = mask if mask is not None else torch.ones(b, n, dtype=torch.bool, device=x.device)
        k_cache, keys = append(k_cache, k, past, dim=2)
        v_cache, values = append(v_cache, v, past, dim=2)
        at_cache, k_at = append(at_cache, at, past, dim=1)
        seen, real = append(seen, new, past, dim=1)
        o = self._attend(
            q, keys, values, at, k_at, mask=real, queries=mask, attend=None, causal=True, turn_keys=not cache_turned
        )
        return self.heads.merge(o), (k_cache, v_cache, at_cache, seen, count + n)

    def join(self, states: Sequence[State], skip: Sequence[int]) -> State:
        """Caches side by side: keys and values of all, at their own positions, less the first ``skip[i]`` of each.

        Raises:
            ValueError: a segment memory, or states of cross-attention.
        """
        kept: list[list[Tensor]] = [[], [], [], []]
        for state, less in zip(states, skip, strict=True):
            assert isinstance(state, tuple)
            if self.memory is not None or len(state) != 5:
                raise ValueError("SoftmaxAttention joins caches of all keys and values only; build it without memory=")
            *caches, count = (_tensor(leaf) for leaf in state)
            filled = int(count[0]) if len(count) else 0
            for leaves, cache, dim in zip(kept, caches, (2, 2, 1, 1), strict=True):
                leaves.append(cache.narrow(dim, min(less, filled), max(filled - less, 0)))
        k, v, at, seen = (torch.cat(leaves, dim) for leaves, dim in zip(kept, (2, 2, 1, 1), strict=True))
        return k, v, at, seen, torch.full_like(at[:, :1].sum(1), at.shape[1])

    def _step_cross(self, x: Tensor, state: tuple[State, ...], at: Tensor | None) -> Tensor:
        k, v, k_at, seen = (_tensor(leaf) for leaf in state)
        q, _, _ = self.heads.split(x, x[:, :0])
        q_at = torch.arange(x.shape[1], device=x.device)[None] if at is None else at
        return self.heads.merge(self._attend(q, k, v, q_at, k_at, mask=seen, queries=None, attend=None, causal=False))

    def _step_segment(
        self, x: Tensor, state: tuple[State, ...], mask: Tensor | None, at: Tensor | None
    ) -> tuple[Tensor, State]:
        assert self.memory is not None
        past, seen, past_at = (_tensor(leaf) for leaf in state)
        b, n = x.shape[:2]
        x = blank(x, mask)
        if at is None:
            start = past_at[:, -1] + 1 if past_at.shape[1] else 0
            at = positions_of(mask, n, start, device=x.device)
        new = mask if mask is not None else torch.ones(b, n, dtype=torch.bool, device=x.device)
        both, real = torch.cat([past, x], 1), torch.cat([seen, new], 1)
        both_at = torch.cat([past_at, at.expand(b, n)], 1)
        q, k, v = self.heads.split(x, both)
        o = self._attend(q, k, v, at, both_at, mask=real, queries=mask, attend=None, causal=True)
        kept = slice(max(0, both.shape[1] - self.memory), None)
        return self.heads.merge(o), (both[:, kept].detach(), real[:, kept], both_at[:, kept])


def _tensor(leaf: State) -> Tensor:
    assert isinstance(leaf, Tensor)
    return leaf
