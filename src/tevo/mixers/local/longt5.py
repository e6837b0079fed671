"""LongT5: attention to neighbours within a radius, and to summaries of blocks of tokens that are made anew in each layer.

    s_ij = q_i . k_j + B[bucket(j - i)],          |i - j| <= r                                         (1)
    S_J = RMSNorm(sum of the inputs of block J),  blocks of g tokens                                   (2)
    s_iJ = q_i . (W_k S_J) + B'[bucket(J - block(i))]                                                  (3)
    o_i = softmax over both kinds of scores, times v_j and W_v S_J                                     (4)

Scores are not scaled. Tokens after the last full block belong to it; without any full block there are no summaries.
Causal: j <= i, and only blocks before the token's own, which tokens after the last full block are not part of.
Cost O(n (r + n / g) d). State of the causal form: the last r keys and values, those of all summaries, and the sum of the
block under way. Letters: r radius, g tokens of a block, G blocks.

Source: 2112.07916, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.attention import attention
from tevo.functional.local_attention import local_attention
from tevo.functional.masks import check_mask, refuse_context, to_front
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads
from tevo.norms.rms_norm import RMSNorm
from tevo.positions.t5_bias import bucket

CARD = Card(
    id="longt5",
    role="mixer",
    summary="Limits attention to a radius and adds one summary key for each block of tokens.",
    equations=(
        r"s_{ij} = q_i^\top k_j + B_{\mathrm{bucket}(j - i)},\quad |i - j| \le r",
        r"S_J = \mathrm{RMSNorm}\Big(\sum_{j \in J} x_j\Big),\quad "
        r"s_{iJ} = q_i^\top W_k S_J + B'_{\mathrm{bucket}(J - \lfloor i / g \rfloor)}",
        r"o_i = \mathrm{softmax}(s_{i\cdot})\,[v;\, W_v S]",
    ),
    exports={"longt5": "LongT5", "longt5_local": "LongT5Local"},
    cost="n^2",
    state="2 * h * (head_dim or d // h) * (radius + n // block) + d",
    parameters="4 * d * h * (head_dim or d // h) + 2 * h * buckets + d",
    memory="n^2",
    claims=("bidirectional", "causal", "padding", "exact_state"),
    examples=(
        {"part": "longt5", "dim": 12, "heads": 3, "radius": 3, "block": 4, "buckets": 8, "max_distance": 9},
        {
            "part": "longt5",
            "dim": 10,
            "heads": 2,
            "head_dim": 3,
            "radius": 1,
            "block": 3,
            "buckets": 6,
            "max_distance": 5,
        },
        {"part": "longt5", "dim": 3, "heads": 1, "radius": 40, "block": 5, "buckets": 4, "max_distance": 16},
        {"part": "longt5", "dim": 8, "heads": 2, "radius": 2, "block": 1, "buckets": 8, "max_distance": 9},
        {"part": "longt5_local", "dim": 12, "heads": 3, "radius": 3, "buckets": 8, "max_distance": 9},
        {"part": "longt5_local", "dim": 10, "heads": 2, "head_dim": 3, "radius": 1, "buckets": 6, "max_distance": 5},
        {"part": "longt5_local", "dim": 3, "heads": 1, "radius": 40, "buckets": 4, "max_distance": 16},
    ),
    equals=(
        "transformers 5.23.0 LongT5LocalAttention, LongT5TransientGlobalAttention and a two-layer encoder (bidirectional); "
        "values in tests/golden/longt5_a.npz",
    ),
    departures=(
        "Each layer has bias tables of its own; the released models share one pair among all layers: assign one layer's "
        "bias and global_bias to the others for that.",
        "The causal form follows the released Flax code, which stores no reference values to compare with.",
        "Padding is moved behind the real tokens before anything else, so that it may stand anywhere.",
    ),
    notes=(
        "longt5_local is the form without summaries, whose cost is linear. Sums of 16 inputs overflow float16: "
        "use bfloat16. The paper's FLOPs grow like n while n < 2 r g (4096 tokens), and like n^2 / g beyond."
    ),
    variants={
        "longt5_local": {
            "cost": "n",
            "state": "2 * h * (head_dim or d // h) * radius",
            "parameters": "4 * d * h * (head_dim or d // h) + h * buckets",
            "memory": "n",
        }
    },
)


# keys and values of summaries (b, h, G, e), biases of their scores (#b, h, n, G), which may be seen (#b, 1, #n, G)
Far = tuple[Tensor, Tensor, Tensor, Tensor]


def block_sums(x: Tensor, block: int, live: Tensor | None) -> Tensor:
    """Sums of ``x`` (b, n, d) over full blocks: (b, n // block, d), of which ``live`` (b,) are of real tokens.

    The tokens after the last live block are added to it; with None they are left out.
    """
    n, full = x.shape[1], x.shape[1] // block
    sums = F.pad(x, (0, 0, 0, (full + 1) * block - n)).unflatten(1, (full + 1, block)).sum(2)
    if live is None:
        return sums[:, :full]
    orphans = sums.take_along_dim(live[:, None, None], 1)
    last = torch.arange(full, device=x.device) == live[:, None] - 1
    return sums[:, :full] + orphans * last[..., None]


class _LongT5(TokenMixer):
    """Both forms; without ``block`` there are no summaries."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        head_dim: int | None,
        radius: int,
        block: int | None,
        buckets: int,
        max_distance: int,
        causal: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        per_side = buckets if causal else buckets // 2
        if radius < 1 or (block is not None and block < 1):
            raise ValueError(f"{name} got radius={radius}, block={block}; expected at least 1 token each")
        if per_side < 2 or max_distance <= per_side // 2:
            raise ValueError(
                f"{name} got buckets={buckets}, max_distance={max_distance}; needs >= 2 buckets a side and a max_distance "
                "above half of them"
            )
        e = check_heads(name, dim, heads) if head_dim is None else head_dim
        self.heads, self.radius, self.block = heads, radius, block
        self.buckets, self.max_distance, self.causal = buckets, max_distance, causal
        self.q = nn.Linear(dim, heads * e, bias=False)
        self.kv = nn.Linear(dim, 2 * heads * e, bias=False)
        self.out = nn.Linear(heads * e, dim, bias=False)
        self.bias = nn.Parameter(torch.empty(heads, buckets))
        self.global_bias = None if block is None else nn.Parameter(torch.empty(heads, buckets))
        self.global_norm = None if block is None else RMSNorm(dim=dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """T5's normals: standard deviation (d e)^-1/2 for queries, in place of a scale, d^-1/2 for keys, values and tables,
        (h e)^-1/2 for the output.
        """
        inner, d = self.q.weight.shape
        nn.init.normal_(self.q.weight, std=(d * inner / self.heads) ** -0.5)
        nn.init.normal_(self.kv.weight, std=d**-0.5)
        nn.init.normal_(self.out.weight, std=inner**-0.5)
        for table in (self.bias, self.global_bias):
            if table is not None:
                nn.init.normal_(table, std=d**-0.5)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); distances are counted in real tokens, whatever ``at`` says."""
        self._only_itself(context)
        b, n, _ = x.shape
        check_mask(type(self).__name__, mask, b, n)
        if mask is None:
            return self._mix(x, None)
        x, count, back = to_front(x, mask)
        return self._mix(x, count).take_along_dim(back, 1)

    def _mix(self, x: Tensor, count: Tensor | None) -> Tensor:
        """``x`` (b, n, d), whose ``count`` (b,) first tokens are real; None means all."""
        n = x.shape[1]
        i = torch.arange(n, device=x.device)
        live, summaries = None, None
        if self.block is not None and n >= self.block:
            live = x.new_full((1,), n // self.block, dtype=torch.long) if count is None else count // self.block
            summaries = block_sums(x, self.block, None if self.causal else live.expand(len(x)))
        far = None
        if summaries is not None and self.block is not None and live is not None:
            own = (i // self.block)[None]  # 1 n
            if not self.causal:
                own = torch.minimum(own, live[:, None] - 1)  # #b n
            far = self._far(summaries, own, live)
        real = None if count is None else i < count[:, None]
        return self.out(merge_heads(self._attend(*self._split(x), real, far)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, far: Far | None) -> Tensor:
        """Equation (4) in blocks: q, k, v (b, h, n, e), ``real`` (b, n)."""
        global_k, global_v, global_bias, global_mask = (None, None, None, None) if far is None else far
        return local_attention(
            q,
            k,
            v,
            radius=self.radius,
            causal=self.causal,
            mask=real,
            bias=self._by_distance(),
            global_k=global_k,
            global_v=global_v,
            global_bias=global_bias,
            global_mask=global_mask,
            scale=1.0,
        )

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k, v (b, h, n, e)."""
        k, v = self.kv(x).chunk(2, -1)
        return split_heads(self.q(x), self.heads), split_heads(k, self.heads), split_heads(v, self.heads)

    def _bucket(self, offset: Tensor) -> Tensor:
        return bucket(offset, causal=self.causal, buckets=self.buckets, max_distance=self.max_distance)

    def _by_distance(self) -> Tensor:
        """The bias of neighbours (h, 2 r + 1)."""
        return self.bias[:, self._bucket(torch.arange(-self.radius, self.radius + 1, device=self.bias.device))]

    def _summary_kv(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Equation (2), then keys and values (b, h, G, e)."""
        assert self.global_norm is not None
        k, v = self.kv(self.global_norm(sums)).chunk(2, -1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def _far(self, sums: Tensor, own: Tensor, live: Tensor | None) -> Far:
        """Keys and values of the block sums (b, G, d), and :meth:`_far_bias`."""
        return *self._summary_kv(sums), *self._far_bias(own, sums.shape[1], live)

    def _far_bias(self, own: Tensor, count: int, live: Tensor | None) -> tuple[Tensor, Tensor]:
        """For tokens of blocks ``own`` (#b, n): biases (#b, h, n, G) of ``count`` summaries, and which of them are seen."""
        assert self.global_bias is not None
        j = torch.arange(count, device=own.device)
        bias = self.global_bias[:, self._bucket(j - own[..., None])].transpose(0, 1)
        if self.causal:
            return bias, (j < own[..., None])[:, None]
        assert live is not None
        return bias, (j < live[:, None])[:, None, None]

    def _only_itself(self, context: Tensor | None) -> None:
        refuse_context(type(self).__name__, context)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Keys and values (b, h, r, e) of the last tokens and whether they exist (b, r), keys and values (b, h, G, e) of the
        summaries, the sum of the block under way (b, d), and the number of tokens (b,).
        """
        self._only_itself(context)
        if not self.causal:
            name = type(self).__name__
            raise ValueError(f"{name}(causal=False) has no state; build it with causal=True")
        weight, d = self.q.weight, self.q.in_features
        near = weight.new_zeros(batch, self.heads, self.radius, len(weight) // self.heads)
        seen = torch.zeros(batch, self.radius, dtype=torch.bool, device=weight.device)
        under_way = weight.new_zeros(batch, d if self.block is not None else 0)
        return near, near, seen, near[:, :, :0], near[:, :, :0], under_way, seen.sum(1)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d); padding anywhere in it leaves the state as it is."""
        b, n, _ = x.shape
        check_mask(type(self).__name__, mask, b, n)
        k_near, v_near, seen, k_far, v_far, under_way, before = (leaf for leaf in state if isinstance(leaf, Tensor))
        back, fresh = None, x.new_full((b,), n, dtype=torch.long)
        if mask is not None:
            x, fresh, back = to_front(x, mask)
        i = torch.arange(n, device=x.device)
        q, k, v = self._split(x)
        # array offsets are distances in tokens: the last token of the window is the one before the first new one
        k, v = torch.cat([k_near.to(k.dtype), k], 2), torch.cat([v_near.to(v.dtype), v], 2)
        real = torch.cat([seen, i < fresh[:, None]], 1)
        far = None
        if self.block is not None:
            own = (before[:, None] + i) // self.block  # b n
            k_far, v_far, under_way = self._summarise(x, k_far, v_far, under_way, before, fresh)
            if k_far.shape[2]:
                far = (k_far, v_far, *self._far_bias(own, k_far.shape[2], None))
        o = self._one(q, k, v, real, far) if n == 1 else self._segment(q, k, v, real, far)
        y = self.out(merge_heads(o))
        kept = fresh[:, None] + torch.arange(self.radius, device=x.device)  # b r
        k, v = (z.take_along_dim(kept[:, None, :, None], 2) for z in (k, v))
        after = k, v, real.take_along_dim(kept, 1), k_far, v_far, under_way, before + fresh
        return y if back is None else y.take_along_dim(back, 1), after

    def _summarise(
        self, x: Tensor, k_far: Tensor, v_far: Tensor, under_way: Tensor, before: Tensor, fresh: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Summaries with the blocks that ``x`` touches written to their places, and the sum of the last block so far.

        Blocks that are not full yet are written too: nobody sees them before they are, and then they are right.
        """
        assert self.block is not None
        n = x.shape[1]
        i = torch.arange(n, device=x.device)
        first = before // self.block
        touched = (n + self.block - 2) // self.block + 1
        j = torch.arange(touched + 1, device=x.device)  # one more: the block under way may be empty yet
        member = (before[:, None, None] + i) // self.block == (first[:, None] + j)[..., None]
        member = member & (i < fresh[:, None])[:, None]  # b touched+1 n
        sums = member.to(x.dtype) @ x + under_way[:, None] * (j == 0)[:, None]
        k, v = self._summary_kv(sums)
        places = (first[:, None] + j)[:, None, :, None].expand_as(k)
        full = (before + fresh) // self.block
        room, kept = (int(first.max()) + touched + 1, int(full.max())) if len(x) else (touched + 1, 0)
        k_far, v_far = (
            F.pad(z, (0, 0, 0, room - z.shape[2])).scatter(2, places, new.to(z.dtype))[:, :, :kept]
            for z, new in ((k_far, k), (v_far, v))
        )
        return k_far, v_far, sums.take_along_dim((full - first)[:, None, None], 1)[:, 0]

    def _segment(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, far: Far | None) -> Tensor:
        """New q (b, h, n, e), k and v (b, h, r + n, e) that begin with the window, ``real`` (b, r + n)."""
        r = self.radius
        if far is not None:
            # the window's own queries are answered and thrown away
            far = (far[0], far[1], F.pad(far[2], (0, 0, r, 0)), F.pad(far[3], (0, 0, r, 0)))
        return self._attend(F.pad(q, (0, 0, r, 0)), k, v, real, far)[:, :, r:]

    def _one(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, far: Far | None) -> Tensor:
        """As :meth:`_segment`, for a single new token, which sees all of the window."""
        bias, allowed = self._by_distance()[None, :, None, : self.radius + 1], real[:, None, None]
        if far is not None:
            b, h = q.shape[:2]
            k, v = torch.cat([k, far[0].to(k.dtype)], 2), torch.cat([v, far[1].to(v.dtype)], 2)
            bias = torch.cat([bias.expand(b, -1, -1, -1), far[2].expand(b, h, -1, -1)], -1)
            allowed = torch.cat([allowed, far[3].expand(b, -1, -1, -1)], -1)
        return attention(q, k, v, allowed=allowed, bias=bias, scale=1.0)


class LongT5(_LongT5):
    """Transient-global attention.

    Args:
        dim: width d.
        heads: number of heads h.
        head_dim: width e of a head; by default dim / heads.
        radius: tokens seen on each side, >= 1.
        block: tokens that a summary stands for, >= 1.
        buckets: buckets of distance in each of the two tables, >= 2 for each side.
        max_distance: distance, in tokens and in blocks, from which on all share the last bucket.
        causal: a token sees itself, earlier ones, and summaries of blocks before its own.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        head_dim: int | None = None,
        radius: int = 127,
        block: int = 16,
        buckets: int = 32,
        max_distance: int = 128,
        causal: bool = False,
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            head_dim=head_dim,
            radius=radius,
            block=block,
            buckets=buckets,
            max_distance=max_distance,
            causal=causal,
        )


class LongT5Local(_LongT5):
    """The same without summaries.

    Args:
        dim, heads, head_dim, radius, buckets, max_distance, causal: as for :class:`LongT5`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        head_dim: int | None = None,
        radius: int = 127,
        buckets: int = 32,
        max_distance: int = 128,
        causal: bool = False,
    ) -> None:
        super().__init__(
            dim=dim,
            heads=heads,
            head_dim=head_dim,
            radius=radius,
            block=None,
            buckets=buckets,
            max_distance=max_distance,
            causal=causal,
        )
