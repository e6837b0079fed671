"""The layers of CoLT5: every token takes a light branch, routed tokens a heavy one as well.

    FF(X)_i = light(X_i) + w_i heavy(X_i),             gated GELU in both                                  (1)
    Attn(X)_i = light(X)_i + w^q_i heavy(X_i, w^kv X)                                                      (2)
    light: s_ij = q_i . k_j + B[bucket(j - i)],        |i - j| <= r                                        (3)
    heavy: s_ij = q_i . k_j + B'[bucket(p_j - p_i)],   i among the routed queries, j among the routed keys (4)
    X <- X + Attn(RMSNorm(X)),   X <- X + FF(RMSNorm(X))                                                   (5)

X is the normalised input; w comes from a :class:`tevo.colt5.Router` and is zero for tokens that are not routed; w^kv
multiplies what keys and values are made of; p are positions in the text. Scores are not scaled, nothing has a bias, and
each branch has an output projection of its own.

FLOPs of (2) beside its projections: 4 n (2 r + 1) h e + 4 q v h' e for q routed queries and v routed keys.
Source: CoLT5 (arXiv 2303.09752), section 3. It leaves open what routers see (here the normalised input), where the heavy
branch gets positions from (a table of its own, indexed by original positions) and whether the branches share an output
projection (they do not, which fits the published numbers of parameters).

Letters beyond the shared ones: r radius, q routed queries, v routed keys, e width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from tevo.colt5.routers import Routed, Router
from tevo.contracts import Position
from tevo.functional.attention import attention, spread
from tevo.functional.local_attention import local_attention
from tevo.functional.masks import blank, check_mask
from tevo.functional.precision import island
from tevo.kernels.local_attention import local_attention as biased_local_attention
from tevo.mixers.softmax.multi_head import merge_heads, split_heads
from tevo.norms.rms_norm import RMSNorm
from tevo.positions.t5_bias import bucket

__all__ = [
    "KV_SCORES",
    "ConditionalAttention",
    "ConditionalFeedForward",
    "ConditionalLayer",
    "GatedFeedForward",
    "LocalAttention",
    "NormedTurn",
    "RelativeBias",
    "RoutedAttention",
    "by_document",
]


# scores of routed attention that are in memory at once where there is no graph
PIECE = 2**22


class RelativeBias(nn.Module):
    """T5's addend of the scores: a learned number per head and bucket of distance. One may serve many layers.

    Args:
        heads: number of heads h.
        buckets: number of buckets, >= 2 for each side.
        max_distance: distance in tokens from which on all share the last bucket.
        bidirectional: half of the buckets for each side; otherwise all for the past, as in a decoder.
    """

    def __init__(self, *, heads: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        per_side = buckets // 2 if bidirectional else buckets
        if per_side < 2 or max_distance <= per_side // 2:
            raise ValueError(
                f"RelativeBias got buckets={buckets}, max_distance={max_distance}; needs >= 2 buckets a side and a "
                "max_distance above half of them"
            )
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
        self.table = nn.Parameter(torch.empty(heads, buckets))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation d^-1/2 in T5; the width is not known here, 0.02 is its value at d = 2500."""
        nn.init.normal_(self.table, std=0.02)

    def by_offset(self, radius: int) -> Tensor:
        """(h, 2 radius + 1): the addend at each offset, key position - query position, from -radius to radius."""
        offset = torch.arange(-radius, radius + 1, device=self.table.device)
        index = bucket(offset, causal=not self.bidirectional, buckets=self.buckets, max_distance=self.max_distance)
        return self.table[:, index]

    def forward(self, q_at: Tensor, k_at: Tensor, *, real: Tensor | None = None) -> Tensor:
        """Positions (#b, n) of queries and (#b, m) of keys give (#b, h, n, m), lowest where keys are not ``real`` (b, m)."""
        # beyond max_distance nothing changes, so that one short row of numbers holds all there are
        most = self.max_distance
        table = self.by_offset(most)
        q_at, k_at = q_at.int(), k_at.int()  # half the bytes of an index of n m numbers
        index = (k_at[:, None, :] - q_at[:, :, None]).clamp_(-most, most).add_(most)  # b n m
        if real is not None:
            # finite, so that a row without any key has finite weights; a quarter, so that it stays so with a score added
            table = F.pad(table, (0, 1), value=torch.finfo(table.dtype).min / 4)
            index = index.masked_fill(~real[:, None], 2 * most + 1)
        if torch.is_grad_enabled() and table.requires_grad:
            # whose gradient is several times faster than that of an index
            bias = table.gather(1, index.flatten().long().expand(len(table), -1))
        else:
            bias = table.index_select(1, index.flatten())
        return bias.unflatten(1, index.shape).transpose(0, 1)


class GatedFeedForward(nn.Module):
    """T5 v1.1's feed-forward layer: (gelu(x W_0) * (x W_1)) W_2, without biases, GELU by its tanh approximation.

    Args:
        dim: width d.
        hidden_dim: width between the maps.
        dropout: probability with which a hidden feature is dropped in training.
    """

    def __init__(self, *, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        # gate first: [W_0; W_1]
        self.into = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.out = nn.Linear(hidden_dim, dim, bias=False)
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's normals of variance 1 / fan-in."""
        for linear in (self.into, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, onto: Tensor | None = None) -> Tensor:
        """(..., d) gives (..., d), added to ``onto`` (..., d), in its memory without a graph; a mask changes nothing."""
        gate, value = self.into(x).chunk(2, -1)
        hidden = F.gelu(gate, approximate="tanh")
        hidden = hidden * value if torch.is_grad_enabled() else hidden.mul_(value)
        hidden = F.dropout(hidden, self.dropout, self.training) if self.dropout else hidden
        if onto is None:
            return self.out(hidden)
        if not _plain(self.out, hidden) or hidden.dtype != onto.dtype or not onto.is_contiguous():
            return onto + self.out(hidden)
        onto.flatten(0, -2).addmm_(hidden.flatten(0, -2), self.out.weight.mT)
        return onto


class NormedTurn(Position):
    """QK-norm as a ``turn``: RMSNorm of queries and keys with gains, and the scale e^-1/2 that scores here lack.

    Args:
        head_dim: width e of a head.
        eps: added to the mean square.
        then: another turn after it, such as rotary positions.
    """

    def __init__(self, *, head_dim: int, eps: float = 1e-6, then: Position | None = None) -> None:
        super().__init__()
        self.q_norm, self.k_norm, self.then = RMSNorm(dim=head_dim, eps=eps), RMSNorm(dim=head_dim, eps=eps), then

    def turn(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """Q (b, h, n, e) and k (b, g, m, e), normalised."""
        q, k = self.q_norm(q) * q.shape[-1] ** -0.5, self.k_norm(k)
        return (q, k) if self.then is None else self.then.turn(q, k, q_at, k_at)


class LocalAttention(nn.Module):
    """Equation (3): LongT5's local attention, and CoLT5's light one.

    Args:
        dim: width d.
        heads: number of heads h.
        head_dim: width e of a head.
        radius: tokens seen on each side, >= 1.
        bias: addend by distance, or None.
        kv_heads: heads of keys and values, a divisor of ``heads``; by default as many.
        turn: what is done to queries and keys before their products, with the contract of ``Position.turn``: rotary
            positions (:class:`tevo.positions.rope.RoPE`), norms of both (:class:`NormedTurn`), or one after the other.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int = 64,
        radius: int = 127,
        bias: RelativeBias | None,
        kv_heads: int | None = None,
        turn: Position | None = None,
    ) -> None:
        super().__init__()
        self.kv_heads = _check_heads("LocalAttention", heads, head_dim, bias, kv_heads)
        if radius < 1:
            raise ValueError(f"LocalAttention got radius={radius}, expected at least 1 token on each side")
        self.heads, self.head_dim, self.radius, self.bias, self.turn = heads, head_dim, radius, bias, turn
        self.qkv = nn.Linear(dim, (heads + 2 * self.kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's normals; the queries' holds the scale that the scores lack."""
        _initialise(self.qkv.weight.split(self._widths()), self.out.weight, self.heads)

    def _widths(self) -> list[int]:
        return [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]

    def forward(self, x: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); ``positions`` (#b, n) are those of ``turn``, 0..n-1 by default."""
        check_mask("LocalAttention", mask, x.shape[0], x.shape[1])
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = map(split_heads, spaced(self.qkv, blank(x, mask)).split(self._widths(), -1), heads)
        if self.turn is not None:
            at = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
            q, k = self.turn.turn(q, k, at, at)
        k, v = spread(k, self.heads), spread(v, self.heads)
        if self.bias is None:
            o = local_attention(q, k, v, radius=self.radius, mask=mask, scale=1.0)
        else:
            bias = self.bias.by_offset(self.radius)
            o = biased_local_attention(q, k, v, radius=self.radius, mask=mask, bias=bias, scale=1.0)
        return self.out(merge_heads(o))


def score_inputs(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's use of the weights (b, v) of keys: what keys and values are made of (b, v, d) is multiplied by them."""
    x = x * w[..., None].to(x.dtype)
    return x, x


def score_values(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Only what values are made of is multiplied."""
    return x, x * w[..., None].to(x.dtype)


def score_nothing(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Keys are chosen, but not weighted; their router learns nothing."""
    return x, x


KvScores = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
KV_SCORES: dict[str, KvScores] = {"inputs": score_inputs, "values": score_values, "none": score_nothing}


class RoutedAttention(nn.Module):
    """Equation (4): routed queries attend to routed keys.

    Args:
        dim: width d.
        heads: number of heads h.
        head_dim: width e of a head.
        bias: addend by distance in the text, or None.
        kv_scores: what the weights of the keys multiply, a name of ``KV_SCORES`` or a function of your own.
        kv_heads: as for :class:`LocalAttention`.
        turn: as for :class:`LocalAttention`, at the tokens' positions in the text.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int = 64,
        bias: RelativeBias | None,
        kv_scores: str | KvScores = "inputs",
        kv_heads: int | None = None,
        turn: Position | None = None,
    ) -> None:
        super().__init__()
        self.kv_heads = _check_heads("RoutedAttention", heads, head_dim, bias, kv_heads)
        if isinstance(kv_scores, str) and kv_scores not in KV_SCORES:
            raise ValueError(
                f"RoutedAttention got kv_scores={kv_scores!r}, expected one of {', '.join(KV_SCORES)}, or a function"
            )
        self.heads, self.bias, self.turn = heads, bias, turn
        self.kv_scores = KV_SCORES[kv_scores] if isinstance(kv_scores, str) else kv_scores
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * self.kv_heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As for :class:`LocalAttention`."""
        _initialise((self.q.weight, *self.kv.weight.chunk(2)), self.out.weight, self.heads)

    def forward(self, x: Tensor, queries: Routed, keys: Routed, *, positions: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), its routed tokens and ``positions`` (#b, n) give the weighted outputs (b, q, d)."""
        k_in, v_in = self.kv_scores(take(x, keys.indices), keys.weights)
        if k_in is v_in:
            k, v = self.kv(k_in).chunk(2, -1)
        else:
            k, v = (F.linear(z, w) for z, w in zip((k_in, v_in), self.kv.weight.chunk(2), strict=True))
        q = split_heads(self.q(take(x, queries.indices)), self.heads)
        k, v = (split_heads(z, self.kv_heads) for z in (k, v))
        q_at, k_at = queries.indices, keys.indices
        if positions is not None:
            q_at, k_at = (positions.expand(len(at), -1).gather(1, at) for at in (q_at, k_at))
        if self.turn is not None:
            q, k = self.turn.turn(q, k, q_at, k_at)
        rows = max(1, PIECE // max(1, k.shape[0] * self.heads * k.shape[2]))
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or q.shape[2] <= rows:
            o = self._attend(q, k, v, q_at, k_at, keys.mask)
        else:
            # without a graph nothing of the size of all scores needs to exist
            parts = zip(q.split(rows, 2), q_at.split(rows, 1), strict=True)
            o = torch.cat([self._attend(part, k, v, at, k_at, keys.mask) for part, at in parts], 2)
        return self.out(merge_heads(o)) * queries.weights[..., None].to(x.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor, real: Tensor) -> Tensor:
        if self.bias is None:
            return attention(q, k, v, allowed=real[:, None, None], scale=1.0)
        # the addend does what a mask of all scores would; a row without any key has no queries that count either
        return attention(q, k, v, bias=self.bias(q_at, k_at, real=real), scale=1.0)


class ConditionalFeedForward(nn.Module):
    """Equation (1), without norm and residual.

    Args:
        dim: width d.
        light_dim: hidden width for all tokens; half of a dense model's in the paper.
        heavy_dim: hidden width for routed tokens; four times a dense model's.
        router: which tokens.
        dropout: probability with which a hidden feature of either branch is dropped in training.
    """

    def __init__(self, *, dim: int, light_dim: int, heavy_dim: int, router: Router, dropout: float = 0.0) -> None:
        super().__init__()
        self.router = router
        self.light = GatedFeedForward(dim=dim, hidden_dim=light_dim, dropout=dropout)
        self.heavy = GatedFeedForward(dim=dim, hidden_dim=heavy_dim, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        scores: Tensor | None = None,
        forced: Tensor | None = None,
        forbidden: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d).

        Args:
            x: normalised tokens.
            mask: (b, n) bool, True = real token.
            scores: (b, n), the router's, if they are known already.
            forced: (b, n) bool, True = take the heavy branch.
            forbidden: (b, n) bool, True = never take it.
            onto: (b, n, d), what the result is added to, in its memory without a graph.
        """
        x = blank(x, mask)
        own = ours(self.light)
        y = self.light(x, onto=onto) if own else self.light(x)
        if onto is not None and not own:
            y = onto + y
        if x.numel() == 0:
            return y
        routed = self.router(x, scores=scores, mask=mask, forced=forced, forbidden=forbidden)
        heavy = self.heavy(take(x, routed.indices)) * routed.weights[..., None].to(x.dtype)
        return add_at(y, routed.indices, heavy, into=own)


class ConditionalAttention(nn.Module):
    """Equation (2), without norm and residual.

    Args:
        dim: width d.
        light_heads: heads of the local attention; a quarter of all in the paper.
        heavy_heads: heads of the attention among routed tokens.
        head_dim: width e of a head.
        radius: tokens that the light branch sees on each side, >= 1.
        q_router: which tokens ask.
        kv_router: which tokens are asked.
        light_bias: addend by distance of the light branch, or None.
        heavy_bias: addend by distance of the heavy branch, or None.
        kv_scores: what the weights of the keys multiply, a name of ``KV_SCORES`` or a function of your own.
        light_kv_heads: heads of keys and values of the light branch, a divisor of ``light_heads``; by default as many.
        heavy_kv_heads: those of the heavy branch.
        light_turn: rotary positions or norms of queries and keys of the light branch, see :class:`LocalAttention`.
        heavy_turn: those of the heavy branch.
    """

    def __init__(
        self,
        *,
        dim: int,
        light_heads: int,
        heavy_heads: int,
        head_dim: int = 64,
        radius: int = 127,
        q_router: Router,
        kv_router: Router,
        light_bias: RelativeBias | None,
        heavy_bias: RelativeBias | None,
        kv_scores: str | KvScores = "inputs",
        light_kv_heads: int | None = None,
        heavy_kv_heads: int | None = None,
        light_turn: Position | None = None,
        heavy_turn: Position | None = None,
    ) -> None:
        super().__init__()
        self.q_router, self.kv_router = q_router, kv_router
        self.light = LocalAttention(
            dim=dim,
            heads=light_heads,
            head_dim=head_dim,
            radius=radius,
            bias=light_bias,
            kv_heads=light_kv_heads,
            turn=light_turn,
        )
        self.heavy = RoutedAttention(
            dim=dim,
            heads=heavy_heads,
            head_dim=head_dim,
            bias=heavy_bias,
            kv_scores=kv_scores,
            kv_heads=heavy_kv_heads,
            turn=heavy_turn,
        )

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        scores: tuple[Tensor, Tensor] | None = None,
        forced: Tensor | None = None,
        forbidden: Tensor | None = None,
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d).

        Args:
            x: normalised tokens.
            mask: (b, n) bool, True = real token.
            positions: (#b, n), of the tokens in the text, for the heavy branch and for turns; 0..n-1 by default. The window and
                the bias of the light branch take tokens that stand side by side for neighbours.
            scores: (b, n) of the routers of queries and of keys, if they are known already.
            forced: (b, n) bool, True = take the heavy branch, as query and as key.
            forbidden: (b, n) bool, True = never take it.
        """
        x = blank(x, mask)
        y = self.light(x, mask=mask, positions=positions)
        if x.numel() == 0:
            return y
        q_scores, kv_scores = (None, None) if scores is None else scores
        queries = self.q_router(x, scores=q_scores, mask=mask, forced=forced, forbidden=forbidden)
        # with one router for both, what is routed is the same
        keys = (
            queries
            if self.kv_router is self.q_router
            else self.kv_router(x, scores=kv_scores, mask=mask, forced=forced, forbidden=forbidden)
        )
        heavy = self.heavy(x, queries, keys, positions=positions)
        return add_at(y, queries.indices, heavy, into=ours(self.light))


class ConditionalLayer(nn.Module):
    """Equation (5).

    Taps, in this order: what the routers of queries, of keys and of the feed-forward layer tap.

    Args:
        dim: width d.
        attention: the first sublayer.
        feed_forward: the second.
        eps: of the norms.
        dropout: probability with which a feature of a sublayer's output is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        attention: ConditionalAttention,
        feed_forward: ConditionalFeedForward,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(dim=dim, eps=eps), attention
        self.feed_forward_norm, self.feed_forward = RMSNorm(dim=dim, eps=eps), feed_forward
        self.dropout = dropout

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        forced: Tensor | None = None,
        forbidden: Tensor | None = None,
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d), zeros at padding; the rest is as for :class:`ConditionalAttention`."""
        check_mask("ConditionalLayer", mask, x.shape[0], x.shape[1])
        x = blank(x, mask)
        # one for both is asked once
        routers = tuple(dict.fromkeys((self.attention.q_router, self.attention.kv_router)))
        y, scores = norm_and_scores(self.attention_norm, x, routers)
        scores = (scores[0], scores[-1])
        y = self.attention(y, mask=mask, positions=positions, scores=scores, forced=forced, forbidden=forbidden)
        y = self._drop(y)
        x = y.add_(x) if ours(self.attention) and x.dtype == y.dtype else x + y
        y, (s,) = norm_and_scores(self.feed_forward_norm, x, (self.feed_forward.router,))
        if ours(self.feed_forward) and not (self.dropout and self.training):
            x = self.feed_forward(y, mask=mask, scores=s, forced=forced, forbidden=forbidden, onto=x)
        else:
            x = x + self._drop(self.feed_forward(y, mask=mask, scores=s, forced=forced, forbidden=forbidden))
        return blank(x, mask)

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


def norm_and_scores(norm: RMSNorm, x: Tensor, routers: tuple[Router, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Normalised ``x`` (b, n, d), and the scores (b, n) that routers give it, by one product for all of them."""
    y = norm(x)
    weights = [router.weight for router in routers]
    learned = [w for w in weights if w is not None]
    dtype = torch.promote_types(y.dtype, torch.float32)
    if not learned:
        return y, tuple(y.new_zeros(y.shape[:-1], dtype=dtype) for _ in routers)
    with island(y):
        found = iter((y.to(dtype) @ torch.stack(learned).to(dtype).mT).unbind(-1))
    return y, tuple(y.new_zeros(y.shape[:-1], dtype=dtype) if w is None else next(found) for w in weights)


def by_document(f: Callable[[Tensor, Tensor], Tensor], x: Tensor, documents: Tensor) -> Tensor:
    """What ``f`` makes of each document by itself, where several are packed in one row.

    Documents become rows, padded to the longest, so that none sees, or is routed with, tokens of another.

    Args:
        f: tokens (documents, longest, ...) and their mask (documents, longest) to (documents, longest, d): a layer, or a
            whole encoder of token ids.
        x: (b, n, ...) packed tokens or ids.
        documents: (b, n) whole numbers, the same for tokens of one document of a row; negative for padding.

    Returns:
        (b, n, d), zeros at padding.

    Raises:
        ValueError: if ``documents`` is not (b, n) of whole numbers.
    """
    if documents.shape != x.shape[:2] or documents.is_floating_point() or documents.dtype == torch.bool:
        raise ValueError(
            f"by_document got documents of dtype {documents.dtype} and shape {tuple(documents.shape)}, expected whole numbers of "
            f"shape {tuple(x.shape[:2])}, one for each token"
        )
    b, n = documents.shape
    real = (documents >= 0).flatten().nonzero().squeeze(-1)
    row = real // n if n else real
    known = documents.flatten()[real]
    _, which, counts = (row * (known.max() + 1 if len(known) else 1) + known).unique(
        return_inverse=True, return_counts=True
    )
    order = which.argsort(stable=True)
    which, real = which[order], real[order]
    slot = torch.arange(len(real), device=x.device) - (counts.cumsum(0) - counts)[which]
    longest = int(counts.max()) if len(counts) else 0
    rows = x.new_zeros(len(counts), longest, *x.shape[2:])
    rows[which, slot] = x.flatten(0, 1)[real]
    y = f(rows, torch.arange(longest, device=x.device) < counts[:, None])
    return y.new_zeros(b * n, y.shape[-1]).index_put((real,), y[which, slot]).unflatten(0, (b, n))


def take(x: Tensor, indices: Tensor) -> Tensor:
    """The tokens ``indices`` (b, c) of ``x`` (b, n, d): (b, c, d)."""
    return x.flatten(0, 1).index_select(0, _rows(x, indices)).unflatten(0, indices.shape)


def spaced(linear: nn.Linear, x: Tensor) -> Tensor:
    """``linear(x)``; without a graph in rows that are no power of two apart, which would share a few sets of the cache."""
    width = linear.out_features
    if not _plain(linear, x) or x.device.type != "cpu" or width % 256 or not x.is_contiguous():
        return linear(x)
    rows = x.new_empty(*x.shape[:-1], width + 16)[..., :width]
    torch.mm(x.flatten(0, -2), linear.weight.mT, out=rows.flatten(0, -2))
    return rows


def add_at(y: Tensor, indices: Tensor, z: Tensor, *, into: bool = False) -> Tensor:
    """``y`` (b, n, d) with ``z`` (b, c, d) added to its tokens ``indices`` (b, c), in its memory if ``into``."""
    rows, z = _rows(y, indices), z.flatten(0, 1).to(y.dtype)
    if into and y.is_contiguous():
        y.flatten(0, 1).index_add_(0, rows, z)
        return y
    return y.flatten(0, 1).index_add(0, rows, z).view_as(y)


def ours(module: nn.Module) -> bool:
    """Whether what ``module`` returns may be written to: no graph needs it, and nobody else has it."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or _has_any_global_hook():
        return False
    if type(module) not in _RETURN_NEW or module._forward_hooks or module._forward_pre_hooks:
        return False
    return not isinstance(module, GatedFeedForward | LocalAttention) or ours(module.out)


def _plain(linear: nn.Linear, x: Tensor) -> bool:
    """Whether ``linear(x)`` is a product with its weight, in one dtype, that may be written anywhere."""
    # autocast knows no meta device
    same = x.dtype == linear.weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
    return same and ours(linear) and getattr(linear, "bias", None) is None


# a product or a sum is the last thing they do; what they inherit or what wraps them may do something else
_RETURN_NEW = (nn.Linear, GatedFeedForward, LocalAttention, ConditionalFeedForward, ConditionalAttention)


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    b, n, _ = x.shape
    return (indices + n * torch.arange(b, device=x.device)[:, None]).flatten()


def _check_heads(owner: str, heads: int, head_dim: int, bias: RelativeBias | None, kv_heads: int | None) -> int:
    if heads < 1 or head_dim < 1:
        raise ValueError(f"{owner} got heads={heads}, head_dim={head_dim}; expected at least 1 each")
    if bias is not None and len(bias.table) != heads:
        raise ValueError(f"{owner} got a bias for {len(bias.table)} heads and heads={heads}; give one of as many heads")
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{owner} got kv_heads={kv_heads}, expected a divisor of heads={heads}")
    return kv_heads


def _initialise(qkv: tuple[Tensor, ...], out: Tensor, heads: int) -> None:
    """T5's normals: standard deviation (d e)^-1/2 for queries, d^-1/2 for keys and values, (h e)^-1/2 for the output."""
    q, k, v = qkv
    inner, d = q.shape
    nn.init.normal_(q, std=(d * inner / heads) ** -0.5)
    nn.init.normal_(k, std=d**-0.5)
    nn.init.normal_(v, std=d**-0.5)
    nn.init.normal_(out, std=inner**-0.5)
