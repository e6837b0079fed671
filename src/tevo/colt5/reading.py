"""Texts to show: what a model reads of them token by token, and how its answer reads.

A user's text and question become an input as the model's task makes them; held-out questions come with the right answer.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tevo.colt5.tasks import Code, LongTask, Modules
from tevo.colt5.tasks.code import _WORD, BEHIND, FIRST, SLOTS, TOKEN, _functions, words_of
from tevo.colt5.tasks.modules import OFFSET
from tevo.colt5.training import Curriculum, question_tokens
from tevo.data.text import stdlib_corpus

__all__ = ["Reading", "held_out", "long_text", "pieces_of", "read"]

# functions that are named to choose from
_NAMED = 10
# bytes of a long text, about
_LONG = 16384


class Reading(NamedTuple):
    """A question about a text.

    Args:
        question: as it is shown.
        tokens: (1, n), the model's input.
        pieces: the text of each token, which put together are question and text.
        say: tokens (t,) of an answer -> its text.
        right: the right answer, if it is known.
        marked: (n,) bool, what the answer repeats or hides behind, if it is known.
    """

    question: str
    tokens: Tensor
    pieces: list[str]
    say: Callable[[Tensor], str]
    right: str | None = None
    marked: Tensor | None = None


def read(task: LongTask, question: str, text: str) -> Reading:
    """A question of the user's, in the words of the task, about a text of the user's.

    Raises:
        ValueError: nothing to read, or words that the task cannot take.
    """
    if not isinstance(task, Code):
        tokens = question_tokens(task, question, text)
        return Reading(question, tokens, pieces_of(task, tokens[0]), task.text)
    asked = re.fullmatch(r"(?:signature of )?(\w+)\s*\??", question.strip())
    if asked is None:
        raise ValueError(f"the question is {question!r}, expected 'signature of NAME?' with the name of a function")
    name, known = asked[1], [function for function, _ in _asked(text, task.parameters)]
    if not known:
        counts = " or ".join(map(str, range(2, task.parameters + 1)))
        raise ValueError(
            f"the text has no function that can be asked for: defined once, with {counts} parameters, and neither defaults, "
            "stars nor annotations among them"
        )
    if name not in known:
        some = ", ".join(known[:_NAMED]) + (", ..." if len(known) > _NAMED else "")
        raise ValueError(f"the text has no {name!r} that can be asked for, expected one of {some}")
    # the model is used to so many questions
    others = [other for other in known if other != name]
    found = task.encode([name, *others[: task.questions - 1]], text)
    starts = [m.start() for m in _WORD.finditer(text) if words_of(m[0])]
    ends = [*starts[1:], len(text)]
    pieces = [f"{found.words[token]} " for token in found.tokens[: task.begin].tolist()]
    pieces[-1] += "\n" + text[: starts[0]]
    pieces += [text[a:b] for a, b in zip(starts, ends, strict=True)]

    def say(answer: Tensor) -> str:
        tokens = answer.tolist()
        # the first question's, up to the sign of the second
        end = next(
            (i for i, token in enumerate(tokens) if FIRST + SLOTS <= token < BEHIND or token < FIRST), len(tokens)
        )
        return ", ".join(found.words.get(token, "?") for token in tokens[:end] if token >= BEHIND)

    return Reading(f"signature of {name}?", found.tokens[None], pieces, say)


def long_text(task: LongTask, split: str) -> tuple[str, str, str]:
    """A held-out module of about 16 KB or, of tasks of made words, one input; a question about it, and the right answer."""
    if isinstance(task, Code):
        files = [source for source in _sources(split) if len(_asked(source, task.parameters)) >= task.questions]
        source = min(files, key=lambda source: abs(len(source) - _LONG))
        functions = _asked(source, task.parameters)
        name, right = functions[len(functions) // 2]
        return source, f"signature of {name}?", right
    if isinstance(task, Modules):
        items = task.items(split)
        raw = min((raw for raw, _ in items), key=lambda raw: abs(len(raw) - _LONG))
        own = sorted((item for other, item in items if other is raw), key=lambda item: item.begin)
        item = own[len(own) // 2]
        shown = raw if item.put is None else raw[: item.begin] + item.put + raw[item.end :]
        return shown.decode("utf-8", errors="replace"), item.question.decode(), item.answer.decode()
    rows = task.batch(split, 0, 0, 1)
    inputs, asks = rows["inputs"][0], int(task.oracle(rows["inputs"], rows["targets"]).question[0].nonzero()[-1, 0]) + 1
    return task.text(inputs[asks:]), task.text(inputs[:asks]), task.text(rows["targets"][0])


def held_out(task: Curriculum, split: str, count: int) -> list[Reading]:
    """Held-out questions of the last phase's length, with their right answers."""
    last = task.last
    if isinstance(last, Code):
        return _windows(last, split, count)
    rows = task.batch(split, 0, 0, count)
    oracle = last.oracle(rows["inputs"], rows["targets"])
    found = []
    for i, inputs in enumerate(rows["inputs"]):
        pieces = pieces_of(last, inputs)
        question = "".join(piece for piece, asks in zip(pieces, oracle.question[i].tolist(), strict=True) if asks)
        marked = oracle.answer[i] if bool(oracle.answer[i].any()) else oracle.evidence[i]
        right = last.text(rows["targets"][i])
        found.append(Reading(question.strip(), inputs[None], pieces, last.text, right, marked))
    return found


def _windows(task: Code, split: str, count: int) -> list[Reading]:
    """Functions of different modules, at depths spread over the windows."""
    found: list[Reading] = []
    for source in _sources(split):
        starts = [m.start() for m in _WORD.finditer(source) if words_of(m[0])]
        functions = [one for one in _functions(words_of(source)) if len(one[1]) <= task.parameters]
        if len(starts) <= task.room or not functions or len(found) == count:
            continue
        at, given = functions[len(functions) // 2]
        low, high = max(0, at + 2 * len(given) + 3 - task.room), min(at, len(starts) - task.room)
        begin = low + (high - low) * len(found) // max(count - 1, 1)
        name = words_of(source)[at + 1]
        one = read(task, name, source[starts[begin] : starts[begin + task.room]])
        place = task.begin + at - begin
        marked = torch.zeros(one.tokens.shape[1], dtype=torch.bool)
        marked[place + 3 : place + 3 + 2 * len(given) : 2] = True
        found.append(one._replace(right=", ".join(given), marked=marked))
    return found


def _sources(split: str) -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / file).read_text(encoding="utf-8", errors="replace") for file in stdlib_corpus().files[split]]


def _asked(source: str, parameters: int) -> list[tuple[str, str]]:
    """Name and parameters of the functions that the task ``code`` can ask for."""
    # a text may end with a signature, unlike modules
    words = [*words_of(source), *[""] * (2 * SLOTS + 3)]
    return [
        (words[at + 1], ", ".join(given))
        for at, given in _functions(words)
        if words[at + 1] not in TOKEN and len(given) <= parameters
    ]


def pieces_of(task: LongTask, tokens: Tensor | Sequence[int]) -> list[str]:
    """The text of each token of an input (n,), spaces between words included; bytes inside a letter join its first.

    Padding is empty.
    """
    given = [int(token) for token in tokens]
    if not isinstance(task, Modules):
        return ["" if token == 0 else f"{task.text([token])} " for token in given]
    pieces, at = [""] * len(given), 0
    raw = bytes(token - OFFSET for token in given if token >= OFFSET)
    for letter in raw.decode("utf-8", errors="surrogateescape"):
        broken = 0xDC80 <= ord(letter) <= 0xDCFF
        pieces[at] = "\N{REPLACEMENT CHARACTER}" if broken else letter
        at += 1 if broken else len(letter.encode())
    return pieces
