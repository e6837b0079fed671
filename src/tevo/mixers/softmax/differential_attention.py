"""Differential attention: a head is the difference of two softmax maps, so that what both give to noise cancels.

    o_j = RMSNorm((softmax(q_j k_j^T / sqrt(e)) - lambda softmax(q'_j k'_j^T / sqrt(e))) v_j) (1 - lambda_0)     (1)
    lambda = exp(l_q . l_k) - exp(l'_q . l'_k) + lambda_0,   lambda_0 = 0.8 - 0.6 exp(-0.3 index)           (2)

Map j of the first half of the h maps is paired with map j of the second half; a pair has values of width 2 e, the pair's two
value heads side by side. index counts layers from 0; lambda is one number a layer. Cost of attention with 3 instead of 2
products of its size; the cache keeps each pair's values twice.

Source: 2410.05258, section 2.1, and its released code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Heads
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads
from tevo.norms.rms_norm import RMSNorm
from tevo.taps import tap

CARD = Card(
    id="differential_attention",
    role="heads",
    summary="Each head is the difference of two softmax maps with a learned factor, normalised.",
    equations=(
        r"o_j = (1 - \lambda_0)\, \mathrm{RMSNorm}\Big(\big(\mathrm{softmax}(q_j k_j^\top / \sqrt{e})"
        r" - \lambda\, \mathrm{softmax}(q'_j k_j'^\top / \sqrt{e})\big) v_j\Big)",
        r"\lambda = e^{l_q^\top l_k} - e^{l_q'^\top l_k'} + \lambda_0,\quad \lambda_0 = 0.8 - 0.6\, e^{-0.3\, l}",
    ),
    exports={"differential_attention": "DifferentialAttention"},
    cost="n^2",
    flops="4 * n * d * (h + (groups or h)) * (head_dim or d // h) + 6 * n * n * h * (head_dim or d // h)",
    state="3 * n * (groups or h) * (head_dim or d // h)",
    parameters=(
        "2 * d * (h + (groups or h)) * (head_dim or d // h) + bias * ((h"
        " + 2 * (groups or h)) * (head_dim or d // h) + d)"
        " + 6 * (head_dim or d // h)"
    ),
    memory="n^2",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "equivariant"),
    examples=(
        {"dim": 12, "heads": 6},
        {"dim": 12, "heads": 4, "groups": 2, "index": 3, "bias": True},
        {"dim": 10, "heads": 2, "head_dim": 3, "index": 1},
    ),
    equals=(
        "transformers 5.23.0 DiffLlamaAttention, causal with rotation and padded without; values in "
        "tests/golden/differential_attention_a.npz",
    ),
    departures=(
        "The norm has gains for the 2 e features, shared by the heads, as in the authors' code; that of transformers has none.",
        "Values are kept twice in the cache, since its heads of keys and values are equal in number.",
    ),
    notes=(
        "heads counts softmax maps: as many as the heads of ordinary attention give as many parameters, and half as many "
        "pairs. Each map can be turned by a position."
    ),
)


def first_lambda(index: int) -> float:
    """lambda_0 of equation (2)."""
    return 0.8 - 0.6 * math.exp(-0.3 * index)


def difference(o: Tensor, factor: Tensor) -> Tensor:
    """What both maps of each pair read, (b, h, n, 2 e), as their difference (b, h / 2, n, 2 e)."""
    one, other = o.chunk(2, dim=1)
    return one - factor.to(o.dtype) * other


class DifferentialAttention(Heads):
    """Projections and pairing of differential attention.

    Args:
        dim: width d of the tokens.
        heads: number of softmax maps h, even.
        groups: number g of key heads, even, divides heads; None is heads.
        head_dim: width e of a map's queries; by default dim / heads.
        index: which layer this is, from 0.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        groups: int | None = None,
        head_dim: int | None = None,
        index: int = 0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        g = heads if groups is None else groups
        if heads < 2 or heads % 2 or g < 2 or g % 2 or heads % g:
            raise ValueError(
                f"DifferentialAttention got heads={heads}, groups={g}; maps come in pairs: both must be even, and groups "
                "divide heads"
            )
        self.heads, self.groups = heads, g
        e = check_heads("DifferentialAttention", dim, heads) if head_dim is None else head_dim
        self.first = first_lambda(index)
        self.q = nn.Linear(dim, heads * e, bias=bias)
        self.kv = nn.Linear(dim, 2 * g * e, bias=bias)
        self.out = nn.Linear(heads * e, dim, bias=bias)
        self.lambdas = nn.Parameter(torch.empty(2, 2, e))  # maps, query and key
        self.norm = RMSNorm(dim=2 * e, eps=1e-5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Vectors of lambda normal with standard deviation 0.1, as released; projections as those of multi-head attention."""
        bound = (6 / sum(self.q.weight.shape)) ** 0.5
        for linear in (self.q, self.kv, self.out):
            nn.init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.normal_(self.lambdas, std=0.1)

    def no_decay(self) -> set[str]:
        """Vectors, though one tensor holds them."""
        return {"lambdas"}

    def factor(self) -> Tensor:
        """Equation (2): lambda, ()."""
        wide = self.lambdas.to(torch.promote_types(self.lambdas.dtype, torch.float32))
        one, other = wide.prod(1).sum(-1).exp()
        return tap("lambda", one - other + self.first)

    def split(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (b, h, n, e) of ``x``; k (b, g, m, e) and v (b, g, m, 2 e) of ``context``."""
        k, v = self.kv(context).chunk(2, dim=-1)
        one, other = split_heads(v, self.groups).chunk(2, dim=1)
        pair = torch.cat([one, other], -1)  # b g/2 m 2e
        return split_heads(self.q(x), self.heads), split_heads(k, self.groups), pair.repeat(1, 2, 1, 1)

    def merge(self, o: Tensor) -> Tensor:
        """(b, h, n, 2 e) gives (b, n, d) (eq. 1)."""
        y = self.norm(difference(o, self.factor())) * (1 - self.first)
        merged: Tensor = self.out(merge_heads(y))
        return merged
