"""What CoLT5 costs in FLOPs, by component and exactly, beside a dense encoder and LongT5 of the same width.

    light feed-forward   3 n d f          heavy feed-forward   3 m d f'                                   (1)
    light projections    2 n d (h + g) e  heavy projections    2 d (q h' + v g') e                        (2)
    light attention      2 n w h e        heavy attention      2 q v h' e        routers   3 n d          (3)
    T5     3 n d f + 4 n d h e + 2 n^2 h e                                                                (4)
    LongT5 3 n d f + 4 n d h e + 2 n w h e + 2 G d h e + 2 n G h e,   G = n / 16                          (5)

multiply-adds of one encoder layer, unrounded; the FLOPs returned here are twice as many, as everywhere in tevo. The window w
is 2 r + 1 keys in the paper. A blocked computation reads more of them, see :func:`computed_window`: with its w, (1) to (3)
are the FLOPs counted on meta tensors. In training 9/8 as many tokens are routed.

Letters: n input tokens, m q v routed ones, f hidden width, h heads and g of them with keys and values
of their own (primes: of the heavy branch), e width of a head, r radius.
Source: CoLT5 (arXiv 2303.09752), tables 1 and 2, which round and drop the window.
"""

from __future__ import annotations

import torch

from tevo.bench.measure import flops as counted
from tevo.colt5.config import CoLT5Config
from tevo.functional.local_attention import local_attention

__all__ = ["computed_window", "decoder_flops", "encoder_flops", "longt5_flops", "model_flops", "t5_flops"]

# tokens that LongT5 sums up in one global key
_SUMMARISED = 16


def encoder_flops(config: CoLT5Config, n: int, *, window: float | None = None) -> dict[str, int]:
    """FLOPs of one encoder layer on one text of n tokens, by component (eqs. 1 to 3); their sum is the layer's.

    Args:
        config: the model's.
        n: tokens of the text.
        window: keys that light attention reads for each query; by default the paper's 2 r + 1.

    Raises:
        ValueError: for the note's attention, which has no such formulas.
    """
    if config.global_tokens is not None:
        raise ValueError(
            f"encoder_flops got global_tokens={config.global_tokens}, expected None: the note's attention is not counted"
        )
    c, w = config, _window(config, window)
    m, q, v = (budget.tokens(n) for budget in c.budgets())
    light, heavy = c.light_heads * c.head_dim, c.heavy_heads * c.head_dim
    light_kv, heavy_kv = c.light_kv_heads or c.light_heads, c.heavy_kv_heads or c.heavy_heads
    return {
        "light feed-forward": 2 * 3 * n * c.dim * c.light_dim,
        "heavy feed-forward": 2 * 3 * m * c.dim * c.heavy_dim,
        "light projections": 2 * 2 * n * c.dim * (light + light_kv * c.head_dim),
        "heavy projections": 2 * 2 * c.dim * (q * heavy + v * heavy_kv * c.head_dim),
        "light attention": round(2 * 2 * n * w * light),
        "heavy attention": 2 * 2 * q * v * heavy,
        "routers": 2 * (2 if c.one_router else 3) * n * c.dim,
    }


def decoder_flops(config: CoLT5Config, n: int, targets: int) -> dict[str, int]:
    """FLOPs of one decoder layer on ``targets`` tokens at once, of a text of n; the causal half is not saved."""
    c, inner = config, config.heads * config.head_dim
    return {
        "self projections": 2 * 4 * targets * c.dim * inner,
        "self attention": 2 * 2 * targets**2 * inner,
        "cross projections": 2 * 2 * (targets * inner + n * c.cross_kv_heads * c.head_dim) * c.dim,
        "cross attention": 2 * 2 * targets * n * inner,
        "feed-forward": 2 * 3 * targets * c.dim * c.hidden_dim,
    }


def model_flops(config: CoLT5Config, n: int, targets: int = 0, *, window: float | None = None) -> int:
    """FLOPs of a forward pass of one text of n tokens; without ``targets`` of its encoder alone."""
    total = config.layers * sum(encoder_flops(config, n, window=window).values())
    if targets:
        total += config.decoder_layers * sum(decoder_flops(config, n, targets).values())
        total += 2 * targets * config.dim * config.vocab_size
    return total


def t5_flops(config: CoLT5Config, n: int) -> int:
    """FLOPs of one dense encoder layer of the decoder's sizes (eq. 4)."""
    c, inner = config, config.heads * config.head_dim
    return 2 * n * (3 * c.dim * c.hidden_dim + 4 * c.dim * inner + 2 * n * inner)


def longt5_flops(config: CoLT5Config, n: int, *, window: float | None = None) -> int:
    """FLOPs of one encoder layer of LongT5, transient-global, of the decoder's sizes (eq. 5)."""
    c, inner, summaries = config, config.heads * config.head_dim, n // _SUMMARISED
    near = 3 * c.dim * c.hidden_dim + 4 * c.dim * inner + 2 * _window(c, window) * inner
    return round(2 * (n * near + 2 * summaries * c.dim * inner + 2 * n * summaries * inner))


def computed_window(n: int, radius: int) -> float:
    """Keys that :func:`tevo.functional.local_attention.local_attention` reads for each of n queries, without a graph."""
    x = torch.empty(1, 1, n, 1, device="meta")
    # of width 1, a score is one multiply-add and a value another
    return int(counted(_Local(radius), x)) / (4 * n)


class _Local(torch.nn.Module):
    def __init__(self, radius: int) -> None:
        super().__init__()
        self.radius = radius

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return local_attention(x, x, x, radius=self.radius)


def _window(config: CoLT5Config, window: float | None) -> float:
    return 2 * config.radius + 1 if window is None else window
