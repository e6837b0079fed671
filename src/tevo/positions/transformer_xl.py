"""Transformer-XL: scores by content and by a sinusoid of the distance, each with a learned bias of the query.

    s_ij = ((q_i + u) . k_j + (q_i + v) . W r_{i-j}) / sqrt(e)                                                  (1)
    r_t = [sin(t f_0), ..., sin(t f_{d/2-1}), cos(t f_0), ..., cos(t f_{d/2-1})],   f_j = base^(-2j/d)

Sines and cosines of i - j split into those of i and of j, so that the second term is one product of two matrices for any
positions, padded, gapped or with later keys visible:

    (q_i + v) . W r_{i-j} = A_i . [cos(j f); sin(j f)]                                                          (2)
    A_i = [a sin(i f) + c cos(i f); c sin(i f) - a cos(i f)],   [a; c] = W^T (q_i + v)

Cost O(h n m d), no state of its own. The other half of the paper, the memory of earlier segments, is
``SoftmaxAttention(memory=M)``: its state keeps the last M inputs of the layer without gradient, 2 more numbers each for
mask and position.

Source: 1901.02860, sections 3.2 and 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Position
from tevo.functional.attention import spread

CARD = Card(
    id="transformer_xl",
    role="position",
    summary="Scores by content and by the sinusoid of the distance; with softmax(memory=M), segments with a memory.",
    equations=(
        r"s_{ij} = \frac{(q_i + u)^\top k_j + (q_i + v)^\top W r_{i-j}}{\sqrt{e}}",
        r"r_t = [\sin(t f);\ \cos(t f)],\quad f_j = 10000^{-2j/d}",
        r"k, v \text{ of } [\mathrm{sg}(m);\ x],\quad m \leftarrow \text{last } M \text{ of } [m;\ x]",
    ),
    exports={"transformer_xl": "TransformerXL"},
    cost="n^2",
    flops="10 * n * d * d + 2 * n * d + (4 + 2 * h) * n * n * d",
    state="2 * n * d",
    parameters="d * d + 2 * d",
    memory="n^2",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "shift_invariant"),
    examples=({"dim": 12, "heads": 3}, {"dim": 10, "heads": 5, "base": 100.0}, {"dim": 4, "heads": 1}),
    reduces_to=("softmax without positions at u = v = W = 0",),
    equals=(
        "kimiyoung/transformer-xl MemTransformerLM and its first layer; values in tests/golden/transformer_xl_a.npz",
    ),
    departures=(
        "u and v are each layer's own; the released language model shares them among layers unless told to untie them. "
        "Adds 2 d parameters a layer.",
        "The distance is signed and later keys may be visible; the released shift of a matrix is right for earlier keys "
        "only. Nothing changes under a causal mask.",
        "The position term takes h times the FLOPs of the released shift of a matrix, in products alone; in return any "
        "positions are allowed, and no value of them is read.",
        "Distances are not clamped (clamp_len of the released code).",
    ),
    notes=(
        "With CausalLM(mixer='softmax(memory=M)', position='transformer_xl') step advances a segment and remembers M "
        "tokens of each layer's input. That state forgets: it equals one pass only for one layer and M >= all earlier "
        "tokens; L layers reach back L M tokens. Without memory= the state is exact."
    ),
)


def position_scores(q: Tensor, w: Tensor, q_at: Tensor, k_at: Tensor, base: float) -> Tensor:
    """Equation (2) for q (b, h, n, e), w (h, e, d), ``q_at`` (#b, n), ``k_at`` (#b, m): (b, h, n, m)."""
    d = w.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    f = base ** (-torch.arange(0, d, 2, device=q.device, dtype=wide) / d)
    i, j = q_at[..., None].to(wide) * f, k_at[..., None].to(wide) * f  # b n d/2, b m d/2
    sin, cos = i.sin().to(q.dtype)[:, None], i.cos().to(q.dtype)[:, None]
    a, c = (q @ w).chunk(2, dim=-1)  # b h n d/2
    turned = torch.cat([a * sin + c * cos, c * sin - a * cos], dim=-1)  # b h n d
    keys = torch.cat([j.cos(), j.sin()], dim=-1).to(q.dtype)[:, None]  # b 1 m d
    return turned @ keys.mT


class TransformerXL(Position):
    """Relative positions of Transformer-XL.

    Args:
        dim: width d of the sinusoid, even.
        heads: number of heads h.
        base: wavelengths run from 2 pi to 2 pi base tokens.
    """

    def __init__(self, *, dim: int, heads: int, base: float = 10000.0) -> None:
        super().__init__()
        if dim % 2 or dim % heads:
            raise ValueError(f"TransformerXL got dim={dim}, heads={heads}; dim must be even, and divisible by heads")
        e = dim // heads
        self.base = base
        self.u = nn.Parameter(torch.empty(heads, e))
        self.v = nn.Parameter(torch.empty(heads, e))
        self.r = nn.Linear(dim, heads * e, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, as in the released code."""
        for parameter in (self.u, self.v, self.r.weight):
            nn.init.normal_(parameter, std=0.02)

    def no_decay(self) -> set[str]:
        """The biases of the query are biases, though a matrix holds them."""
        return {"u", "v"}

    def bias(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """(b, h, n, m): all of equation (1) but q_i . k_j."""
        h, e = self.u.shape
        content = self.u[:, None] @ spread(k, h).mT  # b h 1 m
        place = position_scores(q + self.v[:, None], self.r.weight.unflatten(0, (h, e)), q_at, k_at, self.base)
        return (content + place) * e**-0.5
