"""Questions about the running CPython's standard library, whose answers a parser knows.

    signature   "signature of NAME?"              the parameters, as they stand between the brackets of "def NAME(...)"
    classes     "classes?"                        names of the classes in the text, in their order, with commas between
    docstring   "missing line of NAME?"           the first line of NAME's docstring, for which the text has "???"
    changed     "changed line?"                   the text stands there twice; the line that differs, as in the second

A token is a byte: byte + 3, after padding (0), end (1) and an unused sign (2), ByT5's scheme. The question is the first line, a
window of one module the rest; where a module is longer, the window is drawn so that the answer's depth is spread over it.
Whole packages are held out (:mod:`tevo.data.text`). An answer that occurs as often as "self" needs no reading: signatures of
fewer than two parameters are not asked for. Baseline: the best constant answer.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tevo.bench.tasks.contract import HELD_OUT, IGNORED, Draws, Rows, below, shuffled
from tevo.colt5.tasks.contract import END, PAD, LongTask, Oracle
from tevo.data.text import stdlib_corpus

__all__ = ["ASKS", "Modules", "bytes_of", "tokens_of"]

OFFSET = 3
VOCAB = 256 + OFFSET
HIDDEN = b"???"


class Item(NamedTuple):
    """One question about one module.

    Args:
        question: without its line's end.
        answer: what is right.
        begin: where the bytes begin that the text must show.
        end: where they end.
        put: what stands in the text in place of them; None: they themselves.
    """

    question: bytes
    answer: bytes
    begin: int
    end: int
    put: bytes | None = None


def tokens_of(text: bytes) -> Rows:
    """Bytes as tokens."""
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64) + OFFSET


def bytes_of(tokens: Sequence[int] | Tensor) -> bytes:
    """Tokens as bytes, whatever is none left out."""
    return bytes(int(token) - OFFSET for token in tokens if OFFSET <= int(token) < VOCAB)


def signatures(source: bytes, tree: ast.Module) -> Iterator[Item]:
    """Functions that are defined once, on one line, in the one way of writing it that the parser has."""
    for node in _functions(tree):
        head = f"def {node.name}(".encode()
        if source.count(head) != 1:
            continue
        parameters, begin = ast.unparse(node.args).encode(), source.index(head)
        end = begin + len(head) + len(parameters) + 1
        if b", " in parameters and source[begin:end] == head + parameters + b")":
            yield Item(f"signature of {node.name}?".encode(), parameters, begin, end)


def classes(source: bytes, tree: ast.Module) -> Iterator[Item]:
    """Modules with two to six classes; the text shows all of them."""
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    lines = _line_starts(source)
    if 2 <= len(nodes) <= 6:
        begin, last = lines[nodes[0].lineno - 1], nodes[-1]
        end = lines[last.lineno - 1] + len(f"class {last.name}")
        yield Item(b"classes?", ",".join(node.name for node in nodes).encode(), begin, end)


def docstrings(source: bytes, tree: ast.Module) -> Iterator[Item]:
    """First lines of docstrings of functions that are defined once."""
    for node in _functions(tree):
        text = ast.get_docstring(node, clean=False)
        line = text.strip().splitlines()[0].strip().encode() if text and text.strip() else b""
        if len(line) > 8 and source.count(f"def {node.name}(".encode()) == 1 and source.count(line) == 1:
            begin, at = source.index(f"def {node.name}(".encode()), source.index(line)
            if begin < at:
                yield Item(
                    f"missing line of {node.name}?".encode(), line, begin, at + len(line), source[begin:at] + HIDDEN
                )


def changes(source: bytes, tree: ast.Module) -> Iterator[Item]:
    """Lines with a name of six letters or more, if no other line is like them; its first and last letter change places."""
    lines, known = source.split(b"\n"), set(re.findall(rb"\w+", source))
    starts, often = _line_starts(source), Counter(lines)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or len(node.id) < 6 or not node.id.isascii():
            continue
        name, begin, at = node.id.encode(), starts[node.lineno - 1], node.col_offset
        line, swapped = source[begin : starts[node.lineno]].rstrip(b"\r\n"), name[-1:] + name[1:-1] + name[:1]
        if swapped not in known and often[line] == 1 and line[at : at + len(name)] == name:
            new = line[:at] + swapped + line[at + len(name) :]
            yield Item(b"changed line?", new.strip(), begin, begin + len(line), new)


ASKS: dict[str, Callable[[bytes, ast.Module], Iterator[Item]]] = {
    "signature": signatures,
    "classes": classes,
    "docstring": docstrings,
    "changed": changes,
}


class Modules(LongTask):
    """Questions about the standard library's modules.

    Args:
        ask: a name of ``ASKS``.
        length: bytes of question and text.
        answer: bytes of the longest answer; items with a longer one are left out.
        examples: rows of each held-out split, spread over it; fewer where it has fewer.
    """

    name = "modules"

    def __init__(self, *, ask: str = "signature", length: int = 4096, answer: int = 48, examples: int = 200) -> None:
        if ask not in ASKS:
            raise ValueError(f"task 'modules': ask={ask!r}, expected one of {', '.join(ASKS)}")
        if length < 256 or answer < 8:
            raise ValueError(
                f"task 'modules': length={length} and answer={answer}, expected at least 256 and 8 bytes of them"
            )
        self.ask, self.answer = ask, answer
        self.length = length
        self.corpus = stdlib_corpus()
        self._items: dict[str, list[tuple[bytes, Item]]] = {}
        rows = min(examples, *(len(self.items(split)) for split in HELD_OUT))
        if rows < 1:
            raise ValueError(
                f"task 'modules': no {ask!r} question fits into length={length} with answer={answer}; make them greater"
            )
        self._chosen = {split: np.arange(rows) * len(self.items(split)) // rows for split in HELD_OUT}
        common = Counter(self.items("valid")[i][1].answer for i in self._chosen["valid"])
        super().__init__(
            vocab=VOCAB,
            length=length,
            examples=rows,
            chance=0.0,
            baselines={"one answer for all": max(common.values()) / rows},
            draws=2,
            facts={"ask": ask, "length": length, "answer": answer, "examples": rows, "corpus": self.corpus.facts()},
        )

    def items(self, split: str) -> list[tuple[bytes, Item]]:
        """All questions of a split, each with its module, in an order that mixes modules; parsed when first asked for."""
        if split not in self._items:
            self._items[split] = self._read(split)
        return self._items[split]

    def _read(self, split: str) -> list[tuple[bytes, Item]]:
        root = Path(sysconfig.get_path("stdlib"))
        found = []
        for file in self.corpus.files[split]:
            source = (root / file).read_bytes()
            try:
                tree = ast.parse(source)
            except SyntaxError:
                # templates that are no module
                continue
            found += [(source, item) for item in ASKS[self.ask](source, tree) if self._fits(item)]
        order = shuffled(np.random.Philox(0).random_raw(len(found))[None])[0] if found else []
        return [found[i] for i in order]

    def _fits(self, item: Item) -> bool:
        shown = item.end - item.begin if item.put is None else len(item.put)
        return 0 < len(item.answer) <= self.answer and shown <= self._room(item)

    def _room(self, item: Item) -> int:
        """Bytes of one text."""
        room = self.length - len(item.question) - 1
        return (room - 1) // 2 if self.ask == "changed" else room

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Question, text, padding; answer, end."""
        items = self.items(split)
        inputs = np.full((len(raw), self.length), PAD, dtype=np.int64)
        targets = np.full((len(raw), self.answer + 1), IGNORED, dtype=np.int64)
        which = self._chosen[split][first : first + len(raw)] if split in HELD_OUT else below(raw[:, 0], len(items))
        for row, i in enumerate(which):
            source, item = items[i]
            text, answer = self._show(source, item, raw[row, 1:]), item.answer
            inputs[row, : len(text)] = tokens_of(text)
            targets[row, : len(answer) + 1] = [*tokens_of(answer), END]
        return inputs, targets

    def _show(self, source: bytes, item: Item, raw: Draws) -> bytes:
        room = self._room(item)
        shown = source[item.begin : item.end] if item.put is None else item.put
        # window of the module after the change; as early or late as the answer and the module's ends allow
        changed = source[: item.begin] + shown + source[item.end :]
        low = max(0, item.begin + len(shown) - room)
        high = max(low, min(item.begin, len(changed) - room))
        start = low + int(below(raw, high - low + 1)[0])
        text = changed[start : start + room]
        if self.ask == "changed":
            # as long as before
            text = source[start : start + room] + b"\n" + text
        return item.question + b"\n" + text

    def text(self, tokens: Sequence[int] | Tensor) -> str:
        """Its bytes as UTF-8."""
        return bytes_of(tokens).decode("utf-8", errors="replace")

    def oracle(self, inputs: Tensor, targets: Tensor) -> Oracle:
        """The question's line; the lines with an answer's parts, or with what hides it; the parts themselves."""
        masks = torch.zeros(3, *inputs.shape, dtype=torch.bool)
        for row, (tokens, target) in enumerate(zip(inputs, targets, strict=True)):
            text, answer = bytes_of(tokens), bytes_of(target)
            body = text.index(b"\n") + 1
            masks[0, row, : body - 1] = True
            for begin, end in self._found(text, body, answer):
                masks[2, row, begin:end] = self.ask != "docstring"
                line = max(text.rfind(b"\n", 0, begin) + 1, body)
                stop = text.find(b"\n", end)
                masks[1, row, line : len(text) if stop < 0 else stop] = True
        return Oracle(*masks)

    def _found(self, text: bytes, body: int, answer: bytes) -> list[tuple[int, int]]:
        """Where the parts of the answer stand."""
        if self.ask == "signature":
            name = text[len(b"signature of ") : body - 2]
            begin = text.index(b"def " + name + b"(", body) + len(name) + 5
            return [(begin, begin + len(answer))]
        if self.ask == "classes":
            found, at = [], body - 1
            for name in answer.split(b","):
                at = text.index(b"\nclass " + name, at) + len(b"\nclass ")
                found.append((at, at + len(name)))
            return found
        if self.ask == "docstring":
            name = text[len(b"missing line of ") : body - 2]
            near = text.find(b"def " + name + b"(", body)
            begin = text.index(HIDDEN, max(near, body))
            return [(begin, begin + len(HIDDEN))]
        begin = text.index(answer, body)
        return [(begin, begin + len(answer))]


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def _line_starts(source: bytes) -> list[int]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts
