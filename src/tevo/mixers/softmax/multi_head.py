"""Multi-head projections: every head has queries, keys and values of its own.

    q_i = x W_q[i],  k_i = y W_k[i],  v_i = y W_v[i];  out = concat_i(o_i) W_o

Source: 1706.03762, section 3.2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Heads

CARD = Card(
    id="multi_head",
    role="heads",
    summary="Queries, keys and values of its own for every head.",
    equations=(
        r"q_i = x W^q_i,\quad k_i = y W^k_i,\quad v_i = y W^v_i",
        r"\mathrm{out} = [o_1; \dots; o_h]\, W^o",
    ),
    exports={"multi_head": "MultiHead"},
    cost="n^2",
    flops="8 * n * d * h * (head_dim or d // h) + 4 * n * n * h * (head_dim or d // h)",
    state="2 * n * h * (head_dim or d // h)",
    parameters="4 * d * h * (head_dim or d // h) + bias * (3 * h * (head_dim or d // h) + d)",
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "equivariant"),
    examples=({"dim": 12, "heads": 3}, {"dim": 10, "heads": 2, "head_dim": 3}, {"dim": 4, "heads": 1, "bias": True}),
)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, h e) gives (b, h, n, e)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(o: Tensor) -> Tensor:
    """(b, h, n, v) gives (b, n, h v)."""
    return o.transpose(1, 2).flatten(-2)


def check_heads(owner: str, dim: int, heads: int) -> int:
    """The width of a head, or one sentence why there is none."""
    if heads < 1 or dim % heads:
        raise ValueError(
            f"{owner} cannot split dim={dim} into heads={heads}; choose a number of heads that divides dim"
        )
    return dim // heads


class MultiHead(Heads):
    """Projections of multi-head attention.

    Args:
        dim: width d of the tokens.
        heads: number of heads h.
        head_dim: width e of a head; by default dim / heads.
        bias: whether the four projections have biases.
    """

    def __init__(self, *, dim: int, heads: int = 8, head_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        e = check_heads("MultiHead", dim, heads) if head_dim is None else head_dim
        self.q = nn.Linear(dim, heads * e, bias=bias)
        self.kv = nn.Linear(dim, 2 * heads * e, bias=bias)
        self.out = nn.Linear(heads * e, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform of each d x (h e) matrix, zero biases, as in the paper's released code."""
        for linear, parts in ((self.q, 1), (self.kv, 2), (self.out, 1)):
            for weight in linear.weight.chunk(parts):
                nn.init.xavier_uniform_(weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def split(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (b, h, n, e) of ``x``; k, v (b, h, m, e) of ``context``."""
        if x is context:
            # one product for all three; the stacked weight is small beside the tokens
            weight = torch.cat([self.q.weight, self.kv.weight])
            bias = None if self.q.bias is None else torch.cat([self.q.bias, self.kv.bias])
            q, k, v = nn.functional.linear(x, weight, bias).chunk(3, dim=-1)
        else:
            q = self.q(x)
            k, v = self.kv(context).chunk(2, dim=-1)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def merge(self, o: Tensor) -> Tensor:
        """(b, h, n, e) gives (b, n, d)."""
        return self.out(merge_heads(o))
