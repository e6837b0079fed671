"""Sinkformer: weights that sum to one over keys and, in the limit, evenly over queries, by steps of Sinkhorn.

    f = 0, g = 0;  step t = 1..T:
        odd:   f_i = -log sum_j exp(s_ij + g_j)                                                      (1)
        even:  g_j = -log sum_i exp(s_ij + f_i) + log(n / m)                                         (2)
    a_ij = exp(s_ij + f_i + g_j)                                                                     (3)

T = 1 is softmax. After an odd number of steps every row sums to one; after many steps every column sums to n / m too.
There is no causal form: a column's sum runs over later queries. Cost O(T n m) beside attention's O(n m d); T matrices
of scores are kept for backward. Rows and columns without an allowed pair are not part of the problem, and get zeros.

Source: 2110.11773, section 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tevo.card import Card
from tevo.contracts import Normaliser

CARD = Card(
    id="sinkformer",
    role="normaliser",
    summary="Sinkhorn's alternating normalisation of rows and columns instead of softmax.",
    equations=(
        r"f_i = -\log \sum_j e^{s_{ij} + g_j},\quad g_j = -\log \sum_i e^{s_{ij} + f_i} + \log \tfrac{n}{m}",
        r"a_{ij} = e^{s_{ij} + f_i + g_j}",
    ),
    exports={"sinkformer": "Sinkhorn"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    parameters="0",
    memory="n^2",
    claims=("bidirectional", "cross", "padding", "equivariant"),
    examples=({"iterations": 3}, {"iterations": 1}, {"iterations": 4}, {"iterations": 7}),
    reduces_to=("softmax at iterations=1",),
    equals=(
        "michaelsdr/sinkformers SinkhornDistance and MultiHeadAttention of text classification (without padding); values "
        "in tests/golden/sinkformer_a.npz",
    ),
    departures=(
        "Gradients are those of all steps; the released code takes none through g, which released_gradient=True repeats. "
        "Values are the same, gradients differ by order one for more than one step.",
        "The number of steps is fixed; the released code stops early where a step changes nothing (1e-12).",
        "Keys that may not be seen get nothing; the released code gives padding columns their share.",
    ),
    notes="It must not be used in causal attention.",
)


def sinkhorn(s: Tensor, iterations: int, allowed: Tensor | None = None, *, detach: bool = False) -> Tensor:
    """Equations (1) to (3) for scores (..., n, m) and ``allowed`` (bool, broadcastable); same shape back.

    Args:
        s: scores.
        iterations: number T of steps.
        allowed: pairs that may have weight; None: all.
        detach: no gradient through g, as the released code.
    """
    n, m = s.shape[-2:]
    if s.numel() == 0:
        return s
    by_row = by_column = s
    shift: Tensor | float = math.log(n / m)
    if allowed is not None:
        allowed = allowed.expand_as(s)
        rows, columns = allowed.any(-1, keepdim=True), allowed.any(-2, keepdim=True)
        # in a row or column without any pair the scores stay, so that its logarithm is finite; its weights go at the end
        by_row = s.masked_fill(~allowed & rows, -torch.inf)
        by_column = s.masked_fill(~allowed & columns, -torch.inf)
        live = rows.sum(-2, keepdim=True).to(s.dtype), columns.sum(-1, keepdim=True).to(s.dtype)
        shift = live[0].clamp(min=1).log() - live[1].clamp(min=1).log()
    f, g = s.new_zeros(n, 1), s.new_zeros(1, m)
    for step in range(1, iterations + 1):
        if step % 2:
            f = -(by_row + g).logsumexp(-1, keepdim=True)  # (eq. 1)
        else:
            g = shift - (by_column + f).logsumexp(-2, keepdim=True)  # (eq. 2)
            g = g.detach() if detach else g
    logs = s + f + g
    return (logs if allowed is None else logs.masked_fill(~allowed, -torch.inf)).exp()  # (eq. 3)


class Sinkhorn(Normaliser):
    """Sinkhorn's normalisation of scores.

    Args:
        iterations: number T of steps, >= 1; odd, so that rows sum to one.
        released_gradient: take no gradient through the columns' terms, as the released code; otherwise the true gradient.
    """

    causal_form = False

    def __init__(self, *, iterations: int = 3, released_gradient: bool = False) -> None:
        super().__init__()
        if iterations < 1:
            raise ValueError(f"Sinkhorn got iterations={iterations}; it needs at least 1 step (1 is softmax)")
        self.iterations, self.released_gradient = iterations, released_gradient

    def forward(self, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Scores (b, h, n, m), ``allowed`` (broadcastable) give weights (b, h, n, m); half precision in float32."""
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return sinkhorn(wide, self.iterations, allowed, detach=self.released_gradient).to(scores.dtype)
