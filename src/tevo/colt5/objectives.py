"""Pre-training on plain text: T5's span corruption, the mixture UL2 of CoLT5, and the gap sentences of PEGASUS.

    noise tokens   round(n p), at least 1 and at most n - 1;   spans   round(noise / s), at least 1                (1)
    inputs   text with each span replaced by a sentinel, then the end                                            (2)
    targets  each sentinel and its span, then the end                                                             (3)
    prefix   inputs: the first half of the text and the end; targets: the other half and the end                  (4)
    gaps     inputs: text with its principal sentences replaced by one sentinel each, all the same; targets: they (5)
    score    of a sentence of the set of words A, in a text whose other sentences have B: 2 |A & B| / (|A| + |B|) (6)

with p the share of noise and s the mean span. Both noise and the rest are cut into as many stretches, all cuts alike likely, and
a text begins with an uncorrupted stretch. UL2 here: the prefix form with p = 1/2, and spans of mean 3, 8 and 64 with p = 0.15,
equally often. A text is as long as makes the inputs (2) exactly as long as is asked for: for 4,096 inputs it has 4,550, 4,714 or
4,805 tokens, and its targets 910, 796 or 733. Sentinels count down from the greatest token, as in T5.

A sentence ends behind a line's end, and behind a full stop, an exclamation or a question mark before a space; one that is longer
than the gaps may be is cut. Those of the greatest score (6) are taken, each scored by itself, while they are no more than 0.3 of
the text's tokens: PEGASUS takes 0.3 of the sentences, which in a text of few long ones may be nearly all of it.

Source: T5 (1910.10683), section 3.1.4; UL2 (2205.05131); CoLT5 (2303.09752), sections 3 and 4, which gives p of the prefix form
and leaves its lengths open: here its targets are as long as the longest of the others. PEGASUS (1912.08777), section 3.1, in its
form Ind-Uniq.

Letters: n tokens of a text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tevo.bench.tasks.contract import HELD_OUT, IGNORED, Draws, Rows, Task, below
from tevo.colt5.tasks.contract import END, PAD
from tevo.colt5.tokens import ByteTokens, Tokens
from tevo.data.text import Corpus, files_corpus, stdlib_corpus

__all__ = [
    "GAP_SENTENCES",
    "MIXTURES",
    "SPAN_CORRUPTION",
    "UL2",
    "Denoising",
    "Gaps",
    "Spans",
    "bits",
    "corrupted",
    "gapped",
    "lengths_of",
    "sentences",
    "shown",
    "text_length",
    "vocab_for",
]


class Spans(NamedTuple):
    """Share of noise and mean span; no span: the prefix form."""

    noise: float
    span: float | None


class Gaps(NamedTuple):
    """Share of the tokens that principal sentences take at most."""

    share: float


SPAN_CORRUPTION = (Spans(0.15, 3.0),)
UL2 = (Spans(0.5, None), Spans(0.15, 3.0), Spans(0.15, 8.0), Spans(0.15, 64.0))
GAP_SENTENCES = (Gaps(0.3),)
MIXTURES: dict[str, tuple[Spans | Gaps, ...]] = {
    "span_corruption": SPAN_CORRUPTION,
    "ul2": UL2,
    "gap_sentences": GAP_SENTENCES,
}
# where a line ends behind a mark, its end belongs to the sentence
_END = re.compile(r"[.!?][^\S\n]")
_WORD = re.compile(r"\w+")


def lengths_of(tokens: int, kind: Spans) -> tuple[int, int]:
    """Inputs and targets, their ends included, of a text of so many tokens (eqs. 1 to 4)."""
    if kind.span is None:
        return tokens // 2 + 1, tokens - tokens // 2 + 1
    noise, spans = _counts(tokens, kind.noise, kind.span)
    return tokens - noise + spans + 1, noise + spans + 1


def text_length(inputs: int, kind: Spans, *, targets: int | None = None) -> int:
    """Tokens of the longest text whose inputs are at most ``inputs``, and whose targets at most ``targets``."""
    tokens = 2
    while True:
        a, b = lengths_of(tokens + 1, kind)
        if a > inputs or (targets is not None and b > targets):
            return tokens
        tokens += 1


def _counts(tokens: int, noise: float, span: float) -> tuple[int, int]:
    noisy = min(max(round(tokens * noise), 1), tokens - 1)
    return noisy, max(round(noisy / span), 1)


def corrupted(text: Rows, kind: Spans, raw: Draws, *, first_sentinel: int) -> tuple[Rows, Rows]:
    """Inputs and targets of a text (n,).

    Args:
        text: tokens.
        kind: of the corruption.
        raw: at least 2 n random 64-bit numbers; the prefix form needs none.
        first_sentinel: the token of the first span; those of others count down.
    """
    n = len(text)
    end = np.array([END])
    if kind.span is None:
        return np.concatenate([text[: n // 2], end]), np.concatenate([text[n // 2 :], end])
    noisy, spans = _counts(n, kind.noise, kind.span)
    spans = min(spans, n - noisy)
    stretches = np.empty(2 * spans, dtype=np.int64)
    stretches[0::2], stretches[1::2] = _cut(n - noisy, spans, raw[:n]), _cut(noisy, spans, raw[n:])
    ends = np.cumsum(stretches)
    inputs, targets = [], []
    for i in range(spans):
        begin = ends[2 * i - 1] if i else 0
        sentinel = np.array([first_sentinel - i])
        inputs += [text[begin : ends[2 * i]], sentinel]
        targets += [sentinel, text[ends[2 * i] : ends[2 * i + 1]]]
    return np.concatenate([*inputs, end]), np.concatenate([*targets, end])


def _cut(tokens: int, parts: int, raw: Draws) -> Rows:
    """So many tokens in ``parts`` stretches of at least one, all cuts alike likely."""
    places = np.sort(np.argsort(raw[: tokens - 1], kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], places, [tokens]]))


def sentences(text: Rows, tokens: Tokens, *, most: int) -> list[int]:
    """Where the sentences of a text (n,) end, in tokens; none has more than ``most``."""
    read: dict[tuple[int, ...], str] = {}

    def says(*some: int) -> str:
        if some not in read:
            read[some] = tokens.text(some)
        return read[some]

    ends, begin, given = [], 0, text.tolist()
    for at, token in enumerate(given, 1):
        said = says(token)
        # of pieces only two together say whether there is a space between them
        mark = said.rstrip().endswith((".", "!", "?")) and at < len(given)
        if at - begin == most or "\n" in said or (mark and _END.search(says(token, given[at]))):
            ends.append(at)
            begin = at
    return ends if begin == len(given) else [*ends, len(given)]


def gapped(text: Rows, kind: Gaps, tokens: Tokens, *, sentinel: int) -> tuple[Rows, Rows]:
    """Inputs and targets of a text (n,) whose principal sentences are left out (eq. 5)."""
    room = max(1, int(kind.share * len(text)))
    ends = sentences(text, tokens, most=room)
    parts = np.split(text, ends[:-1])
    words = [set(_WORD.findall(tokens.text(part.tolist()).lower())) for part in parts]
    often = Counter(word for each in words for word in each)
    scores = []
    for each in words:
        # of the other sentences
        others = len(often) - sum(often[word] == 1 for word in each)
        shared = sum(often[word] > 1 for word in each)
        scores.append(2 * shared / max(len(each) + others, 1))
    chosen: set[int] = set()
    for i in sorted(range(len(parts)), key=lambda i: -scores[i]):
        # what shares no word is never principal, unless nothing is
        if len(parts[i]) <= room and (scores[i] > 0 or not chosen):
            chosen.add(i)
            room -= len(parts[i])
    end, gap = np.array([END]), np.array([sentinel])
    inputs = [gap if i in chosen else part for i, part in enumerate(parts)]
    return np.concatenate([*inputs, end]), np.concatenate([*(parts[i] for i in sorted(chosen)), end])


def texts_of(kinds: Sequence[Spans | Gaps], length: int) -> list[int]:
    """Tokens of a text of each kind whose inputs are ``length`` at most; of the prefix form as its targets allow."""
    spans = [kind for kind in kinds if isinstance(kind, Spans)]
    most = max((lengths_of(text_length(length, kind), kind)[1] for kind in spans if kind.span is not None), default=0)
    # a gap is no longer than its sentence
    return [text_length(length, kind, targets=most) if isinstance(kind, Spans) else length - 1 for kind in kinds]


def sentinels_of(kinds: Sequence[Spans | Gaps], length: int) -> int:
    """The most different sentinels of a text."""
    both = zip(texts_of(kinds, length), kinds, strict=True)
    return max(_counts(n, kind.noise, kind.span)[1] if isinstance(kind, Spans) and kind.span else 1 for n, kind in both)


def vocab_for(tokens: Tokens, *, mixture: str, length: int) -> int:
    """Rows of an embedding for tokens and sentinels: 100 sentinels or as many as are needed, in all a multiple of 128."""
    return -(-(tokens.size + max(100, sentinels_of(_kinds(mixture), length))) // 128) * 128


def _kinds(mixture: str) -> tuple[Spans | Gaps, ...]:
    if mixture not in MIXTURES:
        raise ValueError(f"task 'denoising': mixture={mixture!r}, expected one of {', '.join(MIXTURES)}")
    return MIXTURES[mixture]


def shown(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """With "shown" (b, t): the targets one to the right, behind padding, which is what a decoder is given."""
    before = F.pad(rows["targets"][:, :-1], (1, 0), value=PAD)
    return {**rows, "shown": before.masked_fill(before == IGNORED, PAD)}


def bits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Bits and scored targets, of ``logits`` (b, t, V)."""
    kept = targets != IGNORED
    found = F.cross_entropy(logits[kept].double(), targets[kept], reduction="sum") / torch.tensor(2.0).double().log()
    return found, kept.sum().double()


class Denoising(Task):
    """Texts of a corpus, corrupted: rows for an encoder-decoder, of tokens and sentinels.

    A row has one of the mixture's forms, in turn, so that each has its share of every batch; rows are padded to the longest of
    the batch. The score is bits per target token with the right ones before it.

    Args:
        mixture: a name of ``MIXTURES``.
        length: tokens of the inputs at most.
        vocab: of the model; the greatest tokens are sentinels.
        data: the user's file or folder; empty: the running CPython's standard library.
        examples: rows of each held-out split.
        tokens: of the text; bytes in ByT5's scheme by default.
    """

    name: ClassVar[str] = "denoising"
    metric: ClassVar[str] = "bits_per_target"
    higher_is_better: ClassVar[bool] = False

    def __init__(
        self,
        *,
        mixture: str = "ul2",
        length: int = 4096,
        vocab: int = 512,
        data: str = "",
        examples: int = 64,
        tokens: Tokens | None = None,
    ) -> None:
        self.kinds = _kinds(mixture)
        if length < 16:
            raise ValueError(f"task 'denoising': length={length}, expected at least 16 tokens")
        self.texts = texts_of(self.kinds, length)
        self.tokens = ByteTokens() if tokens is None else tokens
        spans = sentinels_of(self.kinds, length)
        if vocab < self.tokens.size + spans:
            raise ValueError(
                f"task 'denoising': vocab={vocab}, expected at least {self.tokens.size + spans}: {self.tokens.size} tokens, "
                f"and a sentinel for each of {spans} spans of length={length}"
            )
        self.corpus: Corpus = files_corpus(data) if data else stdlib_corpus()
        self._texts = {split: self.tokens.stored(text) for split, text in self.corpus.splits.items()}
        short = [split for split, text in self._texts.items() if len(text) < max(self.texts)]
        if short:
            raise ValueError(
                f"task 'denoising': {short[0]!r} of the corpus has {len(self._texts[short[0]])} tokens, expected at least "
                f"{max(self.texts)}, a text of length={length}; give more text or a smaller length"
            )
        facts: dict[str, Any] = {"mixture": mixture, "length": length, "vocab": vocab, "examples": examples}
        super().__init__(
            vocab=vocab,
            length=length,
            examples=examples,
            chance=float(np.log2(vocab)),
            baselines={},
            draws=1 + 2 * max(self.texts),
            facts={**facts, **self.tokens.facts, "corpus": self.corpus.facts()},
        )

    def batch(self, split: str, seed: int, index: int, size: int) -> dict[str, Tensor]:
        """As :meth:`tevo.bench.tasks.Task.batch`, and "shown" (b, t): the targets one to the right."""
        return shown(super().batch(split, seed, index, size))

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Windows of the corpus, corrupted in turn, padded."""
        text, pairs = self._texts[split], []
        for row, numbers in enumerate(raw):
            which = (first + row) % len(self.kinds)
            tokens = self.texts[which]
            room = len(text) - tokens + 1
            # spread over the split, so that few rows show much of it
            start = room * (first + row) // self.examples if split in HELD_OUT else int(below(numbers[:1], room)[0])
            window = text[start : start + tokens].astype(np.int64) + self.tokens.offset
            kind, last = self.kinds[which], self.vocab - 1
            if isinstance(kind, Gaps):
                pairs.append(gapped(window, kind, self.tokens, sentinel=last))
            else:
                pairs.append(corrupted(window, kind, numbers[1:], first_sentinel=last))
        wide = [max(len(pair[side]) for pair in pairs) for side in (0, 1)]
        inputs = np.full((len(raw), wide[0]), PAD, dtype=np.int64)
        targets = np.full((len(raw), wide[1]), IGNORED, dtype=np.int64)
        for row, (a, b) in enumerate(pairs):
            inputs[row, : len(a)], targets[row, : len(b)] = a, b
        return inputs, targets

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Bits and scored targets, of ``logits`` (b, t, V)."""
        return bits(logits, targets)
