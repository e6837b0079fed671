"""Delta-rule fast weights: attention replaced by a matrix whose entries are overwritten, not only added to.

    k_t, q_t <- phi(k_t), phi(q_t),    beta_t = sigmoid(w_beta x_t)
    W_t = W_{t-1} + beta_t (v_t - W_{t-1} k_t) k_t^T,    y_t = W_t q_t / sqrt(e)                    (1)

phi is DPFP-nu, r(x)_i r(x)_{i-j} for j = 1..nu with r(x) = relu([x; -x]), divided by its sum: then 1 - beta |k|^2 lies
in [0, 1] and W cannot grow. Letters: e width of a head, p = 2 nu e features. Cost O(n d p) FLOPs; state: W, p e numbers a
head.

Source: 2102.11174, sections 4.2, 4.3 and 5.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.linear_attention import causal_linear_attention
from tevo.functional.masks import blank, check_mask, refuse_context
from tevo.mixers.linear.linear_attention import elu_features
from tevo.mixers.softmax.multi_head import MultiHead

CARD = Card(
    id="delta_net",
    role="mixer",
    summary="Attention replaced by a fast weight matrix that is written by the delta rule, with DPFP features.",
    equations=(
        r"W_t = W_{t-1} + \beta_t (v_t - W_{t-1} \phi(k_t)) \phi(k_t)^\top",
        r"y_t = W_t \phi(q_t) / \sqrt{e}",
        r"\phi(x) = \frac{f(x)}{\sum_i f_i(x)},\quad f(x) = [r_i(x)\, r_{i-j}(x)]_{j=1..\nu},\quad r(x) = \mathrm{relu}([x; -x])",
    ),
    exports={"delta_net": "DeltaNet"},
    cost="n",
    flops=(
        "8 * n * d * d + 2 * n * d * h + (lambda n, d, e, f, pairs, chunks: pairs * d * (5 * f + 3) "
        "+ 2 * n * d * e * f * (f + 3) + 2 * chunks * d * (e * f) ** 2)"
        "(n, d, d // h, 2 * nu if nu else 1, (n - n % 64) * 64 + (n % 64) ** 2, ceil(n / 64))"
    ),
    state="2 * nu * d * (d // h) if nu else d * (d // h)",
    parameters="4 * d * d + d * h",
    memory="n",
    claims=("causal", "padding", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3},
        {"dim": 15, "heads": 3, "nu": 2},
        {"dim": 14, "heads": 7, "nu": None},
    ),
    equals=(
        "IDSIA/lmtool-fwp at 0159201, CudaFastWeightDPFPTransformerLayer and CudaFastWeightLinearTransformerLayer "
        "(sum-normalised, post-norm), over two segments",
    ),
    departures=(
        "The sum that features are divided by is at least 1e-6: the authors' code divides by zero where all products of a "
        "token vanish (nu = 1, odd head width, alternating signs).",
        "The attention-normalised update, a variant of the paper, is left out.",
    ),
)

# far below any sum of features that matters, and reached only where they nearly vanish
SMALLEST_SUM = 1e-6


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Products of rectified entries: x (..., e) gives (..., 2 nu e), in float32 for half precision."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.cat([x, -x], -1).relu()
    return torch.cat([r * r.roll(j, -1) for j in range(1, nu + 1)], -1)


def normalise(f: Tensor) -> Tensor:
    """Features (..., p) divided by their sum."""
    return f / f.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Equation (1): q, k (b, h, n, p) features, v (b, h, n, e), beta (b, h, n), W_0^T (b, h, p, e) give y and W_n^T."""
    y, state = causal_linear_attention(q, k, v, beta=beta, state=state)
    return y * v.shape[-1] ** -0.5, state


class DeltaNet(TokenMixer):
    """Fast weights under the delta rule.

    Args:
        dim: width d.
        heads: number of heads h.
        nu: shifts of the DPFP features, 1 to 2 e - 1; None takes elu + 1 features, which the paper compares with.
        causal: there is no other form.
    """

    def __init__(self, *, dim: int, heads: int = 8, nu: int | None = 1, causal: bool = True) -> None:
        super().__init__()
        if not causal:
            raise ValueError("DeltaNet writes its fast weights in the order of the tokens; build it with causal=True")
        self.heads = MultiHead(dim=dim, heads=heads)
        most = 2 * dim // heads - 1
        if nu is not None and not 1 <= nu <= most:
            raise ValueError(
                f"DeltaNet got nu={nu}, expected 1 to {most} (2 dim / heads - 1), or None for elu + 1 features"
            )
        self.nu = nu
        self.beta = nn.Linear(dim, heads, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform, as the projections of the heads."""
        nn.init.xavier_uniform_(self.beta.weight)

    def features(self, x: Tensor) -> Tensor:
        """phi: x (..., e) gives (..., p)."""
        return normalise(elu_features(x) if self.nu is None else dpfp(x, self.nu))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); order is that of the tokens, not ``at``."""
        refuse_context("DeltaNet", context)
        return self._advance(x, mask, None)[0]

    def _advance(self, x: Tensor, mask: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        check_mask("DeltaNet", mask, x.shape[0], x.shape[1])
        x = blank(x, mask)
        q, k, v = self.heads.split(x, x)
        beta = self.beta(x).transpose(1, 2).sigmoid()  # b h n
        if mask is not None:
            # padding writes nothing
            beta = beta.masked_fill(~mask[:, None], 0.0)
        y, state = delta_rule(self.features(q), self.features(k), v, beta, state)
        return self.heads.merge(y), state

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """W^T (b, h, p, e), zero."""
        refuse_context("DeltaNet", context)
        like = self.heads.out.weight
        e = like.shape[1] // self.heads.heads
        p = e if self.nu is None else 2 * self.nu * e
        return (like.new_zeros(batch, self.heads.heads, p, e, dtype=torch.promote_types(like.dtype, torch.float32)),)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d)."""
        assert isinstance(state, tuple) and isinstance(state[0], Tensor)
        y, W = self._advance(x, mask, state[0])
        return y, (W,)
