from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tevo import record, soft_topk
from tevo.colt5 import (
    Budget,
    RandomTokens,
    Routed,
    Router,
    SoftTopK,
    StaticBlocks,
    StraightThrough,
)
from tevo.colt5.routers import ROUTINGS, choose, choose_untied, places
from tevo.functional.soft_topk import Iterations

GOLDEN = Path(__file__).parents[1] / "golden" / "colt5" / "colt5_layers_a.npz"
B, N, D = 2, 23, 12
BUDGET = Budget(0.25)
LEARNED = [name for name in ROUTINGS if name not in ("static", "random")]
FIXED = [name for name in ROUTINGS if name != "random"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def router(routing: str = "soft_topk", **options: object) -> Router:
    torch.manual_seed(0)
    return Router(**{"dim": D, "budget": BUDGET, "routing": routing, **options}).double().eval()  # type: ignore[arg-type]


def row_of(routed: Routed, n: int = N) -> Tensor:
    """Weights at the tokens' own places, zero elsewhere."""
    return routed.weights.new_zeros(len(routed.weights), n).scatter_add(-1, routed.indices, routed.weights)


def chosen_of(routed: Routed) -> list[list[int]]:
    return [indices[used].tolist() for indices, used in zip(routed.indices, routed.mask, strict=True)]


@pytest.mark.parametrize(("part", "m"), [("ff", 6), ("q", 6), ("kv", 12)])
def test_equals_the_transcription_of_the_paper(part: str, m: int) -> None:
    with np.load(GOLDEN) as file:
        x, mask, u, s, keep = (
            torch.tensor(file[key]) for key in ("x", "mask", f"u_{part}", f"out_{part}_s", f"out_{part}_keep")
        )
    module = Router(dim=x.shape[-1], budget=Budget(1.0, at_most=m)).double().eval()
    assert module.weight is not None
    module.weight.data = u
    real = s.masked_fill(~mask, 0.0)
    torch.testing.assert_close(module.score(x).masked_fill(~mask, 0.0), real, rtol=0, atol=1e-12)
    routed = module(x, mask=mask)
    torch.testing.assert_close(row_of(routed, x.shape[1]), keep, rtol=0, atol=1e-12)
    assert bool(routed.mask.all())


def test_the_best_tokens_are_routed_with_their_soft_top_k() -> None:
    module, x = router(), randn(B, N, D)
    routed, s = module(x), module.score(x)
    assert routed.indices.shape == (B, 6)
    assert torch.equal(routed.indices, s.topk(6).indices.sort(-1).values)
    torch.testing.assert_close(routed.weights, soft_topk(s, 6).gather(-1, routed.indices), rtol=0, atol=1e-14)


def test_the_notes_form_is_the_softmax_of_the_top_k() -> None:
    module, x = router("softmax_topk"), randn(B, N, D)
    s = module.score(x).detach()
    wanted = torch.full_like(s, -math.inf)
    for row in range(B):
        for token in sorted(range(N), key=lambda i, row=row: -float(s[row, i]))[:6]:  # type: ignore[misc]
            wanted[row, token] = s[row, token]
    torch.testing.assert_close(row_of(module(x)), wanted.softmax(-1), rtol=0, atol=1e-14)


def test_sigmoid_weights_stand_by_themselves() -> None:
    module, x = router("sigmoid"), randn(B, N, D)
    routed = module(x)
    torch.testing.assert_close(routed.weights, module.score(x).sigmoid().gather(-1, routed.indices), rtol=0, atol=1e-15)


def test_straight_through_has_weight_1_and_the_soft_gradient() -> None:
    x, g = randn(B, N, D), randn(B, 6, seed=1)
    soft, hard = router(), router("straight_through")
    assert bool((hard(x).weights == 1).all())
    for module in (soft, hard):
        (module(x).weights * g).sum().backward()
    assert soft.weight is not None and hard.weight is not None
    torch.testing.assert_close(hard.weight.grad, soft.weight.grad, rtol=0, atol=0)
    assert hard.weight.grad is not None and bool(hard.weight.grad.any())


def test_static_routing_takes_the_first_token_of_equal_blocks() -> None:
    x = randn(2, 24, D)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, :3] = mask[1, 19:] = False
    routed = router("static")(x, mask=mask)
    assert chosen_of(routed) == [[0, 4, 8, 12, 16, 20], [3, 7, 11, 15]]
    assert routed.weights.tolist() == [[1] * 6, [1] * 4 + [0] * 2]
    assert not list(router("static").parameters())
    # 5 blocks of 13 tokens begin at ceil(13 i / 5)
    uneven = router("static", budget=Budget(1.0, at_most=5))(randn(1, 13, D))
    assert chosen_of(uneven) == [[math.ceil(13 * i / 5) for i in range(5)]]


def test_random_routing_draws_anew_and_evenly() -> None:
    module, x = router("random"), randn(1, N, D)
    drawn = torch.zeros(N)
    for _ in range(400):
        drawn[module(x).indices[0]] += 1
    # binomial: 400 draws with p = 6/23, five standard deviations
    assert float((drawn - 400 * 6 / 23).abs().max()) < 5 * math.sqrt(400 * 6 / 23 * 17 / 23)


def test_training_routes_nine_eighths_and_keeps_the_sum() -> None:
    module, x = router(budget=Budget(1.0, at_most=8)).train(), randn(B, N, D)
    routed, s = module(x), module.score(x)
    assert routed.indices.shape == (B, 9)
    torch.testing.assert_close(routed.weights, soft_topk(s, 8).gather(-1, routed.indices), rtol=0, atol=1e-14)
    assert module.eval()(x).indices.shape == (B, 8)


def test_the_sum_may_be_nine_eighths_with_m_tokens() -> None:
    module, x = router(slack=1.0, total=9 / 8).train(), randn(B, N, D)
    routed = module(x)
    assert routed.indices.shape == (B, 6)
    wanted = soft_topk(module.score(x), 6.75).gather(-1, routed.indices)
    torch.testing.assert_close(routed.weights, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize(("before", "after"), [(0, 9), (5, 0), (3, 40)])
def test_padding_of_any_side_and_amount_changes_nothing(name: str, training: bool, before: int, after: int) -> None:
    module, x = router(name).train(training), randn(B, N, D)
    bare = module(x)
    padded = torch.cat([torch.full((B, before, D), math.nan), x, randn(B, after, D, seed=1)], 1)
    mask = torch.zeros(B, before + N + after, dtype=torch.bool)
    mask[:, before : before + N] = True
    routed = module(padded, mask=mask)
    assert chosen_of(routed) == [[i + before for i in row] for row in chosen_of(bare)]
    torch.testing.assert_close(routed.weights[routed.mask].view_as(bare.weights), bare.weights, rtol=0, atol=1e-14)
    assert not routed.weights[~routed.mask].any()
    assert bool((routed.indices.diff(dim=-1) >= 0).all())


@pytest.mark.parametrize("name", FIXED)
def test_rows_of_a_batch_do_not_meet(name: str) -> None:
    module, x = router(name), randn(3, N, D)
    mask = torch.arange(N) < torch.tensor([[N], [11], [1]])
    together = module(x, mask=mask)
    for row, length in enumerate((N, 11, 1)):
        alone = module(x[row : row + 1, :length])
        assert chosen_of(together)[row] == chosen_of(alone)[0]
        m = alone.weights.shape[1]
        assert m == math.ceil(length / 4)
        torch.testing.assert_close(together.weights[row, :m], alone.weights[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", FIXED)
def test_a_row_without_a_token_routes_none(name: str) -> None:
    module, x = router(name), randn(B, N, D).requires_grad_()
    mask = torch.tensor([[True], [False]]).expand(B, N)
    routed = module(x, mask=mask)
    assert routed.mask.sum(-1).tolist() == [6, 0]
    assert not routed.weights[1].any()
    if name in LEARNED:
        gradient = torch.autograd.grad(routed.weights.square().sum(), x)[0]
        assert bool(gradient.isfinite().all())
        assert not gradient[1].any()


@pytest.mark.parametrize("name", ["soft_topk", "straight_through"])
def test_a_row_with_no_more_tokens_than_the_budget_routes_all_with_weight_1(name: str) -> None:
    routed = router(name, budget=Budget(1.0, at_most=40))(randn(B, N, D))
    assert chosen_of(routed) == [list(range(N))] * B
    assert bool((routed.weights == 1).all())


@pytest.mark.parametrize("name", list(ROUTINGS))
def test_forced_tokens_are_routed_and_forbidden_ones_never(name: str) -> None:
    module, x = router(name), randn(B, N, D)
    forced, forbidden = torch.zeros(B, N, dtype=torch.bool), torch.zeros(B, N, dtype=torch.bool)
    worst = module.score(x).topk(2, largest=False).indices if name in LEARNED else torch.tensor([[1, 2]] * B)
    forced.scatter_(-1, worst, True)
    forbidden.scatter_(-1, module(x).indices[:, :3], True)
    routed = module(x, forced=forced, forbidden=forbidden)
    for row, chosen in enumerate(chosen_of(routed)):
        assert len(chosen) == 6
        barred = set(forbidden[row].nonzero().flatten().tolist())
        assert not barred & set(chosen)
        assert set(worst[row].tolist()) - barred <= set(chosen)


def test_a_forced_token_has_weight_1_and_takes_1_of_the_sum() -> None:
    module, x = router(), randn(B, N, D)
    forced = torch.zeros(B, N, dtype=torch.bool)
    forced[0, 4] = forced[1, :2] = True
    w, s = row_of(module(x, forced=forced)), module.score(x)
    assert bool((w[forced] == 1).all())
    wanted = torch.cat([soft_topk(s[i : i + 1], 6 - f, mask=~forced[i]) for i, f in ((0, 1), (1, 2))])
    free = (w > 0) & ~forced
    torch.testing.assert_close(w[free], wanted[free], rtol=0, atol=1e-14)


def test_of_too_many_forced_tokens_the_first_are_routed() -> None:
    forced = torch.zeros(1, N, dtype=torch.bool)
    forced[0, 5:20] = True
    routed = router()(randn(1, N, D), forced=forced)
    assert chosen_of(routed) == [list(range(5, 11))]
    assert bool((routed.weights == 1).all())


def test_forbidden_tokens_have_no_share_in_the_sum() -> None:
    module, x = router(), randn(B, N, D)
    forbidden = randn(B, N, seed=1) > 0
    routed = module(x, forbidden=forbidden)
    wanted = soft_topk(module.score(x), 6, mask=~forbidden)
    torch.testing.assert_close(routed.weights, wanted.gather(-1, routed.indices), rtol=0, atol=1e-14)


def test_of_equal_scores_the_earlier_token_is_routed() -> None:
    ranking = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0, -math.inf], [1.0] * 7])
    assert choose(ranking, 4, 4).tolist() == [[0, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    few = torch.full((1, 7), -math.inf)
    few[0, 3] = 1.0
    assert choose(few, 4, 4).nonzero().tolist() == [[0, 3]]


def test_without_ties_one_sort_chooses_the_same_and_otherwise_declines() -> None:
    ranking = randn(3, N)
    wanted = choose(ranking, 5, 5)
    with torch.no_grad():
        found = choose_untied(ranking, 5)
        assert found is not None
        for ours, theirs in zip(found, (wanted, *places(wanted, 5)), strict=True):
            assert torch.equal(ours, theirs)
        # a tie for the last slot in one of the rows; one above it decides nothing
        ranked = ranking[1].sort(descending=True).indices
        for first, second, declined in ((4, 5, True), (0, 1, False), (5, 6, False)):
            tied = ranking.clone()
            tied[1, ranked[second]] = tied[1, ranked[first]]
            assert (choose_untied(tied, 5) is None) == declined
        for odd in (math.nan, -math.inf):
            assert choose_untied(torch.full((1, 7), odd), 5) is None
        assert choose_untied(ranking, N) is None
    assert choose_untied(ranking, 5) is None


@pytest.mark.parametrize("name", FIXED)
def test_without_a_graph_the_same_tokens_are_routed_with_the_same_weights(name: str) -> None:
    module, x = router(name), randn(B, N, D)
    wanted = module(x)
    with torch.no_grad():
        for ours, theirs in zip(module(x), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", LEARNED)
def test_every_token_of_the_competition_sends_a_gradient(name: str) -> None:
    module, x = router(name).train(), randn(B, N, D).requires_grad_()
    routed = module(x)
    gradient = torch.autograd.grad((routed.weights * randn(*routed.weights.shape, seed=1)).sum(), x)[0]
    touched = gradient.any(-1)
    if name in ("sigmoid", "softmax_topk"):
        # only the routed tokens have a part in these
        assert torch.equal(touched, torch.zeros_like(touched).scatter(-1, routed.indices, True))
    else:
        # 50 iterations converge to rounding only: entries at 1 have exactly none in either case
        assert int(touched.sum()) > routed.indices.numel()


def test_scores_that_are_known_are_not_made_again() -> None:
    module, x = router(), randn(B, N, D)
    torch.testing.assert_close(module(x, scores=module.score(x)), module(x), rtol=0, atol=0)
    other = module(x, scores=randn(B, N, seed=3))
    assert torch.equal(other.indices, randn(B, N, seed=3).topk(6).indices.sort(-1).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    module, x = router().to(dtype), randn(B, 300, D).to(dtype)
    assert module.weight is not None
    s = module.score(x)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s, x.float() @ module.weight.float(), rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(module.score(x), s, rtol=0, atol=0)
    assert module(x).weights.dtype == torch.float32


def test_the_paper_s_iterations_agree_with_the_exact_router() -> None:
    x = randn(B, 200, D)
    torch.testing.assert_close(router("soft_topk_iterations")(x).weights, router()(x).weights, rtol=0, atol=1e-12)


def test_a_schedule_may_write_eps() -> None:
    module, x = router(), randn(B, N, D)
    assert isinstance(module.routing, SoftTopK)
    module.routing.eps.fill_(0.25)
    routed = module(x)
    wanted = soft_topk(module.score(x), 6, eps=0.25).gather(-1, routed.indices)
    torch.testing.assert_close(routed.weights, wanted, rtol=0, atol=1e-14)
    again = router()
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again(x), routed, rtol=0, atol=0)


def test_scores_have_unit_variance_at_first() -> None:
    torch.manual_seed(0)
    module = Router(dim=512, budget=BUDGET)
    # the variance of a sample of 512 weights has a standard deviation of sqrt(2 / 512) = 6 %
    assert abs(float(module.score(torch.randn(1, 4000, 512)).detach().var()) - 1) < 0.2


def test_decisions_are_tapped() -> None:
    module, x = router(), randn(B, N, D)
    with record() as seen:
        routed = module(x)
    assert seen["routed"][0] is routed.indices
    assert seen["routing_weights"][0] is routed.weights
    assert torch.equal(seen["routing_scores"][0], module.score(x))


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_graph_break(name: str, masked: bool) -> None:
    torch.compiler.reset()  # all these are one method, of which only so many forms are kept
    options: dict[str, object] = {}
    if name == "soft_topk_iterations":
        options["routing"] = SoftTopK(solver=Iterations(steps=2))
    module, x = router(**{"routing": name, **options}), randn(B, N, D)  # type: ignore[arg-type]
    mask = torch.arange(N) < torch.tensor([[N], [11]]) if masked else None
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask=mask), module(x, mask=mask), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("length", "fraction", "at_most", "m"),
    [(16, 1 / 16, None, 1), (17, 1 / 16, None, 2), (49, 1 / 7, None, 7), (30, 0.3, None, 9), (10, 1.0, 4, 4), (0, 0.5, None, 0)],
)  # fmt: skip
def test_a_budget_is_the_same_for_numbers_and_rows(length: int, fraction: float, at_most: int | None, m: int) -> None:
    budget = Budget(fraction, at_most=at_most)
    assert budget.tokens(length) == m
    assert budget.tokens(torch.tensor([length, 1])).tolist() == [m, 1]


def test_a_budget_stops_growing_where_it_is_told_to() -> None:
    budget = Budget(1 / 16, at_most=2048)
    assert [budget.tokens(n) for n in (16384, 32768, 65536)] == [1024, 2048, 2048]


def test_a_routing_of_ones_own_is_taken() -> None:
    module = router(routing=StraightThrough(of=SoftTopK(eps=0.1)))  # type: ignore[arg-type]
    assert bool((module(randn(B, N, D)).weights == 1).all())
    assert isinstance(module.routing, nn.Module)
    assert not StaticBlocks().learned and not RandomTokens().learned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "top_p"}, "got routing='top_p', expected one of soft_topk, soft_topk_iterations, softmax_topk"),
        ({"slack": 0.5}, "got slack=0.5, expected at least 1"),
        ({"total": 0.0}, "got total=0.0"),
    ],
)
def test_an_unknown_router_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"fraction": 0.0}, {"fraction": 1.5}, {"at_most": 0}])
def test_a_budget_of_nothing_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Budget got"):
        Budget(**options)  # type: ignore[arg-type]


def test_an_eps_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="SoftTopK got eps=0"):
        SoftTopK(eps=0)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((B, N, D + 1), {}, r"Router got x of shape \(2, 23, 13\), expected \(b, n, 12\) with n at least 1"),
        ((B, 0, D), {}, "with n at least 1"),
        ((B, N, D), {"scores": (B, N + 1)}, r"got scores of shape \(2, 24\), expected \(2, 23\)"),
        ((B, N, D), {"forced": (B, 5)}, r"Router \(forced\) got a mask"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shape: tuple[int, ...], given: dict[str, tuple[int, ...]], message: str
) -> None:
    tensors = {k: torch.ones(v, dtype=torch.bool if k == "forced" else torch.float64) for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        router()(randn(*shape), **tensors)
