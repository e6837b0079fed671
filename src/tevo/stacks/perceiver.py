"""Perceiver: a few learned latents read the inputs by cross-attention and think among themselves, again and again.

    Z <- Z + Attn(LN(Z), LN(Y)),   Z <- Z + MLP(LN(Z))                    (1)  read: N latents, m inputs
    Z <- Z + Attn(LN(Z)),          Z <- Z + MLP(LN(Z))                    (2)  think: P layers, a tower
    (1) and (2) are repeated T times from a learned Z; the first reading has weights of its own, the others share theirs,
    and all towers share theirs                                           (3)
    features of a point p in [-1, 1]^axes: [p, sin(pi f_j p), cos(pi f_j p)],  f_j = linspace(1, size / 2, bands)   (4)

Inputs are tokens that know their position: with ``grid`` the features (4) of each token are appended to it, otherwise the
host's position part has to do it. The output is N latents. Cost O(T (m N + P N^2) d), linear in m; no causal form.

Source: 2103.03206, section 3 and appendix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Stack
from tevo.functional.attention import attention
from tevo.functional.masks import blank, check_mask
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads

CARD = Card(
    id="perceiver",
    role="stack",
    summary="Replaces the stack by learned latents that read the inputs by cross-attention and attend to each other.",
    equations=(
        r"Z \leftarrow Z + \mathrm{Attn}(\mathrm{LN}(Z), \mathrm{LN}(Y)),\quad Z \leftarrow Z + \mathrm{MLP}(\mathrm{LN}(Z))",
        r"Z \leftarrow Z + \mathrm{Attn}(\mathrm{LN}(Z)),\quad Z \leftarrow Z + \mathrm{MLP}(\mathrm{LN}(Z))"
        r"\quad P\ \text{times}",
    ),
    exports={"perceiver": "Perceiver"},
    cost="n",
    flops=(
        "repeats * (4 * n * (d + (4 * bands + 2 if grid else 0)) * (d + latents + (4 * bands + 2 if grid else 0)) "
        "+ 4 * latents * (latent_dim or d) * (d + (4 * bands + 2 if grid else 0) + (hidden_dim or latent_dim or d)) "
        "+ depth * 4 * latents * (latent_dim or d) * (2 * (latent_dim or d) + latents + (hidden_dim or latent_dim or d)))"
    ),
    parameters=(
        "(lambda w, c, hid: latents * w + min(2, repeats) * (2 * w * c + 2 * c * c + 5 * c + 6 * w"
        " + 2 * w * hid + hid)"
        " + depth * (4 * w * w + 9 * w + 2 * w * hid + hid))"
        "(latent_dim or d, d + (len(grid) * (2 * bands + 1) if grid else 0), hidden_dim or latent_dim or d)"
    ),
    memory="n",
    claims=("bidirectional", "padding"),
    examples=(
        {"dim": 12, "heads": 3, "latents": 5, "depth": 2, "repeats": 3},
        {"dim": 5, "heads": 2, "latents": 3, "latent_dim": 6, "depth": 1, "repeats": 2, "hidden_dim": 7},
        {"dim": 6, "heads": 1, "cross_heads": 2, "latents": 1, "latent_dim": 5, "depth": 0, "repeats": 1},
        {"dim": 3, "heads": 2, "latents": 4, "latent_dim": 6, "depth": 1, "repeats": 1, "grid": (7, 2), "bands": 2},
    ),
    equals=(
        "transformers 5.23.0 PerceiverModel, its layers composed to repeated readings; Fourier features of "
        "perceiver-pytorch 0.11.0; values in tests/golden/perceiver_a.npz",
    ),
    departures=(
        "Position features are ordered raw, sines, cosines as the paper lists them and the axes are (row, column); "
        "released codes order them otherwise, which a learned projection undoes.",
    ),
    notes=(
        "The output has one vector of width latent_dim for each latent, of which a head takes the mean. Permuting the inputs "
        "changes nothing: give them positions. The width of queries, keys and values of a reading is that of its inputs."
    ),
)


def fourier_features(grid: Sequence[int], bands: int, resolution: Sequence[float] | None = None) -> Tensor:
    """Equation (4) for the points of a grid, row-major: (points, axes (2 bands + 1)), in float64.

    The axes' coordinates come first, then the sines of all axes, then the cosines; within them axis by axis.

    Args:
        grid: points along each axis.
        bands: frequencies for each axis.
        resolution: twice the highest frequency of each axis, in half periods over [-1, 1]; by default the grid's.
    """
    axes = [torch.linspace(-1, 1, size, dtype=torch.float64) for size in grid]
    p = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)  # points axes
    highest = [torch.linspace(1, size / 2, bands, dtype=torch.float64) for size in resolution or grid]
    angle = math.pi * (p[..., None] * torch.stack(highest)).flatten(1)  # points axes*bands
    return torch.cat([p, angle.sin(), angle.cos()], -1)


class Perceiver(Stack):
    """A Perceiver without input and output adapters.

    Args:
        dim: width d of the inputs.
        heads: heads of the latents' self-attention.
        cross_heads: heads of a reading.
        latents: number of latents N.
        latent_dim: width of a latent and so of the outputs; by default dim, which the house's heads expect.
        depth: layers P of the tower between two readings.
        repeats: readings T, each followed by the tower.
        hidden_dim: width inside the MLPs; by default that of a latent, as in the paper.
        grid: sizes of the grid whose points the inputs are, row-major; their features are then appended.
        bands: frequencies of those features for each axis.
        dropout: probability with which a sublayer's output feature is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        cross_heads: int = 1,
        latents: int = 512,
        latent_dim: int | None = None,
        depth: int = 6,
        repeats: int = 8,
        hidden_dim: int | None = None,
        grid: tuple[int, ...] | None = None,
        bands: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if repeats < 1 or latents < 1:
            raise ValueError(f"Perceiver got repeats={repeats}, latents={latents}; expected at least 1 of each")
        latent_dim = dim if latent_dim is None else latent_dim
        self.repeats, self.grid = repeats, grid
        self.points: Tensor | None
        self.register_buffer("points", None if grid is None else fourier_features(grid, bands), persistent=False)
        c = dim if self.points is None else dim + self.points.shape[1]
        self.latents = nn.Parameter(torch.empty(latents, latent_dim))
        readings = [
            PerceiverLayer(dim=latent_dim, heads=cross_heads, hidden_dim=hidden_dim, input_dim=c, dropout=dropout)
            for _ in range(min(2, repeats))
        ]
        self.readings = nn.ModuleList(readings)
        tower = [
            PerceiverLayer(dim=latent_dim, heads=heads, hidden_dim=hidden_dim, dropout=dropout) for _ in range(depth)
        ]
        self.tower = nn.ModuleList(tower)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Latents from a normal of standard deviation 0.02, truncated at 2, as in the paper."""
        nn.init.trunc_normal_(self.latents, std=0.02, a=-2.0, b=2.0)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, m, d), ``mask`` (b, m) give (b, N, latent_dim); inputs are a set, whatever ``at`` says."""
        check_mask("Perceiver", mask, x.shape[0], x.shape[1])
        y = blank(x, mask)
        if self.points is not None:
            if len(self.points) != x.shape[1]:
                raise ValueError(
                    f"Perceiver was built for grid={self.grid}, {len(self.points)} tokens, got {x.shape[1]}; rebuild it with "
                    "the grid of the inputs"
                )
            y = torch.cat([y, self.points.to(y.dtype).expand(len(x), -1, -1)], -1)
        z = self.latents.to(y.dtype).repeat(len(x), 1, 1)
        for repeat in range(self.repeats):
            z = self.readings[min(repeat, 1)](z, y, mask=mask)
            for layer in self.tower:
                z = layer(z)
        return z

    def outputs(self, mask: Tensor | None, n: int) -> tuple[Tensor | None, int]:
        """All N latents are real."""
        return None, len(self.latents)


class PerceiverLayer(nn.Module):
    """Equation (1), or (2) without ``input_dim``.

    Args:
        dim: width of a latent.
        heads: number of heads.
        hidden_dim: width inside the MLP; by default dim.
        input_dim: width of the inputs, and of queries, keys and values; None for latents among themselves.
        dropout: probability with which a sublayer's output feature is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        hidden_dim: int | None = None,
        input_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = dim if input_dim is None else input_dim
        check_heads("PerceiverLayer", width, heads)
        self.heads, self.dropout = heads, dropout
        hidden_dim = dim if hidden_dim is None else hidden_dim
        self.query_norm = nn.LayerNorm(dim)
        self.input_norm = None if input_dim is None else nn.LayerNorm(input_dim)
        self.q = nn.Linear(dim, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.into = nn.Linear(dim, hidden_dim)
        self.back = nn.Linear(hidden_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Variance 1 / inputs in all matrices, as in the released code (a normal truncated at 2), zero biases."""
        for linear in (self.q, self.kv, self.out, self.into, self.back):
            # 0.8796 is the standard deviation of a unit normal truncated at 2
            std = linear.in_features**-0.5 / 0.87962566103423978
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(linear.bias)

    def forward(self, z: Tensor, y: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """``z`` (b, N, dim), ``y`` (b, m, input_dim), ``mask`` (b, m) give (b, N, dim)."""
        queries = self.query_norm(z)
        inputs = queries if y is None or self.input_norm is None else self.input_norm(y)
        k, v = self.kv(inputs).chunk(2, -1)
        q, k, v = (split_heads(part, self.heads) for part in (self.q(queries), k, v))
        o = attention(q, k, v, allowed=None if mask is None else mask[:, None, None])
        z = z + F.dropout(self.out(merge_heads(o)), self.dropout, self.training)
        return z + F.dropout(self.back(F.gelu(self.into(self.mlp_norm(z)))), self.dropout, self.training)
