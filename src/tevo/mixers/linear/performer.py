"""Performer: softmax attention by random positive features whose products have the exponential of q . k as their mean.

    phi(x) = e^{-|x|^2 / 2} [e^{w_1 . x}, ..., e^{w_p . x}] / sqrt(p),   x = q e^{-1/4} or k e^{-1/4}     (1)
    y_i = sum_j (phi(q_i) . phi(k_j)) v_j / sum_j phi(q_i) . phi(k_j)                                (2)

w_1, ..., w_p are orthogonal in groups of e, with the lengths of normal vectors. ``performer_relu`` takes relu(w . x) + 1e-3
in place of (1), the generalised attention. Cost O(n p d) FLOPs; state: p (e + 1) numbers a head. Letters: e width of a
head, p ``features``.

Source: 2009.14794, sections 2.2 to 2.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.linear_attention import normalised_causal_linear_attention
from tevo.functional.masks import blank, check_mask
from tevo.mixers.linear.linear_attention import causal_read, read, summarise
from tevo.mixers.softmax.multi_head import MultiHead

CARD = Card(
    id="performer",
    role="mixer",
    summary="Softmax attention estimated without bias by products of random positive features, in linear time.",
    equations=(
        r"\phi(x) = \frac{e^{-\lVert x \rVert^2 / 2}}{\sqrt{p}} \big[e^{w_1^\top x}, \dots, e^{w_p^\top x}\big]",
        r"y_i = \frac{\sum_j \phi(q_i)^\top \phi(k_j)\, v_j}{\sum_j \phi(q_i)^\top \phi(k_j)},\quad"
        r" \mathbb{E}\, \phi(q)^\top \phi(k) = e^{q^\top k}",
    ),
    exports={"performer": "Performer", "performer_relu": "PerformerReLU"},
    cost="n",
    flops=(
        "(lambda n, d, h, e, p, chunks: 8 * n * d * d + 4 * n * d * p + 4 * n * h * p * (e + 1)"
        " + (2 * ((n - n % 64) * 64 + (n % 64) ** 2) * h * (p + e + 1) + 2 * h * p * (e + 1) * chunks if chunks else 0))"
        "(n, d, h, d // h, features, ceil(n / 64) if causal else 0)"
    ),
    state="h * features * (d // h + 1)",
    parameters="4 * d * d",
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "equivariant", "exact_state"),
    examples=(
        {"part": "performer", "dim": 12, "heads": 3, "features": 7, "causal": True},
        {"part": "performer", "dim": 12, "heads": 3, "features": 5},
        {"part": "performer", "dim": 5, "heads": 1, "features": 11, "causal": True},
        {"part": "performer", "dim": 6, "heads": 2, "features": 1},
        {"part": "performer_relu", "dim": 12, "heads": 3, "features": 7, "causal": True},
        {"part": "performer_relu", "dim": 10, "heads": 2, "features": 3},
    ),
    equals=(
        "performer-pytorch 1.1.4 FastAttention: softmax and ReLU features, both directions; values in "
        "tests/golden/performer_a.npz",
    ),
    departures=(
        "The exponents of (1) are used as they are: those of keys are at most |w|^2 / 2, and the largest of each query is "
        "taken out, which the division cancels. Released codes take out the largest of all keys too, which looks at later "
        "tokens, and then add 1e-4 to every feature, which biases the estimate.",
        "Features are made uniform in direction by the signs of the orthogonalisation, which that package leaves as they "
        "come: its estimate is biased.",
        "eps is added to the denominator, so that a query without any key gets zeros.",
    ),
    notes=(
        "redraw(generator) draws new features; the paper does so every so many steps of training. They are buffers and are "
        "saved with the model."
    ),
)


def orthogonal_features(p: int, e: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Features w (p, e): rows orthogonal in groups of e, each with the length of a normal vector, in float64."""
    groups = []
    for start in range(0, p, e):
        q, r = torch.linalg.qr(torch.randn(e, e, generator=generator, dtype=torch.float64))
        # Gram-Schmidt has a positive diagonal; without it directions are not uniform, and the estimate is biased
        groups.append((q * r.diagonal().sign()).T[: min(e, p - start)])
    lengths = torch.randn(p, e, generator=generator, dtype=torch.float64).norm(dim=1)
    return torch.cat(groups) * lengths[:, None]


def positive_features(x: Tensor, w: Tensor, *, shift: Tensor | float = 0.0, add: float = 0.0) -> Tensor:
    """Equation (1) for x (..., e), w (p, e), with ``shift`` taken out of the exponents and ``add`` added: (..., p)."""
    x = x * x.shape[-1] ** -0.25
    exponent = x @ w.mT - x.square().sum(-1, keepdim=True) / 2 - shift
    return (exponent.exp() + add) * len(w) ** -0.5


def relu_features(x: Tensor, w: Tensor) -> Tensor:
    """The generalised attention's features: x (..., e), w (p, e) give (..., p)."""
    return (x * x.shape[-1] ** -0.25 @ w.mT).relu() + 1e-3


class _Performer(TokenMixer):
    """Both Performers; the features are each class's own."""

    w: Tensor

    def __init__(
        self, *, dim: int, heads: int = 8, causal: bool = False, features: int | None = None, eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.heads = MultiHead(dim=dim, heads=heads)
        e = dim // heads
        p = max(1, int(e * math.log(e))) if features is None else features
        if p < 1:
            raise ValueError(f"{type(self).__name__} got features={p}, expected at least 1")
        self.causal, self.eps = causal, eps
        self.register_buffer("w", torch.empty(p, e))
        self.redraw()

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new features, from torch's global generator by default."""
        with torch.no_grad():
            drawn = orthogonal_features(*self.w.shape, generator=generator)
            self.w.copy_(drawn)

    def query_features(self, q: Tensor) -> Tensor:
        """(b, h, n, e) gives (b, h, n, p), each query's times a factor of its own."""
        raise NotImplementedError

    def key_features(self, k: Tensor) -> Tensor:
        """(b, h, m, e) gives (b, h, m, p)."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``context`` (b, m, d), ``mask`` (b, m); order is that of the tokens, not ``at``."""
        q, k, v = self._split(x, x if context is None else context, mask)
        y = causal_read(q, k, v, self.eps) if self.causal else read(q, summarise(k, v), self.eps)
        return self.heads.merge(y.to(x.dtype))

    def _split(self, x: Tensor, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys in at least float32, and values; the features of padding are zero."""
        check_mask(type(self).__name__, mask, context.shape[0], context.shape[1])
        source = blank(context, mask)
        q, k, v = self.heads.split(source if x is context else x, source)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = self.query_features(q.to(wide)), self.key_features(k.to(wide))
        return q, k if mask is None else k.masked_fill(~mask[:, None, :, None], 0.0), v

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """The sums (b, h, p, e + 1), zero; those of ``context``, which never change, one level deeper."""
        like = self.heads.out.weight
        if context is not None:
            _, k, v = self._split(context[:, :0], context, mask)
            return ((summarise(k, v),),)
        if not self.causal:
            raise ValueError(f"{type(self).__name__}(causal=False) has no state of its own; build it with causal=True")
        p, e = self.w.shape
        wide = torch.promote_types(like.dtype, torch.float32)
        return (like.new_zeros(batch, self.heads.heads, p, e + 1, dtype=wide),)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d), whose padding adds nothing."""
        assert isinstance(state, tuple)
        (S,) = state
        if isinstance(S, tuple):
            (fixed,) = S
            assert isinstance(fixed, Tensor)
            q, _, _ = self._split(x, x[:, :0], None)
            return self.heads.merge(read(q, fixed, self.eps).to(x.dtype)), state
        q, k, v = self._split(x, x, mask)
        y, S = normalised_causal_linear_attention(q, k, v.to(q.dtype), state=S, eps=self.eps)
        return self.heads.merge(y.to(x.dtype)), (S,)


class Performer(_Performer):
    """Softmax attention by positive random features.

    Args:
        dim: width d.
        heads: number of heads h.
        causal: a token sees itself and earlier ones.
        features: number p of features; None is e log e.
        eps: added to the denominator.
    """

    def query_features(self, q: Tensor) -> Tensor:
        """Equation (1) with its largest exponent taken out."""
        exponent = (q * q.shape[-1] ** -0.25) @ self.w.to(q.dtype).mT
        return exponent.sub(exponent.detach().amax(-1, keepdim=True)).exp()

    def key_features(self, k: Tensor) -> Tensor:
        """Equation (1)."""
        return positive_features(k, self.w.to(k.dtype))


class PerformerReLU(_Performer):
    """Generalised attention with ReLU features; arguments as for :class:`Performer`."""

    def query_features(self, q: Tensor) -> Tensor:
        """ReLU features."""
        return relu_features(q, self.w.to(q.dtype))

    def key_features(self, k: Tensor) -> Tensor:
        """ReLU features."""
        return relu_features(k, self.w.to(k.dtype))
