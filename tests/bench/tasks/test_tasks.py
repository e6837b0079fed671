from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tevo.bench.tasks import HELD_OUT, IGNORED, TASKS, Task, task
from tevo.bench.tasks.contract import below, shuffled
from tevo.data.text import bigram_bits, files_corpus, unigram_bits

GENERATORS = ["recall", "selective_copy", "induction", "repeated_bigram"]
# smallest, default, odd and large
OPTIONS: list[tuple[str, dict[str, object]]] = [
    ("recall", {}),
    ("recall", {"length": 4, "vocab": 4, "pairs": 1}),
    ("recall", {"length": 128, "vocab": 257, "pairs": 13}),
    ("recall", {"length": 28, "vocab": 16, "pairs": 7}),
    ("selective_copy", {}),
    ("selective_copy", {"length": 2, "vocab": 4, "tokens": 1}),
    ("selective_copy", {"length": 77, "vocab": 5, "tokens": 38}),
    ("induction", {}),
    ("induction", {"length": 3, "vocab": 3}),
    ("induction", {"length": 101, "vocab": 7}),
    ("repeated_bigram", {}),
    ("repeated_bigram", {"length": 4, "vocab": 2}),
    ("repeated_bigram", {"length": 51, "vocab": 99}),
]
OPTION_IDS = [f"{name}-{i}" for i, (name, _) in enumerate(OPTIONS)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("text")
    raw = np.random.Philox(3).random_raw(6000)
    (folder / "a.txt").write_bytes((97 + below(raw, 20)).astype(np.uint8).tobytes())
    return task("text", data=folder / "a.txt", length=13, examples=9)


@pytest.fixture(params=["text", *GENERATORS])
def any_task(request: pytest.FixtureRequest, text: Task) -> Task:
    return text if request.param == "text" else task(request.param, examples=9)


def answers(targets: Tensor, predictions: Tensor, vocab: int) -> Tensor:
    """Logits of a model that is sure of its predictions."""
    return torch.nn.functional.one_hot(predictions, vocab).double()


def test_batches_are_int64_in_range_and_score_something(any_task: Task) -> None:
    for split in ("train", *HELD_OUT):
        batch = any_task.batch(split, 0, 0, 5)
        for key in ("inputs", "targets"):
            assert batch[key].shape == (5, any_task.length)
            assert batch[key].dtype == torch.int64
            assert batch[key].max() < any_task.vocab
        assert batch["inputs"].min() >= 0
        kept = batch["targets"][batch["targets"] != IGNORED]
        assert kept.min() >= 0
        assert (batch["targets"] != IGNORED).any(-1).all()


def test_a_batch_is_a_pure_function_of_its_arguments(any_task: Task) -> None:
    first = any_task.batch("train", 3, 5, 7)
    any_task.batch("train", 4, 6, 2)
    again = any_task.batch("train", 3, 5, 7)
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_row_does_not_depend_on_the_batch_size(any_task: Task) -> None:
    large, small = any_task.batch("train", 3, 5, 11), any_task.batch("train", 3, 5, 4)
    for key in large:
        assert torch.equal(large[key][:4], small[key])


def test_seed_index_and_split_each_change_the_rows(any_task: Task) -> None:
    base = any_task.batch("train", 3, 5, 7)["inputs"]
    for other in (("train", 4, 5), ("train", 3, 6), ("valid", 3, 0), ("test", 3, 0)):
        assert not torch.equal(base, any_task.batch(*other, 7)["inputs"])
    assert not torch.equal(any_task.batch("valid", 0, 0, 7)["inputs"], any_task.batch("test", 0, 0, 7)["inputs"])


def test_rows_of_a_stream_are_all_different() -> None:
    chosen = task("selective_copy", length=32)
    rows = torch.cat([chosen.batch("train", 0, index, 50)["inputs"] for index in range(20)])
    assert len(rows.unique(dim=0)) == 1000


def test_held_out_rows_are_the_same_for_every_seed_and_batch_size(any_task: Task) -> None:
    once = any_task.batch("valid", 0, 0, any_task.examples)
    for size in (1, 2, 4, 100):
        parts = list(any_task.batches("valid", size))
        for key in once:
            assert torch.equal(torch.cat([part[key] for part in parts]), once[key])
    other = any_task.batch("valid", 17, 0, any_task.examples)
    assert torch.equal(once["inputs"], other["inputs"])


def test_held_out_splits_end(any_task: Task) -> None:
    assert len(any_task.batch("test", 0, 2, 4)["inputs"]) == 1  # 9 rows
    with pytest.raises(ValueError, match="batch 3 of 4 rows is past the end of 'test', which has examples=9 rows"):
        any_task.batch("test", 0, 3, 4)


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=OPTION_IDS)
def test_the_solver_scores_everything(name: str, options: dict[str, object]) -> None:
    chosen = task(name, **options)
    for batch in (chosen.batch("train", 5, 2, 64), *chosen.batches("valid", 200)):
        predictions = chosen.solve(batch["inputs"])
        assert predictions.shape == batch["inputs"].shape
        total, count = chosen.score(answers(batch["targets"], predictions, chosen.vocab), batch["targets"])
        assert total == count > 0


@pytest.mark.parametrize("name", GENERATORS)
def test_a_solver_fed_other_rows_fails(name: str) -> None:
    chosen = task(name)
    batch, other = chosen.batch("train", 0, 0, 200), chosen.batch("train", 0, 1, 200)
    total, count = chosen.score(
        answers(batch["targets"], chosen.solve(other["inputs"]), chosen.vocab), batch["targets"]
    )
    assert total / count < 0.2


@pytest.mark.parametrize("name", GENERATORS)
def test_chance_is_what_blind_guessing_scores(name: str) -> None:
    chosen = task(name)
    batch = chosen.batch("train", 0, 0, 4000)
    kept = batch["targets"][batch["targets"] != IGNORED]
    shares = torch.bincount(kept, minlength=chosen.vocab) / len(kept)
    # answers are equally likely: any one of them, always given, scores chance; five standard deviations, rows of
    # several questions counted as independent
    expected = (shares > 0).double() * chosen.chance
    assert ((shares - expected).abs() <= 5 * math.sqrt(chosen.chance / len(kept))).all()
    assert (shares > 0).sum() == round(1 / chosen.chance)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_baseline_is_what_guessing_among_the_rows_tokens_scores(name: str) -> None:
    chosen = task(name)
    batch = chosen.batch("train", 0, 0, 4000)
    inputs, kept = batch["inputs"], batch["targets"] != IGNORED
    candidates = {
        "recall": lambda row: row[1:8:2],
        "selective_copy": lambda row: row[row > 1],
        "induction": lambda row: row[row > 0],
        "repeated_bigram": lambda row: row.unique(),
    }[name]
    share = (
        sum(
            (candidates(row)[:, None] == target[mask]).double().mean(0).sum()
            for row, target, mask in zip(inputs, batch["targets"], kept, strict=True)
        )
        / kept.sum()
    )
    # the mean over 4000 rows of a number in [0, 1]; measured spread is far below 0.01
    assert share.item() == pytest.approx(chosen.baselines[next(iter(chosen.baselines))], abs=0.01)


def test_recall_asks_each_key_once_and_answers_with_its_value() -> None:
    chosen = task("recall", length=40, vocab=33, pairs=7)
    batch = chosen.batch("train", 1, 0, 50)
    for row, target in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
        value = dict(zip(row[0:14:2], row[1:14:2], strict=True))
        assert len(value) == 7 and all(1 <= k < 16 for k in value)
        assert len(set(value.values())) == 7 and all(16 <= v < 33 for v in value.values())
        assert target[:14] == [IGNORED] * 14
        assert sorted(k for k in row[14:] if k) == sorted(value)
        for k, answer in zip(row[14:], target[14:], strict=True):
            assert answer == (value[k] if k else IGNORED)


def test_recall_gaps_follow_the_power_law() -> None:
    chosen = task("recall", length=66, vocab=8, pairs=1)
    batch = chosen.batch("train", 0, 0, 20_000)
    gaps = ((batch["targets"] != IGNORED).int().argmax(-1) - 2) // 2  # 0 .. 31
    seen = torch.bincount(gaps, minlength=32) / len(gaps)
    rate = torch.arange(1, 33) ** -0.99
    # four standard deviations of a share at most: sqrt(0.25 / 20000) = 0.0035
    assert (seen - rate / rate.sum()).abs().max() < 0.014
    assert (seen > 0).all()


def test_selective_copy_asks_for_its_tokens_in_order() -> None:
    batch = task("selective_copy", length=30, vocab=9, tokens=5).batch("train", 1, 0, 50)
    for row, target in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
        kept = [x for x in row[:25] if x != 0]
        assert row[25:] == [1] * 5
        assert target == [IGNORED] * 25 + kept
        assert min(kept) >= 2


def test_selective_copy_places_are_equally_likely() -> None:
    batch = task("selective_copy", length=24, tokens=4).batch("train", 0, 0, 10_000)
    share = (batch["inputs"][:, :20] > 0).double().mean(0)
    assert (share - 0.2).abs().max() < 5 * math.sqrt(0.2 * 0.8 / 10_000)  # five standard deviations


def test_induction_asks_for_the_follower_of_the_special_token() -> None:
    batch = task("induction", length=11, vocab=5).batch("train", 1, 0, 200)
    places = set()
    for row, target in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
        assert row.count(0) == 2 and row[-1] == 0
        assert target == [IGNORED] * 10 + [row[row.index(0) + 1]]
        places.add(row.index(0))
    assert places == set(range(9))


def test_repeated_bigram_scores_exactly_the_tokens_seen_before() -> None:
    batch = task("repeated_bigram", length=21, vocab=30).batch("train", 1, 0, 200)
    periods = set()
    for row, target in zip(batch["inputs"].tolist(), batch["targets"].tolist(), strict=True):
        for t, (token, answer) in enumerate(zip(row, target, strict=True)):
            assert answer == (row[row.index(token) + 1] if token in row[:t] else IGNORED)
        periods.add(len(set(row)))
    assert periods == set(range(5, 11))


GOLDEN = {
    "recall": "ceb666b6d10de74a",
    "selective_copy": "c7a38f0d08115614",
    "induction": "1d21c614dcf420dd",
    "repeated_bigram": "d054ff42bffe201f",
    "text": "6a82ba478cd5e8a3",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_rows_are_the_same_on_every_machine_and_version(name: str, text: Task) -> None:
    chosen = text if name == "text" else task(name)
    digest = hashlib.sha256()
    for split, seed, index in (("train", 0, 0), ("train", 2**40 + 1, 10**9), ("valid", 0, 0), ("test", 0, 1)):
        batch = chosen.batch(split, seed, index, 4)
        for key in ("inputs", "targets"):
            digest.update(batch[key].numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[name], (
        "rows changed: earlier results can no longer be compared with new ones"
    )


def test_text_targets_are_the_next_bytes(text: Task) -> None:
    for split in ("train", *HELD_OUT):
        batch = text.batch(split, 0, 0, 6)
        assert torch.equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_text_rows_are_windows_of_their_own_split(text: Task) -> None:
    for split in ("train", *HELD_OUT):
        whole = text.corpus.splits[split].tobytes()  # type: ignore[attr-defined]
        batch = text.batch(split, 2, 0, 9)
        for x, y in zip(batch["inputs"], batch["targets"], strict=True):
            assert bytes([*x.tolist(), y[-1].item()]) in whole


def test_text_held_out_rows_cover_a_split_without_scoring_a_byte_twice(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(1, 201)) * 10)
    chosen = task("text", data=tmp_path / "a", length=9, examples=10_000)
    assert chosen.examples == 11  # 100 held-out bytes, of which the first is never asked
    scored = torch.cat([batch["targets"].flatten() for batch in chosen.batches("valid", 4)])
    held = chosen.corpus.splits["valid"]  # type: ignore[attr-defined]
    assert scored.tolist() == held[1:100].tolist()


def test_text_held_out_rows_are_spread_over_the_split(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"".join(b"%07d\n" % i for i in range(10_000)))
    chosen = task("text", data=tmp_path / "a", length=16, examples=5)
    held = chosen.corpus.splits["valid"].tobytes()  # type: ignore[attr-defined]
    starts = [held.index(bytes(row.tolist())) for row in chosen.batch("valid", 0, 0, 5)["inputs"]]
    assert starts == [i * 249 // 5 * 16 for i in range(5)]


def test_text_baselines_are_those_of_the_bytes_scored(tmp_path: Path) -> None:
    raw = np.random.Philox(5).random_raw(4000)
    (tmp_path / "a").write_bytes((97 + below(raw, 7)).astype(np.uint8).tobytes())
    chosen = task("text", data=tmp_path / "a", length=1, examples=10_000)
    corpus = files_corpus(tmp_path / "a")
    assert chosen.baselines == pytest.approx(
        {"unigram": unigram_bits(corpus), "bigram": bigram_bits(corpus)}, rel=1e-12
    )
    assert task("text", data=tmp_path / "a", length=1, examples=20).baselines != chosen.baselines


def test_text_train_windows_reach_both_ends(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(33, 99)))
    chosen = task("text", data=tmp_path / "a", length=3)
    corpus = chosen.corpus.splits["train"]  # type: ignore[attr-defined]
    inputs = chosen.batch("train", 0, 0, 2000)["inputs"]
    assert inputs[:, 0].unique().tolist() == corpus[:-3].tolist()


def test_uniform_logits_score_chance(any_task: Task) -> None:
    batch = any_task.batch("valid", 0, 0, 9)
    logits = torch.zeros(9, any_task.length, any_task.vocab)
    total, count = any_task.score(logits, batch["targets"])
    if any_task.metric == "bits_per_byte":
        assert (total / count).item() == pytest.approx(8.0, rel=1e-12)
    else:
        assert total <= count


def test_bits_per_byte_is_the_mean_of_minus_log2_p(text: Task) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = text.batch("valid", 0, 0, 3)["targets"].clone()
    targets[1, 4:] = IGNORED
    logits = torch.randn(3, text.length, 256, generator=generator, dtype=torch.float64)
    total, count = text.score(logits, targets)
    expected = [
        -math.log2(math.exp(logits[b, t, targets[b, t]]) / logits[b, t].exp().sum().item())
        for b in range(3)
        for t in range(text.length)
        if targets[b, t] != IGNORED
    ]
    assert count == len(expected)
    assert total.item() == pytest.approx(sum(expected), rel=1e-12)


def test_scores_pool_exactly(any_task: Task) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = any_task.batch("valid", 0, 0, 9)["targets"]
    logits = torch.randn(9, any_task.length, any_task.vocab, generator=generator)
    total, count = any_task.score(logits, targets)
    parts = [any_task.score(logits[i : i + 2], targets[i : i + 2]) for i in range(0, 9, 2)]
    assert sum(p[1] for p in parts) == count
    # float64 sums in another order
    assert float(sum(p[0] for p in parts)) == pytest.approx(total.item(), rel=1e-14)


def test_a_nan_is_never_a_hit() -> None:
    chosen = task("recall")
    batch = chosen.batch("valid", 0, 0, 3)
    logits = answers(batch["targets"], chosen.solve(batch["inputs"]), chosen.vocab)
    # argmax takes a NaN for the greatest: put where the right answer is, it would be a hit
    poisoned = logits.masked_fill(logits == 1, math.nan)
    assert chosen.score(logits, batch["targets"])[0] == chosen.score(logits, batch["targets"])[1]
    assert chosen.score(poisoned, batch["targets"])[0] == 0


def philox(key: int, counter: int) -> list[int]:
    """Philox4x64-10 as published (Salmon et al. 2011, Random123), one count: four 64-bit numbers."""
    full = (1 << 64) - 1
    x = [counter >> 64 * i & full for i in range(4)]
    k = [key & full, key >> 64]
    for _ in range(10):
        a, b = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
        x = [b >> 64 ^ x[1] ^ k[0], b & full, a >> 64 ^ x[3] ^ k[1], a & full]
        k = [k[0] + 0x9E3779B97F4A7C15 & full, k[1] + 0xBB67AE8584CAA73B & full]
    return x


def test_draws_equal_the_published_generator_row_by_row() -> None:
    chosen = task("induction", length=11, vocab=7)
    key = int.from_bytes(hashlib.sha256(b"induction train -3").digest()[:16], "little")
    rows = chosen.batch("train", -3, 5, 4)["inputs"].tolist()
    for r, row in enumerate(rows):
        # numpy counts up before it draws; 11 numbers take three counts
        raw = [x for i in range(3) for x in philox(key, (5 << 128) + 3 * r + i + 1)][:11]
        expected = [1 + (x * 6 >> 64) for x in raw]
        expected[raw[-1] * 9 >> 64] = expected[-1] = 0
        assert row == expected


def test_below_equals_exact_integer_arithmetic() -> None:
    raw = np.concatenate([np.random.Philox(1).random_raw(500), np.array([0, 2**64 - 1, 2**32, 2**32 - 1], np.uint64)])
    for bound in (1, 2, 3, 1000, 2**31 + 7, 2**32 - 1):
        assert below(raw, bound).tolist() == [int(x) * bound >> 64 for x in raw]


def test_shuffled_gives_every_permutation_equally_often() -> None:
    rows = shuffled(np.random.Philox(1).random_raw(24_000).reshape(-1, 4))
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    assert len(kinds) == 24
    assert abs(counts - 250).max() < 5 * math.sqrt(250)  # five standard deviations


def test_options_do_not_move_the_random_numbers() -> None:
    few, many = task("recall", examples=9), task("recall", examples=90)
    assert torch.equal(few.batch("train", 0, 0, 5)["inputs"], many.batch("train", 0, 0, 5)["inputs"])
    assert torch.equal(few.batch("valid", 0, 0, 9)["inputs"], many.batch("valid", 0, 0, 9)["inputs"])


def test_facts_are_json_and_name_the_task(any_task: Task) -> None:
    import json

    assert json.loads(json.dumps(any_task.facts))["task"] == any_task.name


def test_text_has_no_solver_and_says_so(text: Task) -> None:
    with pytest.raises(ValueError, match="no exact solver"):
        text.solve(text.batch("valid", 0, 0, 1)["inputs"])


def test_every_task_is_looked_up_by_its_name() -> None:
    assert {kind.name for kind in TASKS.values()} == set(TASKS) == {"text", *GENERATORS}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("recal", {}, "unknown task 'recal' .did you mean 'recall'"),
        ("zzz", {}, "unknown task 'zzz'; the tasks are text, recall"),
        ("recall", {"pair": 3}, "no option 'pair' .did you mean 'pairs'"),
        ("recall", {"length": 33}, "length=33 with pairs=4"),
        ("recall", {"length": 14}, "length=14 with pairs=4"),
        ("recall", {"pairs": 0}, "pairs=0"),
        ("recall", {"vocab": 9}, "vocab=9 has 3 keys for pairs=4; vocab >= 10"),
        ("recall", {"examples": 0}, "examples=0"),
        ("selective_copy", {"tokens": 17}, "length=32 with tokens=17"),
        ("selective_copy", {"vocab": 3}, "vocab=3"),
        ("induction", {"length": 2}, "length=2"),
        ("repeated_bigram", {"vocab": 15}, "vocab=15"),
        ("text", {"data": "/does/not/exist"}, "does not exist"),
        ("text", {"length": 0}, "length=0"),
        ("text", {"examples": 0}, "examples=0"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(name, **options)


def test_text_shorter_than_a_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 200)
    with pytest.raises(ValueError, match=r"length=10 needs 11 bytes in each split, and 'valid' of .* has 10"):
        task("text", data=tmp_path / "a", length=10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("training", 0, 0, 1), "split is 'training'"),
        (("train", 0, -1, 1), "index=-1"),
        (("train", 0, 0, 0), "size=0"),
    ],
)
def test_batches_that_cannot_be_are_refused(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task("recall").batch(*arguments)


def test_train_has_no_end_to_iterate_to() -> None:
    with pytest.raises(ValueError, match="'train' has no end"):
        next(task("recall").batches("train", 4))
