"""LARA: softmax attention as an expectation over random features, from few proposals shared by all queries.

    xi(x, w) = exp(s (w . x - |x|^2 / 2)),  s = e^-1/2
    a softmax row = E_w[sum_m xi(k_m, w) v_m / sum_m xi(k_m, w)],  w ~ sum_m softmax_m(s q . k_m) N(q + k_m, I)   (1)
    RA: one w for each query of its own: m drawn from softmax(s q K^T), w = q + k_m + noise                      (2)
    LARA: w_c = mu_c + noise, mu_c = qbar_c + kbar_c, the means of C segments of queries and of keys             (3)
    F_c = sum_m softmax_m(log xi(k_m, w_c)) v_m                                                                  (4)
    y_n = sum_c softmax_c(log alpha_cn + log xi(q_n, w_c) + logsumexp_m log xi(k_m, w_c) - log p_cc) F_c         (5)
    alpha_cn = max(p_cc / sum_c' p_cc' + a (t_cn - mean_c t_cn), 1e-8),  t_cn = softmax_n(s qbar_c . q_n)        (6)
    log p_cc' = s (w_c . mu_c' - |mu_c'|^2 / 2)

The noise is there in training only; without it everything is deterministic, and RA takes the mean of its keys in place of
a draw. Cost O(n C d) for LARA, O(n^2 d) for RA. t is normalised over all queries and F over all keys: there is no causal
form. Letters: C proposals (of each head).

Source: 2204.04667, sections 3 and 4, and its released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import TokenMixer
from tevo.functional.attention import scores
from tevo.functional.masks import refuse_context, refuse_mask
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads

CARD = Card(
    id="lara",
    role="mixer",
    summary="Estimates softmax attention by random features around a few proposals that all queries share.",
    equations=(
        r"y_n = \sum_c \mathop{\mathrm{softmax}}_c\left(\log \alpha_{cn} + \log \xi(q_n, w_c)"
        r" + \log \sum_m \xi(k_m, w_c) - \log p_{cc}\right) F_c",
        r"F_c = \frac{\sum_m \xi(k_m, w_c)\, v_m}{\sum_m \xi(k_m, w_c)},\quad w_c \sim \mathcal{N}(\bar q_c + \bar k_c, I)",
    ),
    exports={"lara": "LARA", "randomized_attention": "RandomizedAttention"},
    cost="n",
    flops=(
        "8 * n * d * d + 4 * (min(proposals, n) if grid else n) * d * (d // h)"
        " + (10 if query_specific else 8) * min(proposals, n) * n * d"
        " + (6 if mixed else 2) * min(proposals, n) ** 2 * d"
    ),
    parameters="4 * d * d + 4 * d + 2 * (d // h) * (d // h + 3)",
    memory="n",
    claims=("bidirectional",),
    variants={
        "lara": {"claims": ("bidirectional", "grid")},
        "randomized_attention": {
            "cost": "n^2",
            "flops": "8 * n * d * d + 8 * n * n * d",
            "parameters": "4 * d * d + 4 * d",
            "memory": "n^2",
        },
    },
    examples=(
        {"part": "lara", "dim": 12, "heads": 3, "proposals": 4},
        {"part": "lara", "dim": 10, "heads": 2, "proposals": 5, "query_specific": False},
        {"part": "lara", "dim": 6, "heads": 3, "proposals": 4, "grid": (5, 7), "mixed": True, "alpha": 0.5},
        {"part": "randomized_attention", "dim": 12, "heads": 3},
        {"part": "randomized_attention", "dim": 5, "heads": 1},
    ),
    equals=(
        "HKUNLP/efficient-attention at 531ff516: LinearRA (1-D and 2-D, with and without noise, padded) and "
        "RandomizedAttention for stored draws; values in tests/golden/lara_a.npz",
    ),
    departures=(
        "A mask is refused: the released code zeroes padding before the proposals, into whose means it then enters, so that "
        "the amount of padding changes the outputs. The function lara takes a mask and does that.",
        "In evaluation RA takes the mean-field form of the released code, which draws nothing.",
        "The noise has unit variance, as released, where equation (1) for scaled scores would want 1 / s.",
    ),
    notes="Outputs are random in training. With antithetic=True every noise is used with both signs.",
)


def log_xi(w: Tensor, x: Tensor) -> Tensor:
    """Logarithms of xi(x_n, w_c) (..., C, n) of ``w`` (..., C, e) and ``x`` (..., n, e)."""
    s = x.shape[-1] ** -0.5
    return s * (w @ x.mT - x.square().sum(-1)[..., None, :] / 2)


def lara(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qbar: Tensor,
    kbar: Tensor,
    *,
    noise: Tensor | None = None,
    alpha: float | None = 1.0,
    antithetic: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Equations (3) to (6).

    Args:
        q: queries (b, h, n, e).
        k: keys, same shape.
        v: values, same shape.
        qbar: queries' half of mu (b, h, C, e).
        kbar: keys' half of mu, same shape.
        noise: (b, h, C, e); None is zero.
        alpha: the factor a of equation (6); None leaves the query-specific weights out and balances by
            p_cc / sum_c' p_cc' alone.
        antithetic: use ``noise`` with both signs, as 2 C proposals.
        mask: real keys (b, n).

    Returns:
        (b, h, n, e).
    """
    mu = qbar + kbar
    w = mu if noise is None else mu + noise
    if antithetic and noise is not None:
        w, mu, qbar = torch.cat([w, mu - noise], -2), torch.cat([mu, mu], -2), torch.cat([qbar, qbar], -2)
    keys = log_xi(w, k)  # b h C n
    if mask is not None:
        keys = keys.masked_fill(~mask[:, None, None], -torch.inf)
    p = log_xi(w, mu)  # b h C C
    summaries = keys.softmax(-1) @ v  # b h C e
    weights = log_xi(w, q) + keys.logsumexp(-1, keepdim=True)
    if alpha is None:
        weights = weights - p.logsumexp(-1, keepdim=True)
    else:
        own = p.diagonal(dim1=-2, dim2=-1)[..., None]  # b h C 1
        t = scores(qbar, q).softmax(-1)
        balance = (own - p.logsumexp(-1, keepdim=True)).exp() + alpha * (t - t.mean(-2, keepdim=True))
        weights = weights + balance.clamp(min=1e-8).log() - own
    return weights.softmax(-2).mT @ summaries


def randomized_attention(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, noise: Tensor | None) -> Tensor:
    """Equation (2) for ``q``, ``k``, ``v`` (b, h, n, e): ``chosen`` (b, h, n, e) keys and ``noise`` of the same shape."""
    w = q + chosen if noise is None else q + chosen + noise
    return log_xi(w, k).softmax(-1) @ v


def segment_means(x: Tensor, count: int) -> Tensor:
    """Means of ``count`` segments of neighbours of ``x`` (..., n, e), the longer ones last; ``x`` itself for n <= count."""
    n = x.shape[-2]
    if n <= count:
        return x
    short, long = n // count, n % count
    first, rest = x.split([(count - long) * short, long * (short + 1)], -2)
    parts = [
        part.unflatten(-2, (-1, size)).mean(-2) for part, size in ((first, short), (rest, short + 1)) if part.shape[-2]
    ]
    return torch.cat(parts, -2)


class LARA(TokenMixer):
    """Linear randomised attention.

    Args:
        dim: width d.
        heads: number of heads h.
        proposals: C; on a grid a square number.
        grid: (rows, columns), whose proposals are means of sqrt(C) x sqrt(C) windows; None is a sequence.
        alpha: the factor a of equation (6).
        query_specific: whether weights depend on how much a proposal is each query's.
        mixed: proposals of keys attend to each other first.
        antithetic: use each noise with both signs.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        proposals: int = 49,
        grid: tuple[int, int] | None = None,
        alpha: float = 1.0,
        query_specific: bool = True,
        mixed: bool = False,
        antithetic: bool = False,
    ) -> None:
        super().__init__()
        e = check_heads("LARA", dim, heads)
        side = round(proposals**0.5)
        if proposals < 1 or (grid is not None and side * side != proposals):
            raise ValueError(
                f"LARA got proposals={proposals}, grid={grid}; expected at least 1, and a square number of them on a grid"
            )
        self.heads, self.proposals, self.side, self.grid = heads, proposals, side, grid
        self.alpha = alpha if query_specific else None
        self.mixed, self.antithetic = mixed, antithetic
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_proposal = nn.Sequential(nn.Linear(e, e), nn.LayerNorm(e))
        self.k_proposal = nn.Sequential(nn.Linear(e, e), nn.LayerNorm(e))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with standard deviation 0.02, truncated at 2, zero biases, as in the released code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-2.0, b=2.0)
                nn.init.zeros_(module.bias)

    def regrid(self, grid: tuple[int, int]) -> None:
        """Work on a grid of another size, with the same weights."""
        if self.grid is None:
            raise ValueError(
                "LARA was built for a sequence and has no grid to change; build it with grid=(rows, columns)"
            )
        self.grid = grid

    def propose(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Q and k (b, h, n, e) give qbar and kbar (b, h, C, e)."""
        if self.grid is None:
            qbar = segment_means(self.q_proposal(q), self.proposals)
            kbar = segment_means(self.k_proposal(k), self.proposals)
        else:
            qbar, kbar = self.q_proposal(self._pool(q)), self.k_proposal(self._pool(k))
        if self.mixed:
            kbar = scores(kbar, kbar).softmax(-1) @ kbar
        return qbar, kbar

    def _pool(self, x: Tensor) -> Tensor:
        """Means of the windows of a grid: (b, h, n, e) gives (b, h, C, e)."""
        assert self.grid is not None
        planes = x.mT.flatten(0, 1).unflatten(-1, self.grid)  # b*h e rows columns
        pooled = F.adaptive_avg_pool2d(planes, (self.side, self.side)).flatten(-2).mT
        return pooled.unflatten(0, x.shape[:2])

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d); the order of the tokens is that of the tensor, whatever ``at`` says.

        Raises:
            ValueError: a context, a mask, or another number of tokens than the grid's.
        """
        refuse_mask("LARA", mask)
        refuse_context("LARA", context)
        if self.grid is not None and x.shape[1] != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"LARA was built for grid={self.grid}, {self.grid[0] * self.grid[1]} tokens, got {x.shape[1]}; call "
                "regrid() with the grid of the inputs"
            )
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        if x.shape[1] == 0:
            return self.out(merge_heads(q + k + v))
        qbar, kbar = self.propose(q, k)
        noise = torch.randn_like(qbar) if self.training else None
        o = lara(q, k, v, qbar, kbar, noise=noise, alpha=self.alpha, antithetic=self.antithetic)
        return self.out(merge_heads(o))


class RandomizedAttention(TokenMixer):
    """Randomised attention with one sample for each query.

    Args:
        dim: width d.
        heads: number of heads h.
    """

    def __init__(self, *, dim: int, heads: int = 8) -> None:
        super().__init__()
        check_heads("RandomizedAttention", dim, heads)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices normal with standard deviation 0.02, truncated at 2, zero biases, as in the released code."""
        for linear in (self.qkv, self.out):
            nn.init.trunc_normal_(linear.weight, std=0.02, a=-2.0, b=2.0)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d); tokens are a set.

        Raises:
            ValueError: a context or a mask.
        """
        refuse_mask("RandomizedAttention", mask)
        refuse_context("RandomizedAttention", context)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        weights = scores(q, k).softmax(-1)  # b h n n
        if not self.training:
            return self.out(merge_heads(randomized_attention(q, k, v, weights @ k, None)))
        index = torch.distributions.Categorical(probs=weights, validate_args=False).sample()
        chosen = k.take_along_dim(index[..., None], -2)
        return self.out(merge_heads(randomized_attention(q, k, v, chosen, torch.randn_like(q))))
