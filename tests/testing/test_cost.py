from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tevo.catalogue.rows import rows
from tevo.testing import user_subject
from tevo.testing.cost import at_length, count, formula, growth, growth_kept, kept, last_octave
from tevo.testing.subject import subjects


class Cubic(nn.Module):
    """n^2 d FLOPs beside 2 n d^2, and a matrix of scores kept."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ x.mT).tanh() @ x


SUBJECT = user_subject(Cubic, role="mixer", memory="n^2")


def test_flops_are_those_of_the_products() -> None:
    d = SUBJECT.dim
    assert count(SUBJECT, 13) == 2 * 13 * d * d + 4 * 13 * 13 * d


def test_growth_is_that_of_the_greatest_term_in_the_last_octave() -> None:
    exponent = last_octave(growth(SUBJECT))
    assert exponent is not None and 1.99 < exponent <= 2


def test_kept_are_the_inputs_of_products_and_the_matrix() -> None:
    # x, which the three products share, and tanh of the scores
    assert kept(SUBJECT, 13) == 4 * (13 * SUBJECT.dim + 13 * 13)


def test_what_is_linear_is_taken_off_before_the_growth_of_what_is_kept_is_taken() -> None:
    assert growth_kept(SUBJECT) == pytest.approx(2, abs=1e-12)
    plain = user_subject(lambda dim: nn.Linear(dim, dim), role="mixer", memory="n^2")
    assert growth_kept(plain) == pytest.approx(1, abs=1e-12)


def test_a_formula_knows_arguments_and_their_defaults_and_names_what_it_does_not_know() -> None:
    subject = next(iter(subjects(rows()["multi_query_attention"])))
    assert formula(subject, "n * d + h * groups + (head_dim or d // h) + bias", 7) == 7 * 12 + 3 * 1 + 4
    assert formula(subject, "sum(k * d for k in (1, 2))", 7) == 36
    with pytest.raises(
        ValueError, match="card multi_query_attention: formula 'n \\* width': name 'width' is not defined"
    ):
        formula(subject, "n * width", 7)


def test_what_is_built_for_a_length_or_a_grid_is_built_for_the_one_asked_for() -> None:
    table = next(iter(subjects(rows()["learned"])))
    assert at_length(table, 64).example["length"] == 64
    grids = [s for s in subjects(rows()["neighborhood_attention"]) if "grid" in s.example]
    assert at_length(grids[0], 64).example["grid"] == (8, 8)
    assert torch.tensor(at_length(grids[0], 512).example["grid"]).prod() == 512
