"""A user's questions and answers as batches of rows of similar lengths.

An input is cut to ``length`` tokens and an output to ``answer``, their ends included. Lengths are rounded up to one of few:
``length``, its half, its quarter and so on (buckets). An epoch is a random order of all rows; in it those of one bucket follow
each other in batches, those left over go to the next longer bucket, and the last batch is filled up with rows drawn again. The
batches of an epoch come in random order. All of this follows from (seed, step) alone, so that a run goes on where it stopped.

Held out are a fifth of the records, in the order of the hash of their inputs: half for valid, half for test. Of a file given for
it, and of a zip's validation split (SCROLLS' test split has no answers), all are. Where there are several right answers, training
draws one; the score is of the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tevo.bench.tasks.contract import HELD_OUT, IGNORED, Rows, Task, below, shuffled
from tevo.colt5.objectives import bits, shown
from tevo.colt5.readers import Record, read_records
from tevo.colt5.tasks.contract import END, PAD
from tevo.colt5.tokens import Tokens

__all__ = ["Records", "edges_of"]

_SHORTEST = 32


def edges_of(length: int, shortest: int = _SHORTEST) -> list[int]:
    """``length``, its half and so on, at least ``shortest`` each, ascending."""
    found = [length]
    while found[-1] >= 2 * shortest:
        found.append(-(-found[-1] // 2))
    return found[::-1]


class Records(Task):
    """Inputs and outputs of a file.

    Args:
        data: as of :func:`tevo.colt5.readers.read_records`; of a zip, its splits train and validation.
        test_data: what is held out; empty: some of ``data``.
        tokens: of inputs and outputs.
        vocab: of the model.
        length: tokens of an input at most, its end among them.
        answer: tokens of an output at most, its end among them.
        examples: rows of each held-out split at most.
    """

    name: ClassVar[str] = "records"
    metric: ClassVar[str] = "bits_per_target"
    higher_is_better: ClassVar[bool] = False

    def __init__(
        self, *, data: str, tokens: Tokens, vocab: int, length: int, answer: int, examples: int, test_data: str = ""
    ) -> None:
        if vocab < tokens.size:
            raise ValueError(f"task 'records': vocab={vocab}, expected at least {tokens.size}, the tokens there are")
        self.tokens, self.answer_length = tokens, answer
        self.edges, self.answers = edges_of(length), edges_of(answer, 8)
        self.records, hashes = _split(data, test_data, examples)
        found = {split: [self.kept(one.input, length) for one in rows] for split, rows in self.records.items()}
        for split in HELD_OUT:
            # rows of similar lengths follow each other
            order = sorted(range(len(found[split])), key=lambda i: len(found[split][i][0]))
            found[split] = [found[split][i] for i in order]
            self.records[split] = [self.records[split][i] for i in order]
        self._inputs = {split: [row for row, _ in rows] for split, rows in found.items()}
        cut = {split: sum(was_cut for _, was_cut in rows) for split, rows in found.items()}
        self._outputs = {
            split: [[self.kept(text, answer)[0] for text in one.outputs] for one in rows]
            for split, rows in self.records.items()
        }
        self._epoch: tuple[tuple[int, int, int], list[Rows]] | None = None
        super().__init__(
            vocab=vocab,
            length=length,
            examples=min(len(self.records[split]) for split in HELD_OUT),
            chance=float(np.log2(vocab)),
            baselines={},
            draws=2 * len(self.records["train"]),
            facts={
                "length": length,
                "answer": answer,
                "vocab": vocab,
                "rows": {split: len(rows) for split, rows in self.records.items()},
                "inputs cut": cut,
                "sha256": hashes,
                **tokens.facts,
            },
        )

    def kept(self, text: str, most: int) -> tuple[npt.NDArray[Any], bool]:
        """The tokens of a text without its end sign, at most ``most`` with it, and whether some were cut off."""
        raw = np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8)
        stored = self.tokens.stored(raw)
        # a copy, so that what was cut off is not kept
        return stored[: most - 1].copy(), len(stored) > most - 1

    def encode(self, text: str) -> Tensor:
        """An input (1, n), with its end."""
        stored, _ = self.kept(text, self.length)
        return torch.from_numpy(np.append(stored.astype(np.int64) + self.tokens.offset, END))[None]

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        """As :meth:`tevo.bench.tasks.Task.batch`, of the module's rows, and "shown" (b, t)."""
        if split in HELD_OUT:
            rows = np.arange(index * size, min((index + 1) * size, self.examples))
            if not len(rows):
                raise ValueError(f"task 'records': {split!r} has {self.examples} rows, and no batch {index} of {size}")
            return self._rows(split, rows, np.zeros(len(rows), dtype=np.uint64))
        if split != "train":
            raise ValueError(f"task 'records': split is {split!r}, expected 'train', 'valid' or 'test'")
        epoch, at = divmod(index, -(-len(self._inputs["train"]) // size))
        if self._epoch is None or self._epoch[0] != (seed, epoch, size):
            self._epoch = (seed, epoch, size), self._batches(seed, epoch, size)
        return self._rows("train", self._epoch[1][at], self._raw("which", seed, index, 0, 1)[0])

    def _batches(self, seed: int, epoch: int, size: int) -> list[Rows]:
        raw = self._raw("order", seed, epoch, 0, 1)
        count = raw.shape[1] // 2
        order = shuffled(raw[:, :count])[0]
        bucket = np.searchsorted(self.edges, [len(self._inputs["train"][i]) + 1 for i in order])
        found: list[Rows] = []
        left = order[:0]
        for which in range(len(self.edges)):
            rows = np.concatenate([left, order[bucket == which]])
            full = len(rows) // size * size
            found += list(rows[:full].reshape(-1, size))
            left = rows[full:]
        if len(left):
            found.append(np.concatenate([left, np.resize(order, size - len(left))]))
        return [found[i] for i in shuffled(raw[:, count : count + len(found)])[0]]

    def _rows(self, split: str, rows: Rows, raw: npt.NDArray[np.uint64]) -> dict[str, Tensor]:
        inputs = [self._inputs[split][i] for i in rows]
        several = [self._outputs[split][i] for i in rows]
        # a row of training has numbers enough: there are two of each record
        drawn = np.resize(raw, len(rows))
        outputs = [one[int(below(drawn[k : k + 1], len(one))[0])] for k, one in enumerate(several)]
        return shown(
            {
                "inputs": torch.from_numpy(self._padded(inputs, self.edges, PAD)),
                "targets": torch.from_numpy(self._padded(outputs, self.answers, IGNORED)),
            }
        )

    def _padded(self, rows: Sequence[npt.NDArray[Any]], edges: Sequence[int], fill: int) -> Rows:
        """With ends, padded to the bucket of the longest."""
        width = edges[int(np.searchsorted(edges, max(map(len, rows)) + 1))]
        found = np.full((len(rows), width), fill, dtype=np.int64)
        for row, tokens in zip(found, rows, strict=True):
            row[: len(tokens)] = tokens.astype(np.int64) + self.tokens.offset
            row[len(tokens)] = END
        return found

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Bits and scored targets, of ``logits`` (b, t, V)."""
        return bits(logits, targets)


def _split(data: str, test_data: str, examples: int) -> tuple[dict[str, list[Record]], dict[str, str]]:
    """Records of each split, and the hashes of the files."""
    zipped = Path(data).suffix == ".zip"
    train = _ordered(read_records(data, split="train" if zipped else None))
    hashes = {"data": _sha256(data)}
    if test_data:
        held = _ordered(read_records(test_data, split="validation" if Path(test_data).suffix == ".zip" else None))
        hashes["test_data"] = _sha256(test_data)
    elif zipped:
        held = _ordered(read_records(data, split="validation"))
    else:
        count = max(2, len(train) // 5)
        held, train = train[:count], train[count:]
    half = len(held) // 2
    found = {"train": train, "valid": held[:half][:examples], "test": held[half:][:examples]}
    for split, rows in found.items():
        if not rows:
            raise ValueError(
                f"data: {data} leaves no record with an answer for {split!r}; give at least 3, and 2 of what is held out"
            )
    return found, hashes


def _ordered(records: Sequence[Record]) -> list[Record]:
    """Those with an answer, in the order of the hash of their inputs."""
    return sorted(
        (one for one in records if one.outputs),
        key=lambda one: hashlib.sha256(one.input.encode(errors="replace")).digest(),
    )


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
