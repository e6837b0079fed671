"""Multi-query associative recall: pairs first, then their keys again, each to be answered with its value.

    k1 v1 k2 v2 ... kp vp  .  .  k2  .  k1  .  .  ...        scored at the second k only
                                 v2     v1

By the rules of arXiv:2312.04927: keys from one half of the vocabulary, values from the other, each without repetition;
query j stands on an even place, at a gap g of 1..s pairs of places after the pairs, with probability proportional to
g^(a - 1), without repetition. Places between queries hold token 0, which is no key.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tevo.bench.tasks.contract import IGNORED, Draws, Rows, Task, shuffled

__all__ = ["Recall"]

POWER = 0.01  # a, as published: gaps nearly proportional to 1 / g


class Recall(Task):
    """Multi-query associative recall.

    Args:
        length: tokens per row, even, >= 4 pairs.
        vocab: tokens; the upper half are values, the lower half but 0 keys.
        pairs: keys and values per row, >= 1; each key is asked once.
        examples: rows of each held-out split.
    """

    name = "recall"

    def __init__(self, *, length: int = 32, vocab: int = 32, pairs: int = 4, examples: int = 512) -> None:
        if pairs < 1 or length % 2 or length < 4 * pairs:
            raise ValueError(
                f"task 'recall': length={length} with pairs={pairs}, expected pairs >= 1 and an even length >= 4 pairs"
            )
        if vocab // 2 - 1 < pairs:
            raise ValueError(
                f"task 'recall': vocab={vocab} has {vocab // 2 - 1} keys for pairs={pairs}; vocab >= {2 * pairs + 2}"
            )
        self.pairs = pairs
        self.keys = vocab // 2 - 1
        self.values = vocab - vocab // 2
        self.gaps = (length - 2 * pairs) // 2
        super().__init__(
            vocab=vocab,
            length=length,
            examples=examples,
            chance=1 / self.values,
            baselines={"one of the row's values": 1 / pairs},
            draws=self.keys + self.values + self.gaps,
            facts={"length": length, "vocab": vocab, "pairs": pairs, "examples": examples},
        )

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Pairs, and queries at power-law gaps."""
        p = self.pairs
        inputs = np.zeros((len(raw), self.length), dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        keys = 1 + shuffled(raw[:, : self.keys])[:, :p]
        values = self.vocab // 2 + shuffled(raw[:, self.keys : -self.gaps])[:, :p]
        inputs[:, 0 : 2 * p : 2], inputs[:, 1 : 2 * p : 2] = keys, values
        # exponential races: in order of arrival, one draws without repetition with probability proportional to the rate
        uniform = ((raw[:, -self.gaps :] >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        rate = np.arange(1, self.gaps + 1) ** (POWER - 1)
        places = 2 * p + 2 * np.argsort(-np.log(uniform) / rate, axis=1, kind="stable")[:, :p]
        np.put_along_axis(inputs, places, keys, axis=1)
        np.put_along_axis(targets, places, values, axis=1)
        return inputs, targets

    def solve(self, inputs: Tensor) -> Tensor:
        """Each token's value, if it is a key of the row."""
        keys, values = inputs[:, 0 : 2 * self.pairs : 2], inputs[:, 1 : 2 * self.pairs : 2]
        same = inputs[:, :, None] == keys[:, None, :]  # b n p
        return torch.where(same, values[:, None, :], 0).sum(-1)
