"""Linear attention: the softmax replaced by a product of positive features, so that all keys are summed once.

    y_i = phi(q_i)^T sum_j phi(k_j) v_j^T / (phi(q_i)^T sum_j phi(k_j) + eps),    phi(x) = elu(x) + 1

The causal form sums over j <= i, as a recurrence or chunk by chunk. Letters: e width of a head. Cost O(n d e) FLOPs;
state: the two sums, e (e + 1) numbers a head.

Source: 2006.16236, sections 3.2 to 3.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.linear_attention import normalised_causal_linear_attention
from tevo.functional.masks import blank, check_mask
from tevo.mixers.softmax.multi_head import MultiHead

CARD = Card(
    id="linear_attention",
    role="mixer",
    summary="The softmax replaced by a product of positive features, so that all keys are summed once.",
    equations=(
        r"y_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j) + \epsilon}",
        r"\phi(x) = \mathrm{elu}(x) + 1",
    ),
    exports={"linear_attention": "LinearAttention"},
    cost="n",
    flops=(
        "8 * n * d * d + 4 * n * d * (d // h + 1) + (2 * ((n - n % 64) * 64 + (n % 64) ** 2) * (2 * d + h) "
        "+ 2 * d * (d // h + 1) * ceil(n / 64) if causal else 0)"
    ),
    state="d * (d // h + 1)",
    parameters="4 * d * d",
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "equivariant", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3, "causal": True},
        {"dim": 12, "heads": 3},
        {"dim": 5, "heads": 1, "causal": True},
        {"dim": 14, "heads": 7, "eps": 1e-3},
    ),
    departures=(
        "eps, which the paper's equation lacks, is added to the denominator as in its released code, so that a query "
        "without any key gets zeros.",
    ),
)


def elu_features(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, in float32 for half precision."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # e^x itself for negative x, not e^x - 1 + 1, which is zero from x = -17 on
    return x.relu() + x.clamp(max=0).exp()


def summarise(k: Tensor, v: Tensor) -> Tensor:
    """Both sums over keys: k (b, h, m, e) features, v (b, h, m, v) give S (b, h, e, v + 1), z its last column."""
    return k.mT @ F.pad(v.to(k.dtype), (0, 1), value=1.0)


def read(q: Tensor, S: Tensor, eps: float) -> Tensor:
    """The equation: q (b, h, n, e) features, S (b, h, e, v + 1) give (b, h, n, v)."""
    y = q @ S
    return y[..., :-1] / (y[..., -1:] + eps)


def causal_read(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """The equation over j <= i, with the last of n queries at the last of m keys; a query before all keys gets zeros."""
    earlier = k.shape[2] - q.shape[2]
    if earlier >= 0:
        S = summarise(k[:, :, :earlier], v[:, :, :earlier])
        return normalised_causal_linear_attention(
            q, k[:, :, earlier:], v[:, :, earlier:].to(q.dtype), state=S, eps=eps
        )[0]
    y, _ = normalised_causal_linear_attention(q[:, :, -earlier:], k, v.to(q.dtype), eps=eps)
    return F.pad(y, (0, 0, -earlier, 0))


class LinearAttention(TokenMixer):
    """Linear attention with elu + 1 features.

    Args:
        dim: width d.
        heads: number of heads h.
        causal: a token sees itself and earlier ones.
        eps: added to the denominator.
    """

    def __init__(self, *, dim: int, heads: int = 8, causal: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.heads = MultiHead(dim=dim, heads=heads)
        self.causal = causal
        self.eps = eps

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``context`` (b, m, d), ``mask`` (b, m); order is that of the tokens, not ``at``."""
        q, k, v = self._split(x, x if context is None else context, mask)
        y = causal_read(q, k, v, self.eps) if self.causal else read(q, summarise(k, v), self.eps)
        return self.heads.merge(y.to(x.dtype))

    def _split(self, x: Tensor, context: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, and values; the features of padding are zero."""
        check_mask("LinearAttention", mask, context.shape[0], context.shape[1])
        source = blank(context, mask)
        q, k, v = self.heads.split(source if x is context else x, source)
        k = elu_features(k)
        return elu_features(q), k if mask is None else k.masked_fill(~mask[:, None, :, None], 0.0), v

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """The sums (b, h, e, v + 1), zero; those of ``context``, which never change, one level deeper."""
        like = self.heads.out.weight
        if context is not None:
            _, k, v = self._split(context[:, :0], context, mask)
            return ((summarise(k, v),),)
        if not self.causal:
            raise ValueError("LinearAttention(causal=False) has no state of its own; build it with causal=True")
        e = like.shape[1] // self.heads.heads
        return (
            like.new_zeros(batch, self.heads.heads, e, e + 1, dtype=torch.promote_types(like.dtype, torch.float32)),
        )

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
