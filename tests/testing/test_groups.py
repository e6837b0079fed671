"""Each check fails on a part that is wrong in just its way; a check that cannot fail asks nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.testing import CHECKS, GROUPS, examine, user_subject


class Plain(nn.Module):
    """A token-wise map; each part below breaks it in one way."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


class Casts(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class MixesRows(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x.mean(0, keepdim=True) if len(x) else 0.0)


class PrefersTheFirstRow(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[:1]


class NeedsAToken(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[:, -1][:, None]


class Draws(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1)


class StopsAt16(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (x.shape[1] != 16)


class WritesIntoItsInput(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.requires_grad_(False).mul_(1.0 + 1e-9) if not x.requires_grad else x)


class RemembersItsBuild(Plain):
    built = 0

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        RemembersItsBuild.built += 1
        self.extra = float(RemembersItsBuild.built)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.extra


class LooksAtValues(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if x.numel() and float(x.sum()) > 0 else 1.0)


class Detaches(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.detach()


class HasAnIdleParameter(Plain):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.idle = nn.Parameter(torch.ones(dim))


class Overflows(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.exp() * 1e-3


class AddsManySmallOnes(Plain):
    """A sum that half precision loses."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x) * 0 + 256
        for _ in range(64):
            y = y + 1
        return y * x


class HidesItsWeight(Plain):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.hidden = [torch.randn(dim)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.hidden[0].to(x.dtype)


class KeepsAnOldWeight(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "old"):
            object.__setattr__(self, "old", self.linear.weight.detach().clone())
        return F.linear(x, self.old.to(x.dtype), self.linear.bias) + 0 * self.linear(x)


class CountsItsCalls(Plain):
    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class DrawsFromNowhere(Plain):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(torch.seed() % 1000))
        return super().forward(x) + (noise if self.training else 0.0)


class Branches(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if x.abs().max().item() > 100 else 1)


class KeepsScores(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x @ x.mT).tanh().mean(-1, keepdim=True)


class IsDead(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return 1e-6 * super().forward(x)


class NamesNothing(Plain):
    def no_decay(self) -> set[str]:
        return {"bias"}


class LeaksAhead(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.cumsum(1) + 1e-3 * F.pad(x[:, 1:], (0, 0, 0, 1))


class CountsTheFuture(Plain):
    """No gradient shows it: the number of all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.cumsum(1) / max(x.shape[1], 1)


class KnowsItsPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]


class SpreadsNaN(Plain):
    def forward(self, x: Tensor) -> Tensor:
        triangle = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
        return super().forward(x) + triangle @ x


CASES = [
    (Casts, (), "shape_and_dtype"),
    (MixesRows, (), "batch_consistency"),
    (PrefersTheFirstRow, (), "batch_order"),
    (NeedsAToken, (), "short_lengths"),
    (Draws, (), "deterministic"),
    (StopsAt16, (), "lengths"),
    (WritesIntoItsInput, (), "layouts"),
    (RemembersItsBuild, (), "copies"),
    (LooksAtValues, (), "meta"),
    (Detaches, (), "gradient"),
    (HasAnIdleParameter, (), "every_parameter_gets_a_gradient"),
    (MixesRows, (), "nan_row"),
    (Overflows, (), "extremes"),
    (AddsManySmallOnes, (), "bfloat16"),
    (LeaksAhead, ("causal",), "causal"),
    (CountsTheFuture, ("causal",), "prefix"),
    (KnowsItsPlace, ("equivariant",), "equivariant"),
    (NeedsAToken, ("token_wise",), "token_wise"),
    (SpreadsNaN, ("causal", "nan_contained"), "nan_contained"),
    (Plain, ("identity_at_start",), "identity_at_start"),
    (HidesItsWeight, (), "state_dict"),
    (KeepsAnOldWeight, (), "functional_call"),
    (CountsItsCalls, (), "checkpointing"),
    (CountsItsCalls, (), "threads"),
    (DrawsFromNowhere, (), "training_is_seeded"),
    (Branches, (), "compiles"),
    (KeepsScores, (), "saved_bytes"),
    (KeepsScores, (), "cost"),
    (Plain, (), "flops"),
    (Plain, (), "parameters"),
    (IsDead, (), "learns"),
    (NamesNothing, (), "no_decay"),
]


@pytest.mark.parametrize(("part", "claims", "name"), CASES, ids=[f"{name}-{part.__name__}" for part, _, name in CASES])
def test_a_check_fails_on_a_part_that_is_wrong_in_its_way(
    part: type[nn.Module], claims: tuple[str, ...], name: str
) -> None:
    group = next(check.group for check in CHECKS if check.name == name)
    fields = {"cost": "n", "flops": "n * d * d", "parameters": "d * d"} if group == "E" else {}
    subject = user_subject(part, role="mixer", claims=claims, **fields)
    report = examine(part.__name__, [subject], groups=group)
    assert name in {result.check for result in report.failed}


@pytest.mark.parametrize(
    ("part", "memory", "holds"),
    [
        (Plain, "n", True),
        (Plain, "n^2", False),
        (Plain, "1", False),
        (KeepsScores, "n^2", True),
        (KeepsScores, "n", False),
    ],
)
def test_bytes_kept_for_backward_must_grow_as_declared(part: type[nn.Module], memory: str, holds: bool) -> None:
    report = examine("", [user_subject(part, role="mixer", memory=memory)], groups="E")
    assert set(report.results) == {"saved_bytes"}
    assert (not report.failed) is holds, report.table()


def test_a_part_that_keeps_nothing_for_backward_keeps_a_constant() -> None:
    report = examine("", [user_subject(lambda: nn.Flatten(2), role="mixer", dim=5, memory="1")], groups="E")
    assert report.results["saved_bytes"].cases == 1 and not report.failed


def test_a_plain_part_passes_every_group() -> None:
    declared = {"cost": "n", "flops": "2 * n * d * d", "parameters": "d * d + d", "memory": "n"}
    subject = user_subject(Plain, claims=["token_wise", "equivariant"], **declared)
    report = examine("Plain", [subject], groups="".join(GROUPS))
    assert not report.failed, report.table()
    assert {result.group for result in report.results.values()} == set(GROUPS)


def test_every_check_has_a_group_and_says_what_it_asks_and_why() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.group in GROUPS
        assert check.asks.endswith(".") and check.why.endswith((".", "?")), check.name


def test_a_part_that_raises_is_reported_with_the_input_that_it_was_given() -> None:
    report = examine("NeedsAToken", [user_subject(NeedsAToken)], groups="A")
    failure = next(result.failures[0] for result in report.failed if result.check == "short_lengths")
    assert failure["smallest"].startswith("x of shape (1, 0, ")
    assert failure["what"].startswith("IndexError")
