"""Code: the parameters of a named function, in a long window of a module of the running CPython's standard library.

    what are the parameters of the function NAME ?   import os ... def NAME ( self , other , key ) : ...
                                                                            <1> self <2> other <3> key

A token is a word: a name, a number, or a sign; line ends and spaces are left out. Keywords, signs, "self" and the words of
the question have tokens of their own. All other words of a row get tokens drawn anew for it, as entities do in the reading
task of Hermann et al. (arXiv 1506.03340): nothing can be known of a function by its name, no vocabulary is needed, and an
answer is spelled by the words that stand in the text. Functions are asked for that a module defines once, with two or three
parameters, without defaults, stars and annotations, that no other of these functions has: what is most frequent in a text
would need no reading. The window is drawn so that the depth of the answer is spread over it; whole packages are held out
(:mod:`tevo.data.text`).
"""

from __future__ import annotations

import keyword
import re
import string
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tevo.bench.tasks.contract import HELD_OUT, IGNORED, Draws, Rows, below, shuffled
from tevo.colt5.tasks.contract import END, PAD, LongTask, Oracle
from tevo.data.text import stdlib_corpus

__all__ = ["Code", "Encoded", "words_of"]

SLOTS = 3  # parameters asked for at most
LEAD = ("what", "are", "the", "parameters", "of", "the", "function")
FIXED = (*sorted(keyword.kwlist), *string.punctuation, "self", *dict.fromkeys(LEAD))
KNOWN = ("<pad>", "</s>", *(f"<{i + 1}>" for i in range(SLOTS)), *FIXED)
FIRST = KNOWN.index("<1>")
NAME = len(LEAD)  # place of the name in the question
TOKEN = {word: token for token, word in enumerate(KNOWN)}
DEF, OPEN, CLOSE, COMMA = (TOKEN[word] for word in ("def", "(", ")", ","))
QUESTION = NAME + 2  # tokens
_LEAD = [TOKEN[word] for word in LEAD]
_WORD = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Names, numbers and signs of a text; signs outside ASCII are left out."""
    return [word for word in _WORD.findall(text) if word.isidentifier() or word.isdigit() or word in TOKEN]


class Item(NamedTuple):
    """A function: its module, the place of its ``def`` among the module's words, and its parameters."""

    module: int
    at: int
    parameters: tuple[str, ...]


class Encoded(NamedTuple):
    """An input (n,) and the words of its tokens."""

    tokens: Tensor
    words: dict[int, str]


class Code(LongTask):
    """Parameters of a named function.

    Args:
        length: words of question and window; modules with fewer are left out.
        names: tokens for words without one of their own; a row with more of them shares tokens, but none of two functions'
            names.
        parameters: most parameters of a function that is asked for, 2 or 3.
        told: share of training rows whose question shows the parameters too: how to answer can be learned from them before
            how to find.
        examples: rows of each held-out split, spread over it; fewer where it has fewer.
    """

    name = "code"

    def __init__(
        self, *, length: int = 2048, names: int = 512, parameters: int = 3, told: float = 0.0, examples: int = 200
    ) -> None:
        if length < 32 or names < 32:
            raise ValueError(f"task 'code': length={length} and names={names}, expected at least 32 each")
        if not 2 <= parameters <= SLOTS:
            raise ValueError(f"task 'code': parameters={parameters}, expected 2 or 3")
        if not 0 <= told <= 1:
            raise ValueError(f"task 'code': told={told}, expected a share from 0 to 1")
        self.length, self.names, self.parameters, self.told = length, names, parameters, told
        self.corpus = stdlib_corpus()
        self._items: dict[str, list[Item]] = {}
        self._modules: dict[str, list[tuple[list[str], Rows]]] = {}
        rows = min(examples, *(len(self.items(split)) for split in HELD_OUT))
        if rows < 1:
            raise ValueError(f"task 'code': no held-out module has length={length} words; make it shorter")
        self._chosen = {split: np.arange(rows) * len(self.items(split)) // rows for split in HELD_OUT}
        common = Counter(self.items("valid")[i].parameters for i in self._chosen["valid"])
        super().__init__(
            vocab=len(KNOWN) + names,
            length=length,
            examples=rows,
            chance=0.0,
            baselines={"one answer for all": max(common.values()) / rows},
            draws=3 + names,
            facts={
                "length": length,
                "names": names,
                "parameters": parameters,
                "told": told,
                "examples": rows,
                "corpus": self.corpus.facts(),
            },
        )

    def items(self, split: str) -> list[Item]:
        """All functions of a split, in an order that mixes modules; read when first asked for."""
        if split not in self._items:
            found: list[Item] = []
            modules: list[tuple[list[str], Rows]] = []
            for table, places, functions in _modules(split):
                if len(places) >= self.length - QUESTION:
                    found += [Item(len(modules), at, given) for at, given in functions if len(given) <= self.parameters]
                    modules.append((table, places))
            order = shuffled(np.random.Philox(0).random_raw(len(found))[None])[0] if found else []
            self._modules[split], self._items[split] = modules, [found[i] for i in order]
        return self._items[split]

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Question and window; numbered parameters and the end sign."""
        items = self.items(split)
        inputs = np.full((len(raw), self.length), PAD, dtype=np.int64)
        targets = np.full((len(raw), 2 * SLOTS + 1), IGNORED, dtype=np.int64)
        which = self._chosen[split][first : first + len(raw)] if split in HELD_OUT else below(raw[:, 0], len(items))
        told = ((raw[:, 2] >> np.uint64(11)) * 2.0**-53 < self.told) & (split == "train")
        for row, i in enumerate(which):
            item = items[i]
            table, places = self._modules[split][item.module]
            shown = 2 * len(item.parameters) + 1 if told[row] else 0
            room = self.length - QUESTION - shown
            low = max(0, item.at + 2 * len(item.parameters) + 3 - room)
            high = max(low, min(item.at, len(places) - room))
            start = low + int(below(raw[row, 1:2], high - low + 1)[0])
            window, at = places[start : start + room], item.at - start
            tokens, _ = self._tokens(table, window, raw[row, 3:])
            answer = tokens[at + 3 : at + 3 + 2 * len(item.parameters) : 2]
            line = np.concatenate([_LEAD, tokens[at + 1 : at + 2 + shown], [TOKEN["?"]], tokens])
            inputs[row, : len(line)] = line
            targets[row, : 2 * len(answer)] = np.stack([FIRST + np.arange(len(answer)), answer], 1).ravel()
            targets[row, 2 * len(answer)] = END
        return inputs, targets

    def _tokens(self, table: Sequence[str], window: Rows, raw: Draws) -> tuple[Rows, dict[int, str]]:
        """Tokens of ``window``, which are places in ``table``, and what they mean; names are drawn by ``raw`` (names,)."""
        present, back = np.unique(window, return_inverse=True)
        words = [table[i] for i in present]
        defined = {table[i] for i in window[1:][_is(table, window[:-1], "def")]}
        free = len(KNOWN) + shuffled(raw[None])[0]
        # functions first, so that they share no token unless there are more than tokens
        order = sorted((i for i, word in enumerate(words) if word not in TOKEN), key=lambda i: words[i] not in defined)
        own = np.array([TOKEN.get(word, PAD) for word in words], dtype=np.int64)
        own[order] = free[np.arange(len(order)) % self.names]
        return own[back], {
            int(own[i]): words[i] for i in [*reversed(order), *np.flatnonzero(own < len(KNOWN)).tolist()]
        }

    def encode(self, name: str, text: str) -> Encoded:
        """A question about ``text``, of any length, as an input.

        Raises:
            ValueError: ``name`` is no word of the text.
        """
        words = words_of(text)
        if name not in words:
            raise ValueError(f"the text has no {name!r}, expected the name of a function that it defines")
        table, places = np.unique(words, return_inverse=True)
        tokens, meaning = self._tokens(
            table.tolist(), places.astype(np.int64), np.random.Philox(0).random_raw(self.names)
        )
        line = [*_LEAD, int(tokens[words.index(name)]), TOKEN["?"], *tokens.tolist()]
        known = dict(enumerate(KNOWN))
        return Encoded(torch.tensor(line), {**known, **meaning})

    def _told(self, inputs: Tensor) -> Tensor:
        """(b,): the place of the ``def`` of the function that is asked for."""
        same = (inputs[:, :-1] == DEF) & (inputs[:, 1:] == inputs[:, NAME : NAME + 1])
        return same.int().argmax(-1)

    def solve(self, inputs: Tensor) -> Tensor:
        """What stands behind ``def NAME (``, numbered, up to the bracket's end."""
        at = self._told(inputs)[:, None]
        found = torch.full((len(inputs), 2 * SLOTS + 1), END)
        # behind the last word there is nothing to follow
        given = inputs.gather(1, (at + torch.arange(3, 3 + 2 * SLOTS)).clamp(max=inputs.shape[1] - 1))
        going = torch.ones(len(inputs), dtype=torch.bool)
        for slot in range(SLOTS):
            found[going, 2 * slot], found[going, 2 * slot + 1] = FIRST + slot, given[going, 2 * slot]
            going = going & (given[:, 2 * slot + 1] == COMMA)
        return found

    def oracle(self, inputs: Tensor, targets: Tensor) -> Oracle:
        """The question; ``def``, name and parameters; the parameters."""
        place, at = torch.arange(inputs.shape[1])[None], self._told(inputs)[:, None]
        slots = (targets == FIRST + torch.arange(SLOTS)[:, None, None]).any(-1).sum(0)[:, None]  # b 1
        behind = place - at
        answer = (behind >= 3) & (behind < 3 + 2 * slots) & (behind % 2 == 1)
        return Oracle((place < QUESTION).expand_as(answer), (behind >= 0) & (behind < 3 + 2 * slots), answer)


def _is(table: Sequence[str], places: Rows, word: str) -> npt.NDArray[np.bool_]:
    """Where ``word`` stands."""
    return places == (table.index(word) if word in table else -1)


@cache
def _modules(split: str) -> list[tuple[list[str], Rows, list[tuple[int, tuple[str, ...]]]]]:
    """Different words of each module, the places of all of its words among them, and its functions."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for file in stdlib_corpus().files[split]:
        words = words_of((root / file).read_text(encoding="utf-8", errors="replace"))
        if words:
            table, places = np.unique(words, return_inverse=True)
            functions = list(_functions(words))
            often = Counter(given for _, given in functions)
            found.append((table.tolist(), places.astype(np.int64), [one for one in functions if often[one[1]] == 1]))
    return found


def _functions(words: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Place of ``def`` and parameters of the functions that are asked for."""
    often = Counter(words[i + 1] for i, word in enumerate(words[:-1]) if word == "def")
    for at, word in enumerate(words[: -2 * SLOTS - 3]):
        if word != "def" or words[at + 2] != "(" or often[words[at + 1]] != 1:
            continue
        given = []
        for slot in range(SLOTS):
            name, sign = words[at + 3 + 2 * slot : at + 5 + 2 * slot]
            if not name.isidentifier() or keyword.iskeyword(name):
                break
            given.append(name)
            if sign != ",":
                if sign == ")" and len(given) > 1:
                    yield at, tuple(given)
                break
