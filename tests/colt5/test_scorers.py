"""Scores: by hand, against slow second forms, and against the package rouge-score where it is installed."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tevo.colt5 import scorers

WORDS = ["The", "cat", "sat", "on", "a", "mat.", "running", "runs", "Ünïted", "it's", "42", "—", "mats", "don't"]


def _texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, draw.integers(0, 12))) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  cat, an `a`!", "cat"),
        ("U.S.A.", "usa"),
        ("theatre and another", "theatre and another"),
        ("a.b", "ab"),
        ("", ""),
    ],
)
def test_normalising_drops_case_punctuation_and_articles(text: str, expected: str) -> None:
    assert scorers.normalised(text) == expected


def test_f1_by_hand_and_the_best_reference_counts() -> None:
    # of 3 words 2 are right, of 4 real ones 2 are found
    assert scorers.token_f1("red red fox", ["red fox runs home"]) == pytest.approx(4 / 7)
    assert scorers.token_f1("red red fox", ["nothing", "red fox runs home", "blue"]) == pytest.approx(4 / 7)
    assert scorers.token_f1("", ["x"]) == scorers.token_f1("x", ["the"]) == 0
    assert scorers.exact_match("The Yes.", ["no", "yes"]) == 1 and scorers.exact_match("yes yes", ["yes"]) == 0


def test_rouge_by_hand() -> None:
    found = scorers.rouge("the cat the mat", ["the cat sat on the mat"])
    assert found == pytest.approx({"rouge1": 2 * 4 / 10, "rouge2": 2 * 2 / 8, "rougeL": 2 * 4 / 10})
    # each measure takes its own best reference
    best = scorers.rouge("a b c d", ["d c b a", "a b x y z"])
    assert best["rouge1"] == 1 and best["rouge2"] == pytest.approx(2 / 7) and best["rougeL"] == pytest.approx(4 / 9)


def test_the_common_subsequence_is_that_of_the_recursion() -> None:
    def slow(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        @cache
        def upto(i: int, j: int) -> int:
            if not i or not j:
                return 0
            if a[i - 1] == b[j - 1]:
                return upto(i - 1, j - 1) + 1
            return max(upto(i - 1, j), upto(i, j - 1))

        return upto(len(a), len(b))

    texts = [tuple(scorers.rouge_words(text)) for text in _texts(60)]
    for a, b in zip(texts[:30], texts[30:], strict=True):
        assert scorers._common_subsequence(a, b) == slow(a, b)


@pytest.mark.parametrize("stemmed", [False, True])
def test_rouge_is_that_of_the_package(stemmed: bool) -> None:
    package = pytest.importorskip("rouge_score.rouge_scorer")
    names = ["rouge1", "rouge2", "rougeL"]
    theirs = package.RougeScorer(names, use_stemmer=stemmed)
    stem = None
    if stemmed:
        from nltk.stem import porter

        stem = porter.PorterStemmer().stem
    texts = _texts(80)
    for prediction, one, other in zip(texts[:26], texts[26:52], texts[52:78], strict=True):
        expected = {n: max(theirs.score(r, prediction)[n].fmeasure for r in (one, other)) for n in names}
        assert scorers.rouge(prediction, [one, other], stem=stem) == pytest.approx(expected, abs=1e-12)


def test_a_set_is_scored_in_percent_and_rouge_as_the_geometric_mean_of_means() -> None:
    references = scorers.merged(["i", "j", "i"], ["red fox", "blue sky", "fox"])
    assert references == {"i": ["red fox", "fox"], "j": ["blue sky"]}
    predictions = {"j": "blue", "i": "fox"}
    assert scorers.score_set(predictions, references, metric="exact_match") == {"exact_match": 50}
    assert scorers.score_set(predictions, references, metric="f1") == {"f1": pytest.approx(50 * (1 + 2 / 3))}
    found = scorers.score_set({"i": "red fox", "j": "blue sky now"}, references, metric="rouge")
    assert found["rouge"] == pytest.approx((found["rouge1"] * found["rouge2"] * found["rougeL"]) ** (1 / 3))
    assert found["rouge2"] == pytest.approx(50 * (1 + 2 / 3))
    assert set(scorers.METRICS.values()) == {"rouge", "f1", "exact_match"}


@pytest.mark.parametrize(
    ("predictions", "metric", "sentence"),
    [
        ({"i": "x"}, "f1", "1 of 2 ids have no prediction, 0 predictions have no reference"),
        ({"i": "x", "j": "y", "k": "z"}, "f1", "0 of 2 ids have no prediction, 1 predictions have no reference"),
        ({"i": "x", "j": "y"}, "bleu", "metric is 'bleu', expected f1, exact_match or rouge"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(predictions: dict[str, str], metric: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        scorers.score_set(predictions, {"i": ["a"], "j": ["b"]}, metric=metric)


@pytest.mark.parametrize("references", ["text", []])
def test_references_are_a_list_of_some(references: object) -> None:
    with pytest.raises(ValueError, match="expected a list of one text or more"):
        scorers.token_f1("x", references)  # type: ignore[arg-type]
