from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck

from tevo.functional import soft_topk as module
from tevo.functional.soft_topk import Iterations, Solver, soft_topk

GOLDEN = Path(__file__).parents[1] / "golden" / "colt5"
EXACT: tuple[Solver, ...] = ("exact", "newton")
SCHEDULES = {
    "as published": Iterations(steps=5),
    "from zero": Iterations(steps=4, from_zero=True),
    "scaled": Iterations(steps=6, eps_start=2.0, eps_decay=0.6),
    "scaled from zero": Iterations(steps=5, eps_start=3.0, eps_decay=0.3, from_zero=True),
}


FEW_STEPS = module._few_steps


@pytest.fixture(autouse=True, params=["few steps first", "sorted"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # every claim holds for both forms of the exact solver
    if request.param == "sorted":
        monkeypatch.setattr(module, "_few_steps", lambda s, k, eps: None)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def bisection(scores: Tensor, k: float, eps: float, mask: Tensor | None = None) -> Tensor:
    """Equation (2) in float64: the threshold t = -a of every row is halved into place."""
    s = scores.double()
    real = torch.ones_like(s, dtype=torch.bool) if mask is None else mask.expand_as(s)
    s = s.masked_fill(~real, -math.inf)
    some = s.masked_fill(~real, 0.0)
    high = some.abs().amax(-1, keepdim=True) + eps * math.log(s.shape[-1] / k + 1) + 1
    low = -high - eps * 800
    for _ in range(200):
        t = (low + high) / 2
        too_much = ((s - t) / eps).clamp(max=0).exp().sum(-1, keepdim=True) > k
        low, high = torch.where(too_much, t, low), torch.where(too_much, high, t)
    x = ((s - high) / eps).clamp(max=0).exp()
    return torch.where(real.sum(-1, keepdim=True) <= k, real.double(), x)


def best_of_all_subsets(s: Tensor, k: float, eps: float) -> Tensor:
    """Equation (1) for one short row: every set of entries at 1, the others shared out by a softmax; the best feasible."""
    n = len(s)
    best, value = s, -math.inf
    for size in range(math.ceil(k)):
        for taken in combinations(range(n), size):
            x = torch.ones_like(s)
            free = [i for i in range(n) if i not in taken]
            x[free] = (k - size) * torch.softmax(s[free] / eps, 0)
            objective = float((s * x).sum() + eps * torch.special.entr(x).sum())
            if bool((x <= 1 + 1e-12).all()) and objective > value:
                best, value = x, objective
    return best


def alternating_updates(s: Tensor, k: float, eps: float, mask: Tensor, steps: Iterations) -> Tensor:
    """The published updates of a and of the vector b."""
    s = s.masked_fill(~mask, -1e300)
    b = torch.zeros_like(s) if steps.from_zero else -s
    now = max(steps.eps_start or eps, eps)
    a = torch.zeros_like(s[..., :1])
    for _ in range(steps.steps):
        z = ((s + b) / now).masked_fill(~mask, -1e300)
        a = now * (math.log(k) - torch.logsumexp(z, -1, keepdim=True))
        b = -torch.relu(s + a)
        now = max(now * steps.eps_decay, eps)
    return ((s + a + b) / now).exp().masked_fill(~mask, 0.0)


def golden_rows() -> dict[str, dict[str, np.ndarray]]:
    rows: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDEN / "soft_topk_a.npz") as file:
        for key in file.files:
            name, field = key.split("__")
            rows.setdefault(name, {})[field] = file[key]
    return rows


ROWS = golden_rows()


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("name", ROWS)
def test_equals_the_solution_at_60_digits(name: str, solver: Solver) -> None:
    row = {field: torch.tensor(value) for field, value in ROWS[name].items()}
    s, mask = row["s"].requires_grad_(), row.get("mask")
    x = soft_topk(s, float(row["k"]), eps=float(row["eps"]), mask=mask, solver=solver)
    torch.testing.assert_close(x, row["x"], rtol=0, atol=1e-12)
    if mask is not None:
        assert not x[~mask].any()
    if "vjp" in row:
        gradient = torch.autograd.grad(x, s, row["g"])[0]
        torch.testing.assert_close(gradient, row["vjp"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("name", ROWS)
def test_float32_equals_the_solution_for_the_rounded_scores(name: str, solver: Solver) -> None:
    row = {field: torch.tensor(value) for field, value in ROWS[name].items()}
    s, k, eps = row["s"].float(), float(row["k"]), float(row["eps"])
    x = soft_topk(s, k, eps=eps, mask=row.get("mask"), solver=solver)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x.double(), bisection(s, k, eps, row.get("mask")), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("eps", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("n", [1000, 9001])
def test_long_rows_in_float32_are_right_to_1e_5(n: int, eps: float, solver: Solver) -> None:
    s = randn(3, n, dtype=torch.float32) * torch.tensor([[1.0], [4.0], [28.0]]) + torch.tensor([[0.0], [10.0], [-3.0]])
    k = 9 / 8 * n / 16
    x = soft_topk(s, k, eps=eps, solver=solver)
    torch.testing.assert_close(x.double(), bisection(s, k, eps), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.double().sum(-1), torch.full((3,), k, dtype=torch.float64), rtol=1e-6, atol=0)


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 40),
    share=st.floats(0.01, 1.1),
    eps=st.floats(1e-4, 10.0),
    scale=st.floats(1e-3, 1e4),
    levels=st.integers(1, 30),
)
def test_exact_and_newton_equal_bisection(
    seed: int, n: int, share: float, eps: float, scale: float, levels: int
) -> None:
    # few levels make many ties
    s = (randn(2, n, seed=seed) * levels).round() / levels * scale
    mask = randn(2, n, seed=seed + 1) > -1
    k = share * n
    # rows in which k equals the number of real entries but for rounding have no stable threshold to compare
    wanted = bisection(s, k, eps, mask)
    for solver in EXACT:
        x = soft_topk(s, k, eps=eps, mask=mask, solver=solver)
        # an error of 1 ulp in a score moves x by ulp / eps
        torch.testing.assert_close(x, wanted, rtol=0, atol=1e-11 + 4e-16 * scale * 4 / eps)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("k", [0.4, 1.0, 2.5, 4.0, 6.9])
@pytest.mark.parametrize("eps", [0.05, 0.7])
def test_equals_the_best_of_all_subsets(k: float, eps: float, solver: Solver) -> None:
    for seed in range(5):
        s = randn(7, seed=seed)
        torch.testing.assert_close(
            soft_topk(s, k, eps=eps, solver=solver), best_of_all_subsets(s, k, eps), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("k", [0.5, 7.0, 40.3])
def test_a_few_steps_equal_the_sorted_form_and_decline_what_needs_more(k: float) -> None:
    s = randn(5, 200)
    found = FEW_STEPS(s, k, 1.0)
    assert found is not None
    torch.testing.assert_close(found, module.sorted_form(s, k, 1.0, top=math.ceil(k)), rtol=1e-12, atol=1e-14)
    assert FEW_STEPS(s, 199.9, 1.0) is None
    assert FEW_STEPS(s, k, 0.02) is None
    s[2, 3] = -math.inf
    assert FEW_STEPS(s, k, 1.0) is None


def test_a_small_eps_gives_the_hard_choice() -> None:
    s = torch.stack([torch.randperm(13, generator=torch.Generator().manual_seed(i)) for i in range(3)]).double() / 10
    wanted = torch.zeros_like(s).scatter_(-1, s.topk(4).indices, 1.0)
    torch.testing.assert_close(soft_topk(s, 4, eps=1e-4), wanted, rtol=0, atol=1e-12)


def test_k_of_one_is_the_softmax() -> None:
    s = randn(3, 13)
    torch.testing.assert_close(soft_topk(s, 1, eps=0.3), (s / 0.3).softmax(-1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("number", range(4))
def test_iterations_equal_the_published_code(number: int) -> None:
    with np.load(GOLDEN / "coordinate_descent_a.npz") as file:
        row = {key[3:]: torch.tensor(file[key]) for key in file.files if key.startswith(f"{number}__")}
    s = row["s"].requires_grad_()
    steps = Iterations(
        steps=int(row["n_iters"]), eps_start=float(row["eps_init"]) or None, eps_decay=float(row["eps_decay"])
    )
    y = soft_topk(s, float(row["k"]), eps=float(row["eps"]), mask=row["mask"], solver=steps)
    torch.testing.assert_close(y, row["y"], rtol=0, atol=1e-12)
    gradient = torch.autograd.grad(y, s, row["g"])[0]
    torch.testing.assert_close(gradient, row["grad"], rtol=0, atol=1e-12 * float(row["grad"].abs().max()))


@pytest.mark.parametrize("name", SCHEDULES)
def test_iterations_equal_the_alternating_updates_of_two_vectors(name: str) -> None:
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 9:] = False
    s, g = randn(2, 13).requires_grad_(), randn(2, 13, seed=1)
    mine = soft_topk(s, 3.5, eps=0.3, mask=mask, solver=SCHEDULES[name])
    plain = alternating_updates(s, 3.5, 0.3, mask, SCHEDULES[name])
    torch.testing.assert_close(mine, plain, rtol=0, atol=1e-13)
    a, b = (torch.autograd.grad(x, s, g)[0] for x in (mine, plain))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_many_iterations_reach_the_exact_solution() -> None:
    s = randn(3, 64)
    torch.testing.assert_close(soft_topk(s, 4.5, solver="iterations"), soft_topk(s, 4.5), rtol=0, atol=1e-12)
    long = Iterations(steps=2000, from_zero=True)
    torch.testing.assert_close(
        soft_topk(s, 4.5, eps=0.05, solver=long), soft_topk(s, 4.5, eps=0.05), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("solver", [*EXACT, *SCHEDULES.values()], ids=[*EXACT, *SCHEDULES])
def test_derivatives_in_scores_k_and_eps(solver: Solver) -> None:
    s = randn(2, 7).requires_grad_()
    k = torch.tensor([2.5, 3.2], dtype=torch.float64, requires_grad=True)
    eps = torch.tensor([0.4, 0.7], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 2] = False

    def f(s: Tensor, k: Tensor, eps: Tensor) -> Tensor:
        return soft_topk(s, k, eps=eps, mask=mask, solver=solver)

    x = f(s, k, eps)
    assert bool((x == 1).any()) or isinstance(solver, Iterations), "the case must have an entry at 1"
    assert gradcheck(f, (s, k, eps))
    assert gradgradcheck(f, (s, k, eps))


@pytest.mark.parametrize("solver", [*EXACT, "iterations"])
def test_a_shared_k_and_eps_collect_the_gradient_of_all_rows(solver: Solver) -> None:
    s = randn(2, 3, 7)
    k, eps = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.5, 0.4))
    assert gradcheck(lambda k, eps: soft_topk(s, k, eps=eps, solver=solver), (k, eps))


@pytest.mark.parametrize("solver", EXACT)
def test_a_tensor_of_k_gives_each_row_its_own(solver: Solver) -> None:
    s = randn(5, 13)
    ks = [0.7, 3.0, 12.2, 13.0, 20.0]
    x = soft_topk(s, torch.tensor(ks), eps=0.3, solver=solver)
    for row, k in enumerate(ks):
        # the k of the tensor is rounded to float32
        torch.testing.assert_close(x[row], soft_topk(s[row], k, eps=0.3), rtol=0, atol=1e-6)
    torch.testing.assert_close(soft_topk(s, torch.zeros(5), solver=solver), torch.zeros_like(s), rtol=0, atol=1e-300)
    bounded = soft_topk(s[:2], torch.tensor(ks[:2]), eps=0.3, solver=solver, at_most=9)
    torch.testing.assert_close(bounded, x[:2], rtol=0, atol=1e-14)


def test_weights_sum_to_k_and_follow_the_order_of_the_scores() -> None:
    s = randn(3, 50)
    x = soft_topk(s, 6.25, eps=0.3)
    torch.testing.assert_close(x.sum(-1), torch.full((3,), 6.25, dtype=torch.float64), rtol=1e-14, atol=0)
    assert bool((x.gather(-1, s.argsort(-1)).diff(dim=-1) >= 0).all())


def test_a_shift_of_all_scores_changes_nothing() -> None:
    s = randn(3, 50)
    for solver in (*EXACT, Iterations(steps=3, from_zero=True)):
        a, b = (soft_topk(t, 6.25, eps=0.3, solver=solver) for t in (s, s + 64))
        # 64 costs the scores 7e-15 of their digits
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [*EXACT, "iterations"])
def test_padding_changes_nothing_and_gets_nothing(solver: Solver) -> None:
    s = randn(2, 13)
    padded = torch.cat([torch.full((2, 3), 1e30), s, torch.full((2, 4), math.nan)], -1).requires_grad_()
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[:, 3:16] = True
    x = soft_topk(padded, 4.5, eps=0.2, mask=mask, solver=solver)
    torch.testing.assert_close(x[mask].view(2, 13), soft_topk(s, 4.5, eps=0.2, solver=solver), rtol=0, atol=1e-14)
    assert not x[~mask].any()
    gradient = torch.autograd.grad(x.square().sum(), padded)[0]
    assert not gradient[~mask].any()
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("solver", [*EXACT, "iterations"])
def test_a_row_without_a_real_entry_gives_zeros_and_no_gradient(solver: Solver) -> None:
    s = randn(2, 13).requires_grad_()
    mask = torch.tensor([[True], [False]])
    x = soft_topk(s, 3, mask=mask, solver=solver)
    assert not x[1].any()
    gradient = torch.autograd.grad(x.square().sum(), s)[0]
    assert bool(gradient.isfinite().all())
    assert not gradient[1].any()


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores_and_eps_stay_finite(solver: Solver, dtype: torch.dtype) -> None:
    s = (randn(3, 200) * 1e4).to(dtype).requires_grad_()
    for k in (1, 12.5, 199.5):
        x = soft_topk(s, k, eps=1e-4, solver=solver)
        gradient = torch.autograd.grad(x.square().sum(), s)[0]
        torch.testing.assert_close(x.sum(-1).double(), torch.full((3,), float(k)).double(), rtol=1e-5, atol=0)
        assert not gradient.any()


def test_a_row_of_minus_infinities_counts_as_masked() -> None:
    s = randn(2, 13)
    s[0, 4:] = -math.inf
    wanted = soft_topk(s, 3.5, eps=0.2, mask=s > -math.inf)
    torch.testing.assert_close(soft_topk(s, 3.5, eps=0.2), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    s = (randn(2, 3000) * 3).to(dtype).requires_grad_()
    x = soft_topk(s, 200, eps=0.3)
    assert x.dtype == dtype
    torch.testing.assert_close(x, soft_topk(s.detach().float(), 200, eps=0.3).to(dtype), rtol=0, atol=0)
    assert torch.autograd.grad(x.sum(), s)[0].dtype == dtype


@pytest.mark.parametrize("solver", [*EXACT, "iterations"])
def test_function_transforms(solver: Solver) -> None:
    s, k, eps = randn(4, 3, 9), randn(4).abs() + 1.5, randn(4, seed=1).abs() + 0.2

    def f(s: Tensor, k: Tensor, eps: Tensor) -> Tensor:
        return soft_topk(s, k, eps=eps, solver=solver, at_most=9)

    torch.testing.assert_close(torch.vmap(f)(s, k, eps), f(s, k[:, None], eps[:, None]), rtol=0, atol=1e-14)
    torch.testing.assert_close(
        torch.vmap(f, (None, 0, None))(s[0], k, eps[0]),
        torch.stack([f(s[0], i, eps[0]) for i in k]),
        rtol=0,
        atol=1e-14,
    )
    each = torch.func.vmap(torch.func.grad(lambda s, k, eps: f(s, k, eps).square().sum(), argnums=(0, 1, 2)))(s, k, eps)
    leaves = [t.clone().requires_grad_() for t in (s, k, eps)]
    whole = torch.autograd.grad(f(leaves[0], leaves[1][:, None], leaves[2][:, None]).square().sum(), leaves)
    torch.testing.assert_close(each, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [*EXACT, Iterations(steps=3)], ids=[*EXACT, "iterations"])
@pytest.mark.parametrize("own", [False, True], ids=["numbers", "tensors"])
def test_compiles_without_a_graph_break(solver: Solver, own: bool) -> None:
    s, g = randn(2, 13).requires_grad_(), randn(2, 13, seed=1)
    k = torch.tensor([2.5, 4.0], dtype=torch.float64) if own else 2.5

    def f(s: Tensor) -> Tensor:
        return soft_topk(s, k, eps=0.4, solver=solver, at_most=4)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(s), f(s), rtol=0, atol=1e-14)
    a, b = (torch.autograd.grad(h(s), s, g)[0] for h in (compiled, f))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_the_backward_pass_keeps_one_row() -> None:
    kept: list[int] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    s = randn(2, 1000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        soft_topk(s, 60)
    assert kept == [2000]


def test_rows_of_any_shape() -> None:
    s = randn(2, 3, 13)
    x = soft_topk(s, 2.5, eps=0.3)
    torch.testing.assert_close(x[1, 2], soft_topk(s[1, 2], 2.5, eps=0.3), rtol=0, atol=1e-15)
    assert soft_topk(torch.empty(2, 0), 3).shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "got k=0, expected a finite number above 0"),
        ({"k": math.nan}, "got k=nan"),
        ({"k": 2, "eps": -1.0}, "got eps=-1.0"),
        ({"k": torch.ones(3)}, r"got k of shape \(3,\), expected one that broadcasts to \(2,\)"),
        ({"k": 2, "eps": torch.ones(2, 1)}, r"got eps of shape \(2, 1\)"),
        ({"k": 2, "mask": torch.ones(2, 13)}, "mask of dtype torch.float32"),
        ({"k": 2, "mask": torch.ones(2, 12, dtype=torch.bool)}, r"mask of dtype torch.bool and shape \(2, 12\)"),
        ({"k": 2, "solver": "bisect"}, "got solver='bisect', expected 'exact', 'newton', 'iterations' or"),
        ({"k": torch.ones(2), "at_most": 0}, "got at_most=0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_topk(randn(2, 13), **arguments)  # type: ignore[arg-type]


def test_scores_that_are_no_scores_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got scores of dtype torch.int64 and shape \(13,\)"):
        soft_topk(torch.arange(13), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"steps": 0}, "steps=0"), ({"eps_start": 0.0}, "eps_start=0.0"), ({"eps_decay": 1.5}, "eps_decay=1.5")],
)
def test_no_schedule_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Iterations(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["exact", "newton"])
def test_what_has_no_numbers_is_not_looked_into(solver: Solver) -> None:
    with FakeTensorMode():
        assert soft_topk(torch.empty(2, 2**14), 7.5, solver=solver).shape == (2, 2**14)
