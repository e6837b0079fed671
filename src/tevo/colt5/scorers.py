"""Scores of answers and summaries for the sets of SCROLLS: F1, exact match, and ROUGE of several references.

    F1     of the words of a prediction and a reference, normalised (SQuAD): 2 P R / (P + R)                      (1)
    EM     1 where the normalised texts are equal                                                                (2)
    ROUGE  F of n-gram counts (n = 1, 2), or of the longest common subsequence (L), of stemless words            (3)
    SCROLLS' ROUGE: the cube root of ROUGE-1 ROUGE-2 ROUGE-L, of their means over a set                          (4)

An input may have several references; a prediction has the best score over them, of each measure by itself. Normalised: lower
case, without punctuation and the words a, an, the. ROUGE's words are runs of the letters a to z and digits, lower case, and
its L is of the whole text, as in the package rouge-score; without a stemmer unless one is given.

Letters: P share of the prediction's items that are right, R share of the reference's that are found.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence

__all__ = [
    "METRICS",
    "exact_match",
    "merged",
    "normalised",
    "rouge",
    "rouge_words",
    "score_set",
    "token_f1",
]

Stem = Callable[[str], str]
# SCROLLS: set -> its score
METRICS = {
    "gov_report": "rouge",
    "summ_screen_fd": "rouge",
    "qmsum": "rouge",
    "narrative_qa": "f1",
    "qasper": "f1",
    "quality": "exact_match",
    "contract_nli": "exact_match",
}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_WORD = re.compile(r"[^a-z0-9]+")


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction is one of the references (eq. 2)."""
    return float(any(normalised(prediction) == normalised(one) for one in _some(references)))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """The best F1 over the references (eq. 1)."""
    return max(_f1_of(normalised(prediction).split(), normalised(one).split()) for one in _some(references))


def rouge_words(text: str, stem: Stem | None = None) -> list[str]:
    """The words of ROUGE; a stemmer is asked for words of four letters or more."""
    words = _NO_WORD.sub(" ", text.lower()).split()
    return words if stem is None else [stem(word) if len(word) > 3 else word for word in words]


def rouge(prediction: str, references: Sequence[str], *, stem: Stem | None = None) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (eq. 3), of each the best over the references."""
    found = rouge_words(prediction, stem)
    each = [_rouge_of(found, rouge_words(one, stem)) for one in _some(references)]
    return {name: max(one[name] for one in each) for name in each[0]}


def merged(ids: Sequence[Hashable], references: Sequence[str]) -> dict[Hashable, list[str]]:
    """All references of each id, in their order: SCROLLS has a row for each."""
    found: dict[Hashable, list[str]] = {}
    for one, reference in zip(ids, references, strict=True):
        found.setdefault(one, []).append(reference)
    return found


def score_set(
    predictions: Mapping[Hashable, str],
    references: Mapping[Hashable, Sequence[str]],
    *,
    metric: str,
    stem: Stem | None = None,
) -> dict[str, float]:
    """Means over a set, in % as SCROLLS reports them.

    Args:
        predictions: id -> text.
        references: id -> one or more texts.
        metric: "f1", "exact_match" or "rouge".
        stem: of ROUGE's words.

    Returns:
        The metric by its name; for "rouge" also "rouge1", "rouge2" and "rougeL", and "rouge" is (eq. 4).

    Raises:
        ValueError: other ids in one than in the other, or no such metric.
    """
    if metric not in ("f1", "exact_match", "rouge"):
        raise ValueError(f"metric is {metric!r}, expected f1, exact_match or rouge")
    missing, strange = references.keys() - predictions.keys(), predictions.keys() - references.keys()
    if missing or strange or not references:
        raise ValueError(
            f"predictions and references do not fit: {len(missing)} of {len(references)} ids have no prediction, "
            f"{len(strange)} predictions have no reference; give one prediction for each id"
        )
    if metric != "rouge":
        one = token_f1 if metric == "f1" else exact_match
        return {metric: _percent([one(predictions[i], references[i]) for i in references])}
    each = [rouge(predictions[i], references[i], stem=stem) for i in references]
    means = {name: _percent([one[name] for one in each]) for name in each[0]}
    return {**means, "rouge": math.prod(means.values()) ** (1 / 3)}


def _percent(values: Sequence[float]) -> float:
    return 100 * math.fsum(values) / len(values)


def _some(references: Sequence[str]) -> Sequence[str]:
    if isinstance(references, str) or not references:
        raise ValueError(f"references are {references!r}, expected a list of one text or more")
    return references


def _f(common: int, predicted: int, real: int) -> float:
    """F1 from counts; 0 where one of them is 0."""
    return 2 * common / (predicted + real) if common else 0.0


def _f1_of(found: Sequence[Hashable], real: Sequence[Hashable]) -> float:
    return _f((Counter(found) & Counter(real)).total(), len(found), len(real))


def _rouge_of(found: Sequence[str], real: Sequence[str]) -> dict[str, float]:
    grams = {n: [list(zip(*(words[i:] for i in range(n)), strict=False)) for words in (found, real)] for n in (1, 2)}
    scores = {f"rouge{n}": _f1_of(*pair) for n, pair in grams.items()}
    return {**scores, "rougeL": _f(_common_subsequence(found, real), len(found), len(real))}


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of bits for each word of ``a`` (Crochemore and others, 2001)."""
    places: dict[str, int] = {}
    for i, word in enumerate(b):
        places[word] = places.get(word, 0) | 1 << i
    full = (1 << len(b)) - 1
    row = full
    for word in a:
        match = row & places.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(b) - row.bit_count()
