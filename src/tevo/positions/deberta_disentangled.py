"""DeBERTa: scores by content, and by a learned vector of the distance from either side; and its mask decoder.

    delta(i, j) = clamp(bucket(i - j) + k, 0, 2k - 1)                                                        (1)
    s_ij = (q_i . k_j + q_i . Kr[delta(i, j)] + k_j . Qr[delta(j, i)]) / sqrt(3 e)                           (2)
    Kr = P Wk,  Qr = P Wq + c,   P (2k, d)
    bucket(r) = r                                                                          for |r| <= B / 2  (3)
              = sign(r) (ceil(log(2 |r| / B) / log(2 (M - 1) / B) (B / 2 - 1)) + B / 2)    beyond; or r for all r
    mask decoder, twice:  z <- layer(queries z, keys and values h)                                           (4)

Each query meets all 2k vectors in one product, of which its distances are gathered, and so does each key. Letters: B
buckets, M the greatest distance told apart. Cost O(h n m e + (n + m) k d), no state.

Source: 2006.03654, sections 3.1 and 3.2; buckets 2111.09543's released code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import Position
from tevo.functional.attention import spread
from tevo.models.block import Block

CARD = Card(
    id="deberta_disentangled",
    role="position",
    summary="Adds to each score the query's product with a vector of the distance, and the key's with another.",
    equations=(
        r"s_{ij} = \frac{q_i^\top k_j + q_i^\top K^r_{\delta(i,j)} + k_j^\top Q^r_{\delta(j,i)}}{\sqrt{3e}}",
        r"\delta(i,j) = \mathrm{clamp}(i - j + k,\, 0,\, 2k - 1),\quad K^r = P W_k,\quad Q^r = P W_q + c",
    ),
    exports={"deberta_disentangled": "Disentangled"},
    cost="n^2",
    flops="8 * n * d * d + 4 * n * n * d + 8 * span * d * (d + n)",
    state="2 * n * d",
    parameters="2 * span * d + 2 * d * d + d",
    memory="n^2",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "shift_invariant"),
    examples=(
        {"dim": 12, "heads": 3, "span": 5},
        {"dim": 10, "heads": 5, "span": 40, "released": True},
        {"dim": 4, "heads": 1, "span": 6, "max_distance": 41},
    ),
    equals=(
        "transformers 5.23.0 DebertaV2Layer with shared projections and buckets, its mask decoder, and version 1's "
        "DisentangledSelfAttention (released=True); values in tests/golden/deberta_disentangled_a.npz",
    ),
    departures=(
        "P is each layer's own; the paper's is shared by all layers. Adds 2 k d parameters a layer after the first.",
        "Kr has no bias, as in version 1: under the softmax it would change nothing.",
        "Projections are a position's own, as in version 1; later releases use those of the content, which a position "
        "does not see. Copying them here gives the same outputs.",
    ),
    notes=(
        "The embeddings carry no absolute position. released=True reads Qr at delta(i, j), as all released weights expect; "
        "the paper prints delta(j, i). mask_decoder applies equation (4) to the last block of a model."
    ),
)


def bucket(offset: Tensor, span: int, max_distance: int | None) -> Tensor:
    """Equation (3) of integers ``offset`` = query - key position, with B = 2 ``span``; all of them without M."""
    if max_distance is None:
        return offset
    half = span // 2
    # the same edges in every dtype of the model: computed in float32, as in the released code
    far = offset.abs().clamp(min=max(half, 1)).float()
    steps = (far / half).log() / math.log((max_distance - 1) / half) * (half - 1)
    return torch.where(offset.abs() <= half, offset, offset.sign() * (steps.ceil().long() + half))


def gathered(a: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """a_i . table[index_ij]: ``a`` (b, h, n, e), ``table`` (h, 2k, e), ``index`` (#b, n, m) give (b, h, n, m)."""
    b, h, n, _ = a.shape
    products = a @ table.mT  # b h n 2k
    return products.gather(-1, index[:, None].expand(b, h, n, index.shape[-1]))


class Disentangled(Position):
    """Disentangled attention.

    Args:
        dim: width d.
        heads: number of heads h.
        span: k: distances are told apart from -k to k - 1, or, with ``max_distance``, k buckets on each side.
        max_distance: M in tokens, from which on all share the last bucket; None has no buckets.
        released: read the query's side at delta(i, j) as released code does, instead of delta(j, i).
    """

    def __init__(
        self, *, dim: int, heads: int, span: int = 512, max_distance: int | None = None, released: bool = False
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"Disentangled cannot split dim={dim} into heads={heads}; choose heads that divide dim")
        if span < 1 or (max_distance is not None and (span < 4 or max_distance <= span // 2 + 1)):
            raise ValueError(
                f"Disentangled got span={span}, max_distance={max_distance}; needs span >= 1, and with buckets span >= 4 and "
                "max_distance > span / 2 + 1"
            )
        self.heads, self.span, self.max_distance, self.released = heads, span, max_distance, released
        self.table = nn.Parameter(torch.empty(2 * span, dim))
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with standard deviation 0.02, zero bias, as in the released code."""
        for parameter in (self.table, self.q.weight, self.k.weight):
            nn.init.normal_(parameter, std=0.02)
        nn.init.zeros_(self.q.bias)

    def no_decay(self) -> set[str]:
        """The table is an embedding."""
        return {"table"}

    def _delta(self, offset: Tensor) -> Tensor:
        """Equation (1) of ``offset`` = i - j."""
        return (bucket(offset, self.span, self.max_distance) + self.span).clamp(0, 2 * self.span - 1)

    def turn(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """The content's share of the scale: three terms of equal variance are added."""
        return q * 3**-0.5, k

    def bias(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """(b, h, n, m): the second and third term of equation (2)."""
        h, e = q.shape[1], q.shape[3]
        offset = q_at[:, :, None] - k_at[:, None, :]  # b n m
        there = self._delta(offset)
        back = there if self.released else self._delta(-offset)
        kr = self.k(self.table).unflatten(-1, (h, e)).transpose(0, 1)  # h 2k e
        qr = self.q(self.table).unflatten(-1, (h, e)).transpose(0, 1)
        content_to_place = gathered(q, kr, there)
        place_to_content = gathered(spread(k, h), qr, back.mT).mT
        return (content_to_place + place_to_content) * (3 * e) ** -0.5


def mask_decoder(block: Block, h: Tensor, z: Tensor, *, mask: Tensor | None = None, passes: int = 2) -> Tensor:
    """Equation (4): a model's last block again, with queries of its own.

    Args:
        block: the block, whose mixer must take a context.
        h: what the block reads in the model (b, n, d).
        z: the queries before the first pass (b, n, d): ``h`` plus absolute position embeddings.
        mask: real tokens of ``h`` (b, n).
        passes: how often.

    Returns:
        (b, n, d), to predict masked tokens from.
    """

    def mix(y: Tensor) -> Tensor:
        return block.mixer(y, h, mask=mask)

    for _ in range(passes):
        z = block.residual(z, (mix, block.channel))
    return z
