"""Corruption: the paper's lengths, nothing lost, every token once, and forms in turn."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tevo.colt5.objectives import (
    SPAN_CORRUPTION,
    UL2,
    Denoising,
    Gaps,
    Spans,
    corrupted,
    gapped,
    lengths_of,
    sentences,
    text_length,
    vocab_for,
)
from tevo.colt5.tokens import ByteTokens, encode
from tevo.objectives.next_token import IGNORED

SENTINEL = 1000


def _raw(n: int, seed: int = 0) -> np.ndarray:
    return np.random.Philox(seed).random_raw(2 * n)


@pytest.mark.parametrize(("span", "tokens", "targets"), [(3.0, 4550, 910), (8.0, 4714, 796), (64.0, 4805, 733)])
def test_the_paper_s_lengths(span: float, tokens: int, targets: int) -> None:
    kind = Spans(0.15, span)
    assert text_length(4096, kind) == tokens
    assert lengths_of(tokens, kind) == (4096, targets)


def test_the_prefix_form_s_targets_are_as_long_as_the_longest_of_the_others() -> None:
    tokens = text_length(4096, UL2[0], targets=910)
    assert lengths_of(tokens, UL2[0]) == (910, 910)
    text = np.arange(10, 10 + tokens)
    inputs, targets = corrupted(text, UL2[0], _raw(tokens), first_sentinel=SENTINEL + tokens)
    assert inputs.tolist() == [*text[: tokens // 2], 1] and targets.tolist() == [*text[tokens // 2 :], 1]


@pytest.mark.parametrize("kind", UL2[1:], ids=str)
@pytest.mark.parametrize("n", [2, 13, 101, 700])
def test_spans_put_back_in_place_of_their_sentinels_are_the_text(kind: Spans, n: int) -> None:
    text = np.arange(10, 10 + n)
    for seed in range(5):
        inputs, targets = corrupted(text, kind, _raw(n, seed), first_sentinel=SENTINEL)
        assert (len(inputs), len(targets)) == lengths_of(n, kind)
        assert inputs[-1] == targets[-1] == 1 and inputs[0] == text[0]
        spans: dict[int, list[int]] = {}
        for token in targets[:-1].tolist():
            if token > SENTINEL - n and token >= 10 + n:
                spans[token] = []
            else:
                spans[next(reversed(spans))].append(token)
        assert list(spans) == [SENTINEL - i for i in range(len(spans))]
        assert all(spans.values())
        whole = [t for token in inputs[:-1].tolist() for t in spans.get(token, [token])]
        assert whole == text.tolist()


def test_all_cuts_are_alike_likely() -> None:
    # 5 tokens of noise among 13, in 2 spans: 4 cuts of the noise, 7 of the rest
    kind, text, counts = Spans(5 / 13, 2.5), np.arange(10, 23), Counter()
    for seed in range(4000):
        inputs, _ = corrupted(text, kind, _raw(13, seed), first_sentinel=SENTINEL)
        counts[tuple(inputs.tolist())] += 1
    assert len(counts) == 28
    # a binomial count of 4000 draws of 1/28 lies within five standard deviations
    assert max(abs(c - 4000 / 28) for c in counts.values()) < 5 * math.sqrt(4000 / 28)


STORY = (
    "A dog met a cat. The weather was fine! Then the cat and the dog went home?\nNobody knows version 2.5 better. Why"
)


def _sentences(text: str, most: int = 1000) -> list[str]:
    found = encode(ByteTokens(), text)
    ends = sentences(found, ByteTokens(), most=most)
    return [ByteTokens().text(part.tolist()) for part in np.split(found, ends[:-1])]


def test_sentences_end_behind_marks_before_a_space_and_behind_lines() -> None:
    assert _sentences(STORY) == [
        "A dog met a cat.",
        " The weather was fine!",
        " Then the cat and the dog went home?\n",
        "Nobody knows version 2.5 better.",
        " Why",
    ]
    assert _sentences("one line\nand one\n") == ["one line\n", "and one\n"]
    # what is longer is cut
    assert _sentences("abcdefg. h", most=5) == ["abcde", "fg.", " h"]


def test_pieces_of_a_file_have_the_same_sentences() -> None:
    pytest.importorskip("tokenizers")
    from tevo.colt5.tokens import FileTokens

    tokens = FileTokens(Path(__file__).parents[1] / "golden" / "colt5" / "spiece_a.model")
    text = "A dog met a cat. The weather was fine! Then the cat and the dog went home? Nobody knows. why"
    found = encode(tokens, text)
    parts = np.split(found, sentences(found, tokens, most=1000)[:-1])
    assert [tokens.text(part.tolist()).strip() for part in parts] == [one.strip() for one in _sentences(text)]


def _principal(parts: list[str], room: int) -> list[int]:
    """A second way: overlaps are counted word by word, and the best of what is left and fits is taken again and again."""

    def words(text: str) -> set[str]:
        return set("".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split())

    scores = []
    for i, part in enumerate(parts):
        own, rest = words(part), words(" ".join(parts[:i] + parts[i + 1 :]))
        precision, recall = (len(own & rest) / max(len(x), 1) for x in (own, rest))
        scores.append(2 * precision * recall / (precision + recall) if precision else 0.0)
    taken: list[int] = []
    while fits := [
        i
        for i, part in enumerate(parts)
        if i not in taken and sum(len(parts[j]) for j in taken) + len(part) <= room and (scores[i] > 0 or not taken)
    ]:
        best = max(fits, key=lambda i: (round(scores[i], 12), -i))
        taken.append(best)
    return sorted(taken)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_gaps_are_the_sentences_that_share_most_words_with_the_others(share: float) -> None:
    rng = np.random.Generator(np.random.Philox(0))
    for n in (1, 2, 13, 40):
        names = ["ant", "bee", "cow", "dog", "elk", "fox", "gnu", "hen"]
        text = "".join(" ".join(names[j] for j in rng.integers(0, 8, rng.integers(1, 7))) + ". " for _ in range(n))
        given = encode(ByteTokens(), text)
        room = max(1, int(share * len(given)))
        parts = _sentences(text, most=room)
        inputs, targets = gapped(given, Gaps(share), ByteTokens(), sentinel=SENTINEL)
        taken = _principal(parts, room)
        assert ByteTokens().text(targets.tolist()) == "".join(parts[i] for i in taken)
        assert inputs[-1] == targets[-1] == 1 and 1 <= len(targets) - 1 <= room
        # put back, they are the text
        gaps = iter(taken)
        whole = "".join(
            parts[next(gaps)] if token == SENTINEL else ByteTokens().text([token]) for token in inputs[:-1].tolist()
        )
        assert whole == text and next(gaps, None) is None


def test_the_principal_sentence_of_a_story_is_left_out() -> None:
    given = encode(ByteTokens(), STORY)
    # of 37 bytes, in a text of 112
    inputs, targets = gapped(given, Gaps(0.35), ByteTokens(), sentinel=SENTINEL)
    assert ByteTokens().text(targets.tolist()) == " Then the cat and the dog went home?\n"
    assert (inputs == SENTINEL).sum() == 1
    assert ByteTokens().text(inputs.tolist()) == STORY.replace(" Then the cat and the dog went home?\n", "")


def test_a_text_without_shared_words_has_a_gap_all_the_same() -> None:
    inputs, targets = gapped(encode(ByteTokens(), "\n" * 40), Gaps(0.3), ByteTokens(), sentinel=SENTINEL)
    assert targets.tolist() == [13, 1] and len(inputs) == 41


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"{i} bottles of beer on the wall.\n" for i in range(2000)))
    return path


def test_forms_are_taken_in_turn_and_rows_do_not_depend_on_the_batch(text: Path) -> None:
    task = Denoising(mixture="ul2", length=200, data=str(text), examples=9)
    rows = task.batch("train", 3, 7, 8)
    inputs, targets = rows["inputs"], rows["targets"]
    lengths = [lengths_of(n, kind) for n, kind in zip(task.texts, task.kinds, strict=True)]
    assert (inputs != 0).sum(1).tolist() == [lengths[i % 4][0] for i in range(8)]
    assert (targets != IGNORED).sum(1).tolist() == [lengths[i % 4][1] for i in range(8)]
    assert [a for a, _ in lengths[1:]] == [200] * 3 and inputs.shape[1] == 200
    few = task.batch("train", 3, 7, 5)
    assert torch.equal(few["inputs"], inputs[:5])
    held = torch.cat(
        [torch.nn.functional.pad(b["inputs"], (0, 200 - b["inputs"].shape[1])) for b in task.batches("valid", 4)]
    )
    assert torch.equal(held, task.batch("valid", 0, 0, 9)["inputs"])
    assert len({tuple(row.tolist()) for row in held}) == 9
    assert (
        int(inputs.max()) == 511
        and Denoising(mixture="span_corruption", length=64, data=str(text)).kinds == SPAN_CORRUPTION
    )


def test_rows_of_gap_sentences_are_windows_of_the_text(text: Path) -> None:
    task = Denoising(mixture="gap_sentences", length=200, data=str(text), examples=9)
    rows = task.batch("train", 3, 7, 8)
    assert torch.equal(task.batch("train", 3, 7, 5)["inputs"][3, :90], rows["inputs"][3, :90])
    assert rows["inputs"].shape[1] <= 200 and (rows["inputs"] == 511).any(1).all()
    assert ((rows["targets"] != IGNORED).sum(1) <= 1 + 0.3 * 199).all() and (rows["targets"][:, 0] > 2).all()
    assert rows["targets"].max() < 511
    source = text.read_text()
    for inputs, targets in zip(rows["inputs"], rows["targets"], strict=True):
        said = task.tokens.text(targets.where(targets != IGNORED, 0))
        # sentences of this text are its lines, of which a window cuts the first and the last
        parts = [*said.splitlines(), *"".join(task.tokens.text([t]) or "\0" for t in inputs if t > 1).split("\0")]
        assert len(parts) > 2 and all(part in source for part in parts)
    assert vocab_for(ByteTokens(), mixture="gap_sentences", length=4096) == 384


def test_vocabularies_are_t5_s_and_byt5_s_where_their_sentinels_are_enough() -> None:
    t5 = SimpleNamespace(size=32000)
    assert vocab_for(t5, mixture="ul2", length=512) == 32128
    assert vocab_for(ByteTokens(), mixture="ul2", length=512) == 384
    # 227 spans
    assert vocab_for(ByteTokens(), mixture="ul2", length=4096) == 512


def test_texts_are_of_the_tokens_of_a_file(text: Path) -> None:
    pytest.importorskip("tokenizers")
    from tevo.colt5.tokens import FileTokens

    tokens = FileTokens(Path(__file__).parents[1] / "golden" / "colt5" / "spiece_a.model")
    vocab = vocab_for(tokens, mixture="ul2", length=64)
    task = Denoising(mixture="ul2", length=64, data=str(text), examples=9, tokens=tokens, vocab=vocab)
    rows = task.batch("train", 0, 0, 4)
    inputs, targets, shown = rows["inputs"][0], rows["targets"][0], rows["shown"]
    # the prefix form: both halves are the text
    both = [t for t in [*inputs.tolist(), *targets.tolist()] if t > 1]
    source = encode(tokens, text.read_text()).tolist()
    assert any(source[i : i + len(both)] == both for i in range(len(source)))
    assert shown[0, 0] == 0 and torch.equal(shown[0, 1 : (targets > 0).sum()], targets[: (targets > 0).sum() - 1])
    assert task.facts["size"] == 600 and int(rows["inputs"].max()) == vocab - 1


def test_the_score_is_bits_per_scored_target(text: Path) -> None:
    task = Denoising(length=64, data=str(text), examples=4)
    rows = task.batch("valid", 0, 0, 4)
    logits = torch.randn(*rows["targets"].shape, 512, generator=torch.Generator().manual_seed(0))
    bits, count = task.score(logits, rows["targets"])
    p = logits.double().softmax(-1)
    expected = [
        -math.log2(p[b, t, y])
        for b, row in enumerate(rows["targets"].tolist())
        for t, y in enumerate(row)
        if y != IGNORED
    ]
    assert int(count) == len(expected) and float(bits) == pytest.approx(sum(expected))
    assert task.chance == 9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mixture": "ul3"}, "mixture='ul3', expected one of span_corruption, ul2, gap_sentences"),
        ({"length": 5}, "length=5, expected at least 16"),
        (
            {"length": 4096, "vocab": 384},
            "vocab=384, expected at least 486: 259 tokens, and a sentinel for each of 227 spans",
        ),
        ({"length": 9000, "vocab": 2000}, "of the corpus has .* tokens, expected at least"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options: dict[str, object], sentence: str, text: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        Denoising(data=str(text), **options)  # type: ignore[arg-type]
