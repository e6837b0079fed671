from __future__ import annotations

import pytest
import torch

from tevo.testing import relative_rms


def test_the_difference_is_relative_to_the_second_and_plain_where_that_is_zero() -> None:
    ones = torch.ones(3, 5, dtype=torch.float64)
    assert relative_rms(1.5 * ones, 2 * ones) == 0.25
    assert relative_rms(1.5 * ones, 0 * ones) == 1.5
    assert relative_rms(ones[:0], ones[:0]) == 0


def test_a_nan_is_infinitely_far_and_other_shapes_are_refused() -> None:
    ones = torch.ones(3)
    assert relative_rms(ones / 0 * 0, ones) == float("inf")
    with pytest.raises(AssertionError, match=r"shapes differ: \(3,\) and \(2,\)"):
        relative_rms(ones, ones[:2])
