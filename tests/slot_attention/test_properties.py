"""What holds of Slot Attention for any weights, sizes and combination of options, each of them in its turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tevo.slot_attention import (
    Background,
    BatchNormalisedSum,
    BiLevel,
    GumbelSoftmax,
    Implicit,
    JointSoftmax,
    LearnedQueries,
    LearnedSum,
    Mesh,
    NormalisedSum,
    ScaledSum,
    SharedGaussian,
    Sinkhorn,
    SlotAttention,
    SlotSoftmax,
    Sum,
    Truncated,
    UnitGaussian,
    Unrolled,
    WeightedMean,
)
from tevo.slot_attention.competition import Scene, sinkhorn
from tevo.slot_attention.invariant import (
    InvariantSlotAttention,
    Translation,
    TranslationScale,
    TranslationScaleRotation,
)
from tevo.slot_attention.mixture import ProbabilisticSlotAttention, SlotMixture, gaussian


class QuietMesh(Mesh):
    """MESH whose noise does not depend on the order of inputs and slots."""

    def draw(self, inputs: Tensor, k: int) -> Tensor:
        return inputs.new_zeros(len(inputs), k, inputs.shape[1])


SEATS: dict[str, list[object]] = {
    # a short step: a long one magnifies rounding where a plan is hard already
    "competition": [
        SlotSoftmax(temperature=0.7),
        JointSoftmax(temperature=1.3),
        GumbelSoftmax(temperature=0.9),
        Sinkhorn(rounds=3),
        QuietMesh(rounds=3, descents=2, rate=0.5),
    ],
    "aggregation": [
        WeightedMean(),
        WeightedMean(eps=0.0, offset=1.0),
        Sum(),
        ScaledSum(),
        LearnedSum(),
        NormalisedSum(),
        BatchNormalisedSum(),
    ],
    "gradient": [Unrolled(), Implicit(steps=2), Truncated(1), Truncated(9), BiLevel()],
    "init": [SharedGaussian(), UnitGaussian(), LearnedQueries(), LearnedQueries(sigma=0.4), Background()],
}
OPTIONS = [pytest.param(seat, option, id=repr(option)) for seat in SEATS for option in SEATS[seat]]
FORMS = [("auto", "stored"), ("plain", "stored"), ("absorbed", "stored"), ("auto", "lean")]

cases = st.fixed_dictionaries(
    {
        **{seat: st.sampled_from(options) for seat, options in SEATS.items()},
        "form": st.sampled_from(FORMS),
        "heads": st.integers(1, 3),
        "norm_eps": st.sampled_from([1e-3, None]),
        "hidden_dim": st.sampled_from([5, None]),
        "batch": st.integers(1, 3),
        "inputs": st.integers(1, 9),
        "slots": st.integers(1, 4),
        "iterations": st.integers(1, 3),
        "seed": st.integers(0, 2**31),
    }
)
few = settings(max_examples=3)
every_option = pytest.mark.parametrize(("seat", "option"), OPTIONS)


class Drawn:
    """A module in evaluation with no trivial parameter, inputs, and the slots that it starts from."""

    def __init__(self, case: dict[str, Any], seat: str, option: object) -> None:
        case = {**case, seat: option}
        torch.manual_seed(case["seed"])
        competition = case["competition"]
        form, memory = case["form"] if competition.local else FORMS[0]
        heads = 1 if isinstance(competition, Sinkhorn) else case["heads"]
        self.b, self.n, self.k = case["batch"], case["inputs"], case["slots"]
        self.module = SlotAttention(
            dim=6,
            input_dim=5,
            num_slots=self.k,
            inner_dim=2 * heads,
            heads=heads,
            form=form,
            memory=memory,
            **{name: case[name] for name in (*SEATS, "iterations", "norm_eps", "hidden_dim")},
        )
        self.module = self.module.double().eval()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        self.x = torch.randn(self.b, self.n, 5, dtype=torch.float64)
        self.noise = torch.randn(self.b, self.k, 6, dtype=torch.float64)
        self.start = self.module.initial_slots(self.b, noise=self.noise)


def same(a: object, b: object) -> None:
    # norms of sums that nearly vanish magnify rounding a thousandfold
    torch.testing.assert_close(a, b, rtol=0.0, atol=1e-9)


@every_option
@few
@given(case=cases)
def test_order_of_inputs_means_nothing_and_that_of_slots_is_kept(seat: str, option: object, case: dict) -> None:
    d = Drawn(case, seat, option)
    out, attention = d.module(d.x, slots=d.start, return_attention=True)
    inputs, slots = torch.randperm(d.n), torch.randperm(d.k)
    moved = d.module(d.x[:, inputs], slots=d.start[:, slots], return_attention=True)
    same(moved, (out[:, slots], attention[:, slots][..., inputs]))


@every_option
@few
@given(case=cases, places=st.lists(st.booleans(), min_size=1, max_size=4))
def test_padding_anywhere_is_as_if_it_were_not_there(seat: str, option: object, case: dict, places: list[bool]) -> None:
    d = Drawn(case, seat, option)
    mask = torch.tensor([True] * d.n + places)[torch.randperm(d.n + len(places))]
    mask[0] |= not bool(mask.any())
    wide = torch.full((d.b, len(mask), 5), torch.nan, dtype=torch.float64)
    wide[:, mask] = torch.randn(d.b, int(mask.sum()), 5, dtype=torch.float64)
    wide.requires_grad_()
    padded, attention = d.module(wide, slots=d.start, mask=mask.expand(d.b, -1), return_attention=True)
    same(
        (padded, attention[..., mask]),
        d.module(wide[:, mask], slots=d.start, return_attention=True),
    )
    assert not attention[..., ~mask].any()
    (gradient,) = torch.autograd.grad(padded.square().sum(), wide)
    assert gradient.isfinite().all()
    assert not gradient[:, ~mask].any()


@every_option
@few
@given(case=cases, kept=st.lists(st.booleans(), min_size=4, max_size=4))
def test_a_masked_slot_is_as_if_it_were_not_there(seat: str, option: object, case: dict, kept: list[bool]) -> None:
    d = Drawn(case, seat, option)
    slot_mask = torch.tensor(kept[: d.k])
    slot_mask[0] |= not bool(slot_mask.any())
    out = d.module(d.x, slots=d.start[:, slot_mask])
    spoilt = d.start.masked_fill(~slot_mask[:, None], torch.nan)
    masked = d.module(d.x, slots=spoilt, slot_mask=slot_mask.expand(d.b, -1))
    same(masked[:, slot_mask], out)
    assert not masked[:, ~slot_mask].any()


@every_option
@few
@given(case=cases)
def test_rows_of_a_batch_do_not_see_each_other(seat: str, option: object, case: dict) -> None:
    d = Drawn(case, seat, option)
    whole = d.module(d.x, slots=d.start)
    same(torch.cat([d.module(d.x[i : i + 1], slots=d.start[i : i + 1]) for i in range(d.b)]), whole)


@pytest.mark.parametrize(("form", "memory"), FORMS)
@pytest.mark.parametrize("inputs", [7, 301])
def test_in_float32_the_order_of_inputs_is_felt_by_a_millionth(form: str, memory: str, inputs: int) -> None:
    torch.manual_seed(0)
    module = SlotAttention(dim=16, input_dim=12, num_slots=5, form=form, memory=memory).eval()
    x, start = torch.randn(2, inputs, 12), module.initial_slots(2)
    out = module(x, slots=start)
    # slots are of size 1
    torch.testing.assert_close(module(x[:, torch.randperm(inputs)], slots=start), out, rtol=0.0, atol=1e-6)


# constants to the gradient make it another one than that of the function
EXACT = [
    param
    for param in OPTIONS
    if not isinstance(param.values[1], Mesh | Implicit | BiLevel)
    and param.values[1] not in (Truncated(1), LearnedQueries(sigma=0.4))
]


@pytest.mark.parametrize(("seat", "option"), EXACT)
@few
@given(case=cases)
def test_gradients_are_those_of_differences(seat: str, option: object, case: dict) -> None:
    exact = {"gradient": Truncated(9), "init": LearnedQueries(), "competition": SEATS["competition"][0]}
    others = {name: value for name, value in exact.items() if case[name] not in [p.values[1] for p in EXACT]}
    d = Drawn({**case, **others}, seat, option)
    x, noise = d.x.requires_grad_(), d.noise.requires_grad_()
    names = [name for name, _ in d.module.named_parameters()]

    def function(x: Tensor, noise: Tensor, *values: Tensor) -> Tensor:
        held = {f"module.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(_Whole(d.module), held, (x, noise))

    assert torch.autograd.gradcheck(function, (x, noise, *d.module.parameters()), fast_mode=True)


class _Whole(torch.nn.Module):
    def __init__(self, module: SlotAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.module(x, slots=self.module.initial_slots(len(x), noise=noise))


@pytest.mark.parametrize("competition", SEATS["competition"], ids=repr)
@few
@given(case=cases)
def test_gradient_modes_are_their_equations_under_every_competition(competition: object, case: dict) -> None:
    def gradients(mode: object, by_hand) -> None:
        d = Drawn({**case, "gradient": mode, "init": UnitGaussian(), "iterations": 3}, "competition", competition)

        def f(s: Tensor) -> Tensor:
            d.module.gradient = Unrolled()
            return d.module(d.x, slots=s, iterations=1)

        d.x.requires_grad_()
        start = d.noise.requires_grad_()
        results = []
        for run in (lambda s: d.module(d.x, slots=s), lambda s: by_hand(f, s)):
            out = run(start)
            leaves = [d.x, start, d.module.q.weight]
            results.append((out, *torch.autograd.grad((out**3).sum(), leaves, allow_unused=True)))
        same(results[0], results[1])

    gradients(Truncated(9), lambda f, s: f(f(f(s))))
    gradients(Truncated(1), lambda f, s: f(f(f(s)).detach()))
    gradients(Implicit(steps=2), lambda f, s: f(f(f(f(f(s))).detach())))
    gradients(BiLevel(), lambda f, s: f(f(f(s)).detach() + s - s.detach()))


@few
@given(case=cases)
def test_the_slopes_of_mesh_are_constants_to_its_gradient(case: dict) -> None:
    mesh = QuietMesh(rounds=3, descents=2, rate=0.5)
    d = Drawn(case, "competition", mesh)
    q, k = torch.randn(2, d.b, 1, max(d.n, d.k), 2, dtype=torch.float64)
    q, k = q[:, :, : d.k].requires_grad_(), k[:, :, : d.n].requires_grad_()
    scene = mesh.prepare(d.module, d.x, d.start, Scene(None, None))
    weights = torch.randn(d.b, d.k, d.n, dtype=torch.float64)

    def by_hand() -> Tensor:
        alpha = scene.marginal
        beta = (d.k * d.module.slot_marginals(d.start)[..., 0].softmax(-1)).log()
        cost = torch.stack([(q[:, 0, i, None] - k[:, 0]).square().sum(-1).sqrt() for i in range(d.k)], 1)
        v = torch.zeros_like(beta)
        for _ in range(2):
            held = cost.detach().requires_grad_()
            plan = sinkhorn(held, alpha.detach(), beta.detach(), 3, v.detach())[0]
            plan = plan.clamp(1e-20, 1.0)
            (slope,) = torch.autograd.grad(-(plan * plan.log()).mean((1, 2)).sum(), held)
            _, v = sinkhorn(cost, alpha, beta, 3, v)
            cost = cost - 0.5 * F.normalize(slope.flatten(1), dim=1).view_as(cost)
        return sinkhorn(cost, alpha, beta, 3, v)[0]

    leaves, results = [q, k, d.module.slot_marginals[0].weight], []
    for plan in (mesh.weights(d.module, q, k, d.start, scene)[:, 0], by_hand()):
        results.append((plan, *torch.autograd.grad((plan * weights).sum(), leaves, retain_graph=True)))
    same(*results)


@few
@given(case=cases)
def test_the_noise_of_learned_queries_is_a_constant_to_their_gradient(case: dict) -> None:
    d = Drawn(case, "init", LearnedQueries(sigma=0.4))
    weights = torch.randn_like(d.noise)
    (gradient,) = torch.autograd.grad((d.start * weights).sum(), d.module.slots_queries)
    same(gradient, weights.sum(0, keepdim=True))


SHAPE = {"dim": 4, "input_dim": 5, "hidden_dim": 6}
# modules around the same competition, with their own state: name -> slots, T to a module
COMPOSITIONS: dict[str, Any] = {
    "mixture": lambda k, t: SlotMixture(**SHAPE, num_slots=k, iterations=t, gradient=Unrolled()),
    "mixture, normal density": lambda k, t: SlotMixture(
        **SHAPE, num_slots=k, iterations=t, gradient=Unrolled(), log_density=gaussian, out_dim=3
    ),
    "probabilistic": lambda k, t: ProbabilisticSlotAttention(dim=4, input_dim=5, num_slots=k, iterations=t),
    **{
        f"invariant, {name}": lambda k, t, frame=frame: InvariantSlotAttention(
            **SHAPE, num_slots=k, iterations=t, frame=frame, grid=(1, 1)
        )
        for name, frame in {
            "translation": Translation(),
            "scale": TranslationScale(),
            "rotation": TranslationScaleRotation(),
        }.items()
    },
}
every_composition = pytest.mark.parametrize("name", COMPOSITIONS)


class Composed:
    """As :class:`Drawn`; inputs (b, n, 7) end with their places, which one of the modules asks for."""

    def __init__(self, case: dict[str, Any], name: str) -> None:
        torch.manual_seed(case["seed"])
        # a component that has one input has the deviation 1e-4, whose logarithm is steep
        self.b, self.n, self.k = case["batch"], case["inputs"] + 2, case["slots"]
        self.module: nn.Module = COMPOSITIONS[name](self.k, case["iterations"]).double().eval()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        self.x = torch.randn(self.b, self.n, 7, dtype=torch.float64)
        self.start = 0.5 * self.module.initial_slots(self.b).detach()

    def __call__(self, x: Tensor, slots: Tensor, **options: Any) -> Any:
        if isinstance(self.module, InvariantSlotAttention):
            # a place is known, also where there is nothing
            options["places"] = x[..., 5:].nan_to_num()
        return self.module(x[..., :5], slots=slots, **options)


@every_composition
@few
@given(case=cases)
def test_compositions_keep_the_order_of_slots_and_know_none_of_inputs(name: str, case: dict) -> None:
    d = Composed(case, name)
    out, attention = d(d.x, d.start, return_attention=True)
    inputs, slots = torch.randperm(d.n), torch.randperm(d.k)
    moved = d(d.x[:, inputs], d.start[:, slots], return_attention=True)
    same(moved, (out[:, slots], attention[:, slots][..., inputs]))


@every_composition
@few
@given(case=cases, places=st.lists(st.booleans(), min_size=1, max_size=4))
def test_compositions_take_padding_for_nothing(name: str, case: dict, places: list[bool]) -> None:
    d = Composed(case, name)
    mask = torch.tensor([True] * d.n + places)[torch.randperm(d.n + len(places))]
    wide = torch.full((d.b, len(mask), 7), torch.nan, dtype=torch.float64)
    wide[:, mask] = torch.randn(d.b, int(mask.sum()), 7, dtype=torch.float64)
    wide.requires_grad_()
    padded, attention = d(wide, d.start, mask=mask.expand(d.b, -1), return_attention=True)
    same((padded, attention[..., mask]), d(wide[:, mask], d.start, return_attention=True))
    assert not attention[..., ~mask].any()
    (gradient,) = torch.autograd.grad(padded.square().sum(), wide)
    assert gradient.isfinite().all()
    assert not gradient[:, ~mask].any()


@every_composition
@few
@given(case=cases, kept=st.lists(st.booleans(), min_size=4, max_size=4))
def test_compositions_take_a_masked_slot_for_nothing(name: str, case: dict, kept: list[bool]) -> None:
    d = Composed(case, name)
    slot_mask = torch.tensor(kept[: d.k])
    slot_mask[0] |= not bool(slot_mask.any())
    spoilt = d.start.masked_fill(~slot_mask[:, None], torch.nan)
    masked = d(d.x, spoilt, slot_mask=slot_mask.expand(d.b, -1))
    same(masked[:, slot_mask], d(d.x, d.start[:, slot_mask]))
    assert not masked[:, ~slot_mask].any()


@every_composition
@few
@given(case=cases)
def test_compositions_treat_rows_of_a_batch_apart(name: str, case: dict) -> None:
    d = Composed(case, name)
    whole = d(d.x, d.start)
    same(torch.cat([d(d.x[i : i + 1], d.start[i : i + 1]) for i in range(d.b)]), whole)


@every_composition
@few
@given(case=cases)
def test_compositions_have_the_gradients_of_differences(name: str, case: dict) -> None:
    d = Composed(case, name)
    if isinstance(d.module, InvariantSlotAttention) and d.module.frame.width > 2:
        # at the least scale there is no slope
        d.start[..., 6:8] = d.start[..., 6:8].abs() + 0.05
    inputs = (d.x.requires_grad_(), d.start.requires_grad_())
    assert torch.autograd.gradcheck(d, inputs, fast_mode=True)
