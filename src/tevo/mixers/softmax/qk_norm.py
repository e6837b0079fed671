"""QKNorm: queries and keys are scaled to length one, and a learned number takes the place of the scale e^-1/2.

    s_ij = g (q_i / |q_i|) . (k_j / |k_j|),   a_ij = softmax_j s_ij                                  (1)
    g at first = log2(L^2 - L),  L = 97.5th percentile of the lengths of the training sequences      (2)

Scores are cosines times g, so no weight matrix can make them larger than g. The later form that is called QK-norm in
large models (``qk_rms_norm``) is another parametrisation: RMSNorm of queries and keys with gains for each dimension of
a head, and the usual scale:

    s_ij = e^-1/2 RMSNorm(q_i) . RMSNorm(k_j)                                                        (3)

Rotations keep lengths, so that it makes no difference for (1) whether rotary positions turn before or after. Cost of
attention, O(n m d); its state.

Source: 2010.04245, section 2; (3) 2302.05442, section 2, with RMSNorm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Normaliser
from tevo.functional.attention import scores
from tevo.mixers.softmax.multi_head import check_heads
from tevo.norms.rms_norm import RMSNorm

CARD = Card(
    id="qk_norm",
    role="normaliser",
    summary="Cosines of queries and keys times one learned number instead of scaled dot products.",
    equations=(
        r"a_{ij} = \mathrm{softmax}_j\!\left(g\, \frac{q_i^\top k_j}{\lVert q_i \rVert_2 \lVert k_j \rVert_2}\right)",
        r"g_0 = \log_2(L^2 - L)",
    ),
    exports={"qk_norm": "QKNorm", "qk_rms_norm": "QKRMSNorm"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="h if per_head else 1",
    memory="n^2",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "equivariant"),
    examples=(
        {"part": "qk_norm", "length": 27},
        {"part": "qk_norm", "length": 13, "heads": 3, "per_head": True},
        {"part": "qk_norm", "length": 15},
        {"part": "qk_rms_norm", "dim": 12, "heads": 3},
        {"part": "qk_rms_norm", "dim": 10, "heads": 5, "eps": 0.1},
        {"part": "qk_rms_norm", "dim": 7, "heads": 1},
    ),
    reduces_to=("softmax for queries and keys of length one at g = e^-1/2",),
    equals=("CyndxAI/QKNorm Encoder and Decoder of layers.py; values in tests/golden/qk_norm_a.npz",),
    departures=(
        "The cache keeps keys as they are, and their lengths are taken again at each step: the seat of a normaliser has no "
        "say in what is cached. No effect on values.",
    ),
    notes=(
        "length is that of the training sequences, the host's unless given. The rest of the paper's recipe is "
        "residual=scale_norm. Other libraries' qk_norm is often qk_rms_norm here, or cosines times a fixed 10."
    ),
    variants={"qk_rms_norm": {"parameters": "2 * (d // h)"}},
)


def cosine_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Equation (1) before the softmax: q (b, h, n, e), k (b, h, m, e), g () or (h,) give (b, h, n, m)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    # the released code's 1e-12, for queries and keys of zeros
    q_hat = g.reshape(-1, 1, 1) * F.normalize(q.to(wide), dim=-1, eps=1e-12)
    k_hat = F.normalize(k.to(wide), dim=-1, eps=1e-12)
    return q_hat.to(q.dtype) @ k_hat.to(k.dtype).mT


def first_scale(length: float) -> float:
    """Equation (2)."""
    return math.log2(length**2 - length)


class QKNorm(Normaliser):
    """Cosine attention with a learned scale.

    Args:
        length: 97.5th percentile L of the lengths of the training sequences, in tokens, >= 2.
        heads: number of heads h of the attention, used with ``per_head`` only.
        per_head: one scale a head; the paper has one a module.
    """

    def __init__(self, *, length: int, heads: int = 8, per_head: bool = False) -> None:
        super().__init__()
        if length < 2:
            raise ValueError(
                f"QKNorm got length={length}; its first scale log2(L^2 - L) needs the training sequences' length, L >= 2"
            )
        self.length = length
        self.g = nn.Parameter(torch.empty(heads if per_head else ()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equation (2): cosines are at most one, and must be enlarged for weights to become peaked."""
        nn.init.constant_(self.g, first_scale(self.length))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Q (b, h, n, e), k (b, h, m, e) give cosines times g, (b, h, n, m)."""
        return cosine_scores(q, k, self.g)


class QKRMSNorm(Normaliser):
    """RMSNorm of queries and keys, shared by the heads of a module.

    Args:
        dim: width d.
        heads: number of heads h, which divides dim.
        eps: added to the mean square.
    """

    def __init__(self, *, dim: int, heads: int = 8, eps: float = 1e-6) -> None:
        super().__init__()
        e = check_heads("QKRMSNorm", dim, heads)
        self.q_norm = RMSNorm(dim=e, eps=eps)
        self.k_norm = RMSNorm(dim=e, eps=eps)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """Q (b, h, n, e), k (b, h, m, e) give scores (b, h, n, m)."""
        return scores(self.q_norm(q), self.k_norm(k))
