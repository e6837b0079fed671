"""CoLT5's encoder block: every token takes a light branch of attention and feed-forward, routed tokens a heavy one too.

    s_i = x_i . u,  w = soft top-m of s: w_i = min(1, exp((s_i + a) / eps)) with sum m, then 0 but for the m largest   (1)
    Attn(X)_i = light(X)_i + w^q_i heavy(X_i, w^kv X)                                                      (2)
    light: s_ij = q_i . k_j + B[bucket(j - i)],  |i - j| <= r;   heavy: the same among routed tokens        (3)
    FF(X)_i = light(X_i) + w_i heavy(X_i),  (gelu(x W_0) * (x W_1)) W_2 in both                             (4)
    X <- X + Attn(RMSNorm(X)),   X <- X + FF(RMSNorm(X))                                                   (5)

Three routers, of queries, of keys and of the feed-forward layer. Cost O(n d^2 + n r d) for what every token takes, and
4 q v h' e for the heavy attention of q routed queries and v = 2 q keys, which grows like n^2 unless their number is
limited. The layers are those of :mod:`tevo.colt5.layers`; :mod:`tevo.colt5` has the whole model.

Source: 2303.09752, section 3.
"""

from __future__ import annotations

from torch import Tensor, nn

from tevo.card import Card
from tevo.colt5.layers import ConditionalAttention, ConditionalFeedForward, ConditionalLayer, RelativeBias
from tevo.colt5.routers import Budget, Router, SoftTopK
from tevo.mixers.softmax.multi_head import check_heads
from tevo.norms.rms_norm import RMSNorm

CARD = Card(
    id="colt5",
    role="block",
    summary="Gives every token a light attention and feed-forward, and routed tokens a heavy one of each as well.",
    equations=(
        r"s = X u,\quad \tilde s = \mathop{\mathrm{argmax}}_{0 \le x \le 1,\ \sum x = m} \langle s, x\rangle"
        r" + \epsilon H(x),\ \text{zero but for the } m \text{ largest}",
        r"X_i \leftarrow X_i + \mathrm{A}_{\mathrm{light}}(X_i, X) + \tilde s^q_i\,"
        r"\mathrm{A}_{\mathrm{heavy}}(X_i, \tilde s^{kv} X)",
        r"X_i \leftarrow X_i + \mathrm{FF}_{\mathrm{light}}(X_i) + \tilde s_i\, \mathrm{FF}_{\mathrm{heavy}}(X_i)",
    ),
    exports={"colt5": "CoLT5"},
    cost="n^2",
    parameters=(
        "(lambda hid: 5 * d + h * buckets + 4 * d * h * (head_dim or d // h)"
        " + 3 * d * (max(1, hid // 2) + 4 * hid)"
        " + d * (1 if depth and index == depth - 1 else 0))(hidden_dim or max(2, round(8 * d / 3)))"
    ),
    memory="n^2",
    claims=("bidirectional", "padding"),
    examples=(
        {"dim": 12, "heads": 3, "radius": 3, "fraction": 0.4, "buckets": 8, "max_distance": 9},
        {"dim": 10, "heads": 5, "head_dim": 3, "radius": 1, "fraction": 0.3, "eps": 0.3, "depth": 2, "index": 1},
        {"dim": 9, "heads": 2, "head_dim": 4, "radius": 40, "fraction": 0.2, "hidden_dim": 6, "at_most": 2},
    ),
    equals=(
        "a transcription of the paper's equations that shares no code: both sublayers, with and without bias; values in "
        "tests/golden/colt5/colt5_layers_a.npz. There is no official code.",
    ),
    departures=(
        "Each block has tables of distance of its own; the paper's model shares one pair among all layers, as "
        "tevo.colt5's does.",
        "What the paper leaves open: routers see the normalised input; u starts with standard deviation d^-1/2, which "
        "gives scores of unit variance; the heavy branch has a table of distance of its own, indexed by positions in the "
        "text; m is counted from the tokens that are not padding.",
        "The soft top-k is solved exactly; the paper's 50 iterations agree with it at eps = 1.",
    ),
    notes=(
        "In training 9/8 m tokens are routed with weights that sum to m. With eps = 1 and fresh routers the mean weight of "
        "a routed token is about a third, so the heavy branch starts damped. Weights are 1, and routers learn nothing, "
        "where all tokens are routed. Growth of the cost was fitted with 2/5 of the tokens routed; with the paper's 1/16 "
        "the quadratic term is small below 100 000 tokens, and with at_most there is none."
    ),
    tolerances={
        "bfloat16": (
            "CHOICE",
            "which tokens are chosen is decided by scores, and near ties go the other way after rounding",
        ),
    },
)


class CoLT5(nn.Module):
    """A block of CoLT5's encoder.

    Args:
        dim: width d.
        heads: heads of both branches together, >= 2.
        light_heads: how many of them are the light branch's; by default a quarter, at least one.
        head_dim: width e of a head; by default dim / heads.
        hidden_dim: width inside a dense model's gated feed-forward, by default 8/3 dim; the light branch has half of it, the
            heavy one four times as much.
        radius: tokens that the light branch sees on each side, >= 1.
        fraction: part of the tokens that are routed as queries and in the feed-forward layer; twice as many as keys.
        at_most: greatest number of tokens routed so; twice as many as keys.
        eps: > 0, weight of the entropy in the soft top-k.
        buckets: buckets of distance in each of the two tables, >= 2 for each side.
        max_distance: distance in tokens from which on all share the last bucket.
        dropout: probability with which a sublayer's output feature is dropped in training.
        depth: blocks in the stack.
        index: which of them this is, from 0; the last one is followed by a norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        light_heads: int | None = None,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        radius: int = 127,
        fraction: float = 1 / 16,
        at_most: int | None = None,
        eps: float = 1.0,
        buckets: int = 32,
        max_distance: int = 128,
        dropout: float = 0.0,
        depth: int | None = None,
        index: int | None = None,
    ) -> None:
        super().__init__()
        light = max(1, heads // 4) if light_heads is None else light_heads
        if not 1 <= light < heads:
            raise ValueError(
                f"CoLT5 got heads={heads} and light_heads={light_heads}; expected at least one head for each of the two "
                "branches"
            )
        e = check_heads("CoLT5", dim, heads) if head_dim is None else head_dim
        hidden = max(2, round(8 * dim / 3)) if hidden_dim is None else hidden_dim
        few = Budget(fraction, at_most=at_most)
        twice = Budget(min(1.0, 2 * fraction), at_most=None if at_most is None else 2 * at_most)

        def router(budget: Budget) -> Router:
            return Router(dim=dim, budget=budget, routing=SoftTopK(eps=eps))

        def table(count: int) -> RelativeBias:
            return RelativeBias(heads=count, buckets=buckets, max_distance=max_distance)

        self.layer = ConditionalLayer(
            dim=dim,
            attention=ConditionalAttention(
                dim=dim,
                light_heads=light,
                heavy_heads=heads - light,
                head_dim=e,
                radius=radius,
                q_router=router(few),
                kv_router=router(twice),
                light_bias=table(light),
                heavy_bias=table(heads - light),
            ),
            feed_forward=ConditionalFeedForward(
                dim=dim, light_dim=max(1, hidden // 2), heavy_dim=4 * hidden, router=router(few), dropout=dropout
            ),
            dropout=dropout,
        )
        self.last = RMSNorm(dim=dim) if depth is not None and index == depth - 1 else None

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d), zeros at padding; ``at`` are the heavy branch's positions."""
        y: Tensor = self.layer(x, mask=mask, positions=at)
        return y if self.last is None else self.last(y)
