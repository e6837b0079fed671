"""Gated linear attention: a matrix of keys and values whose every row fades by a factor that each token chooses.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t / sqrt(e)                            (1)
    alpha = sigmoid(x W_1 W_2 + c)^{1 / tau}                                                         (2)
    y = (LayerNorm(o) * silu(x W_r + b_r)) W_o,   a norm for each head                               (3)

In chunks, with G the running sums of log alpha and S the state before a chunk:

    o_i = S^T (q_i e^{G_i}) + sum_{j <= i} (sum_p q_ip k_jp e^{G_ip - G_jp}) v_j,                      (4)

whose exponents are never positive. Keys have d / 2 features in all and values d. Cost O(n d e) FLOPs; state: S, e v numbers
a head. Letters: e width of keys, v of values, c tokens of a chunk, r chunks.

Source: 2312.06635, sections 4.1 to 4.4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.masks import blank, check_mask, refuse_context
from tevo.functional.precision import island
from tevo.functional.scan import scan
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads
from tevo.norms.layer_norm import LayerNorm

CARD = Card(
    id="gated_linear_attention",
    role="mixer",
    summary="Linear attention whose state fades, feature by feature, by factors that each token chooses.",
    equations=(
        r"S_t = \mathrm{diag}(\alpha_t)\, S_{t-1} + k_t v_t^\top,\quad o_t = S_t^\top q_t / \sqrt{e}",
        r"\alpha_t = \sigma(x_t W_1 W_2 + c)^{1/\tau}",
        r"y_t = \big(\mathrm{LN}(o_t) \odot \mathrm{silu}(x_t W_r + b_r)\big) W_o",
    ),
    exports={"gated_linear_attention": "GatedLinearAttention"},
    cost="n",
    flops=(
        "(lambda n, d, h, e, v, rank, c, r: 4 * n * d * h * e + 6 * n * d * d + 2 * n * rank * (d + h * e)"
        " + 2 * r * h * v * (c * c + 2 * c * e + e))"
        "(n, d, h, head_dim or max(1, d // h // 2), d // h, rank, min(16, n), ceil(n / min(16, n)))"
    ),
    state="d * (head_dim or max(1, d // h // 2))",
    parameters="3 * d * d + d + 2 * (d // h) + d * rank + h * (head_dim or max(1, d // h // 2)) * (2 * d + rank + 1)",
    memory="n",
    claims=("causal", "padding", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3, "rank": 2},
        {"dim": 10, "heads": 1, "rank": 3, "tau": 4.0},
        {"dim": 6, "heads": 2, "head_dim": 4, "rank": 5},
    ),
    reduces_to=("causal linear attention without features or denominator at alpha = 1",),
    equals=(
        "fla-org/flash-linear-attention at bc3b101d, ops/gla/naive.py, equation (1) with both states; values in "
        "tests/golden/gated_linear_attention_a.npz",
    ),
    departures=(
        "Inside a chunk the products of equation (4) are made as they stand, c^2 e numbers for each chunk; the paper factors "
        "them in halves of a chunk for the sake of its hardware. No effect on values.",
    ),
)


def plain_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equation (1) one token after another, the reference; arguments as for :func:`gated_linear_attention`."""
    S = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]) if state is None else state
    os = []
    for q_t, k_t, v_t, g_t in zip(q.unbind(2), k.unbind(2), v.unbind(2), g.unbind(2), strict=True):
        S = g_t.exp()[..., None] * S + k_t[..., None] * v_t[..., None, :]
        os.append((q_t[..., None, :] @ S) * q.shape[-1] ** -0.5)
    return torch.cat(os, 2) if os else v, S


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None = None, *, chunk: int = 16
) -> tuple[Tensor, Tensor]:
    """Equation (1) by equation (4).

    Args:
        q: (b, h, n, e).
        k: (b, h, n, e).
        v: (b, h, n, v).
        g: log alpha <= 0 (b, h, n, e).
        state: S_0 (b, h, e, v); None is zero.
        chunk: tokens of a chunk, >= 1.

    Returns:
        o (b, h, n, v), and S_n (b, h, e, v).
    """
    b, h, n, e = q.shape
    if n <= 1:
        return plain_gated_linear_attention(q, k, v, g, state)
    c = min(chunk, n)
    r, more = -(-n // c), -n % c
    # tokens that are appended neither fade nor write
    q, k, v, g = (F.pad(t, (0, 0, 0, more)).reshape(b * h, r, c, t.shape[-1]) for t in (q, k, v, g))
    sums = g.cumsum(2)  # bh r c e
    future = torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1)[..., None]
    within = (sums[:, :, :, None] - sums[:, :, None]).masked_fill(future, -torch.inf).exp()  # bh r c c e
    scores = (q[:, :, :, None] * k[:, :, None] * within).sum(-1)  # bh r c c
    last = sums[:, :, -1:]
    added = (k * (last - sums).exp()).mT @ v  # bh r e v
    first = v.new_zeros(b * h, e, v.shape[-1]) if state is None else state.flatten(0, 1).to(v.dtype)
    fade = last.mT.exp().expand_as(added).flatten(2)
    states, after = scan(fade, added.flatten(2), first.flatten(1))
    before = torch.cat([first.flatten(1)[:, None], states[:, :-1]], 1).unflatten(2, added.shape[2:])
    o = (scores @ v + (q * sums.exp()) @ before) * e**-0.5  # (eq. 4)
    return o.reshape(b, h, r * c, v.shape[-1])[:, :, :n], after.reshape(b, h, e, v.shape[-1])


class GatedLinearAttention(TokenMixer):
    """Gated linear attention.

    Args:
        dim: width d.
        heads: number of heads h, divides dim.
        head_dim: width e of queries and keys; None is half of that of the values, dim / heads.
        rank: rank of the map to alpha.
        tau: temperature of alpha, > 0; the larger, the slower it fades.
        causal: there is no other form.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 4,
        head_dim: int | None = None,
        rank: int = 16,
        tau: float = 16.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError("GatedLinearAttention fades in the order of the tokens; build it with causal=True")
        width = check_heads("GatedLinearAttention", dim, heads)
        e = max(1, width // 2) if head_dim is None else head_dim
        if e < 1 or rank < 1 or tau <= 0:
            raise ValueError(
                f"GatedLinearAttention got head_dim={e}, rank={rank}, tau={tau}; expected at least 1, 1 and a tau above 0"
            )
        self.heads, self.e, self.tau = heads, e, tau
        self.qk = nn.Linear(dim, 2 * heads * e, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.decay_into = nn.Linear(dim, rank, bias=False)
        self.decay = nn.Linear(rank, heads * e)
        self.gate = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim=width)
        self.out = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform matrices, as in the released code, and zero biases."""
        for linear in (self.qk, self.v, self.decay_into, self.decay, self.gate, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); order is that of the tokens, not ``at``."""
        refuse_context("GatedLinearAttention", context)
        return self._advance(x, mask, None)[0]

    def _advance(self, x: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        check_mask("GatedLinearAttention", mask, x.shape[0], x.shape[1])
        x = blank(x, mask)
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k = self.qk(x).chunk(2, -1)
        g = F.logsigmoid(self.decay(self.decay_into(x)).to(wide)) / self.tau  # (eq. 2)
        if mask is not None:
            g = g.masked_fill(~mask[..., None], 0.0)
        q, k, v, g = (split_heads(t.to(wide), self.heads) for t in (q, k, self.v(x), g))
        with island(x):
            o, state = gated_linear_attention(q, k, v, g, state)
        y = self.norm(o.to(x.dtype)) * F.silu(split_heads(self.gate(x), self.heads))  # (eq. 3)
        return self.out(merge_heads(y).to(x.dtype)), state

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """S (b, h, e, v), zero."""
        refuse_context("GatedLinearAttention", context)
        like = self.out.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        return (like.new_zeros(batch, self.heads, self.e, like.shape[0] // self.heads, dtype=wide),)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d), whose padding neither fades nor writes."""
        assert isinstance(state, tuple)
        (S,) = state
        assert isinstance(S, Tensor)
        y, S = self._advance(x, mask, S)
        return y, (S,)
