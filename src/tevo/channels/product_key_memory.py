"""Product-key memory: each token reads the k best of K^2 slots, found by comparing with 2 K halves of keys.

    q = N(x W_q + b_q), for each of H heads, split into halves q_1, q_2                              (1)
    I_1, I_2 = the k largest of C_1 q_1 and of C_2 q_2,   C_1, C_2 (K, e/2) of each head             (2)
    s_ab = (C_1 q_1)_a + (C_2 q_2)_b for a in I_1, b in I_2;   J = the k largest of these k^2        (3)
    y = sum over heads and over (a, b) in J of softmax_J(s)_ab v[a K + b]                            (4)

The k best of all K^2 sums are always among the k^2 of (3), so that the search is exact. N is batch normalisation, without
which few slots are ever used. Cost O(n H (K e + k^2 + k d)), parameters K^2 d. No state. Letters: H heads of the memory,
K keys a half, e query width a head, k slots that a head reads.

Source: 1907.05242, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.card import Card
from tevo.contracts import ChannelMixer
from tevo.functional.masks import check_mask
from tevo.taps import tap

CARD = Card(
    id="product_key_memory",
    role="channel",
    summary="Each token reads the best of very many slots, found by two short searches, in place of the feed-forward.",
    equations=(
        r"I_1 = \operatorname{top\text{-}k}(C_1 q_1),\quad I_2 = \operatorname{top\text{-}k}(C_2 q_2)",
        r"J = \operatorname{top\text{-}k}_{a \in I_1, b \in I_2} \big((C_1 q_1)_a + (C_2 q_2)_b\big)",
        r"y = \sum_{\mathrm{heads}} \sum_{(a, b) \in J} \mathrm{softmax}_J(s)_{ab}\, v_{aK + b}",
    ),
    exports={"product_key_memory": "ProductKeyMemory"},
    cost="n",
    flops="2 * n * memory_heads * query_dim * (d + keys)",
    parameters="memory_heads * query_dim * (d + 1 + keys + 2 * (query_norm != 'none')) + keys ** 2 * d",
    memory="n",
    claims=("token_wise",),
    examples=(
        {"dim": 12, "memory_heads": 3, "keys": 9, "topk": 4, "query_dim": 6},
        {"dim": 5, "memory_heads": 1, "keys": 4, "topk": 4, "query_dim": 4},
        {"dim": 7, "memory_heads": 2, "keys": 5, "topk": 2, "query_dim": 8, "query_norm": "none"},
        {"dim": 6, "memory_heads": 2, "keys": 6, "topk": 3, "query_dim": 4, "query_norm": "layer"},
    ),
    equals=(
        "facebookresearch/XLM PKM-layer notebook HashingMemory: evaluation, training, and without batch normalisation; "
        "values in tests/golden/product_key_memory_a.npz",
    ),
    departures=(
        "The output has the width of the input, as the seat asks; the released layer may change it.",
        "Statistics of batch normalisation are of real tokens only; the released code counts padding.",
        "The paper trains values by an optimiser of their own (Adam at 1e-3, sparse gradients): a part cannot ask for one.",
    ),
    notes=(
        "Claims hold in evaluation. In training batch normalisation takes statistics over all tokens, later ones too: for "
        "causal models query_norm='layer' sees one token only. Used beside or in place of the feed-forward of one or two "
        "layers. With topk=1 the softmax of one score is 1, and queries and keys get no gradient."
    ),
    tolerances={
        "bfloat16": (
            "CHOICE",
            "which keys are chosen is decided by scores, and near ties go the other way after rounding",
        ),
    },
)

NORMS = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}


def best_slots(q: Tensor, c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Equations (2) and (3) for ``q`` (t, H, e) and ``c`` (H, 2, K, e/2): scores and slots (t, H, k), best first."""
    keys = c.shape[2]
    s = torch.einsum("thpe,hpke->thpk", q.unflatten(-1, (2, -1)), c)  # t H 2 K
    best, place = s.topk(k, dim=-1)  # (eq. 2)
    pairs = best[:, :, 0, :, None] + best[:, :, 1, None, :]  # t H k k
    slots = place[:, :, 0, :, None] * keys + place[:, :, 1, None, :]
    scores, among = pairs.flatten(-2).topk(k, dim=-1)  # (eq. 3)
    return scores, slots.flatten(-2).gather(-1, among)


def usage(weights: Tensor, slots: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How evenly a memory is used, from what was tapped as ``memory_weights`` and ``memory_slots``.

    Args:
        weights: (..., k), each set of k sums to one.
        slots: (..., k) int.
        size: number of slots.

    Returns:
        The fraction of slots that was read at all, and KL(z || uniform) in nats, z the mean weight of each slot.
    """
    flat, where = weights.detach().flatten(), slots.flatten()
    z = flat.new_zeros(size).index_add(0, where, flat)
    z = z / z.sum()
    touched = torch.zeros(size, dtype=torch.bool, device=slots.device).index_fill(0, where, True)
    return touched.to(z.dtype).mean(), torch.special.xlogy(z, z * size).sum()


class ProductKeyMemory(ChannelMixer):
    """Product-key memory.

    Args:
        dim: width d.
        memory_heads: number H of queries of a token, each with keys of its own; all read the same slots.
        keys: number K of keys a half; there are K^2 slots.
        topk: number k of slots that a head reads, 1 <= k <= K.
        query_dim: width e of a query, even.
        query_norm: "batch", as in the paper, "layer" (over the heads of one token together), or "none".
    """

    def __init__(
        self,
        *,
        dim: int,
        memory_heads: int = 4,
        keys: int = 512,
        topk: int = 32,
        query_dim: int = 256,
        query_norm: str = "batch",
    ) -> None:
        super().__init__()
        if not 1 <= topk <= keys or query_dim < 2 or query_dim % 2:
            raise ValueError(
                f"ProductKeyMemory got topk={topk}, keys={keys}, query_dim={query_dim}; needs 1 <= topk <= keys and an even "
                "query_dim"
            )
        if query_norm not in NORMS:
            raise ValueError(f"ProductKeyMemory got query_norm={query_norm!r}; choose among {', '.join(NORMS)}")
        self.topk = topk
        self.query = nn.Linear(dim, memory_heads * query_dim)
        self.norm = NORMS[query_norm](memory_heads * query_dim)
        self.keys = nn.Parameter(torch.empty(memory_heads, 2, keys, query_dim // 2))
        self.values = nn.Parameter(torch.empty(keys**2, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys uniform within (e/2)^-1/2, values from N(0, 1/d), as released."""
        self.query.reset_parameters()
        bound = self.keys.shape[-1] ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.normal_(self.values, std=self.values.shape[1] ** -0.5)

    def no_decay(self) -> set[str]:
        """Slots are an embedding table: decay would wear down those that are seldom read."""
        return {"values"}

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(b, n, d) gives (b, n, d); ``mask`` (b, n) keeps padding out of the statistics of training, and gives it zeros."""
        check_mask("ProductKeyMemory", mask, x.shape[0], x.shape[1])
        heads, _, _, half = self.keys.shape
        tokens = x.flatten(0, 1)
        # statistics are of what is passed through the norm
        real = tokens if mask is None else tokens[mask.flatten()]
        queries = self.query(real)
        q = (self.norm(queries) if len(real) else queries).unflatten(-1, (heads, 2 * half))  # (eq. 1)
        scores, slots = best_slots(q, self.keys, self.topk)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(self.values.dtype)
        slots, weights = tap("memory_slots", slots), tap("memory_weights", weights)
        y = F.embedding_bag(slots.flatten(1), self.values, per_sample_weights=weights.flatten(1), mode="sum")  # (eq. 4)
        y = y.to(x.dtype)
        if mask is not None:
            y = x.new_zeros(len(tokens), x.shape[2]).masked_scatter(mask.flatten()[:, None], y)
        return y.unflatten(0, x.shape[:2])
