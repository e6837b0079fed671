from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tevo.testing import CHECKS, examine, user_subject
from tevo.testing import shrink as shrinking
from tevo.testing.shrink import shrink


class FailsFrom(nn.Module):
    """Sees the future of sequences of more than six tokens of at least two heads."""

    def __init__(self, *, dim: int, heads: int) -> None:
        super().__init__()
        self.linear, self.heads = nn.Linear(dim, dim), heads

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x) + x.cumsum(1)
        return y + 1e-3 * x.mean(1, keepdim=True) if x.shape[1] > 6 and self.heads > 1 else y


class CountsPaddingBehind(nn.Module):
    """A mean whose number of tokens takes in one of the padding that follows, if there are two."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        x = x.masked_fill(~mask[..., None], 0.0)
        behind = (~mask).long().flip(1).cumprod(1).sum(1) > 1
        return self.linear(x) + x.sum(1, keepdim=True) / (mask.sum(1) + behind)[:, None, None]


class FailsInFloat32(nn.Module):
    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).double()


def smallest(part: type[nn.Module], name: str, claims: tuple[str, ...]) -> str:
    report = examine("", [user_subject(part, role="mixer", claims=claims)], groups="AB")
    return report.results[name].failures[0]["smallest"]


@pytest.fixture(params=["with hypothesis", "without"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without":
        monkeypatch.setattr(shrinking, "find_spec", lambda name: None)


@pytest.mark.usefixtures("either")
def test_length_rows_heads_and_width_are_made_small_together() -> None:
    said = smallest(FailsFrom, "causal", ("causal",))
    assert said == "x of shape (1, 7, 2) to FailsFrom(dim=2, heads=2)"


@pytest.mark.usefixtures("either")
def test_the_padding_that_matters_is_found() -> None:
    said = smallest(CountsPaddingBehind, "padding", ("padding",))
    assert said.startswith("x of shape (1, 1, 1), 0 before and ") and "after it padding to CountsPaddingBehind" in said


@pytest.mark.usefixtures("either")
def test_the_dtype_that_matters_is_found() -> None:
    assert smallest(FailsInFloat32, "shape_and_dtype", ()) == "x of shape (1, 1, 1), float32 to FailsInFloat32(dim=1)"


def test_hypothesis_finds_the_least_padding_of_all() -> None:
    assert "0 before and 2 after it padding" in smallest(CountsPaddingBehind, "padding", ("padding",))


def test_a_failure_that_no_smaller_input_shares_is_given_back() -> None:
    check = next(check for check in CHECKS if check.name == "causal")
    subject, error = user_subject(FailsFrom, role="mixer", claims=["causal"]), AssertionError("of another kind")
    assert shrink(subject, check, error) == (subject, error)
