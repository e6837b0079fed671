"""Randomised positions: tokens take sorted random places of a range far longer than any training sequence.

    i_1 < ... < i_n: n distinct numbers of 0 .. L - 1, uniformly;  token t stands at i_t                     (1)
    r_1 < ... < r_{n-1}, of 1 .. L - 1:  the token t to the right is at distance r_t, to the left l_t        (2)
    l = r, or a draw of its own

(1) serves encodings added to embeddings and rotary ones, (2) those of distances. A draw is a buffer: it is shared by all
sequences, layers and hooks of a forward pass, and renewed after each step of the optimiser. Cost of the base encoding.
Letters: L ``limit``.

Source: 2305.16843, section 3 and its released code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.card import Card
from tevo.catalogue.create import Spec
from tevo.contracts import Position
from tevo.models.block import acts_on_scores, build
from tevo.positions.rope import rotate

CARD = Card(
    id="randomized_positional_encodings",
    role="position",
    summary="Puts tokens at sorted random places of a long range, so that no position of a longer sequence is new.",
    equations=(
        r"i_1 < \dots < i_n \sim \mathcal{U}\left(\{0, \dots, L-1\}\right)",
        r"p_t \leftarrow p_{i_t},\quad d_{ts} \leftarrow \mathrm{sign}(t - s)\, r_{|t - s|}",
    ),
    exports={
        "randomized_positional_encodings": "RandomizedPositions",
        "randomized_rope": "RandomizedRoPE",
        "randomized_distances": "RandomizedDistances",
    },
    cost="n^2",
    state="2 * n * d",
    parameters="limit * d if base == 'learned' else 0",
    claims=("bidirectional", "causal", "cross", "padding", "exact_state", "shared_across_layers"),
    examples=(
        {"part": "randomized_positional_encodings"},
        {"part": "randomized_positional_encodings", "base": "learned", "dim": 12, "limit": 200},
        {"part": "randomized_rope", "limit": 300},
        {"part": "randomized_distances", "heads": 3, "tie": 0.5},
        {"part": "randomized_distances", "base": "transformer_xl", "dim": 12, "heads": 3, "both_sides": True},
    ),
    reduces_to=("the base encoding at length = limit",),
    equals=(
        "google-deepmind/randomized_positional_encodings at e8c64749: encodings, turned queries and keys, biases and "
        "logits for its stored draws; values in tests/golden/randomized_positional_encodings_a.npz",
    ),
    departures=(
        "A draw is renewed by after_step, or by draw(n), not by each forward pass: then evaluation is deterministic, "
        "decoding exact, and micro-batches of one step share a draw. Average several draws for the paper's evaluation.",
        "A draw is for sequences of one number of tokens, and a shorter one takes its first places; call draw(n) before a "
        "batch of another length. The paper draws for each batch's own length.",
        "Distances to the left are drawn as those to the right; the released relative form draws one number more and "
        "drops the farthest.",
        "The released table of relative encodings is too short, and its out-of-range rows all read the last one; here "
        "every distance has its own encoding, as its comments intend.",
        "Both layers' and a base's parameters are one for all layers, because the draw is.",
    ),
    notes=(
        "Use randomized_positional_encodings around positions of the embeddings, randomized_rope, or randomized_distances "
        "around biases (alibi: with tie=0.5, which tells left from right as the paper does). length is the number of "
        "tokens that draws are for. Mirrored distances do not add up along a sequence."
    ),
    variants={"randomized_rope": {"parameters": "0"}, "randomized_distances": {"parameters": ""}},
)


def drawn(n: int, low: int, limit: int) -> Tensor:
    """N sorted distinct numbers of ``low`` .. ``limit`` - 1, then -1 up to ``limit`` entries."""
    chosen = (torch.randperm(limit - low)[:n] + low).sort().values
    return torch.cat([chosen, chosen.new_full((limit - n,), -1)])


def places(owner: str, table: Tensor, at: Tensor) -> Tensor:
    """``table[at]``.

    Raises:
        ValueError: ``at`` lies beyond the draw (read from the CPU only, and not while compiling).
    """
    found = table[at]
    if at.device.type == "cpu" and at.numel() and not torch.compiler.is_compiling() and int(found.min()) < 0:
        raise ValueError(
            f"{owner} holds a draw for {int((table >= 0).sum())} tokens, got position {int(at.max())}; call draw() with "
            "the number of tokens"
        )
    return found


def sizes(owner: str, length: int | None, limit: int) -> int:
    """The number of tokens to draw for, by default a quarter of ``limit``."""
    n = limit // 4 if length is None else length
    if not 1 <= n <= limit:
        raise ValueError(f"{owner} got length={length}, limit={limit}; expected 1 <= length <= limit")
    return n


class RandomizedPositions(Position):
    """Equation (1) around an encoding that is added to the embeddings.

    Args:
        base: the encoding; one with a table is built for ``limit`` tokens.
        dim: width d, for bases that have one.
        length: tokens of the sequences; by default a quarter of ``limit``.
        limit: L.
    """

    table: Tensor

    def __init__(
        self, *, base: Spec = "sinusoidal", dim: int | None = None, length: int | None = None, limit: int = 2048
    ) -> None:
        super().__init__()
        n = sizes("RandomizedPositions", length, limit)
        built = build("position", base, {"dim": dim, "length": limit})
        if not isinstance(built, Position) or acts_on_scores(built):
            raise ValueError(
                f"RandomizedPositions needs a base that is added to embeddings, got {type(built).__name__}; take "
                "randomized_rope, or randomized_distances around it"
            )
        self.base = built
        self.register_buffer("table", drawn(n, 0, limit))

    def draw(self, length: int | None = None) -> None:
        """New places for sequences of ``length`` tokens, by default as many as before."""
        n = int((self.table >= 0).sum()) if length is None else length
        self.table.copy_(drawn(sizes("draw", n, len(self.table)), 0, len(self.table)))

    def after_step(self) -> None:
        """New places for the next batch."""
        self.draw()

    def embed(self, x: Tensor, at: Tensor) -> Tensor:
        """``x`` (b, n, d) at ``at`` (#b, n) gives (b, n, d)."""
        return self.base.embed(x, places("RandomizedPositions", self.table, at))


class RandomizedRoPE(Position):
    """Equation (1) for rotary positions.

    Args:
        theta: wavelengths run from 2 pi to 2 pi theta places.
        length: tokens of the sequences; by default a quarter of ``limit``.
        limit: L.
    """

    table: Tensor

    def __init__(self, *, theta: float = 10000.0, length: int | None = None, limit: int = 2048) -> None:
        super().__init__()
        self.theta = theta
        self.register_buffer("table", drawn(sizes("RandomizedRoPE", length, limit), 0, limit))

    def draw(self, length: int | None = None) -> None:
        """New places for sequences of ``length`` tokens, by default as many as before."""
        n = int((self.table >= 0).sum()) if length is None else length
        self.table.copy_(drawn(sizes("draw", n, len(self.table)), 0, len(self.table)))

    def after_step(self) -> None:
        """New places for the next batch."""
        self.draw()

    def turn(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """Q (b, h, n, e) and k (b, g, m, e), turned.

        Raises:
            ValueError: e is odd, or a position lies beyond the draw.
        """
        if q.shape[-1] % 2:
            raise ValueError(
                f"RandomizedRoPE turns pairs of features, got head width {q.shape[-1]}; choose an even one"
            )
        q_place, k_place = (places("RandomizedRoPE", self.table, at) for at in (q_at, k_at))
        return rotate(q, q_place, self.theta), rotate(k, k_place, self.theta)


class RandomizedDistances(Position):
    """Equation (2) around a bias of distances.

    Args:
        base: the bias.
        dim: width d, for bases that have one.
        heads: number of heads, for bases that have any.
        both_sides: distances to the left are a draw of their own.
        tie: taken from distances to the left, so that a symmetric base tells the sides apart (ALiBi: 0.5).
        length: tokens of the sequences; by default a quarter of ``limit``.
        limit: L.
    """

    table: Tensor

    def __init__(
        self,
        *,
        base: Spec = "alibi",
        dim: int | None = None,
        heads: int | None = None,
        both_sides: bool = False,
        tie: float = 0.0,
        length: int | None = None,
        limit: int = 2048,
    ) -> None:
        super().__init__()
        n = sizes("RandomizedDistances", length, limit)
        built = build("position", base, {"dim": dim, "heads": heads})
        if not isinstance(built, Position) or type(built).bias is Position.bias:
            raise ValueError(
                f"RandomizedDistances needs a base with a bias, got {type(built).__name__}; take "
                "randomized_positional_encodings around it, or randomized_rope"
            )
        self.base = built
        self.both_sides, self.tie = both_sides, tie
        # row 0: distances to the right; row 1: to the left
        self.register_buffer("table", torch.full((2, limit), -1))
        self.draw(n)

    def draw(self, length: int | None = None) -> None:
        """New distances for sequences of ``length`` tokens, by default as many as before."""
        limit = self.table.shape[1]
        n = sizes("draw", int((self.table[0] >= 0).sum()) if length is None else length, limit)
        right, left = (torch.cat([torch.zeros(1).long(), drawn(n - 1, 1, limit)[: limit - 1]]) for _ in range(2))
        self.table.copy_(torch.stack([right, left if self.both_sides else right]))

    def after_step(self) -> None:
        """New distances for the next batch."""
        self.draw()

    def turn(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> tuple[Tensor, Tensor]:
        """What the base does to q and k, which may not depend on positions."""
        return self.base.turn(q, k, q_at, k_at)

    def distances(self, q_at: Tensor, k_at: Tensor) -> Tensor:
        """Query minus key position (#b, n, m), as drawn."""
        steps = q_at[:, :, None] - k_at[:, None, :]
        there = places("RandomizedDistances", self.table.flatten(), steps.abs() + (steps > 0) * self.table.shape[1])
        return torch.where(steps > 0, there - self.tie if self.tie else there, -there)

    def bias(self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """(#b, #h, n, m): the base's bias of each query alone, standing at 0 among keys at minus their distances."""
        if q.shape[2] == 0:
            return q.new_zeros(1, 1, 0, k.shape[2])

        def of_one(query: Tensor, distance: Tensor) -> Tensor:
            found = self.base.bias(query[:, :, None], k, torch.zeros_like(distance[:, :1]), -distance)
            assert found is not None
            return found[:, :, 0]  # b h m

        return torch.vmap(of_one, in_dims=(2, 1), out_dims=2)(q, self.distances(q_at, k_at))
