"""The smallest input on which a check fails: lengths, rows, widths, options, masks and dtypes made smaller together.

Where hypothesis is installed it proposes and shrinks the cases; otherwise one size after another is tried from 1 upward.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from random import Random

from tevo.testing.checks import Check
from tevo.testing.subject import PRECISIONS, Subject

# seconds spent at most on making one failing input smaller
PATIENCE = 15.0
# cases that hypothesis proposes at most before one fails
PROPOSALS = 100


def kind(subject: Subject, error: Exception) -> str:
    """A failure's sentence without the part's arguments and without numbers."""
    text = str(error).replace(subject.name, "")
    return type(error).__name__ + re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", text)[:120]


def shrink(subject: Subject, check: Check, error: Exception) -> tuple[Subject, Exception]:
    """The smallest subject found on which a check fails alike, and its failure: shortest first, then fewest rows.

    A failure is alike if its sentence is, numbers apart. Without a smaller one the subject itself is given back.
    """
    search = Search(subject, check, error)
    if find_spec("hypothesis") is not None:
        search.proposed()
    if not search.found:
        # also a failure of few cases, which no proposal hit
        search.one_by_one()
    if not search.found:
        return subject, error
    return min(search.found, key=lambda pair: size(pair[0]))


def size(subject: Subject) -> tuple[int, ...]:
    """What is to be small, the most important first."""
    options = [v for k, v in subject.example.items() if type(v) is int and k not in ("dim", "heads")]
    return (
        max(subject.sizes(), default=0),
        subject.rows or 3,
        subject.dim,
        subject.heads,
        sum(options),
        len(subject.paddings),
        sum(map(sum, subject.paddings)),
        len(subject.precisions),
        sum(map(PRECISIONS.index, subject.precisions)),
    )


class Search:
    """Runs a check on smaller subjects, each once, and keeps those that fail alike."""

    def __init__(self, subject: Subject, check: Check, error: Exception) -> None:
        self.subject, self.check, self.sentence = subject, check, kind(subject, error)
        before = Counter(subject.runs)
        with suppress(Exception):
            check.run(subject)
        self.used = subject.runs - before
        self.until = time.perf_counter() + PATIENCE
        self.known: dict[str, bool] = {}
        self.found: list[tuple[Subject, Exception]] = []

    def fails(self, smaller: Subject) -> bool:
        """Whether the check fails alike; False for what is new after the time is up."""
        key = repr((dict(smaller.example), smaller.lengths, smaller.rows, smaller.paddings, smaller.precisions))
        if key in self.known or time.perf_counter() > self.until:
            return self.known.get(key, False)
        self.known[key] = False
        try:
            self.check.run(smaller)
        except Exception as seen:
            if kind(smaller, seen) == self.sentence:
                self.known[key] = True
                self.found.append((smaller, seen))
        return self.known[key]

    def proposed(self) -> None:
        """Let hypothesis propose cases and shrink those that fail."""
        from hypothesis import HealthCheck, Phase, find, settings
        from hypothesis import strategies as st
        from hypothesis.errors import HypothesisException

        ranges = dict(self.ranges())
        case = st.fixed_dictionaries({name: st.integers(least, most) for name, (least, most) in ranges.items()})
        quiet = settings(
            max_examples=PROPOSALS,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        with suppress(HypothesisException), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            find(case, lambda values: self.fails(self.smaller(values)), settings=quiet, random=Random(0))

    def ranges(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """What may be made smaller -> the least and greatest value."""
        s = self.subject
        if s.any_length():
            yield "length", (1, max(s.sizes(), default=1))
        yield "rows", (1, 3)
        if "heads" in s.example:
            yield "heads", (1, s.heads)
        if "dim" in s.example:
            yield "width", (1, s.dim // s.heads if "heads" in s.example else s.dim)
        for name, value in s.example.items():
            if type(value) is int and name not in ("dim", "heads") and value > 1:
                yield f"option {name}", (1, value)
        if self.used["paddings"]:
            yield "before", (0, 4)
            yield "after", (0, 4)
        if self.used["precisions"]:
            yield "precision", (0, len(s.precisions) - 1)

    def smaller(self, values: dict[str, int]) -> Subject:
        """The subject of a proposed case."""
        s = self.subject
        example = {name: values.get(f"option {name}", value) for name, value in s.example.items()}
        if "heads" in values:
            example["heads"] = values["heads"]
        if "width" in values:
            example["dim"] = values["width"] * values.get("heads", 1)
        return replace(
            s,
            example=example,
            lengths=(values["length"],) if "length" in values else s.lengths,
            rows=values["rows"],
            paddings=((values["before"], values["after"]),) if "before" in values else s.paddings,
            precisions=(s.precisions[values["precision"]],) if "precision" in values else s.precisions,
        )

    def one_by_one(self) -> None:
        """Lengths from 1 upward, then rows, heads, widths, paddings and precisions, each with what was found before."""
        s = self.subject

        def first(candidates: Iterable[Subject]) -> None:
            nonlocal s
            s = next((smaller for smaller in candidates if self.fails(smaller)), s)

        if s.any_length():
            first(replace(s, lengths=(n,)) for n in range(1, max(s.sizes(), default=0) + 1))
        first(replace(s, rows=b) for b in (1, 2))
        if "heads" in s.example:
            first(replace(s, example={**s.example, "heads": h}) for h in range(1, s.heads))
        if "dim" in s.example:
            heads = s.heads if "heads" in s.example else 1
            first(replace(s, example={**s.example, "dim": d}) for d in range(heads, s.dim, heads))
        if self.used["paddings"]:
            first(replace(s, paddings=(pair,)) for pair in ((0, 1), (1, 0), (1, 1), *s.paddings))
        if self.used["precisions"]:
            first(replace(s, precisions=(dtype,)) for dtype in s.precisions)


def described(small: Subject, subject: Subject) -> str:
    """The smallest input in words: its shape, and the padding and the dtype where those were made smaller."""
    said = f"x of shape ({small.rows or 'b'}, {max(small.sizes())}, {small.dim})"
    if small.paddings != subject.paddings:
        before, after = small.paddings[0]
        said += f", {before} before and {after} after it padding"
    if small.precisions != subject.precisions:
        said += f", {str(small.precisions[0]).removeprefix('torch.')}"
    return f"{said} to {small.name}"
