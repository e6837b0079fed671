from __future__ import annotations

import math

import pytest
import torch

from tevo.bench.verdicts import BETTER, NOT_JUDGED, UNDECIDED, WORSE, interval, judge, student


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30])
def test_students_quantile_equals_scipys(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_only_what_leaves_the_band_is_better_or_worse():
    baseline = [1.0, 2.0, 3.0]
    # s = 1, t(0.975, 2) = 4.3027, one seed against three
    band = 4.302652729911275 * math.sqrt(1 / 3 + 1)
    assert judge([2.0 + 0.99 * band], baseline, higher_is_better=True).word == UNDECIDED
    assert judge([2.0 + 1.01 * band], baseline, higher_is_better=True).word == BETTER
    assert judge([2.0 + 1.01 * band], baseline, higher_is_better=False).word == WORSE
    assert judge([2.0 - 1.01 * band], baseline, higher_is_better=False).word == BETTER
    assert judge([2.0], baseline, higher_is_better=True).band == pytest.approx(band)


def test_more_seeds_narrow_the_band_and_the_interval():
    baseline = [1.0, 1.1, 0.9, 1.05, 0.95]
    one, three = (judge([1.0] * r, baseline, higher_is_better=True).band for r in (1, 3))
    assert one is not None and three is not None and three < one
    assert interval([1.0] * 4, baseline) == pytest.approx(interval([1.0], baseline) / 2)


def test_without_noise_there_is_no_verdict():
    assert judge([1.0], [1.0], higher_is_better=True).word == NOT_JUDGED
    assert judge([], [1.0, 2.0], higher_is_better=True).word == NOT_JUDGED
    assert interval([1.0], [1.0]) is None


def test_a_baseline_that_is_always_right_still_has_the_noise_of_its_questions():
    baseline = [1.0, 1.0, 1.0]
    assert judge([0.999], baseline, higher_is_better=True, answers=2048).word == UNDECIDED
    assert judge([0.9], baseline, higher_is_better=True, answers=2048).word == WORSE
    assert judge([0.999], baseline, higher_is_better=True).word == WORSE


def test_equally_good_parts_are_told_apart_in_five_of_a_hundred_cases():
    # a second formulation: the definition of the band, by drawing
    draws = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)).tolist()
    wrong = sum(judge(row[:3], row[3:], higher_is_better=True).word != UNDECIDED for row in draws)
    # three standard errors of a share of 5 % among 4000
    assert wrong / 4000 == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 4000))
