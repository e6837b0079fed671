"""Grouped-query attention with QK-norm: today's usual attention of language models.

    q_i = RMSNorm(x W_q[i]),   k_g = RMSNorm(y W_k[g]),   v_g = y W_v[g],   g of heads i = floor(i g / h)     (1)
    o_i = softmax(q_i k_g^T / sqrt(e)) v_g

Each norm has gains for the e dimensions of a head, shared by the heads. Positions turn what is normalised, and the cache
keeps keys after their norm. Cost of attention, with g instead of h heads of keys and values: state 2 n g e.

Source: 2305.13245 and 2302.05442, section 2, together as in 2505.09388.
"""

from __future__ import annotations

from torch import Tensor

from tevo.card import Card
from tevo.contracts import Heads
from tevo.mixers.softmax.multi_query_attention import MultiQuery
from tevo.norms.rms_norm import RMSNorm

CARD = Card(
    id="grouped_query_qk_norm",
    role="heads",
    summary="Several query heads share each key head, and queries and keys are normalised before their product.",
    equations=(
        r"s_{ij} = \frac{1}{\sqrt{e}}\, \mathrm{RMSNorm}(x_i W^q_h)^\top\, \mathrm{RMSNorm}(y_j W^k_{\lfloor h g / H \rfloor})",
    ),
    exports={"grouped_query_qk_norm": "GroupedQueryQKNorm"},
    cost="n^2",
    flops="4 * n * (d * (h + groups) + n * h) * (head_dim or d // h)",
    state="2 * n * groups * (head_dim or d // h)",
    parameters=(
        "2 * d * (h + groups) * (head_dim or d // h) + bias * ((h + 2 * groups) * (head_dim or d // h) + d)"
        " + 2 * (head_dim or d // h)"
    ),
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "equivariant"),
    examples=(
        {"dim": 12, "heads": 6, "groups": 3},
        {"dim": 12, "heads": 3, "groups": 1, "eps": 0.1},
        {"dim": 10, "heads": 6, "groups": 2, "head_dim": 3, "bias": True},
    ),
    reduces_to=("multi_query_attention with qk_rms_norm as its normaliser",),
    equals=(
        "transformers 5.23.0 Qwen3Attention, rotation included; values in tests/golden/grouped_query_qk_norm_a.npz",
    ),
)


class GroupedQueryQKNorm(Heads):
    """Grouped projections with RMSNorm of queries and keys.

    Args:
        dim: width d of the tokens.
        heads: number of query heads h.
        groups: number g of key and value heads, divides heads.
        head_dim: width e of a head; by default dim / heads.
        bias: whether the projections have biases.
        eps: added to the mean square in the norms.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        groups: int = 1,
        head_dim: int | None = None,
        bias: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.project = MultiQuery(dim=dim, heads=heads, groups=groups, head_dim=head_dim, bias=bias)
        self.q_norm = RMSNorm(dim=self.project.head_dim, eps=eps)
        self.k_norm = RMSNorm(dim=self.project.head_dim, eps=eps)

    def split(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Equation (1): q (b, h, n, e) of ``x``; k, v (b, g, m, e) of ``context``."""
        q, k, v = self.project.split(x, context)
        return self.q_norm(q), self.k_norm(k), v

    def merge(self, o: Tensor) -> Tensor:
        """(b, h, n, e) gives (b, n, d)."""
        return self.project.merge(o)
