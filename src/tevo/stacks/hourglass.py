"""Hourglass: full layers around a valley that works on a sequence shortened k times.

    x <- layers(x),   r = x padded to a multiple of k                                                        (1)
    x' = r, or if causal k - 1 zeros and r without its last k - 1 tokens                                     (2)
    s_g = mean of the group x'_{gk} .. x'_{gk+k-1}, or a linear map of all of it                             (3)
    s <- s + Attn(s, group),  s <- s + FFN(s)                            each group by itself                (4)
    s <- layers(s), or an hourglass of its own                                                               (5)
    u = each s_g repeated k times, or a linear map of it to k tokens;   u <- u + r                           (6)
    u <- u + Attn(u, s_g),  u <- u + FFN(u)                              each group by itself                (7)
    x <- layers(first n of u)                                                                                (8)

With the shift of (2) group g holds the tokens gk - (k - 1) .. gk and is given to gk .. gk + k - 1: none of them later. In
(7) there is one key, whose weight is 1: the attention is the linear map of its value. Cost that of the layers: O(n^2 d)
for the outer ones and O((n / k)^2 d) for the valley. Letters: g groups, k ``factor``.

Source: 2110.13711, section 2, in the form of hourglass-transformer-pytorch.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import create
from tevo.contracts import Stack
from tevo.functional.masks import refuse_mask
from tevo.mixers.softmax.multi_head import MultiHead
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.models.block import Block, build

CARD = Card(
    id="hourglass",
    role="stack",
    summary="Shortens the sequence for the layers in the middle, and lengthens it again for the last.",
    equations=(
        r"s = \mathrm{Shorten}_k(\mathrm{shift}_{k-1}(x)),\quad s \leftarrow \mathrm{valley}(s)",
        r"x \leftarrow \mathrm{layers}(x + \mathrm{Upsample}_k(s))",
    ),
    exports={"hourglass": "Hourglass"},
    cost="n^2",
    parameters=(
        "(lambda block, channel, factors: 2 * d + depth * block + sum("
        "2 * outer * block + linear * (2 * k * d * d + k * d + d)"
        " + resample * (block + 2 * d * d + bias * d + 2 * d + channel) for k in factors))"
        "(4 * d * d + 4 * bias * d + 2 * d * (hidden_dim or 4 * d) + (hidden_dim or 4 * d) + 5 * d,"
        " 2 * d * (hidden_dim or 4 * d) + (hidden_dim or 4 * d) + d,"
        " (factor,) if isinstance(factor, int) else factor)"
    ),
    memory="n",
    claims=("bidirectional", "causal"),
    examples=(
        {"dim": 12, "heads": 3, "depth": 2, "factor": 3, "causal": True},
        {"dim": 12, "heads": 3, "depth": 1, "factor": (2, 3), "hidden_dim": 7},
        {"dim": 6, "heads": 1, "depth": 1, "factor": 4, "linear": False, "resample": False, "causal": True},
        {"dim": 10, "heads": 5, "depth": 1, "factor": 2, "linear": False, "outer": 2, "bias": True},
    ),
    equals=(
        "hourglass-transformer-pytorch 0.0.6: means and linear maps, with and without resampling, nested; values in "
        "tests/golden/hourglass_a.npz",
    ),
    departures=(
        "Resampling looks inside each group only, as in that package; the authors' Trax code attends over the whole "
        "shortened sequence with relative positions, which is not built here.",
        "In (7) the package's queries, keys and norm, which one key makes idle, are left out; the outputs are the same.",
        "A mask is refused: the package's groups mix padding into real tokens.",
    ),
    notes="depth counts the layers of the valley, outer those before it and those after it, on each level.",
)


class FromGroup(nn.Module):
    """Equation (4).

    Args:
        block: a pre-norm block whose mixer takes a context.
    """

    def __init__(self, *, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, s: Tensor, groups: Tensor) -> Tensor:
        """``s`` (b, g, d), ``groups`` (b, g, k, d) give (b, g, d)."""
        context = groups.flatten(0, 1)

        def mix(y: Tensor) -> Tensor:
            return self.block.mixer(y, context)

        y = self.block.residual(s.flatten(0, 1)[:, None], (mix, self.block.channel))
        return y[:, 0].unflatten(0, s.shape[:2])


class ToGroup(nn.Module):
    """Equation (7).

    Args:
        dim: width d.
        hidden_dim: width inside the feed-forward; None leaves its own choice.
        bias: whether the last map has a bias.
    """

    def __init__(self, *, dim: int, hidden_dim: int | None, bias: bool) -> None:
        super().__init__()
        wanted = {} if hidden_dim is None else {"hidden_dim": hidden_dim}
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.norm = create("layer_norm", dim=dim)
        self.channel = build("channel", "gelu", {"dim": dim}, wanted)

    def forward(self, u: Tensor, s: Tensor) -> Tensor:
        """``u`` (b, g, k, d), ``s`` (b, g, d) give (b, g, k, d)."""
        u = u + self.out(self.v(s))[:, :, None]
        return u + self.channel(self.norm(u))


class Level(nn.Module):
    """Equations (1) to (8); arguments as for :class:`Hourglass`, with one factor for this level and for each one inside."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        depth: int,
        outer: int,
        factors: tuple[int, ...],
        causal: bool,
        linear: bool,
        resample: bool,
        bias: bool,
        hidden_dim: int | None,
        dropout: float,
    ) -> None:
        super().__init__()

        def block(causal: bool) -> Block:
            projections = MultiHead(dim=dim, heads=heads, bias=bias)
            mixer = SoftmaxAttention(dim=dim, heads=projections, causal=causal)
            return Block(dim=dim, mixer=mixer, hidden_dim=hidden_dim, dropout=dropout)

        self.factor, self.causal, k = factors[0], causal, factors[0]
        self.before = nn.ModuleList(block(causal) for _ in range(outer))
        self.after = nn.ModuleList(block(causal) for _ in range(outer))
        self.down = nn.Linear(k * dim, dim) if linear else None
        self.up = nn.Linear(dim, k * dim) if linear else None
        self.from_group = FromGroup(block=block(False)) if resample else None
        self.to_group = ToGroup(dim=dim, hidden_dim=hidden_dim, bias=bias) if resample else None
        inner = {"heads": heads, "depth": depth, "outer": outer, "hidden_dim": hidden_dim, "dropout": dropout}
        self.valley = nn.ModuleList(
            [Level(dim=dim, factors=factors[1:], causal=causal, linear=linear, resample=resample, bias=bias, **inner)]  # type: ignore[arg-type]
            if len(factors) > 1
            else [block(causal) for _ in range(depth)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) gives (b, n, d)."""
        for block in self.before:
            x = block(x)
        n, k = x.shape[1], self.factor
        if n:
            x = self._through_the_valley(F.pad(x, (0, 0, 0, -n % k)))[:, :n]
        for block in self.after:
            x = block(x)
        return x

    def _through_the_valley(self, r: Tensor) -> Tensor:
        """Equations (2) to (7) for ``r`` (b, g k, d)."""
        k = self.factor
        groups = (F.pad(r, (0, 0, k - 1, 1 - k)) if self.causal else r).unflatten(1, (-1, k))  # b g k d
        s = groups.mean(2) if self.down is None else self.down(groups.flatten(2))  # b g d
        if self.from_group is not None:
            s = self.from_group(s, groups)
        for part in self.valley:
            s = part(s)
        u = s[:, :, None] if self.up is None else self.up(s).unflatten(-1, (k, -1))  # b g k d
        u = u + r.unflatten(1, (-1, k))
        if self.to_group is not None:
            u = self.to_group(u, s)
        return u.flatten(1, 2)


class Hourglass(Stack):
    """An hourglass and a norm.

    Args:
        dim: width d.
        heads: number of heads.
        depth: layers of the (innermost) valley.
        outer: layers before and layers after each valley.
        factor: how many times the sequence is shortened; several numbers nest hourglasses, from the outside in.
        causal: a token sees itself and earlier ones.
        linear: shorten and lengthen by linear maps instead of means and repetition.
        resample: equations (4) and (7).
        bias: whether the projections of attention have biases.
        hidden_dim: width inside the feed-forwards; None is 4 dim.
        dropout: probability with which a sublayer's output feature is dropped in training, outside the resampling.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        depth: int = 6,
        outer: int = 1,
        factor: int | tuple[int, ...] = 3,
        causal: bool = False,
        linear: bool = True,
        resample: bool = True,
        bias: bool = False,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        factors = (factor,) if isinstance(factor, int) else tuple(factor)
        if depth < 1 or outer < 0 or not factors or min(factors) < 1:
            raise ValueError(
                f"Hourglass got depth={depth}, outer={outer}, factor={factor}; expected depth >= 1, outer >= 0 and factors "
                ">= 1"
            )
        self.level = Level(
            dim=dim,
            heads=heads,
            depth=depth,
            outer=outer,
            factors=factors,
            causal=causal,
            linear=linear,
            resample=resample,
            bias=bias,
            hidden_dim=hidden_dim,
            dropout=dropout,
        )
        self.norm = create("layer_norm", dim=dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d); the order of the tokens is that of the tensor.

        Raises:
            ValueError: a mask.
        """
        refuse_mask("Hourglass", mask)
        return self.norm(self.level(x))
