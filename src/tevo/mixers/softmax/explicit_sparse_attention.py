"""Explicit sparse attention: softmax over the k largest scores of each row, zero elsewhere.

    t_i = the k-th largest score of row i among the keys it may see
    a_ij = softmax_j over { j : s_ij >= t_i },  0 elsewhere

Scores that tie with the k-th are all kept, as in the paper. The threshold is a constant for the gradient. Cost
O(n m log k) beside the scores, which are all computed: the gain is in what is attended to, not in speed.

Source: 1912.11637, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Normaliser
from tevo.functional.attention import softmax_weights

CARD = Card(
    id="explicit_sparse_attention",
    role="normaliser",
    summary="Softmax over the k largest scores of each query instead of all.",
    equations=(
        r"a_{ij} = \frac{[s_{ij} \ge t_i]\, e^{s_{ij}}}{\sum_{l} [s_{il} \ge t_i]\, e^{s_{il}}}",
        r"t_i = \text{the } k\text{-th largest of } s_{i1}, \dots, s_{im}",
    ),
    exports={"explicit_sparse_attention": "ExplicitSparse"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="0",
    memory="n^2",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "equivariant"),
    examples=({"topk": 4}, {"topk": 2}, {"topk": 11}),
    reduces_to=("softmax at topk >= the number of keys",),
    equals=(
        "lancopku/Explicit-Sparse-Transformer sparse_activated_multihead_attention and x-transformers 2.31.10 "
        "sparse_topk_attn; values in tests/golden/explicit_sparse_attention_a.npz",
    ),
    departures=("k is a fixed number; the released code can also take a share of the number of keys.",),
)


def top_k_softmax(s: Tensor, k: int, allowed: Tensor | None = None) -> Tensor:
    """Scores (..., m) give weights (..., m); ``allowed`` (bool, broadcastable) goes first."""
    if k >= s.shape[-1]:
        return softmax_weights(s, allowed)
    visible = s.detach() if allowed is None else s.detach().masked_fill(~allowed, -torch.inf)
    kept = visible >= visible.topk(k, dim=-1).values[..., -1:]
    # a row with fewer than k keys has the threshold minus infinity, which the others reach too
    return softmax_weights(s, kept if allowed is None else kept & allowed)


class ExplicitSparse(Normaliser):
    """Top-k softmax.

    Args:
        topk: number k of keys that a query attends to, >= 1.
    """

    def __init__(self, *, topk: int = 8) -> None:
        super().__init__()
        if topk < 1:
            raise ValueError(f"ExplicitSparse got topk={topk}; a query must attend to at least 1 key")
        self.topk = topk

    def forward(self, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Scores (b, h, n, m), ``allowed`` (broadcastable) give weights (b, h, n, m)."""
        return top_k_softmax(scores, self.topk, allowed)
