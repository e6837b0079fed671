"""Questions about code, in words."""

from __future__ import annotations

import pytest
import torch

from tevo.bench.tasks import IGNORED
from tevo.colt5.tasks import Code
from tevo.colt5.tasks.code import KNOWN, NAME, QUESTION, words_of
from tevo.colt5.tasks.contract import END, PAD

TEXT = """
import numpy as np

class Some:
    def first(self, other, key):
        # says "nothing" \u2013 twice
        return self.second(other)

    def second(self, other=3):
        return not_asked(1, 2)

def not_asked(*a): return 10

def alone(a): pass

def two(left, right): return first(left)
"""


@pytest.fixture(scope="module")
def task() -> Code:
    return Code(length=300, told=0.5)


def test_words_are_names_numbers_and_signs() -> None:
    said = words_of('def f2(_a, b=10):  # "x" \u2013 y')
    assert " ".join(said) == 'def f2 ( _a , b = 10 ) : # " x " y'


def test_the_solver_finds_every_answer(task: Code) -> None:
    for batch in (task.batch("train", 3, 1, 60), task.batch("test", 0, 0, 60)):
        logits = torch.nn.functional.one_hot(task.solve(batch["inputs"]), task.vocab).double()
        right, count = task.score(logits, batch["targets"])
        assert right == count == 60
        assert (batch["inputs"] != PAD).all()


def test_the_marked_tokens_are_enough_for_the_answer(task: Code) -> None:
    batch = task.batch("valid", 0, 0, 50)
    question, evidence, answer = task.oracle(**batch)
    bare = torch.where(question | evidence, batch["inputs"], KNOWN.index("."))
    solved, targets = task.solve(bare), batch["targets"]
    # the sign behind the last parameter is not marked
    said = (targets != IGNORED) & (targets != END)
    assert torch.equal(solved[said], targets[said])
    assert not (answer & ~evidence).any()
    for row, marked, target in zip(batch["inputs"], answer, targets, strict=True):
        slots = target[(target != IGNORED) & (target != END)][1::2]
        assert torch.equal(row[marked], slots)


def test_names_are_drawn_anew_for_each_row_and_depth_is_spread(task: Code) -> None:
    batch = task.batch("train", 0, 0, 400)
    asked = batch["inputs"][:, NAME]
    assert len(asked.unique()) > 200 and (asked >= len(KNOWN)).all()
    depth = task.depth(**batch)
    assert 0.35 < depth.mean() < 0.65 and depth.std() > 0.2


def test_training_rows_alone_tell_the_answer(task: Code) -> None:
    told = task.batch("train", 0, 0, 1000)["inputs"][:, NAME + 1] == KNOWN.index("(")
    # five standard deviations of a share
    assert abs(told.double().mean().item() - 0.5) < 0.08
    assert (task.batch("valid", 0, 0, 50)["inputs"][:, NAME + 1] == KNOWN.index("?")).all()


def test_a_text_of_ones_own_is_read_as_the_modules_are() -> None:
    task = Code(length=64)
    found = task.encode("first", TEXT)
    said = [found.words[int(token)] for token in task.solve(found.tokens[None])[0]]
    assert said == ["<1>", "self", "<2>", "other", "<3>", "key", "</s>"]
    assert [found.words[int(token)] for token in found.tokens[QUESTION:]] == words_of(TEXT)


def test_the_baseline_is_the_most_frequent_answer(task: Code) -> None:
    assert 0 < task.baselines["one answer for all"] < 0.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Code(length=8), "length=8 and names=512, expected at least 32 each"),
        (lambda: Code(told=2.0), "told=2.0, expected a share from 0 to 1"),
        (lambda: Code(length=10**6), "no held-out module has length=1000000 words"),
        (lambda: Code(length=64).encode("third", TEXT), "the text has no 'third', expected the name of a function"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
