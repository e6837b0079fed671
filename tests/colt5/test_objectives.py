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
    Spans,
    corrupted,
    lengths_of,
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
        ({"mixture": "ul3"}, "mixture='ul3', expected one of span_corruption, ul2"),
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
