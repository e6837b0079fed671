"""Pass key: a number is told once in a long text of other words, and asked for.

    what is the pass key ? <word> <word> ... the pass key is 7 3 1 9 . <word> ...        7 3 1 9

Nothing else in the text looks like a number, so that finding it needs no comparison with the question: this measures
reach over depth and length. The place is uniform over the text, or fixed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tevo.bench.tasks.contract import Draws, Rows
from tevo.colt5.tasks.contract import END, Oracle, WordTask, fill, rooms, spread
from tevo.colt5.tasks.words import FILLER

__all__ = ["Passkey"]

WORDS = ("<pad>", "</s>", "what", "is", "the", "pass", "key", "?", ".", *"0123456789", *FILLER)
QUESTION = tuple(map(WORDS.index, ("what", "is", "the", "pass", "key", "?")))
BEGINNING = tuple(map(WORDS.index, ("the", "pass", "key", "is")))
ZERO = WORDS.index("0")


class Passkey(WordTask):
    """Pass key in a long text.

    Args:
        length: tokens per input, >= 15 + 2 digits.
        digits: digits of the key, >= 1.
        depth: where its sentence stands, from 0, right behind the question, to 1, at the end; None: anywhere.
        examples: rows of each held-out split.
    """

    name = "passkey"
    words = WORDS

    def __init__(self, *, length: int = 2048, digits: int = 5, depth: float | None = None, examples: int = 512) -> None:
        if digits < 1 or length < 15 + 2 * digits:
            raise ValueError(
                f"task 'passkey': length={length} with digits={digits}, expected digits >= 1 and length >= 15 + 2 digits"
            )
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"task 'passkey': depth={depth}, expected a number from 0 to 1, or None for any")
        self.digits, self.at = digits, depth
        # begins, the digits, a full stop
        self.passage = len(BEGINNING) + digits + 1
        self.places = rooms(length - len(QUESTION), self.passage)
        super().__init__(
            vocab=len(WORDS),
            length=length,
            examples=examples,
            chance=10.0**-digits,
            baselines={},
            draws=length + digits + self.places + 1,
            # without a depth as in records from before there was one
            facts={
                "length": length,
                "digits": digits,
                "examples": examples,
                **({} if depth is None else {"depth": depth}),
            },
        )

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Filler, over which question and passage are written."""
        n, d = self.length, self.digits
        inputs = fill(raw[:, :n], np.arange(ZERO + 10, len(WORDS)))
        key = ZERO + fill(raw[:, n : n + d], np.arange(10))
        begin = len(QUESTION)
        if self.at is None:
            start = spread(raw[:, n + d :], 1, first=begin, last=n, width=self.passage)
        else:
            start = np.full((len(raw), 1), begin + round(self.at * (n - begin - self.passage)))
        inputs[:, :begin] = QUESTION
        lead = np.broadcast_to(BEGINNING, (len(raw), len(BEGINNING)))
        stop = np.full((len(raw), 1), WORDS.index("."))
        np.put_along_axis(inputs, start + np.arange(self.passage), np.concatenate([lead, key, stop], 1), axis=1)
        return inputs, np.concatenate([key, np.full((len(raw), 1), END)], 1)

    def solve(self, inputs: Tensor) -> Tensor:
        """The digits of each input, in their order, and the end sign."""
        digits = inputs[(inputs >= ZERO) & (inputs < ZERO + 10)].view(len(inputs), self.digits)
        return torch.cat([digits, torch.full_like(digits[:, :1], END)], 1)

    def oracle(self, inputs: Tensor, targets: Tensor) -> Oracle:
        """The question, the sentence with the key, the key."""
        answer = (inputs >= ZERO) & (inputs < ZERO + 10)
        at = torch.arange(self.length)
        begin = answer.int().argmax(-1, keepdim=True) - len(BEGINNING)
        evidence = (at >= begin) & (at < begin + self.passage)
        return Oracle((at < len(QUESTION)).expand_as(answer), evidence, answer)
