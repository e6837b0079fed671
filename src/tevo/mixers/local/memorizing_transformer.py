"""Memorizing Transformer: windowed attention, and beside it attention to the few best of many stored tokens.

    q, k <- x / sqrt(|x|^2 + 1e-6)                                                                   (1)
    y_local = softmax_j g (q_i . k_j + bias_{i-j}) v_j,   over the last w tokens                      (2)
    y_memory = softmax_j g (q_i . k_j) v_j,   over the k tokens of the memory with the largest q_i . k_j  (3)
    y = (1 - beta) y_local + beta y_memory,   beta = sigmoid(b)                                       (4)

The sequence is read in segments of w tokens; after each its keys and values join the memory, which holds the last T and
through which no gradient goes. g = |scale| and b are learned for each head. While the memory is empty y is y_local. Cost
O(n (2 w + T) d); state: keys and values of the last T + w tokens. Letters: w ``window``, T ``memory``, k ``topk``,
r segments.

Source: 2203.08913, section 3, and its released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import State, TokenMixer
from tevo.functional.attention import softmax_weights
from tevo.functional.masks import refuse_context, refuse_mask
from tevo.mixers.softmax.multi_head import MultiHead
from tevo.positions.t5_bias import bucket
from tevo.taps import tap

CARD = Card(
    id="memorizing_transformer",
    role="mixer",
    summary="Attention to a window, mixed by a gate with attention to the best keys of a large memory without gradient.",
    equations=(
        r"y = (1 - \sigma(b))\, \mathrm{softmax}_{j \in \text{window}}\big(g (q_i^\top k_j + B_{i-j})\big) v_j"
        r" + \sigma(b)\, \mathrm{softmax}_{j \in \mathrm{top}_k}\big(g\, q_i^\top \bar k_j\big) \bar v_j",
        r"q, k \leftarrow x / \sqrt{\lVert x \rVert^2 + 10^{-6}},\quad g = |\gamma|",
    ),
    exports={"memorizing_transformer": "MemorizingTransformer"},
    cost="n",
    flops=(
        "(lambda n, d, w, t, read, r: 8 * n * d * d + 8 * r * w * w * d + 2 * r * w * d * t + 4 * r * w * d * read)"
        "(n, d, window, min(memory, (ceil(n / window) - 1) * window), min(topk, memory, (ceil(n / window) - 1) * window),"
        " ceil(n / window))"
    ),
    state="2 * d * min(n, memory + window)",
    parameters="4 * d * d + h * (buckets + 2)",
    memory="n",
    claims=("causal", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3, "window": 11, "memory": 16, "topk": 3},
        {"dim": 10, "heads": 2, "window": 4, "memory": 7, "topk": 3, "buckets": 4, "max_distance": 3},
        {"dim": 6, "heads": 1, "window": 3, "memory": 30, "topk": 50},
        {"dim": 8, "heads": 2, "window": 6, "memory": 2, "topk": 1},
    ),
    reduces_to=("windowed attention at b = -inf",),
    equals=(
        "google-research/meliad at cc1aef50, simple_attention, external_attention and the gate, with exact search; values in "
        "tests/golden/memorizing_transformer_a.npz",
    ),
    departures=(
        "While the memory is empty the gate is left out; the released code attends to zeros there, which scales y by "
        "1 - beta.",
        "The search is exact; on accelerators the released code takes the best of each of k strided buckets.",
        "The released code's further logit of -1000 in the local softmax, which stands for nothing, is left out: a token "
        "always sees itself.",
        "Gradients flow to the window's keys across the start of a segment; the released code cuts them there.",
    ),
    notes=(
        "One layer of a model, the paper's third from last but one, has it: mixer=[..., 'memorizing_transformer', ...]. "
        "The port memorizing-transformers-pytorch puts both kinds of scores into one softmax, which is another model."
    ),
)


def unit(x: Tensor) -> Tensor:
    """Equation (1), in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def local_read(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, g: Tensor, allowed: Tensor) -> Tensor:
    """Equation (2): q (..., n, e), k (..., m, e), v (..., m, v), bias (..., n, m), g (..., 1, 1) give (..., n, v)."""
    return softmax_weights(g * (q @ k.mT + bias), allowed) @ v


def retrieve(q: Tensor, k: Tensor, allowed: Tensor, topk: int) -> Tensor:
    """The keys with the largest products: q (..., n, e), k (..., m, e), allowed (..., 1, m) give indices (..., n, k)."""
    scores = (q.detach() @ k.detach().mT).masked_fill(~allowed, -torch.inf)
    return scores.topk(min(topk, k.shape[-2])).indices


def memory_read(q: Tensor, k: Tensor, v: Tensor, g: Tensor, allowed: Tensor, topk: int) -> Tensor:
    """Equation (3): as :func:`local_read`, with nothing learned through k and v; zeros where nothing is allowed."""
    index = tap("retrieved", retrieve(q, k, allowed, topk))
    flat = index.flatten(-2)[..., None]
    k_j, v_j = (t.detach().take_along_dim(flat, -2).unflatten(-2, index.shape[-2:]) for t in (k, v))  # ... n k e
    s = (q[..., None, :] @ k_j.mT).squeeze(-2)  # ... n k
    seen = allowed.expand(*index.shape[:-1], allowed.shape[-1]).gather(-1, index)
    return (softmax_weights(g * s, seen)[..., None, :] @ v_j).squeeze(-2)


def gated(local: Tensor, memory: Tensor, b: Tensor, any_: Tensor) -> Tensor:
    """Equation (4): (..., n, v) twice, b (..., 1, 1); ``any_`` (..., 1, 1), whether there is a memory."""
    beta = b.sigmoid() * any_
    return (1 - beta) * local + beta * memory


class MemorizingTransformer(TokenMixer):
    """Windowed attention with a memory.

    Args:
        dim: width d.
        heads: number of heads h.
        causal: there is no other form.
        window: tokens w that a token sees beside the memory, itself included; also those of a segment.
        memory: tokens T that are kept, >= 1.
        topk: how many of them a query reads; 128 in the released configuration.
        buckets: buckets of the T5 bias of the window.
        max_distance: distance from which on they are one.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        causal: bool = True,
        window: int = 512,
        memory: int = 8192,
        topk: int = 32,
        buckets: int = 32,
        max_distance: int = 128,
    ) -> None:
        super().__init__()
        if not causal:
            raise ValueError(
                "MemorizingTransformer remembers earlier tokens and has no form with causal=False; build it with causal=True"
            )
        if window < 1 or memory < 1 or topk < 1 or buckets < 2 or max_distance <= buckets // 2:
            raise ValueError(
                f"MemorizingTransformer got window={window}, memory={memory}, topk={topk}, buckets={buckets}, "
                f"max_distance={max_distance}; expected at least 1 each, 2 buckets and a max_distance above half of them"
            )
        self.window, self.memory, self.topk = window, memory, topk
        self.buckets, self.max_distance = buckets, max_distance
        self.heads = MultiHead(dim=dim, heads=heads)
        self.scale = nn.Parameter(torch.empty(heads))
        self.gate = nn.Parameter(torch.empty(heads))
        self.table = nn.Parameter(torch.empty(heads, buckets))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1 and gate 0, as released; the table as T5's."""
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.gate)
        nn.init.normal_(self.table, std=0.02)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d) gives (b, n, d); order is that of the tokens, not ``at``."""
        refuse_context("MemorizingTransformer", context)
        refuse_mask("MemorizingTransformer", mask)
        q, k, v = self._split(x)
        return self.heads.merge(self._read(q, k, v, 0).to(x.dtype))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.heads.split(x, x)
        q, k = unit(q), unit(k)
        return q, k, v.to(q.dtype)

    def _read(self, q: Tensor, k: Tensor, v: Tensor, past: int) -> Tensor:
        """Queries (b, h, n, e) of the tokens from ``past`` on, k and v of them and of those kept, give (b, h, n, e)."""
        n, w = q.shape[2], self.window
        if n == 0:
            return q
        start = past // w * w  # of the first segment
        r = -(-(past + n - start) // w)
        kept = min(self.memory, start + (r - 1) * w)
        before = max(kept, w)
        end = start + r * w
        q = F.pad(q, (0, 0, past - start, end - past - n)).unflatten(2, (r, w))  # b h r w e
        # keys and values of the positions from start - before to end
        first = past + n - k.shape[2]
        k, v = (F.pad(t, (0, 0, first - (start - before), end - past - n)) for t in (k, v))
        places = torch.arange(start - before, end, device=q.device)
        exists = (places >= first) & (places < past + n)

        def cut(t: Tensor, dim: int, back: int, size: int) -> Tensor:
            """For each segment the ``size`` entries from ``back`` before its start on, as a last dimension."""
            return t.narrow(dim, before - back, size + (r - 1) * w).unfold(dim, size, w)

        distance = torch.arange(w, device=q.device)[:, None] + w - torch.arange(2 * w, device=q.device)  # w 2w
        allowed = ((distance >= 0) & (distance < w)) & cut(exists, 0, w, 2 * w)[:, None]  # r w 2w
        index = bucket(-distance, causal=True, buckets=self.buckets, max_distance=self.max_distance)
        g = self.scale.abs().to(q.dtype)[:, None, None, None]  # h 1 1 1
        bias = self.table.to(q.dtype)[:, index][:, None]  # h 1 w 2w
        y = local_read(q, cut(k, 2, w, 2 * w).mT, cut(v, 2, w, 2 * w).mT, bias, g, allowed)
        if kept:
            seen = cut(exists, 0, kept, kept)[:, None]  # r 1 T
            k_m, v_m = (cut(t, 2, kept, kept).mT for t in (k, v))  # b h r T e
            read = memory_read(q, k_m, v_m, g, seen, self.topk)
            b = self.gate.to(q.dtype)[:, None, None, None]
            y = gated(y, read, b, seen.any(-1, keepdim=True))
        return y.flatten(2, 3)[:, :, past - start : past - start + n]

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Keys and values (b, h, 0, e) of the last T + w tokens, and how many tokens there were (b,)."""
        refuse_context("MemorizingTransformer", context)
        like = self.heads.out.weight
        empty = like.new_zeros(batch, 0, like.shape[0])
        _, k, v = self._split(empty)
        return k, v, torch.zeros(batch, dtype=torch.long, device=like.device)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d)."""
        refuse_mask("MemorizingTransformer", mask)
        assert isinstance(state, tuple)
        k_past, v_past, count = state
        assert isinstance(k_past, Tensor) and isinstance(v_past, Tensor) and isinstance(count, Tensor)
        q, k, v = self._split(x)
        k, v = torch.cat([k_past, k], 2), torch.cat([v_past, v], 2)
        y = self._read(q, k, v, int(count[0]) if len(x) else 0)
        kept = slice(max(0, k.shape[2] - self.memory - self.window), None)
        return self.heads.merge(y.to(x.dtype)), (k[:, :, kept], v[:, :, kept], count + x.shape[1])
