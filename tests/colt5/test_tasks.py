from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tevo.bench.tasks import HELD_OUT, IGNORED
from tevo.colt5.tasks import Documents, Lookup, Passkey, WordTask
from tevo.colt5.tasks.contract import END, PAD, rooms, spread
from tevo.colt5.tasks.words import FILLER, syllables

# smallest, default, odd and several hops
TASKS: dict[str, Callable[[], WordTask]] = {
    "passkey": Passkey,
    "passkey-small": lambda: Passkey(length=17, digits=1, examples=9),
    "passkey-odd": lambda: Passkey(length=77, digits=7, examples=9),
    "lookup": Lookup,
    "lookup-small": lambda: Lookup(length=10, questions=1, facts=1, names=1, values=2, examples=9),
    "lookup-odd": lambda: Lookup(length=131, questions=3, facts=7, names=13, values=5, examples=9),
    "lookup-2": lambda: Lookup(length=141, questions=3, hops=2, examples=9),
    "lookup-3": lambda: Lookup(length=141, questions=2, hops=3, facts=11, examples=9),
    "documents": Documents,
    "documents-small": lambda: Documents(length=43, documents=1, examples=9),
    "documents-last": lambda: Documents(length=301, documents=5, question_last=True, examples=9),
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> WordTask:
    return TASKS[request.param]()


def logits_of(answers: Tensor, vocab: int) -> Tensor:
    """Logits of a model that is sure of its answers."""
    return torch.nn.functional.one_hot(answers, vocab).double()


def test_batches_are_tokens_of_the_vocabulary_and_end(task: WordTask) -> None:
    for split in ("train", *HELD_OUT):
        batch = task.batch(split, 0, 0, 7)
        inputs, targets = batch["inputs"], batch["targets"]
        assert inputs.shape == (7, task.length) and inputs.dtype == targets.dtype == torch.int64
        assert inputs.min() > END > PAD and max(inputs.max(), targets.max()) < task.vocab == len(task.words)
        assert (targets[:, -1] == END).all() and (targets[:, :-1] > END).all()
    assert len(set(task.words)) == len(task.words)


def test_rows_depend_on_split_seed_index_and_row_alone(task: WordTask) -> None:
    first = task.batch("train", 3, 5, 7)
    for key, rows in first.items():
        assert torch.equal(rows[:4], task.batch("train", 3, 5, 4)[key])
    for other in (("train", 4, 5), ("train", 3, 6), ("valid", 3, 0)):
        assert not torch.equal(first["inputs"], task.batch(*other, 7)["inputs"])
    parts = list(task.batches("valid", 4))[:3]
    assert torch.equal(torch.cat([part["inputs"] for part in parts])[:9], task.batch("valid", 0, 0, 9)["inputs"])


def test_the_solver_matches_exactly(task: WordTask) -> None:
    batch, other = task.batch("train", 5, 2, 100), task.batch("train", 5, 3, 100)
    right, count = task.score(logits_of(task.solve(batch["inputs"]), task.vocab), batch["targets"])
    assert right == count == 100
    right, count = task.score(logits_of(task.solve(other["inputs"]), task.vocab), batch["targets"])
    # fed other rows it guesses: one of two values, or one of ten digits, in the smallest cases
    assert right / count <= task.chance + 5 * math.sqrt(task.chance / 100) + 0.05


def test_the_marked_tokens_are_enough_for_the_answer(task: WordTask) -> None:
    batch = task.batch("train", 1, 0, 50)
    question, evidence, _ = task.oracle(**batch)
    assert not (question & evidence).any()
    # all other tokens become one filler word
    bare = torch.where(question | evidence, batch["inputs"], task.words.index(FILLER[0]))
    assert torch.equal(task.solve(bare), batch["targets"])


def test_the_marked_answer_spells_the_answer(task: WordTask) -> None:
    batch = task.batch("train", 1, 0, 50)
    _, evidence, answer = task.oracle(**batch)
    assert not (answer & ~evidence).any()
    for row, marked, target in zip(batch["inputs"], answer, batch["targets"], strict=True):
        found, expected = row[marked].tolist(), target[:-1].tolist()
        if isinstance(task, Lookup):
            # numbers are not in the text, whose facts stand in another order than the questions
            found, expected = sorted(found), sorted(expected[1::2])
        assert found == expected


def test_exact_match_counts_whole_answers_only() -> None:
    chosen = Passkey(length=40, digits=3)
    targets = torch.tensor([[9, 10, 11, END], [9, 10, 11, END], [9, 10, END, IGNORED], [9, 10, 11, END]])
    logits = logits_of(
        torch.tensor([[9, 10, 11, END], [9, 10, 12, END], [9, 10, END, 5], [9, 10, 11, END]]), chosen.vocab
    )
    logits[3, 1, 0] = math.nan
    right, count = chosen.score(logits, targets)
    assert (right.item(), count.item()) == (2.0, 4.0)


def test_a_passage_begins_at_every_token_about_as_often() -> None:
    raw = np.random.Philox(1).random_raw((20_000, rooms(31, 4) + 1))
    starts = spread(raw, 3, first=5, last=36, width=4)
    assert starts.min() == 5 and starts.max() + 4 == 36
    assert (np.diff(np.sort(starts, axis=1), axis=1) >= 4).all()
    share = np.bincount(starts.ravel(), minlength=33)[5:] / starts.size
    # 28 starts; five standard deviations of a share, the three of a row counted as one
    assert np.abs(share - 1 / 28).max() < 5 * math.sqrt(1 / 28 / 20_000)


@pytest.mark.parametrize("name", ["passkey", "documents", "lookup-single"])
def test_depth_is_uniform(name: str) -> None:
    chosen = {
        "passkey": Passkey(length=400),
        "documents": Documents(length=405, documents=8),
        "lookup-single": Lookup(length=400, questions=1),
    }[name]
    batch = chosen.batch("train", 0, 0, 5000)
    tenths = (chosen.depth(**batch) * 10).long().clamp(max=9).bincount(minlength=10) / 5000
    # five standard deviations of a share, and one passage of 13 tokens that the ends cannot hold, 0.03 of the length
    assert (tenths - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / 5000) + 0.035


def test_a_fixed_depth_moves_the_key_and_nothing_else() -> None:
    anywhere = Passkey(length=77, examples=9).batch("test", 0, 0, 9)
    # 77 tokens less a question of 6 and a sentence of 10
    for depth, start in ((0.0, 6), (0.5, 36), (1.0, 67)):
        chosen = Passkey(length=77, depth=depth, examples=9)
        batch = chosen.batch("test", 0, 0, 9)
        assert (chosen.depth(**batch) * 77).round().tolist() == [start] * 9
        assert torch.equal(batch["targets"], anywhere["targets"])
        assert torch.equal(chosen.solve(batch["inputs"]), batch["targets"])
        filler = [~Passkey(length=77).oracle(**rows).evidence for rows in (batch, anywhere)]
        both = filler[0] & filler[1]
        assert torch.equal(batch["inputs"][both], anywhere["inputs"][both])


@pytest.mark.parametrize("name", ["passkey", "lookup", "documents"])
def test_answers_are_alike_likely(name: str) -> None:
    chosen = {
        "passkey": Passkey(length=40, digits=1),
        "lookup": Lookup(length=40, questions=1, facts=3, names=7, values=5),
        "documents": Documents(length=45, documents=1),
    }[name]
    targets = chosen.batch("train", 0, 0, 4000)["targets"][:, :-1]
    seen = torch.stack([column.bincount(minlength=chosen.vocab) for column in targets.T]) / 4000
    kinds = (seen > 0).sum(1)
    assert kinds.double().prod().item() == pytest.approx(1 / chosen.chance)
    for column, kind in zip(seen, kinds, strict=True):
        # five standard deviations of a share
        assert (column[column > 0] - 1 / kind).abs().max() < 5 * math.sqrt(1 / kind / 4000)


def test_guessing_a_value_of_the_row_scores_the_baseline() -> None:
    chosen = Lookup(length=60, questions=1, facts=4, values=5)
    batch = chosen.batch("train", 0, 0, 4000)
    first = chosen.vocab - 5
    right = [
        (row[row >= first] == target[1]).double().mean().item()
        for row, target in zip(batch["inputs"], batch["targets"], strict=True)
    ]
    # mean of 4000 numbers in [0, 1]
    assert np.mean(right) == pytest.approx(next(iter(chosen.baselines.values())), abs=0.02)


def test_every_question_of_a_lookup_is_followed_hop_by_hop() -> None:
    chosen = Lookup(length=141, questions=2, hops=3, facts=11)
    batch = chosen.batch("train", 0, 0, 30)
    names = syllables("en")[:64]
    for row, target in zip(batch["inputs"], batch["targets"], strict=True):
        words = chosen.text(row).split()
        body, answers = words[5:], []
        for asked in (words[1], words[3]):
            for _ in range(3):
                # a name that stands before another name is what is said of it
                places = [
                    i
                    for i, word in enumerate(body)
                    if word == asked and body[i + 1 : i + 2] not in [[n] for n in names]
                ]
                assert len(places) == 1
                asked = body[places[0] - 1]
            answers.append(asked)
        assert f"1 {answers[0]} 2 {answers[1]}" == chosen.text(target)
        # other chains are as long, and end in values too
        assert sum(word.endswith("il") for word in body) == 11 - 2 * 3


def test_told_questions_are_their_own_answers_in_training_only() -> None:
    chosen = Lookup(length=141, questions=3, told=0.4)
    batch = chosen.batch("train", 0, 0, 400)
    assert torch.equal(chosen.solve(batch["inputs"]), batch["targets"])
    said = batch["inputs"][:, 1:6:2] >= chosen.first_value
    # five standard deviations of a share
    assert abs(said.double().mean().item() - 0.4) < 5 * math.sqrt(0.4 * 0.6 / 1200)
    assert torch.equal(batch["inputs"][:, 1:6:2][said], batch["targets"][:, 1:6:2][said])
    plain = Lookup(length=141, questions=3)
    assert torch.equal(chosen.batch("valid", 0, 0, 9)["inputs"], plain.batch("valid", 0, 0, 9)["inputs"])


def test_only_one_sentence_of_the_documents_fits_the_question() -> None:
    chosen = Documents(length=700, documents=13)
    batch = chosen.batch("train", 0, 0, 30)
    shared = 0
    for row, target in zip(batch["inputs"], batch["targets"], strict=True):
        words = chosen.text(row).split()
        question, body = words[:4], words[5:]
        fits = [body[i + 4 : i + 6] for i in range(len(body)) if body[i : i + 4] == question]
        assert fits == [chosen.text(target).split()]
        assert body.count("about") == 13
        shared += sum(body[i] == question[0] and body[i + 1] != question[1] for i in range(len(body) - 1))
    # others of that first name: the name alone does not tell
    assert shared > 0


def test_invented_names_and_filler_are_all_different() -> None:
    words = [*FILLER, *syllables("en"), *syllables("il"), *syllables("ur"), *syllables("a"), *syllables("u")]
    assert len(set(words)) == len(words) == 64 + 500


def test_rows_are_the_same_on_every_machine() -> None:
    rows = [make().batch("valid", 0, 0, 9) for make in TASKS.values()]
    total = hashlib.sha256(
        b"".join(t.numpy().astype("<i8").tobytes() for row in rows for t in row.values())
    ).hexdigest()
    # changes with any change of a generator, and with it the meaning of every stored score
    assert total[:16] == "aaba5f309f65f2de"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Passkey(length=16), "length=16 with digits=5, expected digits >= 1 and length >= 15"),
        (lambda: Passkey(depth=1.5), "depth=1.5, expected a number from 0 to 1, or None"),
        (lambda: Lookup(questions=10), "questions=10, facts=64, names=64, expected hops >= 1, questions from 1 to 9"),
        (lambda: Lookup(facts=70), "facts=70, names=64"),
        (lambda: Lookup(hops=3, facts=11), "hops x questions <= facts"),
        (lambda: Lookup(values=1), "values=1, expected 2 to 100"),
        (lambda: Lookup(told=1.5), "told=1.5, expected a share from 0 to 1"),
        (lambda: Lookup(length=30, questions=1, facts=7), "has room for 6 facts, got facts=7; length >= 34"),
        (lambda: Documents(documents=0), "documents=0, expected 1 to 400"),
        (lambda: Documents(length=42, documents=1), "37 tokens, which need 38; length >= 43"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Callable[[], WordTask], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
