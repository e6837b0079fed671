"""Questions about code, in words."""

from __future__ import annotations

import pytest
import torch

from tevo.bench.tasks import IGNORED
from tevo.colt5.tasks import Code
from tevo.colt5.tasks.code import BEHIND, DEF, FIRST, KNOWN, SLOTS, words_of
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
    return Code(length=700, questions=3)


def solved(task: Code, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the solver's answers."""
    return torch.nn.functional.one_hot(task.solve(batch["inputs"]), task.vocab).double()


def test_words_are_names_numbers_and_signs() -> None:
    said = words_of('def f2(_a, b=10):  # "x" \u2013 y')
    assert " ".join(said) == 'def f2 ( _a , b = 10 ) : # " x " y'


def test_the_solver_finds_every_answer(task: Code) -> None:
    for batch in (task.batch("train", 3, 1, 60), task.batch("test", 0, 0, 60)):
        right, count = task.score(solved(task, batch), batch["targets"])
        assert right == count == 180
        assert (batch["inputs"] != PAD).all()


def test_the_marked_tokens_are_enough_for_the_answer(task: Code) -> None:
    batch = task.batch("valid", 0, 0, 50)
    question, evidence, answer = task.oracle(**batch)
    closed = evidence.roll(1, -1) & ~evidence  # the sign behind the last parameter is not marked
    bare = torch.where(question | evidence | closed, batch["inputs"], KNOWN.index("."))
    assert torch.equal(*(task.solve(inputs) for inputs in (bare, batch["inputs"])))
    assert not (answer & ~evidence).any() and not (question & evidence).any()
    for row, marked, target in zip(batch["inputs"], answer, batch["targets"], strict=True):
        # functions stand in another order than they are asked for
        assert sorted(row[marked].tolist()) == sorted(target[target >= BEHIND].tolist())


def test_each_question_counts_by_itself(task: Code) -> None:
    batch = task.batch("test", 0, 0, 20)
    targets = batch["targets"]
    second = (targets >= FIRST + SLOTS) & (targets < FIRST + 2 * SLOTS)
    opens = second.int().argmax(-1)
    rows = torch.arange(20)

    def score(place: torch.Tensor) -> float:
        logits = solved(task, batch)
        logits[rows, place] = 0.0
        logits[rows, place, PAD] = 1.0
        right, count = task.score(logits, targets)
        assert count == 60
        return float(right)

    # a parameter of the first question, the sign that ends it, a parameter of the second, the last sign
    last = (targets == END).int().argmax(-1)
    assert [score(place) for place in (opens - 1, opens, opens + 1, last)] == [40.0] * 4
    # the very first sign is part of the first question too
    assert score(opens * 0) == 40.0


def test_functions_have_tokens_of_their_own_drawn_anew_for_each_row(task: Code) -> None:
    batch = task.batch("train", 0, 0, 300)
    inputs = batch["inputs"]
    asked = inputs[:, 1 : task.begin : 2 * task.parameters + 3]
    assert len(asked.unique()) > 300 and (asked >= len(KNOWN)).all()
    for row, names in zip(inputs, asked, strict=True):
        defined = row[task.begin :][1:][row[task.begin :][:-1] == DEF]
        assert ((defined[:, None] == names).sum(0) == 1).all()


def test_no_two_functions_of_a_window_that_are_asked_for_have_the_same_parameters(task: Code) -> None:
    for target in task.batch("train", 1, 0, 200)["targets"]:
        marks = (target >= FIRST) & (target < BEHIND) & ((target - FIRST) % SLOTS == 0)
        parts = [tuple(part[part >= BEHIND].tolist()) for part in target.tensor_split(marks.nonzero()[1:, 0].tolist())]
        assert len(set(parts)) == 3 and all(2 <= len(part) <= 3 for part in parts)


def test_the_depth_of_answers_is_spread_over_the_window() -> None:
    task = Code(length=700, questions=1)
    depth = task.depth(**task.batch("train", 0, 0, 400))
    assert 0.4 < depth.mean() < 0.6
    # nine tenths of them are not in a half of it
    assert depth.quantile(0.1) < 0.25 and depth.quantile(0.9) > 0.75


def test_outlines_are_the_beginnings_of_functions_in_training_rows_alone() -> None:
    outlined = Code(length=80, questions=2, parameters=2, outline=9)
    batch = outlined.batch("train", 0, 0, 40)
    right, count = outlined.score(solved(outlined, batch), batch["targets"])
    assert right == count == 80
    for row in batch["inputs"][:, outlined.begin :]:
        at = (row == DEF).nonzero()[:, 0]
        # one begins at each ninth word, from the first whole one on
        assert torch.equal(at, torch.arange(int(at[0]), len(row), 9)) and at[0] < 9
    whole = Code(length=500, questions=2, parameters=2)
    cut = Code(length=500, questions=2, parameters=2, outline=40)
    assert torch.equal(whole.batch("test", 0, 0, 9)["inputs"], cut.batch("test", 0, 0, 9)["inputs"])


def test_a_text_of_ones_own_is_read_as_the_modules_are() -> None:
    task = Code(length=64, questions=2)
    found = task.encode(["first", "two"], TEXT)
    said = [found.words[int(token)] for token in task.solve(found.tokens[None])[0]]
    assert said[:10] == ["<1>", "self", "<1.2>", "other", "<1.3>", "key", "<2>", "left", "<2.2>", "right"]
    assert set(said[10:]) == {"</s>"}
    assert [found.words[int(token)] for token in found.tokens[task.begin :]] == words_of(TEXT)
    # one name for both questions
    assert task.encode(["first"], TEXT).tokens.shape == found.tokens.shape


def test_the_baseline_is_a_guess_among_the_functions_of_the_window(task: Code) -> None:
    windows, ends = task.windows("valid")
    rows = [1 / len(window.asked) for window in windows for _ in range(window.begin, window.end)]
    assert len(rows) == ends[-1]
    assert task.baselines == {"any function that could be asked for": pytest.approx(sum(rows) / len(rows))}
    assert Code(length=80, outline=9).baselines == {}


def test_what_tokens_say_is_readable(task: Code) -> None:
    batch = task.batch("test", 0, 0, 1)
    said = task.text(batch["inputs"][0])
    assert said.startswith("def w") and " ( <1> , <1.2> , <1.3> ) def w" in said
    target = batch["targets"][0]
    assert task.text(target[target != IGNORED]).startswith("<1> w")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Code(length=8), "length=8 and names=512, expected at least 32 each"),
        (lambda: Code(questions=5), "questions=5, expected 1 to 4"),
        (lambda: Code(parameters=4), "parameters=4, expected 2 or 3"),
        (lambda: Code(outline=8), "outline=8, expected 0 or the 9 words of a signature at least"),
        (
            lambda: Code(length=10**6).batch("test", 0, 0, 1),
            "no module has length=1000000 words with questions=4 functions",
        ),
        (lambda: Code(length=64).encode(["third"], TEXT), "the text has no 'third', expected the name of a function"),
        (lambda: Code(length=64).encode([], TEXT), "there are 0 names, expected 1 to questions=4"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
