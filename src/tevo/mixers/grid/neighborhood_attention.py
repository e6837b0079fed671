"""Neighbourhood attention: every query attends to the k nearest tokens along each axis, shifted to stay inside the map.

    start(i) = clamp(i - floor(k/2), 0, N - k),   keys start(i) .. start(i) + k - 1                      (1)
    causal: keys max(0, i - k + 1) .. i                                                                  (2)
    o_i = sum_j softmax_j(q_i . k_j / sqrt(e) + B[j - i]) v_j, j over the product of the axes' windows   (3)

With dilation delta, (1) and (2) hold among the tokens of an axis that are congruent to i modulo delta. On an axis with
fewer than k such tokens the window is all of them.

Queries are taken in tiles of t neighbours along each axis, whose windows lie in t + k - 1 tokens; a tile is one dense
product, so that the cost is n ((t + k - 1) / t)^axes of what the windows alone need. State of the causal form: the keys
and values that a later window can reach. Letters: k window, T tiles, t queries of a tile, s keys of a tile, K keys of a
query.

Source: 2204.07143, section 3; dilation 2209.15001.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.attention import attention, softmax_weights
from tevo.functional.masks import refuse_context, refuse_mask
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads

CARD = Card(
    id="neighborhood_attention",
    role="mixer",
    summary="Limits each query to its k nearest tokens along each axis, in windows that never leave the map.",
    equations=(
        r"\mathrm{start}(i) = \mathrm{clamp}(i - \lfloor k/2 \rfloor,\, 0,\, N - k)",
        r"o_i = \sum_{j \in \rho(i)} \mathrm{softmax}_j\!\left(\frac{q_i^\top k_j}{\sqrt{e}} + B_{j - i}\right) v_j",
    ),
    exports={"neighborhood_attention": "NeighborhoodAttention"},
    cost="n",
    state="2 * d * (window - 1) * dilation * (grid[1] + 1 if grid else 1)",
    parameters="4 * d * d + 4 * d + relative * h * (2 * window - 1) ** (2 if grid else 1)",
    memory="n",
    claims=("bidirectional", "causal", "grid", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3, "window": 5},
        {"dim": 12, "heads": 3, "window": 3, "grid": (7, 4)},
        {"dim": 10, "heads": 2, "window": 3, "dilation": 2},
        {"dim": 6, "heads": 1, "window": 3, "dilation": 2, "grid": (11, 8), "relative": False},
        {"dim": 4, "heads": 1, "window": 31},
    ),
    equals=(
        "natten 0.14.6 NeighborhoodAttention1D and 2D, and the masks of its later causal form; values in "
        "tests/golden/neighborhood_attention_a.npz",
    ),
    departures=(
        "On a side shorter than window * dilation the window is all tokens of the residue class; the official module pads "
        "such a side with zeros before the projections and attends to the padding.",
    ),
    notes=(
        "With grid=(rows, columns) tokens are row-major and windows are square; without, they are a sequence of any length. "
        "A causal token on a grid sees the part of its window above and left of it. A window >= twice the side is full "
        "attention."
    ),
)

# queries of a tile along each axis of a line, and of a grid
_TILE = {1: 32, 2: 4}


class Tiles(NamedTuple):
    """Which queries and keys meet: token numbers of queries (T, t) and keys (T, s), padded with 0; ``allowed`` and the
    row of the bias table, ``offset``, (T, t, s); and ``back`` (n,), each token's place among all T t queries.
    """

    query: Tensor
    key: Tensor
    allowed: Tensor
    offset: Tensor
    back: Tensor


def tiles(
    sizes: tuple[int, ...], *, window: int, dilation: int, causal: tuple[bool, ...], device: torch.device | None = None
) -> Tiles:
    """The tiles of a line or grid, row-major, by equations (1) and (2) along each axis."""
    tile = _TILE[len(sizes)]
    query, real, key, allowed, offset = _axis(sizes[0], window, dilation, causal[0], tile, device)
    for size, past_only in zip(sizes[1:], causal[1:], strict=True):
        q, q_real, k, a, o = _axis(size, window, dilation, past_only, tile, device)
        query = (query[:, None, :, None] * size + q[None, :, None, :]).flatten(2).flatten(0, 1)
        real = (real[:, None, :, None] & q_real[None, :, None, :]).flatten(2).flatten(0, 1)
        key = (key[:, None, :, None] * size + k[None, :, None, :]).flatten(2).flatten(0, 1)
        allowed = _product(allowed, a, torch.logical_and)
        offset = _product(offset * (2 * window - 1), o, torch.add)
    n = int(torch.Size(sizes).numel())
    places = torch.arange(query.numel(), device=device)
    # padded queries write to a place of their own behind the last token
    to = query.masked_fill(~real, n).flatten()
    back = torch.zeros(n + 1, dtype=torch.long, device=device).scatter(0, to, places)[:n]
    return Tiles(query, key, allowed, offset, back)


def _product(rows: Tensor, columns: Tensor, join: object) -> Tensor:
    """(T, t, s) of two axes give (T T', t t', s s')."""
    assert callable(join)
    both = join(rows[:, None, :, None, :, None], columns[None, :, None, :, None, :])
    return both.flatten(4).flatten(2, 3).flatten(0, 1)


def _axis(
    size: int, window: int, dilation: int, causal: bool, tile: int, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries (T, t), whether they exist, keys (T, s), allowed and offset (T, t, s) along one axis.

    Within a residue class tokens are counted 0, 1 ..; tiles of all classes are stacked.
    """
    classes = max(1, min(dilation, size))
    r = torch.arange(classes, device=device)[:, None]
    most = -(-size // dilation)  # tokens of the largest class
    count = (size - r + dilation - 1) // dilation
    t = max(1, min(tile, most))
    first = torch.arange(0, max(most, 1), t, device=device)
    i = first[None, :, None] + torch.arange(t, device=device)  # 1 tiles t
    start = _start(i, count[..., None], window, causal)  # classes tiles t
    s = max(1, min(t + window - 1, most))
    j = start[..., :1] + torch.arange(s, device=device)  # classes tiles s
    last = i if causal else start + window - 1
    allowed = (j[..., None, :] >= start[..., None]) & (j[..., None, :] <= last[..., None])
    allowed &= (j < count[..., None])[..., None, :]
    offset = (j[..., None, :] - i[..., None] + window - 1).clamp(0, 2 * window - 2)
    real = i < count[..., None]
    query = (r[..., None] + dilation * i).masked_fill(~real, 0)
    key = (r[..., None] + dilation * j).masked_fill(j >= count[..., None], 0)
    return query.flatten(0, 1), real.flatten(0, 1), key.flatten(0, 1), allowed.flatten(0, 1), offset.flatten(0, 1)


def _start(i: Tensor, count: Tensor, window: int, causal: bool) -> Tensor:
    """The first key of query i among ``count`` tokens (eq. 1, 2)."""
    if causal:
        return (i - window + 1).clamp(min=0) + 0 * count
    return torch.minimum((i - window // 2).clamp(min=0), (count - window).clamp(min=0))


def neighborhood_attention(q: Tensor, k: Tensor, v: Tensor, plan: Tiles, bias: Tensor | None) -> Tensor:
    """Equation (3): q, k, v (b, h, n, e) and a table ``bias`` (h, offsets) give (b, h, n, e)."""
    h = q.shape[1]
    queries, keys, values = (
        x[:, :, index].flatten(1, 2) for x, index in ((q, plan.query), (k, plan.key), (v, plan.key))
    )  # b (h T) t e, b (h T) s e
    allowed = plan.allowed.repeat(h, 1, 1)  # (h T) t s
    addend = None if bias is None else bias[:, plan.offset].flatten(0, 1)
    o = attention(queries, keys, values, allowed=allowed[None], bias=None if addend is None else addend[None])
    return o.unflatten(1, (h, -1)).flatten(2, 3)[:, :, plan.back]


class NeighborhoodAttention(TokenMixer):
    """Neighbourhood attention on a line or a grid.

    Args:
        dim: width d.
        heads: number of heads h.
        window: tokens k of a window along each axis, odd.
        dilation: distance of neighbours, in tokens, >= 1.
        grid: (rows, columns) of row-major tokens; None for a sequence.
        causal: a token sees itself and, along each axis, tokens before it.
        relative: whether scores get a learned bias for each offset.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        window: int = 7,
        dilation: int = 1,
        grid: tuple[int, int] | None = None,
        causal: bool = False,
        relative: bool = True,
    ) -> None:
        super().__init__()
        check_heads("NeighborhoodAttention", dim, heads)
        if window < 1 or window % 2 == 0 or dilation < 1:
            raise ValueError(
                f"NeighborhoodAttention got window={window}, dilation={dilation}; the window must be odd, so that it has a "
                "middle, and both at least 1"
            )
        self.heads, self.window, self.dilation, self.grid, self.causal = heads, window, dilation, grid, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        axes = 1 if grid is None else 2
        self.bias = nn.Parameter(torch.empty(heads, (2 * window - 1) ** axes)) if relative else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normals of standard deviation 0.02 and zero biases, as in the released code."""
        for linear in (self.qkv, self.out):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if self.bias is not None:
            nn.init.trunc_normal_(self.bias, std=0.02)

    def regrid(self, grid: tuple[int, int]) -> None:
        """Work on another grid from now on; the parameters do not depend on it."""
        if self.grid is None:
            raise ValueError(f"NeighborhoodAttention was built for sequences, got grid={grid}; rebuild it with a grid")
        self.grid = grid

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d); neighbours are those of the tensor, whatever ``at`` says."""
        self._check(context, mask)
        n = x.shape[1]
        if self.grid is not None and n != self.grid[0] * self.grid[1]:
            raise ValueError(
                f"NeighborhoodAttention works on grid={self.grid}, {self.grid[0] * self.grid[1]} tokens, got {n}; call "
                "regrid() with the grid of the tokens"
            )
        q, k, v = self._split(x)
        if n == 0:
            return self.out(merge_heads(q + k + v))
        sizes = (n,) if self.grid is None else self.grid
        plan = tiles(
            sizes,
            window=self.window,
            dilation=self.dilation,
            causal=(self.causal,) * len(sizes),
            device=x.device,
        )
        return self.out(merge_heads(neighborhood_attention(q, k, v, plan, self.bias)))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k, v (b, h, n, e)."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    @staticmethod
    def _check(context: Tensor | None, mask: Tensor | None) -> None:
        refuse_mask("NeighborhoodAttention", mask)
        refuse_context("NeighborhoodAttention", context)

    def _reach(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """How many rows and columns before a token its keys lie, (K,) each; a line has columns only."""
        back = torch.arange(0, self.window * self.dilation, self.dilation, device=device)
        if self.grid is None:
            return torch.zeros_like(back), back
        return back.repeat_interleave(self.window), back.repeat(self.window)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Keys and values (b, h, M, e) of the last M tokens, the farthest a window reaches, and their number (b,)."""
        self._check(context, mask)
        if not self.causal:
            raise ValueError("NeighborhoodAttention(causal=False) has no state; build it with causal=True")
        farthest = (self.window - 1) * self.dilation * (1 if self.grid is None else self.grid[1] + 1)
        weight = self.out.weight
        empty = weight.new_zeros(batch, self.heads, farthest, weight.shape[0] // self.heads)
        return empty, empty, torch.zeros(batch, dtype=torch.long, device=weight.device)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d), on a grid in row-major order."""
        self._check(None, mask)
        k_past, v_past, count = state
        assert isinstance(k_past, Tensor) and isinstance(v_past, Tensor) and isinstance(count, Tensor)
        n, farthest = x.shape[1], k_past.shape[2]
        q, k, v = self._split(x)
        k, v = torch.cat([k_past.to(k.dtype), k], 2), torch.cat([v_past.to(v.dtype), v], 2)
        rows, columns = self._reach(x.device)
        width = 0 if self.grid is None else self.grid[1]
        distance = rows * width + columns  # K
        index = farthest + torch.arange(n, device=x.device)[:, None] - distance  # n K
        place = count[:, None, None] + torch.arange(n, device=x.device)[:, None]  # b n 1
        if width:
            allowed = (place // width >= rows) & (place % width >= columns)  # b n K
        else:
            allowed = place >= distance
        s = (q[:, :, :, None] * q.shape[-1] ** -0.5 * k[:, :, index]).sum(-1)  # b h n K
        if self.bias is not None:
            side, middle = 2 * self.window - 1, self.window - 1
            down = (middle - rows // self.dilation) * (side if width else 0)
            s = s + self.bias[:, down + middle - columns // self.dilation][:, None]
        weights = softmax_weights(s, allowed[:, None])
        o = (weights[..., None] * v[:, :, index]).sum(-2)  # b h n e
        return self.out(merge_heads(o)), (k[:, :, n:], v[:, :, n:], count + n)
