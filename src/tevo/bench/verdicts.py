"""Better, worse, or not told apart: a difference from the baseline against the baseline's own noise.

    band = t(0.975, k - 1) s sqrt(1/k + 1/r)                                                                  (1)

with s the standard deviation over the baseline's k seeds, r the part's seeds, t Student's quantile: if the part scattered
as the baseline does, 95 of 100 differences between equally good ones would lie inside. Each part is judged by itself, no
allowance is made for their number. Where the score is a share p of N held-out answers, s is at least the error of such a
share, sqrt(p (1 - p) / N), with p = (N p + 1) / (N + 2) kept off 0 and 1: otherwise a baseline that always scores 100 %
would have no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

__all__ = ["BETTER", "NOT_JUDGED", "UNDECIDED", "WORSE", "Verdict", "interval", "judge", "student"]

BETTER, WORSE, UNDECIDED = "better", "worse", "not told apart at this budget"
NOT_JUDGED = "not judged: the baseline needs at least two seeds"


class Verdict(NamedTuple):
    """``difference`` of the means, part minus baseline, and the ``band`` that it must leave to count (eq. 1)."""

    word: str
    difference: float
    band: float | None


def judge(
    part: Sequence[float], baseline: Sequence[float], *, higher_is_better: bool, answers: int | None = None
) -> Verdict:
    """The verdict on ``part`` from the scores of its seeds and of the baseline's.

    Args:
        part: one score for each seed, at least one.
        baseline: likewise; with fewer than two there is no verdict.
        higher_is_better: what the metric wants.
        answers: N of a score that is a share of N answers, else None.
    """
    if not part or not baseline:
        return Verdict(NOT_JUDGED, math.nan, None)
    difference = mean(part) - mean(baseline)
    if len(baseline) < 2:
        return Verdict(NOT_JUDGED, difference, None)
    band = (
        student(len(baseline) - 1) * _spread(baseline, answers) * math.sqrt(1 / len(baseline) + 1 / len(part))
    )  # (eq. 1)
    if abs(difference) <= band:
        return Verdict(UNDECIDED, difference, band)
    return Verdict(BETTER if (difference > 0) == higher_is_better else WORSE, difference, band)


def interval(scores: Sequence[float], baseline: Sequence[float], answers: int | None = None) -> float | None:
    """Half-width of the 95 % interval of a mean of ``len(scores)`` seeds, by the baseline's spread."""
    if len(baseline) < 2 or not scores:
        return None
    return student(len(baseline) - 1) * _spread(baseline, answers) / math.sqrt(len(scores))


def _spread(baseline: Sequence[float], answers: int | None) -> float:
    s = stdev(baseline)
    if answers is None:
        return s
    p = (answers * mean(baseline) + 1) / (answers + 2)
    return max(s, math.sqrt(p * (1 - p) / answers))


def student(freedom: int, level: float = 0.975) -> float:
    """The t below which Student's distribution with ``freedom`` degrees of freedom has the share ``level`` > 1/2."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _below(t: float, freedom: int) -> float:
    """Student's distribution function for t >= 0, in its closed form for whole degrees of freedom."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = 1.0 if freedom % 2 == 0 else cosine
    total = 0.0 if freedom == 1 else term
    for j in range(2 if freedom % 2 == 0 else 3, freedom, 2):
        term *= cosine * cosine * (j - 1) / j
        total += term
    inside = sine * total if freedom % 2 == 0 else 2 / math.pi * (angle + sine * total)
    return (1 + inside) / 2
