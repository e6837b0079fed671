"""What a task is: batches as a pure function, a score that pools exactly, a chance level, an exact solver.

Randomness. Row r of batch ``index`` is made from raw 64-bit outputs of numpy's Philox, whose key is a hash of
(task's name, split, seed) and whose counter is (index, r): rows are independent of each other and of the batch size.
Bit streams of numpy's bit generators are guaranteed across versions; those of ``Generator.choice`` and
``permutation`` are not, so integers, subsets and permutations are made here from raw outputs alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["HELD_OUT", "IGNORED", "Draws", "Rows", "Task", "below", "shuffled"]

Draws: TypeAlias = npt.NDArray[np.uint64]
Rows: TypeAlias = npt.NDArray[np.int64]

HELD_OUT = ("valid", "test")
IGNORED = -100  # target of a token that is not scored, as cross_entropy's default


class Task:
    """A task's batches and its score.

    Subclasses set the class attributes, give their options to ``__init__`` and write :meth:`make`; ``draws`` is how
    many raw 64-bit numbers a row takes.

    Args:
        vocab: number of different tokens, inputs and targets alike.
        length: tokens n per row.
        examples: rows of each held-out split.
        chance: score of guessing without looking at the input.
        baselines: name -> score of a trivial model, on the valid split.
        draws: raw 64-bit numbers that a row is made from.
        facts: all that determines the rows besides (split, seed, index, size), ready for JSON; a run records it.
    """

    name: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    def __init__(
        self,
        *,
        vocab: int,
        length: int,
        examples: int,
        chance: float,
        baselines: Mapping[str, float],
        draws: int,
        facts: Mapping[str, object],
    ) -> None:
        self.vocab = vocab
        self.length = length
        self.examples = examples
        self.chance = chance
        self.baselines = dict(baselines)
        self.draws = draws
        self.facts = {"task": self.name, **facts}
        if examples < 1:
            raise ValueError(f"task {self.name!r}: examples={examples}, expected the number of held-out rows, >= 1")

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        """Rows of one batch, a pure function of the arguments.

        Train: row r depends on (seed, index, r) alone; there is no end. Held out ("valid", "test"): the same
        ``examples`` rows for every seed, row ``index * size + r`` of them, so that all runs are scored on the same;
        the last batch may be shorter, see :meth:`batches`.

        Returns:
            "inputs" (size, n) int64, and "targets" (size, n) int64 with ``IGNORED`` where nothing is scored.

        Raises:
            ValueError: no such split, a negative index, a size below 1, or a held-out batch past the end.
        """
        if split != "train" and split not in HELD_OUT:
            raise ValueError(f"task {self.name!r}: split is {split!r}, expected 'train', 'valid' or 'test'")
        if index < 0 or size < 1:
            raise ValueError(f"task {self.name!r}: index={index} and size={size}, expected index >= 0 and size >= 1")
        batch, first = index, 0
        if split in HELD_OUT:
            # numbered through, so that any batch size covers the same rows
            seed, batch, first = 0, 0, index * size
            if first >= self.examples:
                raise ValueError(
                    f"task {self.name!r}: batch {index} of {size} rows is past the end of {split!r}, which has "
                    f"examples={self.examples} rows; use batches({split!r}, {size})"
                )
            size = min(size, self.examples - first)
        raw = self._raw(split, seed, batch, first, size)
        inputs, targets = self.make(split, first, raw)
        return {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}

    def batches(self, split: str, size: int) -> Iterator[dict[str, Tensor]]:
        """All rows of a held-out split, once each."""
        if split not in HELD_OUT:
            raise ValueError(f"task {self.name!r}: {split!r} has no end; batches are of {' or '.join(HELD_OUT)}")
        for index in range(-(-self.examples // size)):
            yield self.batch(split, 0, index, size)

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Inputs and targets (size, n) from ``raw`` (size, draws); ``first`` is the first row's number if held out."""
        raise NotImplementedError

    def solve(self, inputs: Tensor) -> Tensor:
        """The right answers (size, n) wherever targets are scored, from ``inputs`` (size, n) alone; anything elsewhere.

        Raises:
            ValueError: the task is not a generated one, and nobody knows.
        """
        raise ValueError(f"task {self.name!r} has no exact solver: its answers do not follow from its inputs")

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The metric as (sum, count), both 0-d float64: add up over batches and ranks, then divide.

        ``logits`` (b, n, V) and ``targets`` (b, n). Accuracy: a NaN among a token's logits is a miss.
        """
        kept = targets != IGNORED
        logits, targets = logits[kept], targets[kept]  # p V, p
        if self.metric == "bits_per_byte":
            # in float64, so that the pooled mean does not depend on how rows were batched
            total = F.cross_entropy(logits.double(), targets, reduction="sum") / math.log(2)
        else:
            total = ((logits.argmax(-1) == targets) & ~logits.isnan().any(-1)).sum().double()
        return total, kept.sum().double()

    def _raw(self, split: str, seed: int, batch: int, first: int, size: int) -> Draws:
        text = f"{self.name} {split} {int(seed)}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        # each count of Philox gives four numbers; a row starts on a count of its own
        counts = -(-self.draws // 4)
        bits = np.random.Philox(key=key, counter=(batch << 128) + first * counts)
        return np.asarray(bits.random_raw(size * counts * 4)).reshape(size, -1)[:, : self.draws]


def below(raw: Draws, bound: int) -> Rows:
    """Integers 0..bound-1 from raw 64-bit numbers: floor(raw bound / 2^64), exact for bound < 2^32."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    wide = (raw >> half) * np.uint64(bound) + ((raw & low) * np.uint64(bound) >> half)
    return (wide >> half).astype(np.int64)


def shuffled(raw: Draws) -> Rows:
    """A random permutation of 0..c-1 in each row of ``raw`` (r, c)."""
    # stable, so that equal numbers (once in 2^64) do not depend on the sort's implementation
    return np.argsort(raw, axis=1, kind="stable")
