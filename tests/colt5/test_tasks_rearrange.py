from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise

import pytest
import torch

from tevo.bench.tasks import HELD_OUT
from tevo.colt5.tasks import Rearrange
from tevo.colt5.tasks.contract import END, PAD
from tevo.colt5.tasks.rearrange import ORDERS
from tevo.colt5.tasks.words import FILLER

TASKS: dict[str, Callable[[], Rearrange]] = {
    **{what: lambda what=what: Rearrange(what=what, length=131, examples=9) for what in ORDERS},  # type: ignore[misc]
    "default": Rearrange,
    **{
        f"{what}-one": lambda what=what: Rearrange(what=what, length=7, marked=1, values=2, examples=9)  # type: ignore[misc]
        for what in ORDERS
    },
    "sort-full": lambda: Rearrange(what="sort", length=31, marked=7, values=14, examples=9),
    "reverse-full": lambda: Rearrange(what="reverse", length=31, marked=7, values=14, examples=9),
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Rearrange:
    return TASKS[request.param]()


def test_the_answer_is_what_the_text_s_words_say(task: Rearrange) -> None:
    batch = task.batch("train", 3, 0, 30)
    for row, target in zip(batch["inputs"], batch["targets"], strict=True):
        what, *words = task.text(row).split()
        said = [after for before, after in pairwise(words) if before == "!"]
        if what == "reverse":
            said.reverse()
        if what == "sort":
            said = [word for word in task.words if word in said]
        assert task.text(target).split() == said
        # as many of the same kind without a mark
        kind = set(task.words[-task.values :])
        assert Counter(word in kind for word in words)[True] == 2 * task.marked == len({*words} & kind)
    assert torch.equal(task.solve(batch["inputs"]), batch["targets"])


def test_batches_are_tokens_of_the_vocabulary_and_end(task: Rearrange) -> None:
    for split in ("train", *HELD_OUT):
        batch = task.batch(split, 0, 0, 7)
        inputs, targets = batch["inputs"], batch["targets"]
        assert inputs.shape == (7, task.length) and targets.shape == (7, task.marked + 1)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.min() > END > PAD and max(inputs.max(), targets.max()) < task.vocab == len(task.words)
        assert (targets[:, -1] == END).all() and (targets[:, :-1] > END).all()
    assert len(set(task.words)) == len(task.words)


def test_rows_depend_on_split_seed_index_and_row_alone(task: Rearrange) -> None:
    first = task.batch("train", 3, 5, 7)
    for key, rows in first.items():
        assert torch.equal(rows[:4], task.batch("train", 3, 5, 4)[key])
    for other in (("train", 4, 5), ("train", 3, 6), ("valid", 3, 0)):
        assert not torch.equal(first["inputs"], task.batch(*other, 7)["inputs"])
    parts = list(task.batches("valid", 4))[:3]
    assert torch.equal(torch.cat([part["inputs"] for part in parts])[:9], task.batch("valid", 0, 0, 9)["inputs"])


def test_the_splits_have_no_row_in_common() -> None:
    chosen = Rearrange(what="sort", length=31, marked=2, values=8, examples=400)
    rows = {split: {tuple(row) for row in chosen.batch(split, 0, 0, 400)["inputs"].tolist()} for split in HELD_OUT}
    rows["train"] = {tuple(row) for row in chosen.batch("train", 0, 0, 400)["inputs"].tolist()}
    assert all(not rows[a] & rows[b] for a, b in combinations(rows, 2))


def test_words_stand_together_or_apart_as_is_asked() -> None:
    for what in ORDERS:
        chosen = Rearrange(what=what, length=131)
        batch = chosen.batch("train", 0, 0, 200)
        words = chosen.oracle(**batch).answer.nonzero()[:, 1].view(200, 4)
        together = ((words[:, 1:] - words[:, :-1]) == 2).all(1)
        if what in ("copy", "reverse"):
            assert together.all()
        else:
            # the chance that four of 64 places are side by side is below 1e-3
            assert together.sum() <= 2


def test_the_marked_tokens_are_enough_for_the_answer(task: Rearrange) -> None:
    batch = task.batch("train", 1, 0, 50)
    question, evidence, answer = task.oracle(**batch)
    assert not (question & evidence).any() and not (answer & ~evidence).any()
    # all other tokens become one filler word
    bare = torch.where(question | evidence, batch["inputs"], task.words.index(FILLER[0]))
    assert torch.equal(task.solve(bare), batch["targets"])
    found = batch["inputs"][answer].view(50, task.marked)
    assert torch.equal(found.sort(1).values, batch["targets"][:, :-1].sort(1).values)


@pytest.mark.parametrize("what", ORDERS)
def test_places_of_marked_and_other_words_are_uniform(what: str) -> None:
    chosen = Rearrange(what=what, length=402, marked=3)
    batch = chosen.batch("train", 0, 0, 5000)
    marked = chosen.oracle(**batch).answer
    for places in (marked, (batch["inputs"] >= chosen.vocab - chosen.values) & ~marked):
        at = places.nonzero()[:, 1].double() / 402
        assert len(at) == 15_000
        tenths = (at * 10).long().bincount(minlength=10) / len(at)
        # five standard deviations of a share, words of a row counted as one, and the ends: 7 tokens of 402
        assert (tenths - 0.1).abs().max() < 5 * math.sqrt(0.1 * 0.9 / 5000) + 7 / 402


@pytest.mark.parametrize("what", ORDERS)
def test_chance_is_one_of_all_answers_and_they_are_alike_likely(what: str) -> None:
    chosen = Rearrange(what=what, length=17, marked=2, values=5)
    seen = Counter(tuple(row) for row in chosen.batch("train", 0, 0, 6000)["targets"].tolist())
    assert len(seen) == pytest.approx(1 / chosen.chance) == (10 if what == "sort" else 20)
    # five standard deviations of a share
    assert all(abs(n / 6000 - chosen.chance) < 5 * math.sqrt(chosen.chance / 6000) for n in seen.values())


@pytest.mark.parametrize("what", ORDERS)
def test_saying_words_of_the_row_scores_the_baseline(what: str) -> None:
    chosen = Rearrange(what=what, length=57, marked=2, values=9)
    batch = chosen.batch("train", 0, 0, 500)
    right = 0
    for row, target in zip(batch["inputs"], batch["targets"], strict=True):
        words = row[row >= chosen.vocab - 9]
        # pairs in the order of the text: each as good as any other, so the mean over all is what a guess scores
        right += sum(torch.equal(_ordered(what, words[list(pair)]), target[:-1]) for pair in combinations(range(4), 2))
    # exactly one of the six pairs is marked
    assert right / 6 / 500 == pytest.approx(next(iter(chosen.baselines.values())))


def _ordered(what: str, words: torch.Tensor) -> torch.Tensor:
    return words.sort().values if what == "sort" else words.flip(0) if what == "reverse" else words


def test_a_recipe_s_phases_are_of_this_task() -> None:
    pytest.importorskip("transformers")
    from tevo.colt5.recipes import CoLT5Recipe
    from tevo.colt5.training import build_task
    from tevo.training.recipe import resolve

    task = build_task(resolve(CoLT5Recipe, preset="rearrange", what="reverse", values=20))
    assert [one.facts["length"] for one in task.tasks] == [32, 64, 128, 512, 2048]
    assert {(one.facts["what"], one.facts["marked"], one.facts["values"]) for one in task.tasks} == {("reverse", 4, 20)}
    assert task.answer_length == 5


def test_rows_are_the_same_on_every_machine() -> None:
    rows = [make().batch("valid", 0, 0, 9) for make in TASKS.values()]
    total = hashlib.sha256(
        b"".join(t.numpy().astype("<i8").tobytes() for row in rows for t in row.values())
    ).hexdigest()
    # changes with any change of the generator, and with it the meaning of every stored score
    assert total[:16] == "8785b534651990b6"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"what": "shuffle"}, "what='shuffle', expected one of copy, reverse, selective, sort"),
        ({"marked": 0}, "marked=0 and values=32, expected marked >= 1"),
        ({"marked": 17}, "2 marked <= values <= 100"),
        ({"values": 101}, "values=101"),
        ({"length": 18}, "length=18 has no room for marked=4 words and as many without a mark; length >= 19"),
        ({"what": "sort", "length": 30, "marked": 7}, "length >= 31"),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Rearrange(**options)  # type: ignore[arg-type]
