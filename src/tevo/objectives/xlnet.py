"""XLNet: tokens are predicted in a random order of factorisation, by a second stream that does not see them.

    L = -mean_{t in T} log p(x_t | x_j with rank_j < rank_t)                                         (1)
    content:  h_i reads the h_j with rank_j <= rank_i      query:  g_t reads the h_j with rank_j < rank_t  (2)
    s_ij = ((q_i + u) . k_j + (q_i + w) . R r_{i-j} + (q_i + z) . e_{same segment or not}) / sqrt(e)   (3)
    x <- N(x + Attn),   x <- N(x + FFN(x))       for both, with the same weights                     (4)
    logits of t = E g_t + b,   g at first a learned vector, h at first the embeddings E              (5)

Tokens keep their positions; only the order in which they are factorised is drawn. Ranks are drawn inside blocks, and
tokens that are not predicted have rank -1: all see them. Each layer may also read its inputs of earlier segments, to
which no gradient goes. Cost of an encoder with one more query for each predicted token. Letters: p predicted tokens,
T their positions.

Source: 1906.08237, sections 2.2 to 2.4, and its released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.channels.feed_forward import GELU
from tevo.contracts import Loss, Objective
from tevo.functional.attention import attention
from tevo.functional.masks import blank, check_mask
from tevo.mixers.softmax.multi_head import MultiHead
from tevo.models.encoder import check_tokens
from tevo.positions.transformer_xl import position_scores
from tevo.residuals.post_norm import PostNorm
from tevo.taps import tap

CARD = Card(
    id="xlnet",
    role="objective",
    summary="Predicts tokens in a random order of factorisation, by a stream of queries beside that of the contents.",
    equations=(
        r"L = -\mathrm{mean}_{t \in T} \log p(x_t \mid x_j : \mathrm{rank}_j < \mathrm{rank}_t)",
        r"s_{ij} = \big((q_i + u)^\top k_j + (q_i + w)^\top R\, r_{i-j}"
        r" + (q_i + z)^\top e_{[\mathrm{seg}_i = \mathrm{seg}_j]}\big) / \sqrt{e}",
    ),
    exports={"xlnet": "XLNet", "two_stream": "TwoStream"},
    cost="n^2",
    claims=("bidirectional", "padding"),
    examples=(
        {
            "part": "xlnet",
            "model": "two_stream(vocab=11, dim=12, depth=2, heads=3, hidden_dim=7)",
            "vocab": 11,
            "separator": 4,
            "functional": (3,),
            "share": 3,
            "block": 5,
            "length": 13,
        },
        {
            "part": "xlnet",
            "model": "two_stream(vocab=5, dim=4, depth=1, heads=1)",
            "vocab": 5,
            "separator": 0,
            "length": 11,
        },
        {
            "part": "xlnet",
            "model": "two_stream(vocab=7, dim=10, depth=3, heads=2, head_dim=3, hidden_dim=5)",
            "vocab": 7,
            "separator": 2,
            "share": 2,
            "longest": 2,
            "context": 1,
            "length": 9,
        },
    ),
    equals=(
        "transformers 5.23.0 XLNetLMHeadModel: both streams of every layer, memories, loss and gradients, and the content "
        "stream alone; values in tests/golden/xlnet_a.npz",
    ),
    departures=(
        "A query that may see nothing gets zeros from attention; in the released code it sees all keys, its own too.",
        "The content stream of the last layer, which nobody reads, is left out of the training pass.",
        "Spans count tokens, as the released code does by mistake, not words; and are drawn over whole rows instead of "
        "over the reused part and the rest apart.",
        "Half of the batch read backwards (bi_data) and clamped distances are left out.",
    ),
    notes=(
        "Memories are carried by the caller: batch['memory'] (b, depth, M, d) goes in, the tap 'memory' gives the next "
        "one. With a memory, block must divide the number of reused tokens, or later segments see what they predict."
    ),
)


class Layer(nn.Module):
    """Equations (3) and (4).

    Args:
        dim: width d.
        heads: number of heads h.
        head_dim: width e of a head; None is dim / heads.
        hidden_dim: width inside the feed-forward; None is 4 dim.
    """

    def __init__(self, *, dim: int, heads: int, head_dim: int | None, hidden_dim: int | None) -> None:
        super().__init__()
        self.heads = MultiHead(dim=dim, heads=heads, head_dim=head_dim)
        e = self.heads.out.in_features // heads
        self.r = nn.Linear(dim, heads * e, bias=False)
        self.u = nn.Parameter(torch.empty(heads, e))
        self.w = nn.Parameter(torch.empty(heads, e))
        self.z = nn.Parameter(torch.empty(heads, e))
        self.kinds = nn.Parameter(torch.empty(2, heads, e))
        self.channel = GELU(dim=dim, hidden_dim=hidden_dim)
        self.residual = PostNorm(dim=dim, norm="layer_norm(eps=1e-12)")

    def no_decay(self) -> set[str]:
        """The biases of the query are biases, though a matrix holds them."""
        return {"u", "w", "z"}

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        at: Tensor,
        context_at: Tensor,
        allowed: Tensor | None,
        same: Tensor | None,
    ) -> Tensor:
        """Queries ``x`` (b, n, d) at ``at`` (#b, n) over ``context`` (b, m, d) at ``context_at`` (#b, m).

        ``allowed`` and ``same``, of which pairs are of one segment, are (b, n, m) bool.
        """

        def mix(y: Tensor) -> Tensor:
            q, k, v = self.heads.split(y, context)
            h, e = self.u.shape
            place = position_scores(
                q + self.w[:, None], self.r.weight.unflatten(0, (h, e)), at, context_at, base=10000.0
            )
            bias = self.u[:, None] @ k.mT + place  # b h n m
            if same is not None:
                kinds = (q + self.z[:, None]) @ self.kinds.permute(1, 2, 0)  # b h n 2
                bias = bias + torch.where(same[:, None], kinds[..., :1], kinds[..., 1:])
            return self.heads.merge(
                attention(q, k, v, bias=bias * e**-0.5, allowed=None if allowed is None else allowed[:, None])
            )

        return self.residual(x, (mix, self.channel))


class TwoStream(nn.Module):
    """The model: an encoder with relative positions, that can carry a second stream of queries.

    Args:
        vocab: number of token ids V.
        dim: width d, even.
        depth: number of layers.
        heads: number of heads h.
        head_dim: width e of a head; None is dim / heads.
        hidden_dim: width inside the feed-forwards; None is 4 dim.
        memory: inputs of earlier segments that each layer keeps, in tokens.
        reuse: how many of a segment's first tokens may be kept; None is all.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        depth: int,
        heads: int,
        head_dim: int | None = None,
        hidden_dim: int | None = None,
        memory: int = 0,
        reuse: int | None = None,
    ) -> None:
        super().__init__()
        if dim % 2 or depth < 1 or memory < 0:
            raise ValueError(
                f"TwoStream got dim={dim}, depth={depth}, memory={memory}; expected an even dim, depth >= 1, memory >= 0"
            )
        self.vocab, self.memory, self.reuse = vocab, memory, reuse
        self.embedding = nn.Embedding(vocab, dim)
        self.query = nn.Parameter(torch.empty(dim))
        self.layers = nn.ModuleList(
            Layer(dim=dim, heads=heads, head_dim=head_dim, hidden_dim=hidden_dim) for _ in range(depth)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All matrices and vectors normal with standard deviation 0.02, as released; zero biases, norms as they are."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norms" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """The content stream, all tokens seeing each other: ``tokens`` (b, n) give (b, n, d)."""
        return self._run(tokens, None, None, None, segments, mask, memory)

    def streams(
        self,
        tokens: Tensor,
        places: Tensor,
        content: Tensor,
        query: Tensor,
        *,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Both streams.

        Args:
            tokens: (b, n).
            places: positions (b, p) of the queries.
            content: (b, n, n) bool, which tokens the contents read.
            query: (b, p, n) bool, which tokens the queries read.
            segments: (b, n) int.
            mask: (b, n) bool, True for real tokens.
            memory: (b, depth, M, d), inputs of each layer in earlier segments.

        Returns:
            g (b, p, d).
        """
        return self._run(tokens, places, content, query, segments, mask, memory)

    def _run(
        self,
        tokens: Tensor,
        places: Tensor | None,
        content: Tensor | None,
        query: Tensor | None,
        segments: Tensor | None,
        mask: Tensor | None,
        memory: Tensor | None,
    ) -> Tensor:
        check_tokens("TwoStream", tokens, self.vocab)
        b, n = tokens.shape
        check_mask("TwoStream", mask, b, n)
        x = blank(self.embedding(tokens), mask)
        at = torch.arange(n, device=x.device)[None].expand(b, -1)
        kinds = segments
        seen = content
        if places is not None:
            assert content is not None and query is not None
            x = torch.cat([x, self.query.to(x.dtype).expand(b, places.shape[1], -1)], 1)  # b n+p d
            at = torch.cat([at, places], 1)
            kinds = None if segments is None else torch.cat([segments, segments.gather(1, places)], 1)
            seen = torch.cat([content, query], 1)  # b n+p n
        if mask is not None:
            seen = mask[:, None].expand(-1, x.shape[1], -1) if seen is None else seen & mask[:, None]
        past = 0 if memory is None else memory.shape[2]
        context_at = torch.arange(-past, n, device=x.device)[None]
        if seen is not None:
            seen = F.pad(seen, (past, 0), value=True)
        # the released code gives memories segment 0
        same = None if segments is None or kinds is None else kinds[:, :, None] == F.pad(segments, (past, 0))[:, None]
        kept = []
        for i, layer in enumerate(self.layers):
            h = tap("content", x[:, :n])
            context = h if memory is None else torch.cat([memory[:, i], h], 1)
            if self.memory:
                reused = context[:, : past + (n if self.reuse is None else min(n, self.reuse))]
                kept.append(reused[:, max(0, reused.shape[1] - self.memory) :].detach())
            # of the last layer's outputs only the queries are read, if there are any
            first = n if places is not None and i + 1 == len(self.layers) else 0
            x = layer(
                x[:, first:],
                context,
                at[:, first:],
                context_at,
                None if seen is None else seen[:, first:],
                None if same is None else same[:, first:],
            )
            if places is not None:
                tap("query", x[:, n - first :])
        if kept:
            tap("memory", torch.stack(kept, 1))
        return x


class XLNet(Objective):
    """Permutation language modelling of a :class:`TwoStream` model.

    Args:
        vocab: number of token ids V.
        separator: the id that ends a segment; tokens after the first one are of the next segment, and so on. Never
            predicted. None: one segment.
        functional: further ids that are never predicted, such as that of [CLS].
        share: K, one of so many tokens is predicted.
        longest: greatest length of a span that is predicted, in tokens; length s is drawn in proportion to 1 / s.
        context: how many times as many tokens around a span are not predicted.
        block: tokens inside which ranks are drawn, the same for all blocks of a row; None is the whole row.
    """

    def __init__(
        self,
        *,
        vocab: int,
        separator: int | None = None,
        functional: tuple[int, ...] = (),
        share: int = 6,
        longest: int = 5,
        context: int = 6,
        block: int | None = None,
    ) -> None:
        super().__init__()
        if share < 2 or longest < 1 or context < 0 or (block is not None and block < 1):
            raise ValueError(
                f"XLNet got share={share}, longest={longest}, context={context}, block={block}; expected share >= 2, "
                "longest >= 1, context >= 0 and block >= 1"
            )
        self.vocab, self.separator, self.share = vocab, separator, share
        self.functional = (*functional, *(() if separator is None else (separator,)))
        self.longest, self.context, self.block = longest, context, block
        self.bias = nn.Parameter(torch.zeros(vocab))

    def corrupt(self, tokens: Tensor, *, mask: Tensor | None = None, generator: torch.Generator) -> dict[str, Tensor]:
        """Which tokens are predicted, and in which order.

        Returns:
            ``tokens``, ``rank`` and ``segments`` (b, n), ``places`` (b, p) and ``chosen`` (b, p) bool, which of them count,
            and ``mask`` (b, n).
        """
        check_tokens("XLNet", tokens, self.vocab)
        b, n = tokens.shape
        real = torch.ones(b, n, dtype=torch.bool) if mask is None else mask
        special = torch.isin(tokens, torch.tensor(self.functional, dtype=tokens.dtype))
        block = max(1, n if self.block is None else self.block)
        rows, rank = [], torch.full((b, n), -1)
        for i in range(b):
            targets = self._spans(real[i] & ~special[i], max(1, int(real[i].sum()) // self.share), generator)
            rows.append(targets.nonzero()[:, 0])
            order = torch.randperm(block, generator=generator)
            at = torch.arange(n)
            drawn = at // block * block + order[at % block]
            rank[i] = drawn.where((targets | special[i]) & real[i], -1)
        most = max((len(row) for row in rows), default=0)
        places = torch.stack([F.pad(row, (0, most - len(row))) for row in rows]) if rows else rank.new_zeros(0, 0)
        chosen = torch.arange(most)[None] < torch.tensor([len(row) for row in rows], dtype=torch.long)[:, None]
        ends = (tokens == self.separator).long() if self.separator is not None else torch.zeros_like(tokens)
        return {
            "tokens": tokens,
            "rank": rank,
            "segments": ends.cumsum(1) - ends,
            "places": places,
            "chosen": chosen,
            "mask": real,
        }

    def _spans(self, possible: Tensor, goal: int, generator: torch.Generator) -> Tensor:
        """(n,) bool: spans to predict among the ``possible`` (n,) tokens, ``goal`` tokens in all if there are as many."""
        n, goal = len(possible), min(goal, int(possible.sum()))
        targets, start, found = torch.zeros_like(possible), 0, 0
        odds = 1 / torch.arange(1, self.longest + 1, dtype=torch.float64)
        while start < n and found < goal:
            size = 1 + int(torch.multinomial(odds[: goal - found], 1, generator=generator))
            around = size * self.context
            left = int(torch.randint(0, max(1, around), (1,), generator=generator))
            begin, end = start + left, start + left + size
            span = possible[begin:end]
            if end <= n and bool(span.all()):
                targets[begin:end] = True
                found += size
            start = end + around - left
        # what the spans left missing, token by token, as in the released code
        left_over = (possible & ~targets).nonzero()[:, 0]
        more = left_over[torch.randperm(len(left_over), generator=generator)[: goal - found]]
        targets[more] = True
        return targets

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Equation (5): (b, p, V)."""
        rank, places = batch["rank"], batch["places"]
        content = rank[:, :, None] >= rank[:, None]  # b n n
        query = rank.gather(1, places)[:, :, None] > rank[:, None]  # b p n
        g = model.streams(  # type: ignore[operator]
            batch["tokens"],
            places,
            content,
            query,
            segments=batch["segments"],
            mask=batch["mask"],
            memory=batch.get("memory"),
        )
        return F.linear(g, model.embedding.weight, self.bias)  # type: ignore[arg-type, union-attr]

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        """``batch`` as :meth:`corrupt` gives it, and ``memory`` (b, depth, M, d) if there is any."""
        answers, chosen = batch["tokens"].gather(1, batch["places"]), batch["chosen"]
        logits = self.logits(model, batch)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        nats = F.cross_entropy(wide, answers.flatten(), reduction="none").masked_fill(~chosen.flatten(), 0.0)
        return Loss(nats.sum() / chosen.sum().clamp(min=1), {})  # (eq. 1)

    def items(self, batch: dict[str, Tensor]) -> Tensor:
        """Predicted tokens."""
        return batch["chosen"].sum()
