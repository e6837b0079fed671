"""ListOps: the value of a nested list of operations on digits, by the rules of Long Range Arena.

    [MAX 4 [MIN 9 2 7 ] [SM 6 8 ] ]        4

A node is a digit with probability 3/4, and always at the greatest depth; else an operator with 2 to 10 children:

    MIN, MAX    the least and the greatest of its values
    MED         their median, rounded down
    SM          their sum modulo 10

A tree is kept if its tokens, two for each operator and one for each digit, are more than a quarter of the input's length and
fewer than all of it: more than 500 and fewer than 2,000 by default, as in Long Range Arena. Trees are unique: each belongs to
one split by its hash, and none occurs twice in a held-out one. Behind it stands padding.

:func:`to_tsv` and :func:`from_tsv` write and read the files of Long Range Arena, whose trees are nested pairs:

    ( ( ( [MAX 4 ) 2 ) ] )        for        [MAX 4 2 ]

Source: ListOps (1804.06028); Long Range Arena (2011.04006) and the generator published with it.
"""

from __future__ import annotations

import csv
import hashlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tevo.bench.tasks.contract import HELD_OUT, Draws, Rows
from tevo.colt5.tasks.contract import END, PAD, Oracle, WordTask

__all__ = ["ListOps", "Node", "from_tsv", "parse", "to_tsv"]

_VALUES: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
OPERATORS = tuple(_VALUES)
WORDS = ("<pad>", "</s>", *"0123456789", *OPERATORS, "]")
TOKEN = {word: token for token, word in enumerate(WORDS)}
ZERO, FIRST, CLOSE = TOKEN["0"], TOKEN["[MIN"], TOKEN["]"]
HEADER = ["Source", "Target"]
# of 8 trees 6 are for training
_PARTS = 8
_SPLITS = {0: "valid", 1: "test"}
_TRIES = 50_000


class Node(NamedTuple):
    """A digit or an operation, in words ``begin`` to ``end`` of a text; a digit has no children."""

    word: str
    value: int
    begin: int
    end: int
    children: tuple[Node, ...] = ()


def parse(words: Sequence[str]) -> Node:
    """The tree that words say, with all its values.

    Raises:
        ValueError: they are not one whole tree.
    """
    # what is open, from the outermost to the innermost: each operation's place and the children it has so far
    open_: list[tuple[int, list[Node]]] = [(-1, [])]
    for at, word in enumerate(words):
        if word in OPERATORS:
            open_.append((at, []))
            continue
        if word == "]" and len(open_) > 1:
            begin, children = open_.pop()
            if not children:
                raise ValueError(f"word {begin + 1} of the list, {words[begin]!r}, has nothing to work on")
            node = Node(words[begin], _worth(words[begin], children), begin, at + 1, tuple(children))
        elif len(word) == 1 and word in "0123456789":
            node = Node(word, int(word), at, at + 1)
        else:
            raise ValueError(f"word {at + 1} of the list is {word!r}, expected a digit, an operator or the end of one")
        open_[-1][1].append(node)
    roots = open_[0][1]
    if len(open_) > 1 or len(roots) != 1:
        raise ValueError(
            f"the list has {len(open_) - 1} operators without an end and {len(roots)} whole trees, expected 0 and 1"
        )
    return roots[0]


def _worth(word: str, children: Sequence[Node]) -> int:
    if word == "[SM":
        return sum(child.value for child in children) % 10
    ranked = sorted(child.value for child in children)
    last = len(ranked) - 1
    low, high = {"[MIN": (0, 0), "[MAX": (last, last), "[MED": (last // 2, (last + 1) // 2)}[word]
    return (ranked[low] + ranked[high]) // 2


def _deciding(node: Node) -> list[Node]:
    """The fewest children of an operation that give its value without the others: all for SM, and else the first that has it.

    The two in the middle for a MED that none has.
    """
    if node.word == "[SM":
        return list(node.children)
    last = len(node.children) - 1
    ranked = sorted(node.children, key=lambda child: child.value)
    return [child for child in node.children if child.value == node.value][:1] or ranked[last // 2 : last // 2 + 2]


class ListOps(WordTask):
    """Nested operations on lists of digits.

    Args:
        length: tokens per input; a tree has fewer, and more than a quarter of them.
        depth: levels of a tree, >= 2, its leaves among them.
        children: the most of an operation, >= 2.
        examples: rows of each held-out split.
    """

    name = "listops"
    words = WORDS

    def __init__(self, *, length: int = 2000, depth: int = 10, children: int = 10, examples: int = 2000) -> None:
        if length < 8 or depth < 2 or children < 2:
            raise ValueError(
                f"task 'listops': length={length}, depth={depth} and children={children}, expected at least 8, 2 and 2"
            )
        self.length, self.levels, self.children, self.examples = length, depth, children, examples
        self.draws = 2
        self._held: dict[str, dict[bytes, int]] = {split: {} for split in HELD_OUT}
        super().__init__(
            vocab=len(WORDS),
            length=length,
            examples=examples,
            chance=0.1,
            baselines=self._guesses() if examples > 0 else {},
            draws=self.draws,
            facts={"length": length, "depth": depth, "children": children, "examples": examples},
        )

    def _guesses(self) -> dict[str, float]:
        rows = self._held_out("valid", self.examples)
        answers = Counter(answer for _, answer in rows)
        both = Counter((tree[0], answer) for tree, answer in rows)
        best = {tree[0]: max(both[tree[0], answer] for answer in range(10)) for tree, _ in rows}
        return {
            "one answer for all": max(answers.values()) / self.examples,
            "one answer for each outermost operator": sum(best.values()) / self.examples,
        }

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Trees and padding; their values and the end sign."""
        if split in HELD_OUT:
            rows = self._held_out(split, first + len(raw))[first:]
        else:
            rows = [self._tree(split, numbers, {}) for numbers in raw]
        inputs = np.full((len(raw), self.length), PAD, dtype=np.int64)
        for row, (tree, _) in enumerate(rows):
            inputs[row, : len(tree)] = list(tree)
        return inputs, np.array([[ZERO + answer, END] for _, answer in rows], dtype=np.int64)

    def _held_out(self, split: str, count: int) -> list[tuple[bytes, int]]:
        """The first rows of a held-out split, none of them twice; made when first asked for."""
        held = self._held[split]
        while len(held) < count:
            tree, answer = self._tree(split, self._raw(split, 0, 0, len(held), 1)[0], held)
            held[tree] = answer
        return list(held.items())[:count]

    def _tree(self, split: str, raw: Draws, known: dict[bytes, int]) -> tuple[bytes, int]:
        """The first tree of the random stream that ``raw`` (2,) begins which fits, is of the split and not yet known.

        Raises:
            ValueError: none of many was.
        """
        stream = _numbers(raw)
        for _ in range(_TRIES):
            tokens: list[int] = []
            answer = self._grow(stream, 1, tokens)
            tree = bytes(tokens)
            if 4 * len(tree) > self.length and answer >= 0 and _split_of(tree) == split and tree not in known:
                return tree, answer
        raise ValueError(
            f"task 'listops': of {_TRIES} trees with depth={self.levels} and children={self.children} no new one has more than "
            f"{self.length // 4} and fewer than length={self.length} tokens; make length, depth or children greater, or "
            f"examples={self.examples} smaller"
        )

    def _grow(self, stream: Iterator[int], level: int, tokens: list[int]) -> int:
        """Append a node at ``level``, from 1 on; its value, or -1 if it does not fit. The root is no leaf."""
        if len(tokens) + level >= self.length:
            return -1
        raw = next(stream)
        # two bits say whether it is a digit, 32 others which one
        kind, rest = raw >> 62, raw & 0xFFFFFFFF
        if level == self.levels or (kind and level > 1):
            digit = rest * 10 >> 32
            tokens.append(ZERO + digit)
            return digit
        which, count = divmod(rest * len(OPERATORS) * (self.children - 1) >> 32, self.children - 1)
        tokens.append(FIRST + which)
        values = []
        for _ in range(2 + count):
            value = self._grow(stream, level + 1, tokens)
            if value < 0:
                return -1
            values.append(value)
        tokens.append(CLOSE)
        return _VALUES[OPERATORS[which]](values)

    def _parsed(self, inputs: Tensor) -> list[Node]:
        return [parse([WORDS[token] for token in row if token != PAD]) for row in inputs.tolist()]

    def solve(self, inputs: Tensor) -> Tensor:
        """The value of each tree, and the end sign."""
        return torch.tensor([[ZERO + node.value, END] for node in self._parsed(inputs)])

    def oracle(self, inputs: Tensor, targets: Tensor) -> Oracle:
        """The outermost operator; what alone gives the value; the digit that is handed up to become it, if there is one.

        Of each operation on the way, down from the outermost, the operator, the end, and the fewest children that give its
        value without the others are evidence: all for SM, the two in the middle for a MED that lies between them, else the
        first that has the value and is handed up. A tree of the question and the evidence has the value of the whole one;
        finding them takes the others too.
        """
        question, evidence, answer = torch.zeros(3, *inputs.shape, dtype=torch.bool)
        for row, root in enumerate(self._parsed(inputs)):
            question[row, 0] = True
            todo = [root]
            while todo:
                node = todo.pop()
                evidence[row, [node.begin, node.end - 1]] = True
                todo += _deciding(node) if node.children else []
            node = root
            while node.children and len(deciding := _deciding(node)) == 1:
                node = deciding[0]
            answer[row, node.begin] = not node.children
        return Oracle(question, evidence & ~question, answer)


def _numbers(raw: Draws) -> Iterator[int]:
    """Random 64-bit numbers without an end, of a stream that ``raw`` (2,) names."""
    bits = np.random.Philox(key=int(raw[0]) << 64 | int(raw[1]))
    while True:
        yield from bits.random_raw(256).tolist()


def _split_of(tree: bytes) -> str:
    return _SPLITS.get(hashlib.sha256(tree).digest()[0] % _PARTS, "train")


def _nested(node: Node) -> str:
    if not node.children:
        return node.word
    found = node.word
    for child in node.children:
        found = f"( {found} {_nested(child)} )"
    return f"( {found} ] )"


def to_tsv(file: Path, rows: Iterable[tuple[str, int]]) -> None:
    """Write trees, such as ``[MAX 4 2 ]``, and their values as a file of Long Range Arena."""
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter="\t")
        writer.writerow(HEADER)
        writer.writerows((_nested(parse(tree.split())), value) for tree, value in rows)


def from_tsv(file: Path) -> Iterator[tuple[str, int]]:
    """Trees, such as ``[MAX 4 2 ]``, and their values, of a file of Long Range Arena.

    Raises:
        ValueError: a line is not a tree and its value, or the first is no header.
    """
    with file.open(encoding="utf-8", newline="") as lines:
        for number, cells in enumerate(csv.reader(lines, delimiter="\t"), 1):
            if number == 1:
                if cells != HEADER:
                    raise ValueError(f"{file}: the first line is {cells}, expected the header {HEADER}")
                continue
            if len(cells) != 2:
                raise ValueError(f"{file}, line {number}: {len(cells)} columns, expected a tree, a tab and its value")
            words = [word for word in cells[0].split() if word not in ("(", ")")]
            try:
                node = parse(words)
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from error
            # both forms are in use
            if " ".join(cells[0].split()) not in (_nested(node), " ".join(words)):
                raise ValueError(f"{file}, line {number}: its round brackets are not those of nested pairs, or none")
            if cells[1].strip() != str(node.value):
                raise ValueError(f"{file}, line {number}: the value is {cells[1]!r}, but its tree's is {node.value}")
            yield " ".join(words), node.value
