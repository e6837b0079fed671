"""GLU variants: the feed-forward's nonlinearity becomes a gate on a second linear map.

    FFN_g(x) = (g(x W) * (x V)) W_2
    g: sigmoid (GLU), identity (Bilinear), ReLU (ReGLU), GELU (GEGLU), SiLU (SwiGLU)

W and V are stacked as [W; V] in one weight. Three matrices of 2/3 of the width have as many parameters and FLOPs as the
feed-forward's two. No state.

Source: 2002.05202, section 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import ChannelMixer

CARD = Card(
    id="glu_variants",
    role="channel",
    summary="A gate g(x W) on a second linear map x V in place of the nonlinearity.",
    equations=(
        r"\mathrm{FFN}_g(x) = \big(g(x W) \odot (x V)\big)\, W_2",
        r"g \in \{\sigma,\ \mathrm{id},\ \mathrm{ReLU},\ \mathrm{GELU},\ \mathrm{SiLU}\}",
    ),
    exports={
        "glu_variants": "SwiGLU",
        "swiglu": "SwiGLU",
        "geglu": "GEGLU",
        "reglu": "ReGLU",
        "bilinear": "Bilinear",
        "glu": "GLU",
    },
    cost="n",
    flops="6 * n * d * ((2 * (hidden_dim or 4 * d) + 1) // 3 if match_parameters else hidden_dim or 4 * d)",
    parameters=(
        "(lambda w: 3 * d * w + bias * (2 * w + d))((2 * (hidden_dim or 4 * d)"
        " + 1) // 3 if match_parameters else (hidden_dim or 4 * d))"
    ),
    memory="n",
    claims=("token_wise",),
    examples=(
        {"part": "swiglu", "dim": 12},
        {"part": "geglu", "dim": 5, "hidden_dim": 7, "match_parameters": False},
        {"part": "reglu", "dim": 7, "hidden_dim": 9},
        {"part": "bilinear", "dim": 3, "hidden_dim": 5, "bias": True},
        {"part": "glu", "dim": 6, "hidden_dim": 4},
    ),
    equals=("transformers 5.23.0 T5DenseGatedActDense and LlamaMLP; values in tests/golden/glu_variants_a.npz",),
    departures=(
        "GELU is the exact form x Phi(x), as the paper writes it; T5 v1.1 checkpoints were trained with its tanh "
        "approximation.",
        "2/3 of the width is rounded to a whole number: parameters differ from the feed-forward's by at most d beside "
        "its biases.",
    ),
)


def gated(x: Tensor, w: Tensor, v: Tensor, w_2: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
    """The equation for ``x`` (..., d), w and v (f, d), w_2 (d, f)."""
    return F.linear(g(F.linear(x, w)) * F.linear(x, v), w_2)


class _Gated(ChannelMixer):
    """The three maps; the gate is each class's own."""

    def __init__(
        self, *, dim: int, hidden_dim: int | None = None, match_parameters: bool = True, bias: bool = False
    ) -> None:
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        # two thirds, to the nearest whole number
        self.width = (2 * hidden_dim + 1) // 3 if match_parameters else hidden_dim
        self.into = nn.Linear(dim, 2 * self.width, bias=bias)
        self.out = nn.Linear(self.width, dim, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with variance 1 / fan_in, cut at two standard deviations, zero biases, as T5 draws them."""
        for linear in (self.into, self.out):
            # cutting at two standard deviations leaves 0.8796 of one
            std = linear.in_features**-0.5 / 0.87962566103423978
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d); tokens are independent, so a mask changes nothing."""
        w, v = self.into(x).chunk(2, dim=-1)
        y: Tensor = self.out(self.gate(w) * v)
        return y

    def gate(self, z: Tensor) -> Tensor:
        """The nonlinearity g."""
        raise NotImplementedError


class SwiGLU(_Gated):
    """Gate z sigmoid(z).

    Args:
        dim: width d.
        hidden_dim: width of the plain feed-forward that is replaced; by default 4 dim.
        match_parameters: take 2/3 of hidden_dim, so that parameters and FLOPs are those of the plain one; otherwise
            hidden_dim itself is the width.
        bias: whether the maps have biases.
    """

    def gate(self, z: Tensor) -> Tensor:
        """The swish of z."""
        return F.silu(z)


class GEGLU(_Gated):
    """Gate z Phi(z), with Phi the normal distribution function; arguments as for :class:`SwiGLU`."""

    def gate(self, z: Tensor) -> Tensor:
        """The GELU of z."""
        return F.gelu(z)


class ReGLU(_Gated):
    """Gate max(z, 0); arguments as for :class:`SwiGLU`."""

    def gate(self, z: Tensor) -> Tensor:
        """The positive part of z."""
        return F.relu(z)


class Bilinear(_Gated):
    """No nonlinearity but the product; arguments as for :class:`SwiGLU`."""

    def gate(self, z: Tensor) -> Tensor:
        """Z itself."""
        return z


class GLU(_Gated):
    """Gate sigmoid(z), the original gated linear unit; arguments as for :class:`SwiGLU`."""

    def gate(self, z: Tensor) -> Tensor:
        """The sigmoid of z."""
        return torch.sigmoid(z)
