"""Next byte of real text: random windows of the train split, a fixed cover of the held-out splits.

score = -1/(r n) sum_{r, t} log2 p(x_{t+1} | x_1 .. x_t)        bits per byte, each row's memory starting empty
"""

from __future__ import annotations

import os

import numpy as np

from tevo.bench.tasks.contract import HELD_OUT, Draws, Rows, Task, below
from tevo.data.text import SPLITS, Bytes, bigram_bits_of, files_corpus, stdlib_corpus, unigram_bits_of

__all__ = ["Text"]


class Text(Task):
    """The standard library's source, or the user's own text.

    Held-out rows are windows spread evenly over the split, no byte of which is scored twice. The baselines are scored
    on the very bytes of the valid rows, and are fitted on the whole train split.

    Args:
        data: a text file or a folder; None for the standard library.
        length: bytes scored per row.
        examples: rows of each held-out split; fewer where the split is too short for as many.
    """

    name = "text"
    metric = "bits_per_byte"
    higher_is_better = False

    def __init__(self, *, data: str | os.PathLike[str] | None = None, length: int = 256, examples: int = 256) -> None:
        if length < 1 or examples < 1:
            raise ValueError(f"task 'text': length={length} and examples={examples}, expected both >= 1")
        self.corpus = stdlib_corpus() if data is None else files_corpus(data)
        for split in SPLITS:
            if len(self.corpus.splits[split]) <= length:
                raise ValueError(
                    f"task 'text': length={length} needs {length + 1} bytes in each split, and {split!r} of "
                    f"{self.corpus.name!r} has {len(self.corpus.splits[split])}; give more text or a smaller length"
                )
        windows = {split: (len(self.corpus.splits[split]) - 1) // length for split in HELD_OUT}
        rows = min(examples, *windows.values())
        # in units of whole windows, so that none overlap
        self._starts = {split: np.arange(rows) * windows[split] // rows * length for split in HELD_OUT}
        train, valid = self.corpus.splits["train"], self._windows("valid", self._starts["valid"], length)
        super().__init__(
            vocab=256,
            length=length,
            examples=rows,
            chance=8.0,
            baselines={
                "unigram": unigram_bits_of(train, valid[:, 1:]),
                "bigram": bigram_bits_of(train, valid[:, :-1], valid[:, 1:]),
            },
            draws=1,
            facts={"length": length, "examples": rows, "corpus": self.corpus.facts()},
        )

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Windows of n + 1 bytes, once without the last and once without the first."""
        if split in HELD_OUT:
            starts = self._starts[split][first : first + len(raw)]
        else:
            starts = below(raw[:, 0], len(self.corpus.splits[split]) - self.length)
        rows = self._windows(split, starts, self.length).astype(np.int64)
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def _windows(self, split: str, starts: Rows, length: int) -> Bytes:
        return self.corpus.splits[split][starts[:, None] + np.arange(length + 1)]  # r n+1
