"""Rearranging: the marked words of a long text are said in an order of their own.

    copy       copy . <word> dabil <word> ! koven ! baben ! fovil <word> lunil ...            koven baben fovil
    reverse    they stand together too                                                        fovil baben koven
    selective  selective . <word> ! koven <word> dabil <word> ! baben <word> ! fovil ...      koven baben fovil
    sort       they stand apart too; the answer has the order of the vocabulary               baben fovil koven

As many words of the same kind stand in the text without a mark, so that only what stands before a word tells whether it is
said. No word of this kind occurs twice. Places are uniform over the text.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb, perm

import numpy as np
import torch
from torch import Tensor

from tevo.bench.tasks.contract import Draws, Rows, shuffled
from tevo.colt5.tasks.contract import END, Oracle, WordTask, fill, rooms, spread
from tevo.colt5.tasks.words import FILLER, syllables

__all__ = ["ORDERS", "Rearrange"]

# from the marked words (b, k) as they stand in the text to the answer
ORDERS: dict[str, Callable[[Rows], Rows]] = {
    "copy": lambda words: words,
    "reverse": lambda words: words[:, ::-1],
    "selective": lambda words: words,
    "sort": lambda words: np.sort(words, axis=1),
}
TOGETHER = ("copy", "reverse")
STOP, MARK = 2, 3
QUESTION = 2  # tokens
WIDTH = 2  # of a mark and its word


class Rearrange(WordTask):
    """Copy, reverse, selective copy, and sorting of marked words.

    Args:
        what: a name of ``ORDERS``.
        length: tokens per input, >= 4 marked + 3.
        marked: words with a mark, >= 1; as many have none.
        values: different words of their kind, 2 marked to 100.
        examples: rows of each held-out split.
    """

    name = "rearrange"

    def __init__(
        self, *, what: str = "copy", length: int = 2048, marked: int = 4, values: int = 32, examples: int = 512
    ) -> None:
        if what not in ORDERS:
            raise ValueError(f"task 'rearrange': what={what!r}, expected one of {', '.join(ORDERS)}")
        if marked < 1 or not 2 * marked <= values <= 100:
            raise ValueError(
                f"task 'rearrange': marked={marked} and values={values}, expected marked >= 1 and 2 marked <= values <= 100"
            )
        if length < 2 * WIDTH * marked + QUESTION + 1:
            raise ValueError(
                f"task 'rearrange': length={length} has no room for marked={marked} words and as many without a mark; "
                f"length >= {2 * WIDTH * marked + QUESTION + 1}"
            )
        self.words = ("<pad>", "</s>", ".", "!", *ORDERS, *FILLER, *syllables("il")[:values])
        self.what, self.marked, self.values = what, marked, values
        # words that stand together are placed as one is
        self.joined = WIDTH * (marked - 1) if what in TOGETHER else 0
        super().__init__(
            vocab=len(self.words),
            length=length,
            examples=examples,
            chance=1 / (comb if what == "sort" else perm)(values, marked),
            baselines={"words of the row, marked or not": 1 / comb(2 * marked, marked)},
            draws=length + values + rooms(length - QUESTION - self.joined, WIDTH) + 1,
            facts={"what": what, "length": length, "marked": marked, "values": values, "examples": examples},
        )

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Filler, over which the question, marks and words are written; the marked words."""
        n, k, b = self.length, self.marked, len(raw)
        word, which, where = np.split(raw, np.cumsum([n, self.values]), axis=1)
        begin = self.vocab - self.values
        inputs = fill(word, np.arange(begin - len(FILLER), begin))
        words = begin + shuffled(which)[:, : 2 * k]
        count = k + 1 if self.joined else 2 * k
        starts = spread(where, count, first=QUESTION, last=n - self.joined, width=WIDTH)
        marked, others = starts[:, : count - k], starts[:, count - k :]
        if self.joined:
            others = others + self.joined * (others > marked)
            marked = marked + WIDTH * np.arange(k)
        marked = np.sort(marked, axis=1)
        inputs[:, :QUESTION] = self.words.index(self.what), STOP
        np.put_along_axis(inputs, marked, MARK, axis=1)
        np.put_along_axis(inputs, np.concatenate([marked, others], 1) + 1, words, axis=1)
        return inputs, np.concatenate([ORDERS[self.what](words[:, :k]), np.full((b, 1), END)], 1)

    def _marked(self, inputs: Tensor) -> Tensor:
        """(b, n): what stands behind a mark."""
        found = torch.zeros_like(inputs, dtype=torch.bool)
        found[:, 1:] = inputs[:, :-1] == MARK
        return found

    def solve(self, inputs: Tensor) -> Tensor:
        """What stands behind the marks, in its order, and the end sign."""
        words = inputs[self._marked(inputs)].view(len(inputs), self.marked)
        if self.what == "reverse":
            words = words.flip(1)
        if self.what == "sort":
            words = words.sort(dim=1).values
        return torch.cat([words, torch.full_like(words[:, :1], END)], 1)

    def oracle(self, inputs: Tensor, targets: Tensor) -> Oracle:
        """What to do; marks and marked words; the words."""
        answer = self._marked(inputs)
        question = (torch.arange(self.length) < QUESTION).expand_as(answer)
        return Oracle(question, answer | (inputs == MARK), answer)
