"""T5 relative bias: one learned scalar per head and bucket of distance; scores are not scaled.

    s_ij = q_i . k_j + B[h, bucket(j - i)]
    bucket: exact for small distances, then logarithmic up to max_distance, then one bucket for all beyond

Source: 1910.10683, section 2.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Position

CARD = Card(
    id="t5_bias",
    role="position",
    summary="Adds to each score a learned scalar per head and logarithmic bucket of distance.",
    equations=(r"s_{ij} = q_i^\top k_j + B_{h,\,\mathrm{bucket}(j - i)}",),
    exports={"t5_bias": "T5Bias"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d",
    state="2 * n * d",
    parameters="h * buckets",
    memory="n^2",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "shift_invariant", "shared_across_layers"),
    examples=(
        {"heads": 3, "buckets": 8, "max_distance": 9},
        {"heads": 3, "causal": True, "buckets": 6, "max_distance": 16},
        {"heads": 5, "buckets": 13, "max_distance": 20},
    ),
    equals=("transformers 5.23.0 T5Attention; values in tests/golden/softmax_t5_bias_a.npz",),
)


def bucket(offset: Tensor, *, causal: bool, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each ``offset`` = key position - query position (any integer shape)."""
    half = buckets if causal else buckets // 2
    side = torch.zeros_like(offset) if causal else (offset > 0).long() * half
    distance = (-offset).clamp(min=0) if causal else offset.abs()
    exact = half // 2
    # the same bucket edges in every dtype of the model: computed in float32, as in the released code
    ratio = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = exact + (ratio * (half - exact)).long()
    return side + torch.where(distance < exact, distance, far.clamp(max=half - 1))


class T5Bias(Position):
    """T5's bucketed relative bias, which also undoes the 1/sqrt(e) of the scores.

    Args:
        heads: number of heads.
        causal: buckets of the past only (the decoder's), instead of half of them for each side.
        buckets: number of buckets, >= 2 for each side.
        max_distance: distance in tokens from which on all share the last bucket.
    """

    def __init__(self, *, heads: int, causal: bool = False, buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__()
        self.causal, self.buckets, self.max_distance = causal, buckets, max_distance
        per_side = buckets if causal else buckets // 2
        if per_side < 2 or max_distance <= per_side // 2:
            raise ValueError(
                f"T5Bias got buckets={buckets}, max_distance={max_distance}; needs >= 2 buckets a side and a max_distance "
                "above half of them"
            )
        self.table = nn.Parameter(torch.empty(heads, buckets))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation d^-1/2 in T5; the width is not known here, 0.02 is its value at d = 2500."""
        nn.init.normal_(self.table, std=0.02)

    def turn(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """Undo the scaling of the scores: T5 has none."""
        return q * q.shape[-1] ** 0.5, k

    def bias(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """(#b, h, n, m)."""
        offset = k_at[:, None, :] - q_at[:, :, None]  # b n m
        index = bucket(offset, causal=self.causal, buckets=self.buckets, max_distance=self.max_distance)
        return self.table[:, index].transpose(0, 1)  # b h n m
