"""What holds of Slot Attention for any weights."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor

from tevo import record
from tevo.functional import slot_attention as core
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
from tevo.slot_attention.competition import sinkhorn

B, N, D_IN, D, K = 2, 13, 10, 12, 5
SIZES = {"dim": D, "input_dim": D_IN, "num_slots": K, "hidden_dim": 7}


class QuietMesh(Mesh):
    """MESH whose noise does not depend on the order of inputs and slots."""

    def draw(self, inputs: Tensor, k: int) -> Tensor:
        return inputs.new_zeros(len(inputs), k, inputs.shape[1])


VARIANTS = {
    "default": {},
    "plain": {"form": "plain"},
    "absorbed": {"form": "absorbed"},
    "lean": {"memory": "lean"},
    "heads": {"heads": 3, "inner_dim": 6, "merge_dim": 4},
    "lean heads": {"heads": 3, "memory": "lean"},
    "joint": {"heads": 3, "competition": JointSoftmax(temperature=0.7)},
    "lean joint": {"heads": 3, "competition": JointSoftmax(), "memory": "lean"},
    "no norms": {"norm_eps": None, "hidden_dim": None},
    "sinkhorn": {"competition": Sinkhorn()},
    "mesh": {"competition": QuietMesh()},
    "savi": {"aggregation": WeightedMean(eps=0.0, offset=1e-8)},
    "scaled sum": {"aggregation": ScaledSum()},
    "lean scaled sum": {"aggregation": ScaledSum(), "memory": "lean"},
    "learned sum": {"aggregation": LearnedSum()},
    "normalised sum": {"aggregation": NormalisedSum(), "heads": 2},
    "batch-normalised sum": {"aggregation": BatchNormalisedSum(), "heads": 2},
    "sum": {"aggregation": Sum()},
    "unit": {"init": UnitGaussian()},
    "queries": {"init": LearnedQueries(sigma=0.3)},
    "background": {"init": Background(LearnedQueries(std=None))},
    "implicit": {"gradient": Implicit(steps=2)},
    "truncated": {"gradient": Truncated(2)},
    "bi-level": {"gradient": BiLevel()},
    "lean bi-level": {"gradient": BiLevel(), "memory": "lean"},
}


def build(variant: str, seed: int = 0, **more: object) -> SlotAttention:
    """A module in evaluation, no parameter of which is trivial."""
    torch.manual_seed(seed)
    module = SlotAttention(**{**SIZES, **VARIANTS[variant], **more}).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: object, b: object, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=atol)


every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(params=["few", "many"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same inputs, once taken for few and once for many, in stretches."""
    if request.param == "many":
        monkeypatch.setattr(core, "MANY", 0)
        monkeypatch.setattr(core, "STRETCH", 2)
        monkeypatch.setattr(core, "STRETCH_NUMBERS", 2)


@every_variant
def test_permuting_the_slots_permutes_the_outputs(variant: str) -> None:
    module, x, s = build(variant), draw(B, N, D_IN), draw(B, K, D, seed=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    out, attention = module(x, slots=s, return_attention=True)
    same(module(x, slots=s[:, order], return_attention=True), (out[:, order], attention[:, order]))


@every_variant
def test_permuting_the_inputs_changes_no_slot(variant: str) -> None:
    module, x, s = build(variant), draw(B, N, D_IN), draw(B, K, D, seed=2)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    out, attention = module(x, slots=s, return_attention=True)
    same(module(x[:, order], slots=s, return_attention=True), (out, attention[..., order]))


@every_variant
@pytest.mark.usefixtures("size")
def test_padding_is_as_if_it_were_not_there(variant: str) -> None:
    module, s = build(variant), draw(B, K, D, seed=2)
    x = draw(B, N, D_IN).requires_grad_()
    mask = torch.arange(N) < 9
    out, attention = module(x[:, mask], slots=s, return_attention=True)
    expected = torch.autograd.grad(out.square().sum(), [x, *used(module)], allow_unused=True)
    filled = torch.where(mask[:, None], x.detach(), torch.nan).requires_grad_()
    padded, wide = module(filled, slots=s, mask=mask.expand(B, N), return_attention=True)
    same((padded, wide[..., :9]), (out, attention))
    assert (wide[..., 9:] == 0).all()
    same(torch.autograd.grad(padded.square().sum(), [filled, *used(module)], allow_unused=True), expected)


def used(module: SlotAttention) -> list[Tensor]:
    return [p for name, p in module.named_parameters() if not name.startswith("slots_")]


@every_variant
@pytest.mark.usefixtures("size")
def test_a_masked_slot_is_as_if_it_were_not_there(variant: str) -> None:
    module, x, s = build(variant), draw(B, N, D_IN), draw(B, K, D, seed=2)
    slot_mask = torch.tensor([True, False, True, True, False])
    out, attention = module(x, slots=s[:, slot_mask], return_attention=True)
    s[:, 1] = torch.nan
    masked, wide = module(x, slots=s, slot_mask=slot_mask.expand(B, K), return_attention=True)
    same((masked[:, slot_mask], wide[:, slot_mask]), (out, attention))
    assert (masked[:, ~slot_mask] == 0).all()
    assert (wide[:, ~slot_mask] == 0).all()


@every_variant
def test_rows_of_a_batch_do_not_see_each_other(variant: str) -> None:
    module, x, s = build(variant), draw(B, N, D_IN), draw(B, K, D, seed=2)
    same(module(x, slots=s)[1:], module(x[1:], slots=s[1:]))


# steps that are constants to the gradient make it another one than that of the function
ESTIMATED = {"queries", "mesh", "implicit", "truncated", "bi-level", "lean bi-level"}


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - ESTIMATED))
def test_gradients_are_those_of_differences(variant: str) -> None:
    module = build(
        variant, dim=4, input_dim=3, num_slots=2, heads=2 if VARIANTS[variant].get("heads") else 1, inner_dim=4
    )
    x, noise = draw(1, 4, 3).requires_grad_(), draw(1, 2, 4, seed=2).requires_grad_()
    parameters = dict(module.named_parameters())

    def function(x: Tensor, noise: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(_Whole(module), {f"module.{k}": v for k, v in named.items()}, (x, noise))

    assert torch.autograd.gradcheck(function, (x, noise, *parameters.values()), fast_mode=True)


class _Whole(torch.nn.Module):
    def __init__(self, module: SlotAttention) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.module(x, slots=self.module.initial_slots(len(x), noise=noise))


@every_variant
def test_every_parameter_gets_a_gradient(variant: str) -> None:
    module = build(variant)
    module.train()
    module(draw(B, N, D_IN)).square().sum().backward()
    cut = variant in ("implicit", "truncated")
    for name, parameter in module.named_parameters():
        if cut and name.startswith("slots_"):
            # an implicit or truncated gradient never reaches the start
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("heads", [{}, {"heads": 3}, {"heads": 3, "competition": JointSoftmax()}], ids=str)
def test_the_forms_agree(heads: dict[str, object]) -> None:
    results = []
    for variant in ("plain", "absorbed", "lean"):
        module = build(variant, **heads)
        x = draw(B, 12, D_IN).requires_grad_()
        out, attention = module(x, slots=draw(B, K, D, seed=2), return_attention=True)
        # the attention may be trained on too
        loss = (out**3).sum() + (attention**2).sum()
        results.append((out, attention, *torch.autograd.grad(loss, [x, *used(module)])))
    same(results[0], results[1])
    same(results[0], results[2])


@pytest.mark.parametrize("gradient", [Unrolled(), Implicit(), Truncated(1), BiLevel()], ids=repr)
def test_the_default_in_few_calls_equals_the_plain_form_with_gradients(gradient: object) -> None:
    results, calls = [], []
    for form in ("auto", "plain"):
        module = build("default", form=form, gradient=gradient)
        step = module._usual_step
        module._usual_step = lambda x, form=form, step=step: calls.append(form) or step(x)
        x = draw(B, N, D_IN).requires_grad_()
        slots = draw(B, K, D, seed=2).requires_grad_()
        out = module(x, slots=slots)
        found = torch.autograd.grad((out**3).sum(), [x, slots, *used(module)], allow_unused=True)
        with torch.no_grad():
            results.append((out.detach(), module(x, slots=slots), *found))
    assert calls == ["auto", "auto"]
    same(results[0], results[1])


@pytest.mark.parametrize("part", ["norm_slots", "gru", "norm_mlp", "mlp", "mlp.0", "mlp.2"])
def test_a_part_put_in_place_of_the_default_is_used(part: str) -> None:
    class Negative(torch.nn.Module):
        def __init__(self, whole: torch.nn.Module) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, *args: Tensor) -> Tensor:
            return -self.whole(*args)

    x, slots = draw(B, N, D_IN), draw(B, K, D, seed=2)
    results = []
    for form in ("auto", "plain"):
        module = build("default", form=form)
        before = module(x, slots=slots)
        module.set_submodule(part, Negative(module.get_submodule(part)))
        results.append(module(x, slots=slots))
    same(results[0], results[1])
    assert (results[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["norm_slots", "gru", "norm_mlp", "mlp", "mlp.1"])
def test_hooks_of_the_parts_are_called_in_every_iteration(part: str) -> None:
    module = build("default")
    seen: list[str] = []
    handle = module.get_submodule(part).register_forward_hook(lambda *_: seen.append("forward"))
    x = draw(B, N, D_IN).requires_grad_()
    module(x)
    assert seen == ["forward"] * 3
    handle.remove()
    module.get_submodule(part).register_full_backward_hook(lambda *_: seen.append("backward"))
    module(x).sum().backward()
    assert seen.count("backward") == 3


@pytest.mark.usefixtures("size")
def test_frozen_inputs_get_no_gradient_and_the_weights_the_same() -> None:
    results = []
    for variant in ("plain", "absorbed", "lean"):
        module = build(variant)
        out = module(draw(B, N, D_IN), slots=draw(B, K, D, seed=2))
        results.append(torch.autograd.grad((out**3).sum(), used(module)))
    same(results[0], results[1])
    same(results[0], results[2])


def test_the_default_chooses_the_form_with_fewer_products() -> None:
    def made(heads: int, n: int) -> bool:
        """Whether keys were made."""
        module, calls = SlotAttention(dim=16, heads=heads, hidden_dim=None), []
        prepare = module.competition.prepare
        object.__setattr__(module.competition, "prepare", lambda *a: calls.append(1) or prepare(*a))
        module(torch.randn(1, n, 16), num_slots=2)
        return bool(calls)

    assert not made(heads=1, n=2500)
    assert made(heads=8, n=2500)
    assert made(heads=1, n=500)


def test_the_notes_form_is_its_equations() -> None:
    torch.manual_seed(0)
    module = SlotAttention.note(dim=D, input_dim=D_IN, inner_dim=8, num_slots=K, iterations=4).double()
    x, s = draw(B, N, D_IN), draw(B, K, D, seed=2)
    gru = module.gru
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    state = s
    for _ in range(4):
        q, k, v = state @ module.q.weight.mT, x @ module.k.weight.mT, x @ module.v.weight.mT
        u = (q @ k.mT).softmax(1) @ v
        i_r, i_z, i_n = (u @ gru.weight_ih.mT + gru.bias_ih).chunk(3, -1)
        h_r, h_z, h_n = (state @ gru.weight_hh.mT + gru.bias_hh).chunk(3, -1)
        z = (i_z + h_z).sigmoid()
        state = z * state + (1 - z) * (i_n + (i_r + h_r).sigmoid() * h_n).tanh()
    same(module(x, slots=s), state)
    assert sorted({name.split(".")[0] for name in module.state_dict()}) == [
        *("gru", "k", "q", "slots_log_sigma", "slots_mu", "v"),
    ]


AGGREGATIONS = {
    "mean": (WeightedMean(), lambda a, v: torch.einsum("bkn,bnd->bkd", (a + 1e-8) / (a + 1e-8).sum(-1, True), v)),
    "savi": (WeightedMean(0.0, 1e-8), lambda a, v: torch.einsum("bkn,bnd->bkd", a / (a.sum(-1, True) + 1e-8), v)),
    "bo-qsa": (WeightedMean(0.0, 1.0), lambda a, v: torch.einsum("bkn,bnd->bkd", a / (a.sum(-1, True) + 1), v)),
    "sum": (Sum(), lambda a, v: torch.einsum("bkn,bnd->bkd", a, v)),
    "scaled": (ScaledSum(), lambda a, v: torch.einsum("bkn,bnd->bkd", a / N, v)),
    "learned": (LearnedSum(), lambda a, v: torch.einsum("bkn,bnd->bkd", a / N, v)),
    "normalised": (NormalisedSum(), lambda a, v: F.layer_norm(torch.einsum("bkn,bnd->bkd", a, v), (D,), eps=1e-6)),
}


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("form", ["plain", "absorbed"])
def test_updates_are_what_the_aggregation_says(name: str, form: str) -> None:
    aggregation, formula = AGGREGATIONS[name]
    module = SlotAttention(**SIZES, aggregation=aggregation, form=form).double()
    updates: list[Tensor] = []
    module.gru.register_forward_pre_hook(lambda _, args: updates.append(args[0]))
    x = draw(B, N, D_IN)
    with record() as seen:
        module(x, iterations=2)
    for a, u in zip(seen["attention"], updates, strict=True):
        same(u.view(B, K, D), formula(a[:, 0], module.v(module.norm_inputs(x))))


def test_batch_normalised_updates_have_the_moments_of_a_normal() -> None:
    module = SlotAttention(**SIZES, aggregation=BatchNormalisedSum()).double().train()
    updates: list[Tensor] = []
    module.gru.register_forward_pre_hook(lambda _, args: updates.append(args[0]))
    module(50 * draw(B, N, D_IN), iterations=1)
    same(updates[0].mean(0), torch.zeros(D, dtype=torch.float64))
    # the norm's own eps of 1e-5 is small beside a variance of this size
    same(updates[0].var(0, unbiased=False), torch.ones(D, dtype=torch.float64), 1e-2)


def contracting() -> tuple[SlotAttention, Tensor]:
    """A module whose iteration has a fixed point, and that after many of them."""
    module = build("default", gradient=Implicit(steps=60), iterations=150)
    with torch.no_grad():
        for parameter in (module.q.weight, module.gru.weight_hh, module.mlp[2].weight):
            parameter.mul_(0.3)
    return module, draw(1, K, D, seed=2)


def test_the_implicit_gradient_is_that_of_a_dense_solve() -> None:
    module, start = contracting()
    x = draw(1, N, D_IN).requires_grad_()
    star = module(x, slots=start)
    again = module(x, slots=star.detach(), iterations=1)
    same(again, star, 1e-12)  # a fixed point
    cotangent = draw(1, K, D, seed=5)
    got = torch.autograd.grad((star * cotangent).sum(), [x, module.v.weight])

    once = build("default", gradient=Unrolled(), iterations=1)
    once.load_state_dict(module.state_dict())
    jacobian = torch.autograd.functional.jacobian(lambda s: once(x.detach(), slots=s), star.detach()).reshape(
        K * D, K * D
    )
    left = torch.linalg.solve((torch.eye(K * D, dtype=x.dtype) - jacobian).mT, cotangent.flatten())
    step = once(x, slots=star.detach())
    expected = torch.autograd.grad(step, [x, once.v.weight], left.view_as(step))
    same(got, expected, 1e-9)


def test_memory_of_the_implicit_gradient_does_not_grow_with_the_iterations() -> None:
    sizes = []
    for iterations in (3, 9):
        module, kept = build("implicit", form="plain"), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            module(draw(B, N, D_IN), iterations=iterations)
        sizes.append(sum(kept))
    assert sizes[0] == sizes[1]


def test_gradient_modes_are_their_equations() -> None:
    x, s = draw(B, N, D_IN), draw(B, K, D, seed=2)

    def gradients(gradient: object, by_hand: object) -> tuple[Tensor, Tensor]:
        module = build("default", gradient=gradient)
        once = build("default", iterations=1)
        results = []
        for run in (lambda s: module(x, slots=s), lambda s: by_hand(lambda s: once(x, slots=s), s)):
            start = s.clone().requires_grad_()
            out = run(start)
            weight = (module if not results else once).q.weight
            results.append((out, *torch.autograd.grad(out.square().sum(), [weight, start], allow_unused=True)))
        same(results[0], results[1])
        return results[0]

    gradients(Unrolled(), lambda f, s: f(f(f(s))))
    gradients(Truncated(3), lambda f, s: f(f(f(s))))
    assert gradients(Truncated(2), lambda f, s: f(f(f(s).detach())))[2] is None
    assert gradients(Implicit(), lambda f, s: f(f(f(f(s))).detach()))[2] is None
    assert gradients(BiLevel(), lambda f, s: f(f(f(s)).detach() + s - s.detach()))[2] is not None


def test_a_plan_has_its_marginals() -> None:
    cost, alpha, beta = draw(B, K, N).exp(), draw(B, N, seed=2).log_softmax(-1), draw(B, K, seed=3).log_softmax(-1)
    plan, _ = sinkhorn(cost, alpha, beta, 500, torch.zeros_like(beta))
    same(plan.sum(1), alpha.exp())
    same(plan.sum(2), beta.exp())


def test_mesh_has_less_entropy_than_sinkhorn() -> None:
    def entropy(variant: str) -> float:
        module = build(variant)
        _, plan = module(draw(B, N, D_IN), slots=draw(B, K, D, seed=2), iterations=1, return_attention=True)
        return float(torch.special.entr(plan).sum().detach())

    assert entropy("mesh") < 0.8 * entropy("sinkhorn")


def test_gumbel_noise_is_drawn_in_training_only_and_has_its_law() -> None:
    module = build("default", competition=GumbelSoftmax(temperature=0.5))
    x, s = draw(B, N, D_IN), draw(B, K, D, seed=2)
    same(module(x, slots=s), build("default", competition=SlotSoftmax(temperature=0.5))(x, slots=s))
    module.train()
    with torch.no_grad():
        module.q.weight.zero_()
    torch.manual_seed(0)
    _, attention = module(draw(40, 50, D_IN), num_slots=4, return_attention=True)
    # equal logits: each of 4 slots wins a quarter of 2,000 inputs, with a deviation of 0.01
    wins = F.one_hot(attention.argmax(1), 4).double().mean((0, 1))
    same(wins, torch.full_like(wins, 0.25), 0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", ["plain", "absorbed", "lean", "lean heads", "joint", "sinkhorn", "mesh", "savi"])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_close_and_a_dead_slot_no_nan(variant: str, dtype: torch.dtype, autocast: bool) -> None:
    module, s = build(variant).float(), draw(B, K, D, seed=2).float()
    x = draw(B, N, D_IN).float()
    with torch.no_grad():
        expected = module(x, slots=s)
        if autocast:
            with torch.autocast("cpu", dtype=dtype):
                out = module(x, slots=s)
        else:
            out = module.to(dtype)(x.to(dtype), slots=s.to(dtype))
    error = float((out.float() - expected).abs().max() / expected.abs().max())
    # relative to the largest entry; MESH's descent along a slope of unit length magnifies rounding
    assert error < (0.1 if variant == "mesh" else 1e-2)

    # queries so large that the softmax is hard: slots that win nothing are dead
    with torch.no_grad():
        module.q.weight.mul_(100)
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=autocast), record() as seen:
        out = module(x, slots=s if autocast else s.to(dtype))
    out.float().square().mean().backward()
    if module.competition.local:
        assert min(float(a.detach().sum(-1).min()) for a in seen["attention"]) < 1e-8
    assert out.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ten_thousand_steps_with_a_dead_slot_give_no_nan(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = SlotAttention(dim=8, input_dim=6, num_slots=3, hidden_dim=8, iterations=2)
    head = torch.nn.Linear(8, 6)
    parameters = [*module.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-3)
    least = 1.0
    for step in range(10_000):
        x = torch.randn(2, 9, 6)
        if step % 100 == 0:
            with torch.no_grad(), record() as seen:
                # queries so large that the softmax is hard
                module.q.weight.mul_(500 / module.q.weight.norm())
                module(x)
            least = min(least, *(float(a.sum(-1).min()) for a in seen["attention"]))
        with torch.autocast("cpu", dtype=dtype):
            loss = (head(module(x)).mean(1) - x.mean(1)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimiser.step()
        assert loss.isfinite()
    # a slot that won less than fp16 can hold beside its eps
    assert least < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "absorbed"])
def test_compiles_whole_and_once_for_any_number_of_inputs_and_slots(variant: str) -> None:
    torch._dynamo.reset()
    module, graphs = build(variant, init=UnitGaussian(), iterations=2), []
    first = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for n, k in ((N, K), (N + 4, K + 2), (N + 9, K - 1)):
        x, s = draw(B, n, D_IN), draw(B, k, D, seed=2)
        same(compiled(x, slots=s), module(x, slots=s))
        first = first or len(graphs)
    # the first call may compile twice, when it finds scalars that it can make tensors of
    assert len(graphs) == first


@pytest.mark.parametrize("variant", ["plain", "absorbed", "sinkhorn"])
def test_exports_with_any_batch_and_number_of_inputs(variant: str) -> None:
    module = build(variant, init=LearnedQueries())
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2)
    program = torch.export.export(module, (draw(B, N, D_IN),), dynamic_shapes=({0: batch, 1: length},))
    x = draw(B + 1, N + 5, D_IN)
    same(program.module()(x), module(x))


# torch maps its fused recurrent cell row by row, and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.usefixtures("size")
@pytest.mark.parametrize("variant", ["plain", "absorbed", "lean", "heads", "sinkhorn", "mesh", "bi-level"])
def test_functional_transforms_see_through_it(variant: str) -> None:
    module = build(variant)
    xs, s = draw(3, B, N, D_IN), draw(B, K, D, seed=2)
    batched = torch.func.vmap(lambda x: module(x, slots=s))(xs)
    same(batched, torch.stack([module(x, slots=s) for x in xs]))
    x = xs[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(x, slots=s).square().sum(), x)
    same(torch.func.grad(lambda x: module(x, slots=s).square().sum())(xs[0]), expected)


def test_initial_weights_are_the_references() -> None:
    torch.manual_seed(0)
    module = SlotAttention(dim=64, hidden_dim=128, input_dim=32)
    bounds = {"slots_mu": 1 + 64, "slots_log_sigma": 1 + 64, "q.weight": 128, "k.weight": 96, "v.weight": 96}
    bounds |= {"gru.weight_ih": 64 * 4, "mlp.0.weight": 192, "mlp.2.weight": 192}
    for name, fans in bounds.items():
        bound, largest = (6 / fans) ** 0.5, float(module.get_parameter(name).detach().abs().max())
        # of 64 or more uniform draws one comes near the bound
        assert 0.9 * bound < largest <= bound, name
    same(module.gru.weight_hh.mT @ module.gru.weight_hh, 1.0 * torch.eye(64), 1e-5)
    for name in ("gru.bias_ih", "gru.bias_hh", "mlp.0.bias", "mlp.2.bias"):
        assert not module.get_parameter(name).any()
    assert {module.norm_inputs.eps, module.norm_slots.eps, module.norm_mlp.eps} == {1e-3}


def test_slots_are_drawn_in_evaluation_too_and_differ() -> None:
    module = SlotAttention(**SIZES).eval()
    x = torch.randn(B, N, D_IN)
    assert not torch.equal(module(x), module(x))
    assert module(x, num_slots=9).shape == (B, 9, D)
    assert module.no_decay() == {"slots_mu", "slots_log_sigma"}


def test_starts_are_their_equations() -> None:
    noise = draw(B, K, D)
    module = build("default", init=SharedGaussian())
    same(module.initial_slots(B, noise=noise), module.slots_mu + module.slots_log_sigma.exp() * noise)
    module = build("queries")
    same(module.initial_slots(B, noise=noise), module.slots_queries * (1 + 0.3 * noise.float().double()), 1e-6)
    module = build("background")
    start = module.initial_slots(B, noise=noise)
    same(start[:, 0], module.slots_background[0].expand(B, D))
    same(start[:, 1:], module.slots_queries.expand(B, K - 1, D))
    same(build("unit").initial_slots(B, noise=noise), noise)


def test_the_lean_form_makes_the_attention_only_when_watched() -> None:
    module, calls = build("lean"), []
    whole = module._map
    module._map = lambda *args: calls.append(1) or whole(*args)
    module(draw(B, N, D_IN))
    assert not calls
    with record() as seen:
        module(draw(B, N, D_IN))
    assert len(calls) == len(seen["attention"]) == len(seen["slots"]) == 3


def test_there_are_at_most_fifteen_arguments() -> None:
    assert len(inspect.signature(SlotAttention).parameters) <= 15


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(x[..., :3]), r"inputs of shape \(2, 13, 3\), expected \(batch, inputs, 10\)"),
        (lambda m, x: m(x[:, :0]), r"inputs of shape \(2, 0, 10\)"),
        (lambda m, x: m(x, mask=torch.ones(B, N)), r"mask of dtype torch.float32"),
        (lambda m, x: m(x, mask=torch.ones(B, N + 1, dtype=torch.bool)), r"shape \(2, 14\)"),
        (lambda m, x: m(x, mask=torch.tensor([True, False])[:, None].expand(B, N)), "1 of 2 rows without a real input"),
        (lambda m, x: m(x, slot_mask=torch.ones(B, K + 1, dtype=torch.bool)), r"slot got a mask .* \(2, 6\)"),
        (lambda m, x: m(x, slots=torch.zeros(B, K, D + 1)), r"slots of shape \(2, 5, 13\), expected \(2, slots, 12\)"),
        (lambda m, x: m(x, slots=torch.zeros(B, K, D), num_slots=4), "num_slots=4 slots"),
        (lambda m, x: m(x, num_slots=0), "num_slots=0"),
        (lambda m, x: m(x, iterations=0), "iterations=0"),
        (lambda m, x: SlotAttention(dim=D, heads=5), "heads must divide it"),
        (lambda m, x: SlotAttention(dim=D, num_slots=0), "num_slots=0"),
        (lambda m, x: SlotAttention(dim=D, form="fast"), "form='fast', expected one of auto, plain, absorbed"),
        (lambda m, x: SlotAttention(dim=D, memory="lean", competition=Sinkhorn()), "needs keys and values"),
        (lambda m, x: SlotAttention(dim=D, form="absorbed", competition=GumbelSoftmax()), "needs keys and values"),
        (lambda m, x: SlotAttention(dim=D, form="plain", memory="lean"), "memory='lean'"),
        (lambda m, x: SlotAttention(dim=D, heads=2, competition=Mesh()), "Mesh makes one plan, got heads=2"),
        (lambda m, x: SlotSoftmax(temperature=0.0), "SlotSoftmax got temperature=0.0"),
        (lambda m, x: Implicit(steps=0), "Implicit got steps=0"),
        (lambda m, x: build("queries")(x.double(), num_slots=K + 1), "queries for 5 slots, got num_slots=6"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call(SlotAttention(**SIZES), torch.randn(B, N, D_IN))
    assert "\n" not in str(caught.value)
