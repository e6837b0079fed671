"""Gated delta net: the delta rule on a memory that also fades, by a factor that each token chooses.

    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = S_t^T q_t / sqrt(e)             (1)
    q, k, v = silu(conv(x W)),    q, k <- q / |q|, k / |k|,    beta = sigmoid(x W_beta)                       (2)
    alpha = exp(-A softplus(x W_a + c)),    y = (RMSNorm(o) * silu(x W_g)) W_o                               (3)

The convolutions are causal, of ``taps`` taps for each feature; alpha and beta are one number a head. Cost O(n d e) FLOPs;
state: S, e v numbers a head, and the last taps - 1 inputs of the convolutions. Letters: e width of keys, v of values.

Source: 2412.06464, sections 3.1 and 3.4, and its released code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.fft_conv import short_conv
from tevo.functional.linear_attention import causal_linear_attention, recurrent_linear_attention
from tevo.functional.masks import check_mask, refuse_context, to_front
from tevo.mixers.softmax.multi_head import merge_heads, split_heads
from tevo.norms.rms_norm import RMSNorm

CARD = Card(
    id="gated_delta_net",
    role="mixer",
    summary="Attention replaced by a matrix that is written by the delta rule and fades by a learned factor.",
    equations=(
        r"S_t = \alpha_t (I - \beta_t k_t k_t^\top) S_{t-1} + \beta_t k_t v_t^\top,\quad o_t = S_t^\top q_t / \sqrt{e}",
        r"\alpha_t = \exp(-A\, \mathrm{softplus}(x_t W_a + c)),\quad \beta_t = \sigma(x_t W_\beta)",
        r"y_t = \big(\mathrm{RMSNorm}(o_t) \odot \mathrm{silu}(x_t W_g)\big) W_o",
    ),
    exports={"gated_delta_net": "GatedDeltaNet"},
    cost="n",
    flops=(
        "(lambda n, d, h, e, taps, pairs, chunks: 2 * n * d * (8 * h * e + 2 * h) + 8 * n * taps * h * e"
        " + h * (pairs * 11 * e + 14 * n * e * e + 4 * chunks * e**3))"
        "(n, d, h, head_dim or max(1, 3 * d // (4 * h)), taps, (n - n % 64) * 64 + (n % 64) ** 2, ceil(n / 64))"
    ),
    state="h * (head_dim or max(1, 3 * d // (4 * h))) * (2 * (head_dim or max(1, 3 * d // (4 * h))) + 4 * (taps - 1))",
    parameters=(
        "h * (head_dim or max(1, 3 * d // (4 * h))) * (8 * d + 4 * taps)"
        " + 2 * (head_dim or max(1, 3 * d // (4 * h))) + 2 * h * (d + 1)"
    ),
    memory="n",
    claims=("causal", "padding", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3},
        {"dim": 10, "heads": 2, "head_dim": 3, "taps": 2},
        {"dim": 7, "heads": 1, "head_dim": 4, "taps": 1},
    ),
    reduces_to=("the delta rule at alpha = 1",),
    equals=(
        "fla-org/flash-linear-attention at bc3b101d, ops/gated_delta_rule/naive.py, equation (1) with both states; values in "
        "tests/golden/gated_delta_net_a.npz",
    ),
    departures=(
        "Lengths of keys are at least 1e-6 where they are divided by, so that padding divides nothing by nothing.",
    ),
    notes="The paper alternates it with windowed attention in its hybrid models: mixer=[...] lists one for each layer.",
)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None, *, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Equation (1), chunk by chunk: q, k (b, h, n, e), v (b, h, n, v), g = log alpha and beta (b, h, n), S (b, h, e, v)."""
    o, state = causal_linear_attention(q, k, v, g=g, beta=beta, state=state, chunk=chunk)
    return o * q.shape[-1] ** -0.5, state


def plain_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`gated_delta_rule` one token after another: the reference."""
    o, state = recurrent_linear_attention(q, k, v, g=g, beta=beta, state=state)
    return o * q.shape[-1] ** -0.5, state


class GatedDeltaNet(TokenMixer):
    """Gated delta net.

    Args:
        dim: width d.
        heads: number of heads h.
        head_dim: width e of queries and keys, half that of values; None is 3 dim / (4 heads), the released size.
        taps: taps of the convolutions, >= 1.
        causal: there is no other form.
    """

    def __init__(
        self, *, dim: int, heads: int = 6, head_dim: int | None = None, taps: int = 4, causal: bool = True
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError("GatedDeltaNet writes its memory in the order of the tokens; build it with causal=True")
        e = max(1, 3 * dim // (4 * heads)) if head_dim is None else head_dim
        if heads < 1 or e < 1 or taps < 1:
            raise ValueError(f"GatedDeltaNet got heads={heads}, head_dim={e}, taps={taps}; expected at least 1 each")
        self.heads, self.e = heads, e
        self.qkv = nn.Linear(dim, 4 * heads * e, bias=False)
        self.taps = nn.Parameter(torch.empty(4 * heads * e, taps))
        self.beta = nn.Linear(dim, heads, bias=False)
        self.decay = nn.Linear(dim, heads)
        self.log_rate = nn.Parameter(torch.empty(heads))
        self.gate = nn.Linear(dim, 2 * heads * e, bias=False)
        self.norm = RMSNorm(dim=2 * e, eps=1e-5)
        self.out = nn.Linear(2 * heads * e, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As released: A uniform in (0, 16), steps softplus(c) log-uniform in (0.001, 0.1), Xavier for the projections."""
        for linear in (self.qkv, self.beta, self.decay, self.gate, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.uniform_(self.taps, -(self.taps.shape[1] ** -0.5), self.taps.shape[1] ** -0.5)
        with torch.no_grad():
            self.log_rate.copy_(self.log_rate.uniform_(1e-4, 16).log())
            step = self.decay.bias.uniform_(math.log(1e-3), math.log(0.1)).exp()
            # the inverse of softplus
            self.decay.bias.copy_(step + (-(-step).expm1()).log())

    def no_decay(self) -> set[str]:
        """The taps are filters, each of one feature."""
        return {"taps"}

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); order is that of the tokens, not ``at``."""
        refuse_context("GatedDeltaNet", context)
        return self._advance(x, mask, None, None)[0]

    def _advance(
        self, x: Tensor, mask: Tensor | None, before: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        check_mask("GatedDeltaNet", mask, x.shape[0], x.shape[1])
        count = undo = None
        if mask is not None:
            # the convolutions go from real token to real token
            x, count, undo = to_front(x, mask)
        u = self.qkv(x)
        u, after = short_conv(u, self.taps, state=before) if count is None else self._conv(u, before, count)
        e, h = self.e, self.heads
        q, k, v = (split_heads(t, h) for t in F.silu(u).split([h * e, h * e, 2 * h * e], -1))
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k = (F.normalize(t.to(wide), dim=-1, eps=1e-6) for t in (q, k))
        # one row a head before, not after, so that gradients keep the order that compiled code expects
        beta = self.beta(x).to(wide).mT.contiguous().sigmoid()  # b h n
        pace = F.softplus(self.decay(x).to(wide).mT.contiguous())
        g = -self.log_rate.to(wide).exp()[:, None] * pace
        if count is not None:
            padding = torch.arange(x.shape[1], device=x.device) >= count[:, None]
            beta, g = (t.masked_fill(padding[:, None], 0.0) for t in (beta, g))
        o, state = gated_delta_rule(q, k, v.to(wide), g, beta, state)
        y = self.norm(o) * F.silu(split_heads(self.gate(x), h).to(wide))
        y = self.out(merge_heads(y).to(x.dtype))
        return y if undo is None else y.take_along_dim(undo, 1), (after, state)

    def _conv(self, u: Tensor, before: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution of ``u`` (b, n, c), of which the first ``count`` (b,) are real, and its last real inputs."""
        reach = self.taps.shape[1] - 1
        before = u.new_zeros(len(u), reach, u.shape[2]) if before is None else before
        y, _ = short_conv(u, self.taps, state=before)
        last = count[:, None] + torch.arange(reach, device=u.device)
        return y, torch.cat([before, u], 1).take_along_dim(last[..., None], 1)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """The last inputs of the convolutions (b, taps - 1, 4 h e) and S (b, h, e, 2 e), zero."""
        refuse_context("GatedDeltaNet", context)
        like, e = self.taps, self.e
        wide = torch.promote_types(like.dtype, torch.float32)
        memory = like.new_zeros(batch, self.heads, e, 2 * e, dtype=wide)
        return like.new_zeros(batch, like.shape[1] - 1, like.shape[0]), memory

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d), whose padding writes nothing."""
        assert isinstance(state, tuple)
        before, memory = state
        assert isinstance(before, Tensor) and isinstance(memory, Tensor)
        return self._advance(x, mask, before, memory)
