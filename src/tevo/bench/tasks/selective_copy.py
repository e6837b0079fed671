"""Selective copy: a few tokens among blanks, to be given back in their order, without the blanks, at the end.

    .  .  a  .  b  .  .  c  .  ?  ?  ?        scored at the markers only
                               a  b  c

By the rules of arXiv:2312.00752: tokens drawn independently, their places at random. Token 0 is blank, 1 the marker.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tevo.bench.tasks.contract import IGNORED, Draws, Rows, Task, below, shuffled

__all__ = ["SelectiveCopy"]


class SelectiveCopy(Task):
    """Selective copy.

    Args:
        length: tokens per row, markers included, >= 2 tokens.
        vocab: tokens, >= 4, of which two are blank and marker.
        tokens: tokens to be copied, >= 1.
        examples: rows of each held-out split.
    """

    name = "selective_copy"

    def __init__(self, *, length: int = 32, vocab: int = 16, tokens: int = 8, examples: int = 512) -> None:
        if tokens < 1 or length < 2 * tokens:
            raise ValueError(
                f"task 'selective_copy': length={length} with tokens={tokens}, expected tokens >= 1 and "
                "length >= 2 tokens"
            )
        if vocab < 4:
            raise ValueError(
                f"task 'selective_copy': vocab={vocab}, expected >= 4: blank, marker and two to tell apart"
            )
        self.tokens = tokens
        chance = 1 / (vocab - 2)
        super().__init__(
            vocab=vocab,
            length=length,
            examples=examples,
            chance=chance,
            # the right one of them, or another that happens to be equal
            baselines={"one of the row's tokens": 1 / tokens + (1 - 1 / tokens) * chance},
            draws=length,
            facts={"length": length, "vocab": vocab, "tokens": tokens, "examples": examples},
        )

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Tokens at random places before the markers."""
        before = self.length - self.tokens
        inputs = np.zeros((len(raw), self.length), dtype=np.int64)
        targets = np.full_like(inputs, IGNORED)
        places = np.sort(shuffled(raw[:, :before])[:, : self.tokens], axis=1)
        kept = 2 + below(raw[:, before:], self.vocab - 2)
        np.put_along_axis(inputs, places, kept, axis=1)
        inputs[:, before:] = 1
        targets[:, before:] = kept
        return inputs, targets

    def solve(self, inputs: Tensor) -> Tensor:
        """The tokens that are neither blank nor marker, in order, at the markers."""
        answers = torch.zeros_like(inputs)
        for row, answer in zip(inputs, answers, strict=True):
            answer[row == 1] = row[row > 1]
        return answers
