from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tevo.bench.tasks import HELD_OUT
from tevo.colt5.tasks import ListOps
from tevo.colt5.tasks.contract import END, PAD
from tevo.colt5.tasks.listops import TOKEN, WORDS, from_tsv, parse, to_tsv

TASKS: dict[str, Callable[[], ListOps]] = {
    "default": lambda: ListOps(examples=4),
    "small": lambda: ListOps(length=40, depth=4, children=3, examples=30),
    "odd": lambda: ListOps(length=131, depth=7, children=6, examples=9),
}


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest) -> ListOps:
    return TASKS[request.param]()


def value(text: str) -> int:
    """A second way: Python evaluates the list, with operations that are written out of counts of digits."""
    code = text.replace(" ]", "))").replace(" ", ",")
    for word in ("MIN", "MAX", "MED", "SM"):
        code = code.replace(f"[{word},", f"{word}((")

    def median(values: Sequence[int]) -> int:
        # digits whose rank is in the middle, counted from below
        counts, ranked = Counter(values), []
        for digit in range(10):
            ranked += [digit] * counts[digit]
        half, odd = divmod(len(ranked), 2)
        return ranked[half] if odd else int((ranked[half - 1] + ranked[half]) / 2)

    names = {
        "MIN": lambda values: next(d for d in range(10) if d in values),
        "MAX": lambda values: next(d for d in reversed(range(10)) if d in values),
        "MED": median,
        "SM": lambda values: int(str(sum(values))[-1]),
    }
    return int(eval(code, {}, names))


def trees(rows: Tensor) -> list[str]:
    return [" ".join(WORDS[token] for token in row if token != PAD) for row in rows.tolist()]


def test_values_of_examples_worked_by_hand() -> None:
    worked = {
        "[MAX 4 2 ]": 4,
        "[MED 9 0 5 ]": 5,
        "[MED 1 2 7 8 ]": 4,
        "[SM 9 9 9 ]": 7,
        "[MIN 6 [MAX 3 [MED 0 9 ] ] 8 ]": 4,
        "[SM [MIN 5 7 ] [MAX 5 7 ] [SM 9 1 ] ]": 2,
    }
    for text, right in worked.items():
        assert parse(text.split()).value == value(text) == right


def test_the_answer_is_the_value_of_the_list(task: ListOps) -> None:
    batch = task.batch("train", 3, 0, 40)
    assert [value(text) for text in trees(batch["inputs"])] == (batch["targets"][:, 0] - TOKEN["0"]).tolist()
    assert torch.equal(task.solve(batch["inputs"]), batch["targets"])
    assert (batch["targets"][:, 1] == END).all()


def test_rows_are_padded_trees_of_the_lengths_that_are_kept(task: ListOps) -> None:
    for split in ("train", *HELD_OUT):
        inputs = task.batch(split, 0, 0, 4)["inputs"]
        real = inputs != PAD
        assert inputs.shape == (4, task.length) and inputs.dtype == torch.int64
        assert (inputs[real] > END).all() and inputs.max() < task.vocab == len(task.words)
        # padding is behind
        assert torch.equal(real, real.cumprod(1).bool())
        assert (4 * real.sum(1) > task.length).all() and (real.sum(1) < task.length).all()


def test_long_range_arena_s_limits_are_the_defaults() -> None:
    chosen = ListOps(examples=4)
    assert (chosen.length, chosen.levels, chosen.children, chosen.vocab) == (2000, 10, 10, 17)
    lengths = (chosen.batch("train", 0, 0, 20)["inputs"] != PAD).sum(1)
    assert lengths.min() > 500 and lengths.max() < 2000


def test_rows_depend_on_split_seed_index_and_row_alone(task: ListOps) -> None:
    first = task.batch("train", 3, 5, 7)["inputs"]
    torch.manual_seed(1)
    random.seed(1)
    assert torch.equal(first[:4], task.batch("train", 3, 5, 4)["inputs"])
    for other in (("train", 4, 5), ("train", 3, 6)):
        assert not torch.equal(first, task.batch(*other, 7)["inputs"])


def test_held_out_rows_do_not_depend_on_what_was_asked_for_before() -> None:
    one, other = TASKS["small"](), TASKS["small"]()
    last = one.batch("test", 0, 2, 10)["inputs"]
    whole = torch.cat([rows["inputs"] for rows in other.batches("test", 7)])
    assert torch.equal(last, whole[20:30])


def test_trees_are_unique_and_of_one_split() -> None:
    # few trees: the same ones come again and again
    chosen = ListOps(length=10, depth=2, children=2, examples=40)
    rows = {split: trees(torch.cat([b["inputs"] for b in chosen.batches(split, 40)])) for split in HELD_OUT}
    rows["train"] = trees(chosen.batch("train", 0, 0, 500)["inputs"])
    assert len(set(rows["train"])) < 400
    for split in HELD_OUT:
        assert len(set(rows[split])) == 40
    assert not set(rows["train"]) & set(rows["valid"]) and not set(rows["train"]) & set(rows["test"])
    assert not set(rows["valid"]) & set(rows["test"])


def test_leaves_operators_digits_and_children_are_drawn_as_they_are_said_to_be() -> None:
    chosen = ListOps(length=64, depth=3, children=4, examples=4)
    # all fit
    chosen.length = 10**6
    kinds: Counter[str] = Counter()
    counts: Counter[int] = Counter()
    tries = 3000
    for row in range(tries):
        tokens: list[int] = []
        chosen._grow(_stream(row), 1, tokens)
        root = parse([WORDS[token] for token in tokens])
        counts[len(root.children)] += 1
        kinds.update(child.word for child in root.children)
    total = sum(kinds.values())
    digits = sum(kinds[str(d)] for d in range(10)) / total
    # five standard deviations of a share, of the fewest trials there can be
    assert abs(digits - 0.75) < 5 * math.sqrt(0.75 * 0.25 / total)
    for digit in range(10):
        assert abs(kinds[str(digit)] / total - 0.075) < 5 * math.sqrt(0.075 / total)
    for word in ("[MIN", "[MAX", "[MED", "[SM"):
        assert abs(kinds[word] / total - 0.0625) < 5 * math.sqrt(0.0625 / total)
    assert set(counts) == {2, 3, 4}
    for count in counts.values():
        assert abs(count / tries - 1 / 3) < 5 * math.sqrt(2 / 9 / tries)


def _stream(seed: int) -> Iterator[int]:
    numbers = random.Random(seed)
    while True:
        yield numbers.getrandbits(64)


def test_what_does_not_fit_is_given_up_before_it_is_grown() -> None:
    chosen = ListOps(length=64, depth=10, examples=4)
    for row in range(300):
        tokens: list[int] = []
        right = chosen._grow(_stream(row), 1, tokens)
        assert len(tokens) < 64
        if right >= 0:
            assert right == value(" ".join(WORDS[token] for token in tokens))


def test_the_value_is_the_same_without_all_that_is_not_marked(task: ListOps) -> None:
    batch = task.batch("train", 1, 0, 40)
    question, evidence, answer = task.oracle(**batch)
    assert not (question & evidence).any() and (question.sum(1) == 1).all()
    bare = batch["inputs"].where(question | evidence, PAD)
    assert torch.equal(task.solve(bare), batch["targets"])
    assert (bare != PAD).sum() < (batch["inputs"] != PAD).sum()
    assert not (answer & ~evidence).any()


@pytest.mark.parametrize(
    ("text", "kept", "handed"),
    [
        ("[MAX 4 7 7 ]", "7 ]", [2]),
        ("[MIN 4 [SM 9 4 ] 8 ]", "[SM 9 4 ] ]", []),
        ("[MED 1 2 7 8 ]", "2 7 ]", []),
        # 6.5 rounds down to 6
        ("[MED 1 7 6 8 ]", "6 ]", [3]),
        ("[MED 8 [MAX 5 3 ] 0 ]", "[MAX 5 ] ]", [3]),
        ("[SM 1 [MIN 3 9 ] ]", "1 [MIN 3 ] ]", []),
    ],
)
def test_marks_of_examples_worked_by_hand(text: str, kept: str, handed: list[int]) -> None:
    inputs = torch.tensor([[*(TOKEN[word] for word in text.split()), PAD, PAD]])
    chosen = TASKS["small"]()
    question, evidence, answer = chosen.oracle(inputs, chosen.solve(inputs))
    assert question[0].nonzero().flatten().tolist() == [0]
    assert chosen.text(inputs[evidence]) == kept
    assert answer[0].nonzero().flatten().tolist() == handed


def test_the_marked_digit_is_the_answer_where_one_is_handed_up() -> None:
    chosen = TASKS["small"]()
    batch = chosen.batch("train", 1, 0, 200)
    answer = chosen.oracle(**batch).answer
    handed = answer.any(1)
    assert (answer.sum(1) <= 1).all()
    assert torch.equal(batch["inputs"][answer], batch["targets"][handed, 0])
    for text, one in zip(trees(batch["inputs"]), handed.tolist(), strict=True):
        assert not (one and text.startswith("[SM"))
        if "[SM" not in text and "[MED" not in text:
            assert one


def test_baselines_are_the_best_constants_on_valid() -> None:
    chosen = TASKS["small"]()
    rows = chosen.batch("valid", 0, 0, 30)
    answers, tops = rows["targets"][:, 0], rows["inputs"][:, 0]
    one = max((answers == digit).double().mean().item() for digit in answers)
    each = sum(max(int((answers[tops == top] == d).sum()) for d in answers) for top in set(tops.tolist())) / 30
    assert list(chosen.baselines.values()) == pytest.approx([one, each])
    assert chosen.chance == 0.1 < one <= each


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    rows = [(text, parse(text.split()).value) for text in trees(TASKS["odd"]().batch("test", 0, 0, 9)["inputs"])]
    to_tsv(tmp_path / "lists.tsv", rows)
    assert list(from_tsv(tmp_path / "lists.tsv")) == rows


def test_files_have_the_form_of_long_range_arena(tmp_path: Path) -> None:
    file = tmp_path / "lists.tsv"
    to_tsv(file, [("[MAX 4 [MIN 2 3 ] ]", 4)])
    line = "( ( ( [MAX 4 ) ( ( ( [MIN 2 ) 3 ) ] ) ) ] )\t4\r\n"
    assert file.read_bytes().decode() == "Source\tTarget\r\n" + line
    file.write_text("Source\tTarget\n[MAX 4 [MIN 2 3 ] ]\t4\n")
    assert list(from_tsv(file)) == [("[MAX 4 [MIN 2 3 ] ]", 4)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", None),
        ("Target\tSource\n", "the first line is .* expected the header"),
        ("Source\tTarget\n[MAX 4 2 ] 4\n", "line 2: 1 columns, expected a tree, a tab and its value"),
        ("Source\tTarget\n[MAX 4 2\t4\n", "line 2: the list has 1 operators without an end and 0 whole trees"),
        ("Source\tTarget\n[MAX 4 ] ]\t4\n", "line 2: word 4 of the list is ']', expected a digit"),
        ("Source\tTarget\n1 2\t1\n", "0 operators without an end and 2 whole trees, expected 0 and 1"),
        ("Source\tTarget\n[MAX ]\t4\n", "word 1 of the list, '\\[MAX', has nothing to work on"),
        ("Source\tTarget\n[MAX 4 12 ]\t4\n", "word 3 of the list is '12'"),
        ("Source\tTarget\n( [MAX 4 ) 2 ]\t4\n", "line 2: its round brackets are not those of nested pairs"),
        ("Source\tTarget\n[MAX 4 2 ]\t3\n", "line 2: the value is '3', but its tree's is 4"),
    ],
)
def test_a_malformed_line_is_refused_in_a_sentence(text: str, sentence: str | None, tmp_path: Path) -> None:
    file = tmp_path / "lists.tsv"
    file.write_text(text)
    if sentence is None:
        assert list(from_tsv(file)) == []
        return
    with pytest.raises(ValueError, match=sentence):
        list(from_tsv(file))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"length": 7}, "length=7, depth=10 and children=10, expected at least 8, 2 and 2"),
        ({"depth": 1}, "depth=1"),
        ({"children": 1}, "children=1"),
        ({"length": 100, "depth": 2, "children": 5}, "no new one has more than 25 and fewer than length=100 tokens"),
        ({"length": 8, "depth": 2, "children": 2, "examples": 500}, "examples=500 smaller"),
        ({"length": 40, "depth": 4, "children": 3, "examples": 0}, "examples=0, expected the number of held-out rows"),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ListOps(**options)


def test_a_recipe_s_phases_are_of_this_task() -> None:
    pytest.importorskip("transformers")
    from tevo.colt5.recipes import CoLT5Recipe
    from tevo.colt5.training import build_task
    from tevo.training.recipe import resolve

    task = build_task(resolve(CoLT5Recipe, preset="listops", children=3, examples=9))
    assert [one.facts for one in task.tasks] == [
        {"task": "listops", "length": n, "depth": 4, "children": 3, "examples": 9} for n in (12, 24, 48)
    ]
    assert task.answer_length == 2 and task.chance == 0.1


def test_a_list_can_be_asked_for_as_other_questions_are() -> None:
    pytest.importorskip("transformers")
    from tevo.colt5.reading import long_text, pieces_of
    from tevo.colt5.training import question_tokens

    chosen = TASKS["small"]()
    text, question, right = long_text(chosen, "test")
    tokens = question_tokens(chosen, question, text)
    assert chosen.text(chosen.solve(tokens)[0]) == right
    assert "".join(pieces_of(chosen, tokens[0])).strip() == f"{question} {text}"


def test_rows_are_the_same_on_every_machine() -> None:
    rows = [make().batch(split, 0, 0, 4) for make in TASKS.values() for split in ("train", "valid")]
    total = hashlib.sha256(
        b"".join(t.numpy().astype("<i8").tobytes() for row in rows for t in row.values())
    ).hexdigest()
    # changes with any change of the generator, and with it the meaning of every stored score
    assert total[:16] == "d6e44d69289309a6"
