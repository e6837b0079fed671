"""Code: the parameters of named functions, in a long window of a module of the running CPython's standard library.

    def NAME ( <1> , <1.2> ) def OTHER ( <2> , <2.2> )   import ... def OTHER ( left , right ) ... def NAME ( self , key ) ...
                                                                         <1> self <1.2> key <2> left <2.2> right

A token is a word: a name, a number, or a sign; line ends and spaces are left out. Keywords, signs and the numbers of
the questions have tokens of their own. All other words of a row get tokens drawn anew for it, as entities do in the reading
task of Hermann et al. (arXiv 1506.03340): nothing can be known of a function by its name, no vocabulary is needed, and an
answer is spelled by the words that stand in the text. Functions are asked for that a module defines once, with two or three
parameters, without defaults, stars and annotations, that no other of these functions of the window has: what is most frequent
in a text would need no reading. Windows are drawn alike from all that show enough of them, the functions from a window's, so
that the depth of the answers is spread over it; whole packages are held out (:mod:`tevo.data.text`).

Training may begin with outlines: the words that follow each such function's ``def``, and nothing else of the module; first
parameters, most of which are "self", get a token drawn for each function there. What is evaluated is the untouched text.
"""

from __future__ import annotations

import keyword
import re
import string
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
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
MOST = 4  # questions of a row at most
# of question i, parameter j: what stands for it in the question, and before it in the answer, as T5's sentinels do
NUMBERS = tuple(f"<{i + 1}.{j + 1}>" if j else f"<{i + 1}>" for i in range(MOST) for j in range(SLOTS))
FIXED = (*sorted(keyword.kwlist), *string.punctuation)
KNOWN = ("<pad>", "</s>", *NUMBERS, *FIXED)
FIRST = KNOWN.index("<1>")
BEHIND = FIRST + len(NUMBERS)  # first token that is no number of a question
TOKEN = {word: token for token, word in enumerate(KNOWN)}
DEF, COMMA = TOKEN["def"], TOKEN[","]
_WORD = re.compile(r"[^\W\d]\w*|\d+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Names, numbers and signs of a text; signs outside ASCII are left out."""
    return [word for word in _WORD.findall(text) if word.isidentifier() or word.isdigit() or word in TOKEN]


class Window(NamedTuple):
    """Windows that show the same functions: a module, their first and the first behind their last start, the functions."""

    module: int
    begin: int
    end: int
    asked: tuple[tuple[int, int], ...]  # places of "def" in the module, and numbers of parameters


class Encoded(NamedTuple):
    """An input (n,) and the words of its tokens."""

    tokens: Tensor
    words: dict[int, str]


class Code(LongTask):
    """Parameters of named functions; each question counts by itself.

    Args:
        length: words of questions and window; modules with fewer are left out.
        questions: functions asked for in each row, 1 to 4.
        names: tokens for words without one of their own; a row with more of them shares tokens, but none of two functions'
            names.
        parameters: most parameters of a function that is asked for, 2 or 3.
        outline: words kept from each such function's ``def`` on in training rows, which have no other, and whose first
            parameters are drawn; 0 for the whole text. Held-out rows always have the whole text.
        examples: rows of each held-out split, spread over it.
    """

    name = "code"

    def __init__(
        self,
        *,
        length: int = 2048,
        questions: int = 4,
        names: int = 512,
        parameters: int = 3,
        outline: int = 0,
        examples: int = 200,
    ) -> None:
        if length < 32 or names < 32:
            raise ValueError(f"task 'code': length={length} and names={names}, expected at least 32 each")
        if not 1 <= questions <= MOST:
            raise ValueError(f"task 'code': questions={questions}, expected 1 to {MOST}")
        if not 2 <= parameters <= SLOTS:
            raise ValueError(f"task 'code': parameters={parameters}, expected 2 or 3")
        if outline and outline < 2 * parameters + 3:
            raise ValueError(
                f"task 'code': outline={outline}, expected 0 or the {2 * parameters + 3} words of a signature at least"
            )
        self.length, self.questions, self.names, self.parameters = length, questions, names, parameters
        self.outline = outline
        self.begin = questions * (2 * parameters + 3)
        self.room = length - self.begin
        self.corpus = stdlib_corpus()
        self._windows: dict[str, tuple[list[Window], Rows]] = {}
        self._modules: dict[str, list[tuple[list[str], Rows]]] = {}
        super().__init__(
            vocab=len(KNOWN) + names,
            length=length,
            examples=examples,
            chance=0.0,
            baselines=self._guesses(),
            draws=1 + questions + names,
            facts={
                "length": length,
                "questions": questions,
                "names": names,
                "parameters": parameters,
                "outline": outline,
                "examples": examples,
                "corpus": self.corpus.facts(),
            },
        )

    def windows(self, split: str) -> tuple[list[Window], Rows]:
        """All windows of a split that show enough functions, and how many starts there are up to the end of each.

        Raises:
            ValueError: there is none.
        """
        if split not in self._windows:
            found: list[Window] = []
            self._modules[split] = []
            for table, places, functions in _modules(split):
                few = [(at, given) for at, given in functions if len(given) <= self.parameters]
                if self.outline and split == "train":
                    places, few = _outlined(places, few, self.outline)
                found += [Window(len(self._modules[split]), *one) for one in self._shows(len(places), few)]
                self._modules[split].append((table, places))
            self._windows[split] = found, np.cumsum([window.end - window.begin for window in found])
        windows, ends = self._windows[split]
        if not windows:
            raise ValueError(
                f"task 'code': no module has length={self.length} words with questions={self.questions} functions among them; "
                "make it shorter, or ask for fewer"
            )
        return windows, ends

    def _guesses(self) -> dict[str, float]:
        try:
            windows, ends = self.windows("valid")
        except ValueError:
            # as in a phase whose inputs hold the questions and outlines only
            return {}
        starts = np.diff(ends, prepend=0)
        return {"any function that could be asked for": float(sum(starts / [len(w.asked) for w in windows]) / ends[-1])}

    def _shows(
        self, words: int, functions: Sequence[tuple[int, tuple[str, ...]]]
    ) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
        """Stretches of starts of windows of a module, and the functions that can be asked for in each."""
        last = words - self.room + 1
        spans = [(max(0, at + 2 * len(given) + 3 - self.room), at + 1, at, given) for at, given in functions]
        cuts = sorted({0, *(cut for low, high, _, _ in spans for cut in (low, high))})
        for begin, end in pairwise([*(cut for cut in cuts if cut < last), max(last, 0)]):
            seen = [(at, given) for low, high, at, given in spans if low <= begin < high]
            often = Counter(given for _, given in seen)
            asked = tuple((at, len(given)) for at, given in seen if often[given] == 1)
            if len(asked) >= self.questions:
                yield begin, end, asked

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Questions and window; numbered parameters and the end sign."""
        windows, ends = self.windows(split)
        inputs = np.full((len(raw), self.length), PAD, dtype=np.int64)
        targets = np.full((len(raw), 2 * self.parameters * self.questions + 1), IGNORED, dtype=np.int64)
        total, q = int(ends[-1]), self.questions
        if split in HELD_OUT:
            order = shuffled(np.random.Philox(0).random_raw(self.examples)[None])[0]
            starts = order[first : first + len(raw)] * total // self.examples
        else:
            starts = below(raw[:, 0], total)
        for row, where in enumerate(starts):
            which = int(np.searchsorted(ends, where, side="right"))
            window = windows[which]
            start = window.end - int(ends[which] - where)
            table, places = self._modules[split][window.module]
            tokens, _ = self._tokens(table, places[start : start + self.room], raw[row, 1 + q :])
            if self.outline and split == "train":
                # "self" so often that it could be learned to answer it, whatever is asked
                free = len(KNOWN) + shuffled(raw[row : row + 1, 1 + q :])[0]
                tokens[[at - start + 3 for at, _ in window.asked]] = free[
                    -1 - np.arange(len(window.asked)) % self.names
                ]
            pool, line, answer = list(window.asked), [], []
            for i in range(q):
                at, count = pool.pop(int(below(raw[row : row + 1, 1 + i], len(pool))[0]))
                given = tokens[at - start + 3 : at - start + 3 + 2 * count : 2].tolist()
                line += self._question(i, int(tokens[at - start + 1]))
                for j, parameter in enumerate(given):
                    answer += [FIRST + SLOTS * i + j, parameter]
            inputs[row] = [*line, *tokens]
            targets[row, : len(answer) + 1] = [*answer, END]
        return inputs, targets

    def _question(self, i: int, name: int) -> list[int]:
        """Tokens of question ``i``."""
        line = [DEF, name, TOKEN["("]]
        for j in range(self.parameters):
            line += [FIRST + SLOTS * i + j, COMMA]
        return [*line[:-1], TOKEN[")"]]

    def _tokens(self, table: Sequence[str], window: Rows, raw: Draws) -> tuple[Rows, dict[int, str]]:
        """Tokens of ``window``, which are places in ``table``, and what they mean; names are drawn by ``raw`` (names,)."""
        present, back = np.unique(window, return_inverse=True)
        words = [table[i] for i in present]
        free = len(KNOWN) + shuffled(raw[None])[0]
        # functions first, then what stands behind them, so that those share no token unless there are more than tokens
        defs, behind = np.flatnonzero(_is(table, window, "def")), np.full(len(table), len(window))
        for far in reversed(range(1, 3 + 2 * SLOTS)):
            behind[window[defs[defs < len(window) - far] + far]] = far
        order = sorted((i for i, word in enumerate(words) if word not in TOKEN), key=lambda i: behind[present[i]])
        own = np.array([TOKEN.get(word, PAD) for word in words], dtype=np.int64)
        own[order] = free[np.arange(len(order)) % self.names]
        return own[back], {
            int(own[i]): words[i] for i in [*reversed(order), *np.flatnonzero(own < len(KNOWN)).tolist()]
        }

    def encode(self, names: Sequence[str], text: str) -> Encoded:
        """Questions about ``text``, of any length, as an input; where they are fewer than the task's, the last is repeated.

        Raises:
            ValueError: a name is no word of the text, or there are more than the task has questions.
        """
        words = words_of(text)
        for name in names:
            if name not in words:
                raise ValueError(f"the text has no {name!r}, expected the name of a function that it defines")
        if not 1 <= len(names) <= self.questions:
            raise ValueError(f"there are {len(names)} names, expected 1 to questions={self.questions}")
        table, places = np.unique(words, return_inverse=True)
        tokens, meaning = self._tokens(
            table.tolist(), places.astype(np.int64), np.random.Philox(0).random_raw(self.names)
        )
        line = []
        for i in range(self.questions):
            line += self._question(i, int(tokens[words.index(names[min(i, len(names) - 1)])]))
        known = dict(enumerate(KNOWN))
        return Encoded(torch.tensor([*line, *tokens.tolist()]), {**known, **meaning})

    def _defined(self, inputs: Tensor) -> Tensor:
        """(b, q): the place of the ``def`` of each function that is asked for."""
        asked = inputs[:, 1 : self.begin : 2 * self.parameters + 3]
        same = (inputs[:, None, :-1] == DEF) & (inputs[:, None, 1:] == asked[:, :, None])
        # the question itself says it too
        same[..., : self.begin] = False
        return same.int().argmax(-1)

    def solve(self, inputs: Tensor) -> Tensor:
        """What stands behind each ``def NAME (``, numbered, up to the bracket's end."""
        found = torch.full((len(inputs), 2 * self.parameters * self.questions + 1), END)
        for row, places in enumerate(self._defined(inputs).tolist()):
            answer = []
            for i, at in enumerate(places):
                for j in range(self.parameters):
                    answer += [FIRST + SLOTS * i + j, int(inputs[row, at + 3 + 2 * j])]
                    if inputs[row, at + 4 + 2 * j] != COMMA:
                        break
            found[row, : len(answer)] = torch.tensor(answer)
        return found

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Questions whose parameters are all right, and no more than there are; and questions."""
        wrong = ((logits.argmax(-1) != targets) | logits.isnan().any(-1)) & (targets != IGNORED)
        opens = (targets[..., None] == torch.arange(FIRST, BEHIND, SLOTS, device=targets.device)).any(-1)
        # the sign behind a question's last parameter says that there is no other
        question = (opens.long().cumsum(-1) - opens.long()).clamp(min=1)
        missed = wrong.new_zeros(len(targets), MOST + 1, dtype=torch.long).scatter_add_(1, question, wrong.long()) > 0
        count = opens.sum()
        return (count - missed.sum()).double(), count.double()

    def oracle(self, inputs: Tensor, targets: Tensor) -> Oracle:
        """The questions; ``def``, name and parameters of each; the parameters."""
        place, at = torch.arange(inputs.shape[1]), self._defined(inputs)[..., None]  # b q 1
        slots = torch.stack(
            [(targets >= i) & (targets < i + SLOTS) for i in range(FIRST, FIRST + SLOTS * self.questions, SLOTS)], 1
        ).sum(-1, keepdim=True)
        behind = place - at  # b q n
        answer = (behind >= 3) & (behind < 3 + 2 * slots) & (behind % 2 == 1)
        evidence = (behind >= 0) & (behind < 3 + 2 * slots)
        return Oracle((place < self.begin).expand_as(inputs), evidence.any(1), answer.any(1))

    def text(self, tokens: Sequence[int] | Tensor) -> str:
        """Its words; those whose tokens are drawn are numbered."""
        return " ".join(
            KNOWN[int(token)] if token < len(KNOWN) else f"w{int(token) - len(KNOWN)}"
            for token in tokens
            if int(token) not in (PAD, END)
        )


def _outlined(
    places: Rows, functions: Sequence[tuple[int, tuple[str, ...]]], outline: int
) -> tuple[Rows, list[tuple[int, tuple[str, ...]]]]:
    """The words from each ``def`` of ``functions`` on, ``outline`` of them, and where the functions are then."""
    kept = np.zeros(len(places), dtype=np.bool_)
    for at, _ in functions:
        kept[at : at + outline] = True
    now = np.cumsum(kept) - 1
    return places[kept], [(int(now[at]), given) for at, given in functions]


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
            found.append((table.tolist(), places.astype(np.int64), functions))
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
