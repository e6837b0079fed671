"""Multi-query attention: h query heads share one head of keys and values, or g heads of them (grouped-query attention).

    q_i = x W_q[i],  k_u = y W_k[u],  v_u = y W_v[u],   i = 1..h,  u = 1..g
    head i attends with group floor(i g / h);  out = concat_i(o_i) W_o

FLOPs of the scores are those of multi-head attention; while decoding, 2 g e numbers are kept and read per token and layer
instead of 2 h e.

Source: 1911.02150, section 3; groups: 2305.13245, section 2.2.
"""

from __future__ import annotations

from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Heads
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads

CARD = Card(
    id="multi_query_attention",
    role="heads",
    summary="All query heads share one head of keys and values, or a few groups of them.",
    equations=(
        r"q_i = x W^q_i,\quad k_u = y W^k_u,\quad v_u = y W^v_u,\quad u = \lfloor i g / h \rfloor",
        r"o_i = \mathrm{softmax}\!\left(q_i k_u^\top / \sqrt{e}\right) v_u,\qquad \mathrm{out} = [o_1; \dots; o_h]\, W^o",
    ),
    exports={"multi_query_attention": "MultiQuery"},
    cost="n^2",
    flops="4 * n * (d * (h + groups) + n * h) * (head_dim or d // h)",
    state="2 * n * groups * (head_dim or d // h)",
    parameters="2 * d * (h + groups) * (head_dim or d // h) + bias * ((h + 2 * groups) * (head_dim or d // h) + d)",
    memory="n",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "equivariant"),
    examples=(
        {"dim": 12, "heads": 3},
        {"dim": 12, "heads": 6, "groups": 2},
        {"dim": 10, "heads": 6, "groups": 3, "head_dim": 3, "bias": True},
        {"dim": 14, "heads": 7, "groups": 7},
    ),
    reduces_to=("multi_head at groups = heads",),
    equals=(
        "transformers 5.23.0 LlamaAttention (rotation off) and FalconAttention; values in "
        "tests/golden/multi_query_attention_a.npz",
    ),
    departures=(
        "Scores are divided by sqrt(e): the paper's listings leave the factor to the initial values; without it softmax "
        "saturates under the usual ones.",
    ),
    notes=(
        "The paper keeps the number of parameters by widening the feed-forward layer; here the widths are yours (see "
        "hidden_dim). The larger the model, the more groups = 1 costs in quality: 4 to 8 groups are common."
    ),
)


class MultiQuery(Heads):
    """Projections with fewer heads of keys and values than of queries.

    Args:
        dim: width d of the tokens.
        heads: number of query heads h.
        groups: number g of key and value heads, divides heads; 1 is multi-query, heads is multi-head attention.
        head_dim: width e of a head; by default dim / heads.
        bias: whether the projections have biases.
    """

    def __init__(
        self, *, dim: int, heads: int = 8, groups: int = 1, head_dim: int | None = None, bias: bool = False
    ) -> None:
        super().__init__()
        if groups < 1 or heads % groups:
            raise ValueError(
                f"MultiQuery cannot share groups={groups} key heads among heads={heads}; choose a number of groups that "
                "divides heads"
            )
        self.heads, self.groups = heads, groups
        self.head_dim = check_heads("MultiQuery", dim, heads) if head_dim is None else head_dim
        self.q = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * groups * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As multi-head attention: each key head is drawn as one of its h would be; zero biases."""
        bound = (6 / sum(self.q.weight.shape)) ** 0.5
        for linear in (self.q, self.kv, self.out):
            nn.init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def split(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q (b, h, n, e) of ``x``; k, v (b, g, m, e) of ``context``."""
        k, v = self.kv(context).chunk(2, dim=-1)
        return split_heads(self.q(x), self.heads), split_heads(k, self.groups), split_heads(v, self.groups)

    def merge(self, o: Tensor) -> Tensor:
        """(b, h, n, e) gives (b, n, d)."""
        merged: Tensor = self.out(merge_heads(o))
        return merged
