"""Look-up: several names are asked for at once; each stands somewhere in a long text, behind its value.

    1 baben 2 koven . <word> dabil koven <word> ... fovil baben ...        1 fovil 2 dabil
    hops=2:         . <word> faven koven ... dabil faven ...                      2 dabil

Names and values look different from all other words, so that what matters can be told without the question; which value is
asked for cannot. What has to meet: each question, at the beginning, with the one place of as many as there are facts. A
decoder's first layer knows no name yet, each further layer may follow one hop by itself: in an encoder-decoder whose
decoder has no more layers than hops, tokens far apart have to meet in the encoder. Other facts are distractors. Places are
uniform over the text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tevo.bench.tasks.contract import Draws, Rows, shuffled
from tevo.colt5.tasks.contract import END, Oracle, WordTask, fill, rooms, spread
from tevo.colt5.tasks.words import FILLER, syllables

__all__ = ["Lookup"]

STOP = 2
WIDTH = 4  # tokens that a fact of two takes at least


class Lookup(WordTask):
    """Key-value retrieval, of one or more hops.

    Args:
        length: tokens per input.
        questions: names asked for in each input, 1 to 9.
        facts: names that have a value, hops x questions at least; None for length / 32, or two for each that is needed.
        hops: looked up until a value is reached, >= 1: a name's value may be another name.
        names: different names, >= facts, at most 100.
        values: different values, 2 to 100.
        told: share of the questions of training rows that say a value themselves, in place of a name: how to answer can be
            learned from them before how to find.
        examples: rows of each held-out split.
    """

    name = "lookup"

    def __init__(
        self,
        *,
        length: int = 2048,
        questions: int = 4,
        facts: int | None = None,
        hops: int = 1,
        names: int = 64,
        values: int = 32,
        told: float = 0.0,
        examples: int = 512,
    ) -> None:
        facts = max(length // 32, 2 * hops * questions) if facts is None else facts
        if hops < 1 or not 1 <= questions <= 9 or not hops * questions <= facts <= names <= 100:
            raise ValueError(
                f"task 'lookup': hops={hops}, questions={questions}, facts={facts}, names={names}, expected hops >= 1, "
                "questions from 1 to 9, and hops x questions <= facts <= names <= 100"
            )
        if not 2 <= values <= 100:
            raise ValueError(f"task 'lookup': values={values}, expected 2 to 100")
        if not 0 <= told <= 1:
            raise ValueError(f"task 'lookup': told={told}, expected a share from 0 to 1")
        self.begin = 2 * questions + 1
        self.places = rooms(length - self.begin, WIDTH)
        if self.places < facts:
            raise ValueError(
                f"task 'lookup': length={length} has room for {self.places} facts, got facts={facts}; "
                f"length >= {self.begin + WIDTH * (facts + 1) - 1}"
            )
        self.words = (
            *("<pad>", "</s>", "."),
            *"123456789"[:questions],
            *FILLER,
            *syllables("en")[:names],
            *syllables("il")[:values],
        )
        self.questions, self.facts_count, self.hops, self.told = questions, facts, hops, told
        self.first_name, self.first_value = len(self.words) - names - values, len(self.words) - values
        super().__init__(
            vocab=len(self.words),
            length=length,
            examples=examples,
            chance=values**-questions,
            baselines={"one of the row's values, each time": (1 / facts + (1 - 1 / facts) / values) ** questions},
            draws=length + names + facts + self.places + 1 + 2 * questions,
            facts={
                "length": length,
                "questions": questions,
                "facts": facts,
                "hops": hops,
                "names": names,
                "values": values,
                "told": told,
                "examples": examples,
            },
        )

    def make(self, split: str, first: int, raw: Draws) -> tuple[Rows, Rows]:
        """Filler, over which questions and facts are written."""
        n, r, q = self.length, self.facts_count, self.questions
        widths = [n, self.first_value - self.first_name, r, self.places + 1, q]
        word, which, what, where, whether, said = np.split(raw, np.cumsum(widths), axis=1)
        inputs = fill(word, np.arange(3 + q, self.first_name))
        names = self.first_name + shuffled(which)[:, :r]
        values = self.first_value + fill(what, np.arange(self.vocab - self.first_value))
        # as many chains as there can be, asked for or not; fact i is followed by fact i + chains, the last by a value
        chains = r // self.hops
        chained = chains * (self.hops - 1)
        content = values.copy()
        content[:, :chained] = names[:, chains : chains + chained]
        starts = spread(where, r, first=self.begin, last=n, width=WIDTH)
        np.put_along_axis(inputs, starts, content, axis=1)
        np.put_along_axis(inputs, starts + 1, names, axis=1)
        asked, answers = names[:, :q], values[:, chained : chained + q]
        if split == "train" and self.told:
            shown = (whether >> np.uint64(11)) * 2.0**-53 < self.told
            given = self.first_value + fill(said, np.arange(self.vocab - self.first_value))
            asked, answers = np.where(shown, given, asked), np.where(shown, given, answers)
        numbers = np.broadcast_to(3 + np.arange(q), (len(raw), q))
        inputs[:, : 2 * q] = np.stack([numbers, asked], -1).reshape(len(raw), -1)
        inputs[:, 2 * q] = STOP
        return inputs, np.concatenate(
            [np.stack([numbers, answers], -1).reshape(len(raw), -1), np.full((len(raw), 1), END)], 1
        )

    def _followed(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Where the name of each fact on the way stands, (b, hops, q), and the token before the last one, (b, q)."""
        token, places = inputs[:, 1 : self.begin : 2], []
        # a fact's name stands behind what is said of it
        said = inputs >= self.first_name
        named = said & (inputs < self.first_value)
        named[:, 1:] &= said[:, :-1]
        named[:, : self.begin] = False
        for _ in range(self.hops):
            here = (inputs[:, None] == token[:, :, None]) & named[:, None]  # b q n
            places.append(here.int().argmax(-1))
            # a value that the question says itself is its own answer
            token = token.where(token >= self.first_value, inputs.gather(1, (places[-1] - 1).clamp(min=0)))
        return torch.stack(places, 1), token

    def solve(self, inputs: Tensor) -> Tensor:
        """Each question's number and what it leads to from fact to fact, and the end sign."""
        _, token = self._followed(inputs)
        answers = torch.stack([inputs[:, 0 : 2 * self.questions : 2], token], -1).flatten(1)
        return torch.cat([answers, torch.full_like(token[:, :1], END)], 1)

    def oracle(self, inputs: Tensor, targets: Tensor) -> Oracle:
        """The questions' numbers and names; both tokens of every fact on the way; the values at its end.

        Of rows where all questions are names.
        """
        places, _ = self._followed(inputs)
        nothing = torch.zeros_like(inputs, dtype=torch.bool)
        question = nothing.clone()
        question[:, : self.begin - 1] = True
        every = places.flatten(1)
        return Oracle(
            question,
            nothing.scatter(1, every, True).scatter(1, every - 1, True),
            nothing.scatter(1, places[:, -1] - 1, True),
        )
