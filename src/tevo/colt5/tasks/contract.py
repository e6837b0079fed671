"""What a question over a long input is: a house task whose answer is a short sequence of its own, scored as a whole.

Inputs (b, n) hold the question and the document, targets (b, t) the answer and its end sign: batches for an encoder-decoder.
With the right answer's tokens before it, a model whose every best token is right is a model that decodes the answer
greedily, so the exact match needs no decoding.

Letters: b rows, n tokens of an input, t tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tevo.bench.tasks.contract import IGNORED, Draws, Rows, Task, shuffled

__all__ = ["END", "PAD", "LongTask", "Oracle", "WordTask", "fill", "rooms", "spread"]

PAD, END = 0, 1  # as in T5


class Oracle(NamedTuple):
    """Which tokens of an input matter, (b, n) bool each; what a router that knew the answer would choose.

    Args:
        question: the words that say what is asked for.
        evidence: everything that has to be read for the answer, the question apart.
        answer: the tokens that the answer repeats, which are evidence too.
    """

    question: Tensor
    evidence: Tensor
    answer: Tensor


class LongTask(Task):
    """A task of long inputs and short answers, all of an answer right or nothing. ``PAD`` is no input's token."""

    metric: ClassVar[str] = "exact_match"

    def oracle(self, inputs: Tensor, targets: Tensor) -> Oracle:
        """Where question and answer stand, told from ``inputs`` (b, n) and ``targets`` (b, t) alone."""
        raise NotImplementedError

    def text(self, tokens: Sequence[int] | Tensor) -> str:
        """What the tokens of one input or answer say; padding and ends say nothing."""
        raise NotImplementedError

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Exact matches and rows, both 0-d float64, of ``logits`` (b, t, V); a NaN is a miss."""
        right = (logits.argmax(-1) == targets) & ~logits.isnan().any(-1)
        return (right | (targets == IGNORED)).all(-1).sum().double(), torch.tensor(len(targets)).double()

    def depth(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Where in the input the evidence begins, (b,) float64 from 0 to 1."""
        return self.oracle(inputs, targets).evidence.int().argmax(-1).double() / inputs.shape[1]


class WordTask(LongTask):
    """A long task whose tokens are whole words, ``words[i]`` for token i."""

    words: tuple[str, ...]

    def text(self, tokens: Sequence[int] | Tensor) -> str:
        """Its words."""
        return " ".join(self.words[int(token)] for token in tokens if int(token) not in (PAD, END))


def fill(raw: Draws, words: Rows) -> Rows:
    """Words drawn alike, for each number of ``raw``."""
    half = np.uint64(32)
    return words[((raw >> half) * np.uint64(len(words)) >> half).astype(np.int64)]


def rooms(tokens: int, width: int) -> int:
    """How many passages of ``width`` :func:`spread` has places for in so many tokens."""
    return max(0, (tokens - width + 1) // width)


def spread(raw: Draws, count: int, *, first: int, last: int, width: int) -> Rows:
    """Starts (r, count) of passages of ``width`` tokens in [first, last) that do not overlap, in random order.

    Places are ``width`` apart, and all of them alike likely. The whole grid is shifted by 0 to ``width`` - 1 tokens, so that
    no passage has a fixed place relative to blocks of tokens.

    Args:
        raw: (r, rooms(last - first, width) + 1).
        count: passages, at most as many as there are places.
        first: the first token they may take.
        last: the first behind them.
        width: tokens of each.
    """
    return first + fill(raw[:, :1], np.arange(width)) + shuffled(raw[:, 1:])[:, :count] * width
