"""Induction: what followed this token the last time?

Induction, by the rules of arXiv:2212.14052: the special token 0 stands once among random others and again at the end,
where its follower is asked.

    c a d 0 b a c d ... 0        scored at the end only
                        b

Repeated bigram, after arXiv:2209.11895: different tokens in random order, over and over, with a period that changes
from row to row; asked is the next token, wherever the present one was seen before.

    c a d b c a d b c        scored from the second c on
            a d b c a
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from tevo.bench.tasks.contract import IGNORED, Draws, Rows, Task, below, shuffled

__all__ = ["Induction", "RepeatedBigram"]


class Induction(Task):
    """Induction heads' task, one question per row.

    Args:
        length: tokens per row, >= 3.
        vocab: tokens, >= 3, of which 0 is the special one.
        examples: rows of each held-out split.
    """

    name = "induction"

    def __init__(self, *, length: int = 32, vocab: int = 16, examples: int = 512) -> None:
        if length < 3 or vocab < 3:
            raise ValueError(f"task 'induction': length={length} and vocab={vocab}, expected both >= 3")
        chance = 1 / (vocab - 1)
        super().__init__(
            vocab=vocab,
            length=length,
            examples=examples,
            chance=chance,
            # length - 2 ordinary tokens: the follower, or another that happens to be equal
            baselines={"one of the row's tokens": 1 / (length - 2) + (1 - 1 / (length - 2)) * chance},
            draws=length,
            facts={"length": length, "vocab": vocab, "examples": examples},
        )

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Random tokens, the special one twice."""
        inputs = 1 + below(raw, self.vocab - 1)
        targets = np.full_like(inputs, IGNORED)
        # the last column's number is free, for its token is the special one; the follower needs a place before it
        place = below(raw[:, -1:], self.length - 2)
        np.put_along_axis(inputs, place, 0, axis=1)
        inputs[:, -1] = 0
        targets[:, -1:] = np.take_along_axis(inputs, place + 1, axis=1)
        return inputs, targets

    def solve(self, inputs: Tensor) -> Tensor:
        """The follower of the first special token, everywhere."""
        place = (inputs == 0).int().argmax(-1, keepdim=True)  # argmax gives the first
        return inputs.gather(1, place + 1).expand_as(inputs)


class RepeatedBigram(Task):
    """Next token of a random sequence that repeats with a period of n/4 to n/2 tokens, drawn for each row.

    Args:
        length: tokens per row, >= 4.
        vocab: tokens, >= n/2; None for as many as the row has places.
        examples: rows of each held-out split.
    """

    name = "repeated_bigram"

    def __init__(self, *, length: int = 32, vocab: int | None = None, examples: int = 512) -> None:
        vocab = length if vocab is None else vocab
        if length < 4 or vocab < length // 2:
            raise ValueError(
                f"task 'repeated_bigram': length={length} and vocab={vocab}, expected length >= 4 and vocab >= length/2"
            )
        self.periods = range(length // 4, length // 2 + 1)
        questions = sum(length - p for p in self.periods)
        super().__init__(
            vocab=vocab,
            length=length,
            examples=examples,
            chance=1 / vocab,
            # every period's rows are as many, and a row of period p asks n - p questions
            baselines={"one of the row's tokens": sum((length - p) / p for p in self.periods) / questions},
            draws=vocab + 1,
            facts={"length": length, "vocab": vocab, "examples": examples},
        )

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """A permutation's first tokens, over and over."""
        period = self.periods[0] + below(raw[:, -1:], len(self.periods))
        at = np.arange(self.length + 1)
        rows = np.take_along_axis(shuffled(raw[:, :-1]), at % period, axis=1)
        return rows[:, :-1].copy(), np.where(at[:-1] >= period, rows[:, 1:], IGNORED)

    def solve(self, inputs: Tensor) -> Tensor:
        """The follower of each token's first appearance."""
        place = (inputs[:, :, None] == inputs[:, None, :]).int().argmax(-1)  # b n
        return inputs.gather(1, (place + 1).clamp(max=self.length - 1))
