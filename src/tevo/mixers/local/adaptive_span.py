"""Adaptive span: each head learns how far back it looks, and pays for it.

    s_tx = (q_t . k_{t-x} + q_t . p_x) / e^1/2,   x = 1..S                                           (1)
    m_x = clamp((R + z S - (x - 1)) / R, 0, 1),   z of each head in [0, 1]                           (2)
    a_tx = m_x w_tx / (sum_x m_x w_tx + 1e-8),    w_t = softmax_x s_tx                               (3)
    loss = nats per token + lambda sum over layers of S mean_heads z                                 (4)

A token attends to the S tokens before it and not to itself; p is a learned embedding of the distance. After each step of
the optimiser z is moved into [0, 1]. Distances out of reach of all heads are left out, in steps of 64 tokens. Cost
O(n r d) with r the reach; the state is the last S inputs. Letters: S greatest span, R width of the ramp, r reach,
c queries of a block.

Source: 1905.07799, section 2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Loss, Objective, State, TokenMixer
from tevo.functional.attention import softmax_weights
from tevo.functional.masks import blank, check_mask, refuse_context, to_front
from tevo.mixers.softmax.multi_head import check_heads, merge_heads, split_heads
from tevo.objectives.next_token import NextToken
from tevo.taps import record, tap

CARD = Card(
    id="adaptive_span",
    role="mixer",
    summary="Each head learns its own span of past tokens; attention beyond it is neither made nor kept.",
    equations=(
        r"s_{tx} = \big(q_t^\top k_{t-x} + q_t^\top p_x\big) / \sqrt{e},\quad x = 1, \dots, S",
        r"m_x = \mathrm{clamp}\big((R + z S - (x - 1)) / R,\ 0,\ 1\big)",
        r"a_{tx} = \frac{m_x\, e^{s_{tx}}}{\sum_y m_y\, e^{s_{ty}}}",
    ),
    exports={"adaptive_span": "AdaptiveSpan"},
    cost="n",
    flops=("8 * n * d * d + ceil(n / min(n, span)) * min(n, span) * d * (4 * (min(n, span) + span) + 2 * span)"),
    state="(d + 1) * span",
    parameters="4 * d * d + d // h * span + h",
    memory="n",
    claims=("causal", "padding", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3, "span": 5, "ramp": 3},
        {"dim": 10, "heads": 2, "span": 3, "ramp": 2},
        {"dim": 3, "heads": 1, "span": 40, "ramp": 16},
        {"dim": 8, "heads": 2, "span": 13, "ramp": 4},
        {"dim": 6, "heads": 2, "span": 70, "ramp": 4},
    ),
    equals=(
        "facebookresearch/adaptive-span TransformerSeqLayer and two blocks of a two-layer TransformerSeq; values in "
        "tests/golden/adaptive_span_a.npz",
    ),
    departures=(
        "Equation (2) is that of the released code; the paper's text has x in place of x - 1.",
        "Tokens before the first do not exist; the released code starts from a cache of S inputs of zeros, whose keys take "
        "a share of the softmax. A state of zeros that is marked as seen gives that form.",
        "Each layer has distance embeddings of its own; the released models share one table among all layers: assign one "
        "layer's key_pe to the others for that.",
        "Compiled code leaves nothing out, because the reach depends on parameters' values; outputs differ by the 1e-8 of "
        "equation (3) only.",
        "The dynamic form, whose spans depend on the token, is not built.",
    ),
    notes=(
        "The paper trains with post_norm, relu, Adagrad and gradients clipped parameter by parameter. Keys and values are "
        "made from the kept inputs at each step, as released, so that segments train them through the memory. "
        "AdaptiveSpanLoss adds equation (4)'s price of long spans to the loss of the next token."
    ),
)

# by how many tokens the window shrinks at a time, as released
GRANULE = 64


def ramp_mask(z: Tensor, span: int, ramp: int) -> Tensor:
    """Equation (2) for ``z`` (h,): (h, S), the distances from S down to 1."""
    x = torch.arange(span, 0, -1, device=z.device)
    return ((ramp + span * z[:, None] - (x - 1)) / ramp).clamp(0, 1)


def skew(s: Tensor) -> Tensor:
    """Row i of (..., c, c + r) moved i places to the left: (..., c, r)."""
    c = s.shape[-2]
    flat = F.pad(s.flatten(-2), (0, c))
    return flat.unflatten(-1, (c, s.shape[-1] + 1))[..., : s.shape[-1] - c]


def unskew(a: Tensor) -> Tensor:
    """Row i of (..., c, r) moved i places to the right: (..., c, c + r), zeros around."""
    c, r = a.shape[-2:]
    return F.pad(a, (0, c + 1)).flatten(-2)[..., :-c].unflatten(-1, (c, c + r))


def span_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, p: Tensor, m: Tensor) -> Tensor:
    """Equations (1) and (3).

    Args:
        q: (b, h, n, e).
        k: (b, h, r + n, e), from r tokens before the first query on.
        v: as k.
        seen: (#b, r + n) bool, which of them exist.
        p: (e, r), embeddings of the distances from r down to 1.
        m: (h, r), equation (2) of them.

    Returns:
        (b, h, n, e).
    """
    n, r = q.shape[2], p.shape[1]
    c = max(1, min(n, r))
    blocks = max(1, -(-n // c))
    more = blocks * c - n
    q, k, v = (F.pad(t, (0, 0, 0, more)) for t in (q, k, v))
    seen = F.pad(seen, (0, more))
    q = q.unflatten(2, (blocks, c)) * q.shape[-1] ** -0.5  # b h B c e
    # each block of c queries with the c + r keys of which its rows see r
    k, v = k.unfold(2, c + r, c), v.unfold(2, c + r, c)  # b h B e c+r
    s = skew(q @ k) + q @ p.to(q.dtype)  # (eq. 1)  b h B c r
    allowed = seen.unfold(1, r, 1)[:, : n + more].unflatten(1, (blocks, c))  # #b B c r
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    w = softmax_weights(wide, allowed[:, None]) * m[:, None, None].to(wide.dtype)
    a = w / (w.sum(-1, keepdim=True) + 1e-8)  # (eq. 3)
    return (unskew(a.to(v.dtype)) @ v.mT).flatten(2, 3)[:, :, :n]


class AdaptiveSpan(TokenMixer):
    """Attention with a learned span for each head.

    Args:
        dim: width d.
        heads: number of heads h.
        causal: must be True.
        span: greatest span S, in tokens, >= 1; the paper's small models have 1024 to 4096, the large ones 8192.
        ramp: width R of the soft edge, in tokens, >= 1.
    """

    def __init__(self, *, dim: int, heads: int = 8, causal: bool = True, span: int = 1024, ramp: int = 32) -> None:
        super().__init__()
        if not causal:
            raise ValueError(
                "AdaptiveSpan looks back only and has no form with causal=False; build it with causal=True"
            )
        if span < 1 or ramp < 1:
            raise ValueError(f"AdaptiveSpan got span={span}, ramp={ramp}; expected at least 1 token each")
        e = check_heads("AdaptiveSpan", dim, heads)
        self.heads, self.span, self.ramp = heads, span, ramp
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.key_pe = nn.Parameter(torch.empty(e, span))
        self.z = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Distance embeddings from N(0, 1) and spans of zero, as released: only the ramp looks back at first."""
        for linear in (self.q, self.kv, self.out):
            linear.reset_parameters()
        nn.init.normal_(self.key_pe)
        nn.init.zeros_(self.z)

    def after_step(self) -> None:
        """Move spans into [0, 1]."""
        with torch.no_grad():
            self.z.clamp_(0, 1)

    def no_decay(self) -> set[str]:
        """Distance embeddings are embeddings."""
        return {"key_pe"}

    def reach(self) -> int:
        """R, the distances that some head sees, rounded up so that S - r is a multiple of 64; S where values are unknown."""
        if torch.compiler.is_compiling() or self.z.is_meta:
            return self.span
        longest = math.ceil(float(self.z.detach().max()) * self.span) + self.ramp
        return self.span - max(0, self.span - longest) // GRANULE * GRANULE

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); distances are counted in real tokens, whatever ``at`` says."""
        refuse_context("AdaptiveSpan", context)
        check_mask("AdaptiveSpan", mask, x.shape[0], x.shape[1])
        if mask is None:
            return self._attend(x, x, torch.ones_like(x[:1, :, 0], dtype=torch.bool))
        # behind the real tokens, padding is never looked at by them
        x, _, back = to_front(x, mask)
        return self._attend(x, x, torch.ones_like(mask)).take_along_dim(back, 1)

    def _attend(self, x: Tensor, source: Tensor, seen: Tensor) -> Tensor:
        """``x`` (b, n, d), the last of ``source`` (b, m, d), which ``seen`` (#b, m) says exist, give (b, n, d)."""
        r, n = self.reach(), x.shape[1]
        tap("span", self.z * self.span)
        source, seen = source[:, max(0, source.shape[1] - n - r) :], seen[:, max(0, source.shape[1] - n - r) :]
        before = source.shape[1] - n
        k, v = (split_heads(t, self.heads) for t in self.kv(source).chunk(2, dim=-1))
        # exactly r tokens before the first query, those that are missing as zeros
        k, v = (F.pad(t, (0, 0, r - before, 0)) for t in (k, v))
        seen = F.pad(seen, (r - before, 0))
        q = split_heads(self.q(x), self.heads)
        m = ramp_mask(self.z, self.span, self.ramp)[:, self.span - r :]
        o = span_attention(q, k, v, seen, self.key_pe[:, self.span - r :], m)
        return self.out(merge_heads(o.to(x.dtype)))

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """The last S inputs (b, S, d), and which of them exist (b, S)."""
        refuse_context("AdaptiveSpan", context)
        like = self.q.weight
        past = like.new_zeros(batch, self.span, like.shape[1])
        return past, torch.zeros(batch, self.span, dtype=torch.bool, device=like.device)

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d)."""
        past, seen = state
        assert isinstance(past, Tensor) and isinstance(seen, Tensor)
        check_mask("AdaptiveSpan", mask, x.shape[0], x.shape[1])
        n, back = x.shape[1], None
        if mask is not None:
            x, _, back = to_front(blank(x, mask), mask)
            mask = mask.sort(dim=1, descending=True).values
        source = torch.cat([past, x], 1)
        seen = torch.cat([seen, torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask], 1)
        y = self._attend(x, source, seen)
        if mask is None or back is None:
            return y, (source[:, n:], seen[:, n:])
        # the last S that are real, of each row
        kept = mask.sum(1)[:, None] + torch.arange(self.span, device=x.device)
        return y.take_along_dim(back, 1), (source.take_along_dim(kept[..., None], 1), seen.take_along_dim(kept, 1))


class AdaptiveSpanLoss(Objective):
    """Equation (4): next-token prediction, and a price for long spans.

    Args:
        price: lambda, nats per token of span; as released.
    """

    def __init__(self, *, price: float = 5e-7) -> None:
        super().__init__()
        self.price = price
        self.next_token = NextToken()

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` as for :class:`~tevo.objectives.next_token.NextToken`."""
        with record() as seen:
            loss = self.next_token(model, batch)
        spans = [z.mean() for z in seen.get("span", [])]
        if not spans:
            raise ValueError(
                "AdaptiveSpanLoss found no spans to price; train a model whose mixer is adaptive_span with it"
            )
        total = torch.stack(spans).sum()
        return Loss(loss.total + self.price * total, {"next_token": loss.total, "span": total / len(spans)})

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """As the next token's."""
        return self.next_token.items(batch)
