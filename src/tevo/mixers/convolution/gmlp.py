"""gMLP: tokens are mixed by one learned matrix over positions, as a gate inside a feed-forward; no attention needed.

    [Z_1, Z_2] = GELU(x U + u)                                                                       (1)
    S = W LayerNorm(Z_2) + b,   W (n, n), one b for each position                                    (2)
    y = (Z_1 * S) V + v                                                                              (3)

aMLP adds to S a single small head of attention over x, softmax(q k^T a^-1/2) v O + o. At first W is nearly zero and b is
one, so that the gate is open and each token passes through a feed-forward alone. Positions need no other encoding.
Shorter inputs use the first rows and columns of W; causal: its lower triangle. Cost O(n d f + n^2 f); the causal form
keeps LayerNorm(Z_2) of all past tokens. Letters: f hidden width, a width of the small head, L greatest length.

Source: 2105.08050, sections 2 and 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.attention import attention
from tevo.functional.masks import blank, check_mask, refuse_context, to_front

CARD = Card(
    id="gmlp",
    role="mixer",
    summary="A learned matrix over positions gates a feed-forward in place of attention.",
    equations=(
        r"[Z_1, Z_2] = \mathrm{GELU}(x U),\quad S = W\, \mathrm{LN}(Z_2) + b",
        r"y = (Z_1 \odot S)\, V",
    ),
    exports={"gmlp": "GMLP", "amlp": "AMLP"},
    cost="n^2",
    flops="3 * n * d * (hidden_dim or 6 * d) + n * n * (hidden_dim or 6 * d)",
    state="(length + 1) * (hidden_dim or 6 * d) // 2",
    parameters="(hidden_dim or 6 * d) * (3 * d + 4) // 2 + d + groups * length * (length + 1)",
    memory="n",
    claims=("bidirectional", "causal", "padding", "fixed_length", "exact_state"),
    examples=(
        {"part": "gmlp", "dim": 12, "length": 13},
        {"part": "gmlp", "dim": 5, "length": 11, "hidden_dim": 6, "causal": True},
        {"part": "gmlp", "dim": 6, "length": 17, "hidden_dim": 12, "groups": 3},
        {"part": "amlp", "dim": 12, "length": 13, "attention_dim": 5},
        {"part": "amlp", "dim": 5, "length": 11, "hidden_dim": 6, "attention_dim": 3, "causal": True},
        {"part": "amlp", "dim": 3, "length": 9, "hidden_dim": 4, "attention_dim": 1, "groups": 2},
    ),
    equals=("g-mlp-pytorch 0.1.5 gMLPBlock, five cases; values in tests/golden/gmlp_a.npz",),
    departures=(
        "The causal form and groups of channels with a W each are g-mlp-pytorch's; the paper has neither.",
        "Padding is moved behind the real tokens before anything else, so that it may stand anywhere.",
        "The block's norm and residual connection are the wiring's: the paper's is pre_norm.",
    ),
    notes=(
        "In the paper the block takes the place of attention and of the feed-forward; in the seat of a mixer a "
        "feed-forward follows. Longer inputs than length need another W."
    ),
    variants={
        "amlp": {
            "flops": (
                "3 * n * d * (hidden_dim or 6 * d) + n * n * (hidden_dim or 6 * d) + 6 * n * d * attention_dim"
                " + 4 * n * n * attention_dim + n * attention_dim * (hidden_dim or 6 * d)"
            ),
            "state": "(length + 1) * ((hidden_dim or 6 * d) // 2 + 2 * attention_dim)",
            "parameters": (
                "(hidden_dim or 6 * d) * (3 * d + 5 + attention_dim) // 2 + d + 3 * d * attention_dim"
                " + groups * length * (length + 1)"
            ),
        }
    },
)


def spatial_gate(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Equation (2) for normed ``z`` (b, m, f / 2), w (#b, G, n, m), b (#b, G, n): (b, n, f / 2), G groups of channels."""
    wide = torch.promote_types(z.dtype, torch.float32)
    # sums over all tokens: in half precision they would overflow where m is large
    groups = z.unflatten(-1, (w.shape[1], -1)).transpose(1, 2).to(wide)  # b G m f/2G
    s = w.to(wide) @ groups + b.to(wide)[..., None]
    return s.transpose(1, 2).flatten(2).to(z.dtype)


class _GMLP(TokenMixer):
    """Both forms; ``attention_dim`` 0 has no attention."""

    def __init__(
        self,
        *,
        dim: int,
        length: int,
        hidden_dim: int | None,
        groups: int,
        attention_dim: int,
        causal: bool,
        scale: float,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        hidden_dim = 6 * dim if hidden_dim is None else hidden_dim
        if length < 1 or groups < 1 or hidden_dim < 2 or hidden_dim % (2 * groups):
            raise ValueError(
                f"{name} got length={length}, hidden_dim={hidden_dim}, groups={groups}; needs length >= 1 and a "
                "hidden_dim whose half divides into groups"
            )
        half = hidden_dim // 2
        self.length, self.causal, self.scale = length, causal, scale
        self.into = nn.Linear(dim, hidden_dim)
        self.norm = nn.LayerNorm(half)
        self.weight = nn.Parameter(torch.empty(groups, length, length))
        self.bias = nn.Parameter(torch.empty(groups, length))
        self.out = nn.Linear(half, dim)
        self.qkv = nn.Linear(dim, 3 * attention_dim, bias=False) if attention_dim else None
        self.attention_out = nn.Linear(attention_dim, half) if attention_dim else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """W uniform within scale / L and b one, as the paper says is crucial: at first a feed-forward for each token."""
        linears = [self.into, self.out, *(m for m in (self.qkv, self.attention_out) if m is not None)]
        for linear in linears:
            linear.reset_parameters()
        self.norm.reset_parameters()
        nn.init.uniform_(self.weight, -self.scale / self.length, self.scale / self.length)
        nn.init.ones_(self.bias)

    def no_decay(self) -> set[str]:
        """Biases of positions."""
        return {"bias"}

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); positions are counted in real tokens, whatever ``at`` says."""
        name, n = type(self).__name__, x.shape[1]
        refuse_context(name, context)
        check_mask(name, mask, x.shape[0], n)
        self._check_length(n)
        back = None
        if mask is not None:
            x, count, back = to_front(x, mask)
            mask = torch.arange(n, device=x.device) < count[:, None]
        z_1, z_2 = F.gelu(self.into(x)).chunk(2, dim=-1)  # (eq. 1)
        # blanked behind the norm, whose bias would make something of nothing
        z_2 = blank(self.norm(z_2), mask)
        w = self.weight[:, :n, :n]
        s = spatial_gate(z_2, (w.tril() if self.causal else w)[None], self.bias[None, :, :n])
        if self.qkv is not None and self.attention_out is not None:
            q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
            allowed = None if mask is None else mask[:, None, None]
            s = s + self.attention_out(attention(q, k, v, allowed=allowed, causal=self.causal)[:, 0])
        y: Tensor = self.out(z_1 * s)  # (eq. 3)
        return y if back is None else y.take_along_dim(back, 1)

    def _check_length(self, n: int) -> None:
        if n > self.length:
            raise ValueError(
                f"{type(self).__name__} was built for length={self.length} tokens, got n={n}; rebuild with length>={n}"
            )

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Normed Z_2 (b, L + 1, f / 2), k and v of the small head (b, L + 1, a), count (b,); row L is for padding."""
        refuse_context(type(self).__name__, context)
        if not self.causal:
            name = type(self).__name__
            raise ValueError(f"{name}(causal=False) has no state of its own; build it with causal=True")
        like = self.out.weight
        a = 0 if self.qkv is None else self.qkv.out_features // 3
        rows = self.length + 1
        z, k, v = (like.new_zeros(batch, rows, width) for width in (like.shape[1], a, a))
        return z, k, v, torch.zeros(batch, dtype=torch.long, device=like.device)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d)."""
        z, keys, values, count = state
        assert isinstance(z, Tensor) and isinstance(keys, Tensor)
        assert isinstance(values, Tensor) and isinstance(count, Tensor)
        b, n = x.shape[:2]
        check_mask(type(self).__name__, mask, b, n)
        real = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
        x = blank(x, mask)
        place = count[:, None] + real.long().cumsum(1) - 1
        count = count + real.sum(1)
        if b:
            self._check_length(int(count.max()))
        z_1, z_2 = F.gelu(self.into(x)).chunk(2, dim=-1)  # (eq. 1)
        row = place.where(real, self.length)
        z = _put(z, self.norm(z_2), row)
        place = place.clamp(min=0)
        w = self.weight.tril()[:, place].transpose(0, 1)  # b G n L
        s = spatial_gate(z[:, :-1], w, self.bias[:, place].transpose(0, 1))
        if self.qkv is not None and self.attention_out is not None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            keys, values = _put(keys, k, row), _put(values, v, row)
            allowed = torch.arange(self.length, device=x.device) <= place[..., None]  # b n L
            o = attention(q[:, None], keys[:, None, :-1], values[:, None, :-1], allowed=allowed[:, None])
            s = s + self.attention_out(o[:, 0])
        return self.out(z_1 * s), (z, keys, values, count)  # (eq. 3)


def _put(cache: Tensor, new: Tensor, row: Tensor) -> Tensor:
    """``new`` (b, n, w) at rows ``row`` (b, n) of ``cache`` (b, L + 1, w)."""
    return cache.scatter(1, row[..., None].expand_as(new), new)


class GMLP(_GMLP):
    """Spatial gating alone.

    Args:
        dim: width d.
        length: greatest number L of tokens.
        hidden_dim: width f, even; by default 6 dim, the paper's ratio for language.
        groups: matrices W, each for an equal share of the channels; the paper has 1.
        causal: a token sees itself and earlier ones.
        scale: eps of the initial W, uniform within eps / L.
    """

    def __init__(
        self,
        *,
        dim: int,
        length: int,
        hidden_dim: int | None = None,
        groups: int = 1,
        causal: bool = False,
        scale: float = 1e-3,
    ) -> None:
        super().__init__(
            dim=dim,
            length=length,
            hidden_dim=hidden_dim,
            groups=groups,
            attention_dim=0,
            causal=causal,
            scale=scale,
        )


class AMLP(_GMLP):
    """Spatial gating with a small head of attention beside it; further arguments as for :class:`GMLP`.

    Args:
        attention_dim: width a of the small head, >= 1; the paper has 64, and 128 in its largest models.
    """

    def __init__(
        self,
        *,
        dim: int,
        length: int,
        hidden_dim: int | None = None,
        groups: int = 1,
        attention_dim: int = 64,
        causal: bool = False,
        scale: float = 1e-3,
    ) -> None:
        if attention_dim < 1:
            raise ValueError(f"AMLP got attention_dim={attention_dim}; expected >= 1 (gmlp is the form without)")
        super().__init__(
            dim=dim,
            length=length,
            hidden_dim=hidden_dim,
            groups=groups,
            attention_dim=attention_dim,
            causal=causal,
            scale=scale,
        )
