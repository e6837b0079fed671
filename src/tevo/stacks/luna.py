"""Luna: a short second sequence packs the tokens by attention, and the tokens read what was packed.

    Yp = Attn(queries p, keys = values x),   Yx = Attn(queries x, keys = values Yp)                          (1)
    p <- N(p + Yp),   x <- N(x + Yx),   x <- N(x + FFN(x))                                                   (2)
    p goes from layer to layer beside x; p_0 is learned.
    causal, with p = p_0 in every layer, since tokens may not write into it:
    f(a, b, c)_t = 1/t sum_{j <= t} (a_t . b_j) c_j,   A_t = softplus_2(k'_t . p / sqrt(e))                  (3)
    y_t = f(softmax(f(q, k, A)), A, v)_t,   k = v,   softplus_2(z) = log_2(1 + 2^z)                          (4)

The two heads of equation (1) may differ in number, pack and unpack; keys and values are one projection. Cost O(n l d),
state of the causal form: two sums of e l numbers a head. Letters: l ``packed``.

Source: 2106.01540, section 3, and its released code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import Spec, create
from tevo.contracts import Stack, State
from tevo.functional.attention import attention
from tevo.functional.linear_attention import causal_linear_attention
from tevo.functional.masks import blank, check_mask
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads
from tevo.models.block import build
from tevo.taps import tap

CARD = Card(
    id="luna",
    role="stack",
    summary="Packs the tokens into a short second sequence by attention, layer by layer, and lets them read it.",
    equations=(
        r"Y_P = \mathrm{Attn}(P, X, X),\quad Y_X = \mathrm{Attn}(X, Y_P, Y_P),\quad P \leftarrow \mathrm{LN}(P + Y_P)",
        r"\text{causal:}\ y_t = f(\mathrm{softmax}(f(Q, K, A)), A, V)_t,\quad"
        r" f(a, b, c)_t = \frac{1}{t} \sum_{j \le t} (a_t^\top b_j)\, c_j",
    ),
    exports={"luna": "Luna"},
    cost="n",
    flops=(
        "depth * ((8 * n * d * d + 2 * packed * d * d + 10 * n * packed * d + 4 * d * packed * ceil(n / 64)"
        " + 4 * ((n - n % 64) * 64 + (n % 64) ** 2) * (d + h * packed)"
        " if causal else 6 * n * d * d + 4 * packed * d * d + 8 * n * packed * d)"
        " + 4 * n * d * (hidden_dim or 4 * d))"
    ),
    state="depth * 2 * packed * d",
    parameters=(
        "packed * d + depth * (5 * d * d + 6 * d + 2 * d * (hidden_dim or 4 * d) + (hidden_dim or 4 * d))"
        " + (2 * depth + (0 if causal else depth - 1 + pre_norm) + pre_norm) * (2 * d if norm == 'layer_norm' else d)"
    ),
    memory="n",
    claims=("bidirectional", "causal", "padding", "equivariant", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3, "depth": 2, "packed": 5, "hidden_dim": 7},
        {"dim": 12, "heads": 3, "depth": 2, "packed": 5, "causal": True},
        {"dim": 6, "heads": 1, "depth": 3, "packed": 1, "pre_norm": True, "norm": "rms_norm"},
        {"dim": 10, "heads": 5, "depth": 1, "packed": 3, "causal": True, "pre_norm": True},
    ),
    equals=(
        "XuezheMax/fairseq-apollo at 3644d206: LunaEncoderLayer (also padded), LunarCausalAttention with its state, and "
        "LunaDecoderLayer composed of these parts; values in tests/golden/luna_a.npz",
    ),
    departures=(
        "The causal form leaves padding out of all sums and counts; the released one ignores its mask.",
        "The last post-norm layer does not update the packed sequence, which nobody reads any more.",
        "The decoder's cross-attention is left out of the stack, which has no second sequence.",
    ),
    notes=(
        "The packed sequences of all layers are tapped as 'packed'. Permuting the tokens permutes the outputs: give them "
        "positions."
    ),
)


def count(mask: Tensor | None, n: int, before: Tensor, like: Tensor) -> Tensor:
    """How many real tokens each token sees (#b, n), itself included, at least 1; ``before`` (#b,) were seen earlier."""
    steps = torch.arange(1, n + 1, device=like.device)[None] if mask is None else mask.long().cumsum(1)
    return (steps + before[:, None]).clamp(min=1).to(like.dtype)


class LunaAttention(nn.Module):
    """The five projections, and both forms of the attention.

    Args:
        dim: width d.
        heads: number of heads h that read.
        pack_heads: number of heads that pack.
    """

    def __init__(self, *, dim: int, heads: int, pack_heads: int) -> None:
        super().__init__()
        check_heads("Luna", dim, heads)
        check_heads("Luna", dim, pack_heads)
        self.heads, self.pack_heads = heads, pack_heads
        self.pack_q = nn.Linear(dim, dim)
        self.pack_kv = nn.Linear(dim, dim)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform, those of queries, keys and values with gain 1/sqrt(2), as in the released code; zero biases."""
        for linear in (self.pack_q, self.pack_kv, self.q, self.kv, self.out):
            nn.init.xavier_uniform_(linear.weight, gain=1.0 if linear is self.out else 2**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, p: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Equation (1): ``x`` (b, n, d), ``p`` (b, l, d), ``mask`` of ``x`` or ``context`` (b, m, d) give Yx and Yp."""
        packed = split_heads(self.pack_kv(x if context is None else context), self.pack_heads)
        allowed = None if mask is None else mask[:, None, None]
        pack_q = split_heads(self.pack_q(p), self.pack_heads)
        yp = merge_heads(attention(pack_q, packed, packed, allowed=allowed))  # b l d
        kv = split_heads(self.kv(yp), self.heads)
        return self.out(merge_heads(attention(split_heads(self.q(x), self.heads), kv, kv))), yp

    def causal(
        self, x: Tensor, p: Tensor, *, mask: Tensor | None, sums: tuple[Tensor | None, Tensor | None], before: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Equation (4): ``x`` (b, n, d), ``p`` (#b, l, d) give y (b, n, d) and both sums of earlier and these tokens.

        ``sums`` (b, h, e, l) and (b, h, l, e) and their number of tokens ``before`` (#b,) are those of earlier ones.
        """
        scale = (x.shape[-1] // self.heads) ** -0.5
        pack_q = split_heads(self.pack_q(p), self.heads) * scale
        A = F.softplus(split_heads(self.pack_kv(x), self.heads) @ pack_q.mT, beta=math.log(2))  # b h n l
        if mask is not None:
            A = A.masked_fill(~mask[:, None, :, None], 0.0)
        q, kv = split_heads(self.q(x), self.heads) * scale, split_heads(self.kv(x), self.heads)
        t = count(mask, x.shape[1], before, x)[:, None, :, None]
        u, keys = causal_linear_attention(q, kv, A, state=sums[0])
        y, values = causal_linear_attention((u / t).softmax(-1), A, kv, state=sums[1])
        return self.out(merge_heads(y / t)), (keys, values)


class LunaLayer(nn.Module):
    """One layer: equation (2), or its causal form.

    Args:
        dim: width d.
        heads: number of heads that read.
        pack_heads: number of heads that pack.
        channel: channel mixer.
        hidden_dim: width inside it; None leaves its own choice.
        norm: the norms.
        pre_norm: norms before the sublayers instead of after the additions.
        writes: whether the packed sequence goes on to another layer.
        dropout: probability with which a sublayer's output feature is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        pack_heads: int,
        channel: Spec = "relu",
        hidden_dim: int | None = None,
        norm: str = "layer_norm",
        pre_norm: bool = False,
        writes: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        wanted = {} if hidden_dim is None else {"hidden_dim": hidden_dim}
        self.attention = LunaAttention(dim=dim, heads=heads, pack_heads=pack_heads)
        self.channel = build("channel", channel, {"dim": dim}, wanted)
        self.norms = nn.ModuleList(create(norm, facts={"dim": dim}) for _ in range(2))
        self.p_norm = create(norm, facts={"dim": dim}) if writes else None
        self.pre_norm, self.dropout = pre_norm, dropout

    def forward(self, x: Tensor, p: Tensor, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x`` (b, n, d), ``p`` (b, l, d), ``mask`` (b, n) give both, new."""
        normal_p = p if self.p_norm is None or not self.pre_norm else self.p_norm(p)
        yx, yp = self.attention(self._before(0, x), normal_p, mask=mask)
        p = p + self._drop(yp)
        if self.p_norm is not None and not self.pre_norm:
            p = self.p_norm(p)
        return self._rest(x, yx), p

    def causal(
        self, x: Tensor, p: Tensor, *, mask: Tensor | None, sums: tuple[Tensor | None, Tensor | None], before: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As :meth:`LunaAttention.causal`, with the rest of the layer; ``p`` is read as it is."""
        y, sums = self.attention.causal(self._before(0, x), p, mask=mask, sums=sums, before=before)
        return self._rest(x, y), sums

    def _rest(self, x: Tensor, y: Tensor) -> Tensor:
        x = self._after(0, x + self._drop(y))
        return self._after(1, x + self._drop(self.channel(self._before(1, x))))

    def _before(self, which: int, x: Tensor) -> Tensor:
        return self.norms[which](x) if self.pre_norm else x

    def _after(self, which: int, x: Tensor) -> Tensor:
        return x if self.pre_norm else self.norms[which](x)

    def _drop(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


class Luna(Stack):
    """A stack of Luna layers.

    Args:
        dim: width d.
        heads: number of heads h that read.
        pack_heads: number of heads that pack; by default ``heads``. The causal form has one number.
        depth: number of layers.
        packed: length l of the packed sequence.
        causal: a token sees itself and earlier ones.
        channel: channel mixer of each layer.
        hidden_dim: width inside the channel mixers; None leaves their own choice.
        norm: the norms.
        pre_norm: norms before the sublayers and one at the end, instead of after the additions.
        dropout: probability with which a sublayer's output feature is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        pack_heads: int | None = None,
        depth: int = 6,
        packed: int = 16,
        causal: bool = False,
        channel: Spec = "relu",
        hidden_dim: int | None = None,
        norm: str = "layer_norm",
        pre_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1 or packed < 1 or (causal and pack_heads not in (None, heads)):
            raise ValueError(
                f"Luna got depth={depth}, packed={packed}, heads={heads}, pack_heads={pack_heads}; expected at least 1 of "
                "each, and no other pack_heads than heads in the causal form"
            )
        self.causal = causal
        self.p = nn.Parameter(torch.empty(packed, dim))
        self.layers = nn.ModuleList(
            LunaLayer(
                dim=dim,
                heads=heads,
                pack_heads=heads if pack_heads is None else pack_heads,
                channel=channel,
                hidden_dim=hidden_dim,
                norm=norm,
                pre_norm=pre_norm,
                # only a norm that something is read through
                writes=not causal and (pre_norm or index < depth - 1),
                dropout=dropout,
            )
            for index in range(depth)
        )
        self.final = create(norm, facts={"dim": dim}) if pre_norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The packed sequence from a normal of standard deviation d^-1/2, as in the released code."""
        nn.init.normal_(self.p, std=self.p.shape[1] ** -0.5)

    def no_decay(self) -> set[str]:
        """The packed sequence is an embedding."""
        return {"p"}

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); tokens are a set, or a sequence in the tensor's order."""
        check_mask("Luna", mask, x.shape[0], x.shape[1])
        x = blank(x, mask)
        if self.causal:
            nothing = torch.zeros(1, dtype=torch.long, device=x.device)
            return self._causal(x, mask, [(None, None)] * len(self.layers), nothing)[0]
        p = self.p.repeat(len(x), 1, 1)
        for layer in self.layers:
            x, p = layer(x, p, mask=mask)
            tap("packed", p)
        return x if self.final is None else self.final(x)

    def _causal(
        self, x: Tensor, mask: Tensor | None, sums: list[tuple[Tensor | None, Tensor | None]], before: Tensor
    ) -> tuple[Tensor, tuple[State, ...]]:
        after: list[State] = []
        p = self.p.repeat(1, 1, 1)
        for layer, own in zip(self.layers, sums, strict=True):
            assert isinstance(layer, LunaLayer)
            x, new = layer.causal(x, p, mask=mask, sums=own, before=before)
            after.append(new)
        return x if self.final is None else self.final(x), tuple(after)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Real tokens seen (b,), and of each layer the sums (b, h, e, l) and (b, h, l, e)."""
        if not self.causal:
            raise ValueError("Luna(causal=False) has no state of its own; build it with causal=True")
        sums = []
        for layer in self.layers:
            assert isinstance(layer, LunaLayer)
            h, (length, d) = layer.attention.heads, self.p.shape
            zero = self.p.new_zeros(batch, h, d // h, length, dtype=torch.promote_types(self.p.dtype, torch.float32))
            sums.append((zero, zero.mT.contiguous()))
        return torch.zeros(batch, dtype=torch.long, device=self.p.device), tuple(sums)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d), whose padding adds nothing."""
        seen, sums = state
        assert isinstance(seen, Tensor) and isinstance(sums, tuple)
        check_mask("Luna", mask, x.shape[0], x.shape[1])
        y, after = self._causal(blank(x, mask), mask, list(sums), seen)  # type: ignore[arg-type]
        return y, (seen + (x.shape[1] if mask is None else mask.sum(1)), after)
