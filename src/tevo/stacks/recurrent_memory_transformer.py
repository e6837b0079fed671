"""Recurrent memory: a Transformer reads its input segment by segment and hands a few vectors from one to the next.

    causal:         [-, H_t, M_{t+1}] = Transformer([M_t, X_t, M_t])                                 (1)
    bidirectional:  [M_{t+1}, H_t] = Transformer([M_t, X_t])                                         (2)
    outputs [H_1; H_2; ...],   M_1 learned

The Transformer is unchanged: memory is l more rows of its input, read before the segment and, in the causal form, written
after it; each segment's rows have positions of their own. Gradients flow through all memories, or stop after every
``unroll`` of them. Cost O(n (c + 2 l) d); state: M, and the Transformer's own of the segment begun. Letters: c ``segment``,
l ``memory``.

Source: 2207.06881, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.catalogue.create import Spec
from tevo.contracts import Stack, State
from tevo.functional.masks import check_mask
from tevo.models.encoder import Encoder
from tevo.taps import tap

CARD = Card(
    id="recurrent_memory_transformer",
    role="stack",
    summary="Reads segment by segment, with a few rows of input that carry a memory from one segment to the next.",
    equations=(
        r"[\cdot,\ H_t,\ M_{t+1}] = \mathrm{Transformer}([M_t;\ X_t;\ M_t])\quad \text{(causal)}",
        r"[M_{t+1},\ H_t] = \mathrm{Transformer}([M_t;\ X_t])\quad \text{(bidirectional)}",
    ),
    exports={"recurrent_memory_transformer": "RecurrentMemoryTransformer"},
    cost="n",
    flops=(
        "(lambda d, w, r, earlier, depth, f: depth * (earlier * w * (8 * d * d + 4 * w * d + 4 * d * f)"
        " + r * (8 * d * d + 4 * r * d + 4 * d * f)))"
        "(d, segment + memory * (2 if causal else 1), memory + (n - 1) % segment + 1, ceil(n / segment) - 1, depth,"
        " hidden_dim or 4 * d)"
    ),
    state="d * (2 * depth * max(memory + (n - 1) % segment + 1, 2 * memory) + memory)",
    parameters=(
        "memory * d + depth * (4 * d * d + 2 * d * (hidden_dim or 4 * d) + (hidden_dim or 4 * d) + 5 * d) + 2 * d"
        " + ((segment + (2 if causal else 1) * memory) * d if position == 'learned' else 0)"
    ),
    memory="n",
    claims=("bidirectional", "causal", "exact_state"),
    examples=(
        {"dim": 12, "heads": 3, "depth": 1, "segment": 900, "memory": 3, "causal": True, "hidden_dim": 7},
        {"dim": 12, "heads": 3, "depth": 1, "segment": 9, "memory": 2, "causal": True, "hidden_dim": 7},
        {"dim": 10, "heads": 1, "depth": 2, "segment": 4, "memory": 3, "hidden_dim": 5},
        {
            "dim": 6,
            "heads": 1,
            "depth": 2,
            "segment": 3,
            "memory": 1,
            "unroll": 1,
            "causal": True,
            "position": "learned",
            "hidden_dim": 5,
        },
        {"dim": 8, "heads": 2, "depth": 1, "segment": 5, "memory": 2, "causal": True, "position": "rope"},
    ),
    reduces_to=("its Transformer after l learned vectors, for no more than one segment",),
    equals=(
        "booydar/recurrent-memory-transformer at 9d0ebe17, MemoryCell and RecurrentWrapper around GPT-2: logits, memories, "
        "loss and gradients; values in tests/golden/recurrent_memory_transformer_a.npz",
    ),
    departures=(
        "Read and write rows are under the causal mask as all others, as in that code; in LM-RMT they see each other fully.",
        "Segments begin at the left, so that the last may be short; alignment at the right or in the middle is left out.",
        "Truncated gradients stop at every (unroll + 1)-th memory, so that those of later segments may reach back less far "
        "than unroll; the released code's truncation has no effect.",
        "The combination with a cache of the segment before is left out.",
        "The memory that the last segment would write, which nobody reads, is not computed.",
    ),
    notes=(
        "Give the position to the stack: recurrent_memory_transformer(position=learned). A host's own position that works on "
        "embeddings counts through all segments instead. A mask hides padding, which keeps its place in a segment all the "
        "same: pad on the right. The paper trains with 1 segment first, then 2, and so on."
    ),
)


class RecurrentMemoryTransformer(Stack):
    """A Transformer with a memory that goes from segment to segment.

    Args:
        dim: width d.
        heads: number of heads.
        depth: number of blocks.
        causal: a token sees itself and earlier ones.
        segment: tokens c of a segment, >= 1.
        memory: rows l of the memory, >= 1.
        unroll: how many memories a gradient may pass; None is all of them, the paper took 0 to 4.
        mixer: token mixer of each block.
        channel: channel mixer of each block.
        position: a position part, of rows of a segment.
        residual: wiring.
        norm: the wiring's norm; None leaves the wiring's own choice.
        hidden_dim: width inside the channel mixers; None leaves their own choice.
        dropout: probability with which a sublayer's output feature is dropped in training.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        depth: int = 12,
        causal: bool = False,
        segment: int = 150,
        memory: int = 10,
        unroll: int | None = None,
        mixer: Spec = "softmax",
        channel: Spec = "gelu",
        position: Spec | None = None,
        residual: Spec = "pre_norm",
        norm: str | None = None,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if segment < 1 or memory < 1 or (unroll is not None and unroll < 0):
            raise ValueError(
                f"RecurrentMemoryTransformer got segment={segment}, memory={memory}, unroll={unroll}; expected segment >= 1, "
                "memory >= 1 and unroll >= 0 or None"
            )
        self.causal, self.segment, self.unroll = causal, segment, unroll
        self.memory = nn.Parameter(torch.empty(memory, dim))
        self.encoder = Encoder(
            dim=dim,
            depth=depth,
            heads=heads,
            mixer=mixer,
            channel=channel,
            position=position,
            residual=residual,
            norm=norm,
            causal=causal,
            length=segment + memory * (2 if causal else 1),
            hidden_dim=hidden_dim,
            dropout=dropout,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with the standard deviation of the house's embeddings, d^-1/2: the paper takes that of its own."""
        nn.init.normal_(self.memory, std=self.memory.shape[1] ** -0.5)

    def no_decay(self) -> set[str]:
        """The memory stands among embeddings."""
        return {"memory"}

    def forward(self, x: Tensor, *, mask: Tensor | None = None, at: Tensor | None = None) -> Tensor:
        """``x`` (b, n, d), ``mask`` (b, n) give (b, n, d); the order of the tokens is that of the tensor."""
        b, n, _ = x.shape
        check_mask("RecurrentMemoryTransformer", mask, b, n)
        memory = self._first(b)
        real = None if mask is None else mask.new_ones(b, memory.shape[1])
        starts = range(0, n, self.segment)
        outputs = []
        for index, start in enumerate(starts):
            tokens = x[:, start : start + self.segment]
            writes = self.causal and index + 1 < len(starts)
            rows = [memory, tokens, memory] if writes else [memory, tokens]
            seen = None
            if mask is not None and real is not None:
                here = mask[:, start : start + self.segment]
                seen = torch.cat([real, here, real] if writes else [real, here], 1)
            y = self.encoder(torch.cat(rows, 1), mask=seen, at=_places(0, sum(r.shape[1] for r in rows), x))
            read, h = y[:, : memory.shape[1]], y[:, memory.shape[1] :]
            if index + 1 < len(starts):
                memory = self._handed(h[:, self.segment :] if self.causal else read, index)
            outputs.append(h[:, : tokens.shape[1]])
        return torch.cat(outputs, 1) if outputs else x

    def _first(self, batch: int) -> Tensor:
        """M_1 (b, l, d)."""
        return self.memory.expand(batch, -1, -1)

    def _handed(self, memory: Tensor, index: int) -> Tensor:
        """What the segment of ``index`` leaves to the next, without gradient where the chain ends."""
        ends = self.unroll is not None and (index + 1) % (self.unroll + 1) == 0
        return tap("memory", memory.detach() if ends else memory)

    def init_state(self, batch: int, *, context: Tensor | None = None, mask: Tensor | None = None) -> State:
        """Segments handed over and tokens of the one begun (b,), memory (b, l, d), and the Transformer's own state."""
        if not self.causal:
            raise ValueError(
                "RecurrentMemoryTransformer(causal=False) has no state to decode with; build it with causal=True"
            )
        none = torch.zeros(batch, dtype=torch.long, device=self.memory.device)
        return self._begin(self._first(batch), none)

    def _begin(self, memory: Tensor, segments: Tensor) -> State:
        """The state at the start of a segment, whose memory is read."""
        b, length = memory.shape[:2]
        _, inner = self.encoder.step(memory, self.encoder.init_state(b), at=_places(0, length, memory))
        return segments, torch.zeros_like(segments), memory, inner

    def step(
        self, x: Tensor, state: State, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Advance by ``x`` (b, n, d), over the ends of segments; padding keeps its place in them."""
        check_mask("RecurrentMemoryTransformer", mask, x.shape[0], x.shape[1])
        done, outputs = 0, [x[:, :0]]
        while done < x.shape[1]:
            segments, filled, memory, inner = state
            assert isinstance(segments, Tensor) and isinstance(filled, Tensor) and isinstance(memory, Tensor)
            length, past = memory.shape[1], int(filled[0]) if len(x) else 0
            if past == self.segment:
                written, _ = self.encoder.step(memory, inner, at=_places(length + past, length, x))
                handed = self._handed(written, int(segments[0]) if len(x) else 0)
                state = self._begin(handed, segments + 1)
                continue
            piece = x[:, done : done + self.segment - past]
            here = None if mask is None else mask[:, done : done + self.segment - past]
            y, inner = self.encoder.step(piece, inner, mask=here, at=_places(length + past, piece.shape[1], x))
            outputs.append(y)
            state = segments, filled + piece.shape[1], memory, inner
            done += piece.shape[1]
        return torch.cat(outputs, 1), state


def _places(start: int, n: int, like: Tensor) -> Tensor:
    """(1, n): rows of a segment from ``start`` on."""
    return torch.arange(start, start + n, device=like.device)[None]
