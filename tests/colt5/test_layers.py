from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo import record
from tevo.colt5 import Budget, Router, StraightThrough, layers
from tevo.colt5.layers import (
    KV_SCORES,
    ConditionalAttention,
    ConditionalFeedForward,
    ConditionalLayer,
    GatedFeedForward,
    LocalAttention,
    NormedTurn,
    RelativeBias,
    RoutedAttention,
    add_at,
    by_document,
    norm_and_scores,
    take,
)
from tevo.norms.rms_norm import RMSNorm
from tevo.positions.rope import RoPE, rotate
from tevo.testing.subject import disturb

GOLDEN = Path(__file__).parents[1] / "golden" / "colt5"
B, N, D, E = 2, 23, 12, 3


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as file:
        return {key: torch.tensor(file[key]) for key in file.files}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def router(fraction: float = 0.25, dim: int = D, **options: object) -> Router:
    return Router(dim=dim, budget=Budget(fraction), **options)  # type: ignore[arg-type]


def attention(
    dim: int = D, heads: tuple[int, int] = (1, 3), radius: int = 4, **options: object
) -> ConditionalAttention:
    light, heavy = (RelativeBias(heads=h, buckets=8, max_distance=9) for h in heads)
    made = {
        "dim": dim,
        "light_heads": heads[0],
        "heavy_heads": heads[1],
        "head_dim": E,
        "radius": radius,
        "q_router": router(dim=dim),
        "kv_router": router(0.5, dim=dim),
        "light_bias": light,
        "heavy_bias": heavy,
    }
    return ConditionalAttention(**(made | options))  # type: ignore[arg-type]


def feed_forward(dim: int = D, **options: object) -> ConditionalFeedForward:
    return ConditionalFeedForward(
        **({"dim": dim, "light_dim": 5, "heavy_dim": 17, "router": router(dim=dim)} | options)
    )  # type: ignore[arg-type]


def layer(dim: int = D, dtype: torch.dtype = torch.float64, **options: object) -> ConditionalLayer:
    torch.manual_seed(0)
    made = ConditionalLayer(dim=dim, attention=attention(dim), feed_forward=feed_forward(dim), **options)  # type: ignore[arg-type]
    made = made.to(torch.float64)
    disturb(made)
    return made.to(dtype).eval()


def fixed(m: int, u: Tensor) -> Router:
    made = Router(dim=len(u), budget=Budget(1.0, at_most=m))
    assert made.weight is not None
    made.weight.data = u
    return made


def set_weight(linear: nn.Linear, *parts: Tensor) -> None:
    linear.weight.data = torch.cat([part.mT for part in parts])


def golden_attention(a: dict[str, Tensor], *, bias: bool = True, kv_scores: str = "inputs") -> ConditionalAttention:
    light, heavy = (RelativeBias(heads=int(a[f"heads_{name}"])) for name in ("light", "heavy"))
    light.table.data, heavy.table.data = a["bias_light"].mT, a["bias_heavy"].mT
    made = ConditionalAttention(
        dim=16,
        light_heads=1,
        heavy_heads=3,
        head_dim=int(a["head_dim"]),
        radius=int(a["radius"]),
        q_router=fixed(int(a["q"]), a["u_q"]),
        kv_router=fixed(int(a["v"]), a["u_kv"]),
        light_bias=light,
        heavy_bias=heavy if bias else None,
        kv_scores=kv_scores,
    )
    set_weight(made.light.qkv, *(a[f"attn_light_{name}"] for name in "qkv"))
    set_weight(made.light.out, a["attn_light_o"])
    set_weight(made.heavy.q, a["attn_heavy_q"])
    set_weight(made.heavy.kv, a["attn_heavy_k"], a["attn_heavy_v"])
    set_weight(made.heavy.out, a["attn_heavy_o"])
    return made.double().eval()


def close(ours: Tensor, theirs: Tensor, most: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=most)


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        ("heavy_bias", {}),
        ("heavy_nobias", {"bias": False}),
        ("heavy_bias_vonly", {"kv_scores": "values"}),
    ],
)
def test_attention_equals_the_transcription_of_the_paper(wanted: str, options: dict[str, object]) -> None:
    a = golden("colt5_layers_a.npz")
    module, mask = golden_attention(a, **options), a["mask"]  # type: ignore[arg-type]
    keep = mask[..., None]
    close(module.light(a["x"], mask=mask) * keep, a["out_light"] * keep, 1e-12)
    y = module(a["x"], mask=mask)
    close(y * keep, (a["out_light"] + a[f"out_{wanted}"]) * keep, 1e-12)
    if not options:
        close(y * keep, a["out_attn_y"] * keep, 1e-12)


def test_the_feed_forward_equals_the_transcription_of_the_paper_and_differences_of_its_router() -> None:
    a = golden("colt5_layers_a.npz")
    module = ConditionalFeedForward(dim=16, light_dim=10, heavy_dim=40, router=fixed(int(a["m"]), a["u_ff"]))
    for name, branch in (("light", module.light), ("heavy", module.heavy)):
        set_weight(branch.into, a[f"ff_{name}_wi0"], a[f"ff_{name}_wi1"])
        set_weight(branch.out, a[f"ff_{name}_wo"])
    module = module.double().eval()
    y = module(a["x"], mask=a["mask"])
    keep = a["mask"][..., None]
    close(y * keep, a["out_ff_y"] * keep, 1e-12)
    assert module.router.weight is not None
    (gradient,) = torch.autograd.grad((y * a["g"]).sum(), module.router.weight)
    # central differences of step 1e-6
    torch.testing.assert_close(gradient, a["grad_u_ff_fd"], rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))


def test_parts_equal_t5s() -> None:
    a = golden("t5_longt5_a.npz")
    x, mask = a["x"], a["mask"].bool()
    norm = RMSNorm(dim=24)
    norm.weight.data = a["rmsnorm__w__weight"]
    close(norm(x), a["rmsnorm__y"], 2e-6)
    ff = GatedFeedForward(dim=24, hidden_dim=40)
    ff.into.weight.data = torch.cat([a[f"gated_ffn__w__wi_{i}.weight"] for i in range(2)])
    ff.out.weight.data = a["gated_ffn__w__wo.weight"]
    # relative to the size of the outputs, as its README states; the package computes softmax and norms in float32
    close(ff(x), a["gated_ffn__y"], 2e-5 * float(a["gated_ffn__y"].abs().max()))
    for name, radius in (("local_attn", int(a["longt5__local_radius"])), ("enc_attn", 60)):
        bias = RelativeBias(heads=3)
        bias.table.data = a[f"{name}__w__relative_attention_bias.weight"].mT
        module = LocalAttention(dim=24, heads=3, head_dim=8, radius=radius, bias=bias)
        module.qkv.weight.data = torch.cat([a[f"{name}__w__{p}.weight"] for p in "qkv"])
        module.out.weight.data = a[f"{name}__w__o.weight"]
        y = module(x, mask=mask)[mask]
        scale = 2e-5 * float(a[f"{name}__y"].abs().max())
        close(y, a[f"{name}__y"][mask], scale)
        if name == "local_attn":
            close(module(x), a["local_attn__y_nomask"], scale)
            exact = module.double()(x.double(), mask=mask)[mask].detach()
            close(exact, a["local_attn__y_oracle64"][mask], 1e-12 * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (16, 64), (32, 20)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_t5s(bidirectional: bool, buckets: int, max_distance: int) -> None:
    a = golden("t5_longt5_a.npz")
    offset = a["bucket__rel"]
    bias = RelativeBias(heads=2, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    bias.table.data = torch.arange(2.0 * buckets).view(2, buckets)
    found = bias(torch.full((1, 1), 500), 500 + offset[None])[0, :, 0]
    wanted = a[f"bucket__bidir{int(bidirectional)}_nb{buckets}_md{max_distance}"]
    assert torch.equal(found, torch.stack([wanted, wanted + buckets]).float())
    radius = int(offset.abs().max())
    assert torch.equal(bias.by_offset(radius)[:, offset + radius], found)


def dense_heavy(module: ConditionalAttention, x: Tensor, mask: Tensor) -> Tensor:
    """The heavy branch over all tokens, with weights that are zero for most, one head at a time."""
    wq, wkv, chosen = [], [], []
    for r, out in ((module.q_router, wq), (module.kv_router, wkv)):
        routed = r(x, mask=mask)
        w = x.new_zeros(x.shape[:2]).scatter_add(1, routed.indices, routed.weights)
        # slots without a token repeat another's index
        seen = torch.zeros(mask.shape).scatter_add(1, routed.indices, routed.mask.float()) > 0
        out.append(w)
        chosen.append(seen)
    heavy, parts = module.heavy, []
    keys = x * wkv[0][..., None]
    at = torch.arange(x.shape[1])[None]
    assert heavy.bias is not None
    for h, (q, k, v) in enumerate(
        zip(heavy.q.weight.chunk(heavy.heads), *(w.chunk(heavy.heads) for w in heavy.kv.weight.chunk(2)), strict=True)
    ):
        s = (x @ q.mT) @ (keys @ k.mT).mT + heavy.bias(at, at)[:, h]
        s = s.masked_fill(~chosen[1][:, None], -torch.inf)
        parts.append(s.softmax(-1) @ (keys @ v.mT))
    return heavy.out(torch.cat(parts, -1)) * wq[0][..., None]


def test_routing_equals_the_dense_form_with_weights_of_zero_gradients_too() -> None:
    torch.manual_seed(0)
    module = attention().double()
    disturb(module)
    module.train()  # more tokens than the weights sum to
    x, mask = randn(B, N, D).requires_grad_(), torch.arange(N).expand(B, N) < torch.tensor([[N], [N - 6]])
    keep = mask[..., None]
    ours = module(x, mask=mask) * keep
    theirs = (module.light(x, mask=mask) + dense_heavy(module, x * keep, mask)) * keep
    close(ours, theirs, 1e-12)
    leaves, dy = [x, *module.parameters()], randn(B, N, D, seed=5)
    for got, want in zip(*(torch.autograd.grad(y, leaves, dy) for y in (ours, theirs)), strict=True):
        close(got, want, 1e-11)
        assert bool((got != 0).any())


def test_the_layer_is_pre_norm_with_residuals() -> None:
    module, x = layer(), randn(B, N, D)
    y = x + module.attention(module.attention_norm(x))
    y = y + module.feed_forward(module.feed_forward_norm(y))
    close(module(x), y, 1e-13)


def test_scores_beside_the_norm_are_the_routers() -> None:
    norm, x = RMSNorm(dim=D).double(), randn(B, N, D)
    routers = (router().double(), router(routing="static").double(), router().double())
    y, scores = norm_and_scores(norm, x, routers)
    close(y, norm(x), 0)
    for r, s in zip(routers, scores, strict=True):
        close(s, r.score(y), 1e-14)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 5), (7, 0), (3, 40)])
def test_padding_of_any_side_and_amount_changes_nothing(before: int, after: int, train: bool) -> None:
    x = randn(B, N, D, dtype=torch.float32)
    module = layer(dtype=torch.float32).train(train)
    with record() as plain:
        y = module(x)
    n = before + N + after
    padded = torch.full((B, n, D), torch.nan)
    padded[:, before : before + N] = x
    mask = torch.zeros(B, n, dtype=torch.bool)
    mask[:, before : before + N] = True
    with record() as seen:
        z = module(padded, mask=mask)
    # the figure that is asked for; float32 at outputs of size one
    close(z[:, before : before + N], y, 1e-5)
    assert not z[~mask].any()
    for ours, theirs, weights in zip(seen["routed"], plain["routed"], plain["routing_weights"], strict=True):
        assert torch.equal(ours[:, : theirs.shape[1]] - before, theirs)
        assert bool((weights > 0).all())
    for ours, theirs in zip(seen["routing_weights"], plain["routing_weights"], strict=True):
        close(ours[:, : theirs.shape[1]], theirs, 1e-5)
    z.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


def test_other_rows_of_a_batch_change_nothing() -> None:
    module, lengths = layer(dtype=torch.float32), (N, 5, 1, 17)
    rows = [randn(1, n, D, seed=n, dtype=torch.float32) for n in lengths]
    x = torch.cat([F.pad(row, (0, 0, 0, N - row.shape[1])) for row in rows])
    mask = torch.arange(N) < torch.tensor(lengths)[:, None]
    with record() as together:
        y = module(x, mask=mask)
    for i, row in enumerate(rows):
        with record() as alone:
            close(module(row)[0], y[i, : lengths[i]], 1e-5)
        for ours, theirs in zip(together["routed"], alone["routed"], strict=True):
            assert torch.equal(ours[i, : theirs.shape[1]], theirs[0])


def test_heavy_attention_counts_distance_in_given_positions() -> None:
    torch.manual_seed(0)
    module, x = attention().double().eval(), randn(B, N, D)
    disturb(module)
    at = torch.arange(N)[None] * 3
    close(module(x, positions=at + 100), module(x, positions=at), 1e-13)
    assert float((module(x, positions=at) - module(x)).detach().abs().max()) > 1e-3
    close(module(x, positions=torch.arange(N).expand(B, N)), module(x), 0)


def test_forced_tokens_take_the_heavy_branch_and_forbidden_ones_never_do() -> None:
    module, x = layer(), randn(B, N, D)
    forced, forbidden = torch.zeros(2, B, N, dtype=torch.bool)
    forced[:, [4, 9]], forbidden[:, 12:] = True, True
    with record() as seen:
        module(x, forced=forced, forbidden=forbidden)
    assert len(seen["routed"]) == 3
    for indices in seen["routed"]:
        assert all({4, 9} <= set(row) and max(row) < 12 for row in indices.tolist())


def test_one_router_for_queries_and_keys_routes_once() -> None:
    shared = router()
    module = attention(q_router=shared, kv_router=shared).double()
    with record() as seen:
        module(randn(B, N, D))
    assert len(seen["routed"]) == 1


def test_all_tokens_routed_with_weight_one_is_the_sum_of_both_branches() -> None:
    # k = n routes all tokens with weight 1
    module, x = feed_forward(router=router(1.0)).double(), randn(B, N, D)
    close(module(x), module.light(x) + module.heavy(x), 1e-13)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    module = ConditionalLayer(
        dim=4,
        attention=attention(4, (1, 1), radius=2),
        feed_forward=ConditionalFeedForward(dim=4, light_dim=2, heavy_dim=3, router=router(dim=4)),
    ).double()
    disturb(module)
    module.eval()
    names = [name for name, _ in module.named_parameters()]

    def f(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    values = [p.detach().requires_grad_() for p in module.parameters()]
    # projections of the Jacobian, drawn at random, in place of all of its entries
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(f, (randn(1, 9, 4).requires_grad_(), *values), fast_mode=True)


def test_a_row_of_padding_alone_and_no_tokens_at_all_are_harmless() -> None:
    module, x = layer(), randn(B, N, D)
    x[1] = torch.nan
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1] = False
    y = module(x, mask=mask)
    assert not y[1].any()
    y.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
    for shape in ((2, 0, D), (0, 5, D)):
        assert module(torch.zeros(shape, dtype=torch.float64)).shape == shape
    assert module(randn(B, 1, D)).shape == (B, 1, D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_routes_as_float32_does_with_its_numbers(dtype: torch.dtype) -> None:
    x = randn(B, N, D, dtype=dtype)
    narrow, wide = layer(dtype=dtype), layer(dtype=dtype).float()
    y = narrow(x)
    assert y.dtype == dtype
    # a dozen roundings of numbers of size ten; routed tokens may differ in later sublayers where scores nearly tie
    close(narrow.attention(x).float(), wide.attention(x.float()), 120 * torch.finfo(dtype).eps)


def test_dropout_is_for_training_alone() -> None:
    made = ConditionalLayer(dim=D, attention=attention(), feed_forward=feed_forward(dropout=0.5), dropout=0.5).double()
    x = randn(B, N, D)
    torch.manual_seed(1)
    assert not torch.equal(made.train()(x), made(x))
    assert torch.equal(made.eval()(x), made(x))


def test_fresh_weights_have_t5s_spread() -> None:
    torch.manual_seed(0)
    module = LocalAttention(dim=200, heads=10, head_dim=20, bias=None)
    q, k, v = module.qkv.weight.chunk(3)
    for weight, std in ((q, (200 * 20) ** -0.5), (k, 200**-0.5), (v, 200**-0.5), (module.out.weight, 200**-0.5)):
        # 40 000 draws
        assert abs(float(weight.detach().std()) / std - 1) < 0.02
    ff = GatedFeedForward(dim=200, hidden_dim=300)
    assert abs(float(ff.into.weight.detach().std()) / 200**-0.5 - 1) < 0.02
    assert abs(float(ff.out.weight.detach().std()) / 300**-0.5 - 1) < 0.02


def test_take_and_add_at_are_each_others_transpose() -> None:
    x, z, indices = randn(B, N, D), randn(B, 4, D, seed=1), torch.tensor([[1, 2, 2, 7], [0, 3, 9, 22]])
    wanted = x.clone()
    for b, c in itertools.product(range(B), range(4)):
        assert torch.equal(take(x, indices)[b, c], x[b, indices[b, c]])
        wanted[b, indices[b, c]] += z[b, c]
    close(add_at(x, indices, z), wanted, 1e-15)


def test_compiles_to_one_graph_with_the_same_gradients() -> None:
    module, x = layer(), randn(B, N, D).requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    leaves, dy = [x, *module.parameters()], randn(B, N, D, seed=5)
    ours, theirs = compiled(x), module(x)
    close(ours, theirs, 1e-12)
    for got, want in zip(*(torch.autograd.grad(y, leaves, dy) for y in (ours, theirs)), strict=True):
        close(got, want, 1e-11)
    torch.compiler.reset()


def test_routing_by_name_and_of_ones_own_reach_the_layers() -> None:
    x = randn(B, N, D)
    for routing in ("static", "random", "sigmoid", "straight_through", StraightThrough()):
        module = feed_forward(router=router(routing=routing)).double().eval()
        assert bool(module(x).isfinite().all())
    for name in KV_SCORES:
        assert bool(attention(kv_scores=name).double()(x).isfinite().all())


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: RelativeBias(heads=2, buckets=2), "needs >= 2 buckets a side"),
        (lambda: LocalAttention(dim=4, heads=0, bias=None), "heads=0"),
        (lambda: LocalAttention(dim=4, heads=2, radius=0, bias=None), "radius=0"),
        (lambda: LocalAttention(dim=4, heads=2, bias=RelativeBias(heads=3)), "a bias for 3 heads and heads=2"),
        (lambda: LocalAttention(dim=4, heads=4, bias=None, kv_heads=3), "kv_heads=3, expected a divisor of heads=4"),
        (lambda: by_document(lambda x, mask: x, randn(B, N, D), torch.zeros(B, 3)), "expected whole numbers of shape"),
        (lambda: RoutedAttention(dim=4, heads=2, bias=None, kv_scores="keys"), "expected one of inputs, values, none"),
        (lambda: layer()(randn(B, N, D), mask=torch.ones(B, 3, dtype=torch.bool)), "expected torch.bool of shape"),
        (lambda: feed_forward().double()(randn(B, N, D), scores=randn(B, 3)), "one for each token"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()  # type: ignore[operator]


def test_without_a_graph_routed_attention_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = attention().double().eval(), randn(B, N, D)
    mask = torch.arange(N).expand(B, N) < torch.tensor([[N], [N - 6]])
    whole = module(x, mask=mask)
    # one query at a time, and a few
    for numbers in (1, 200):
        monkeypatch.setattr(layers, "PIECE", numbers)
        with torch.no_grad():
            close(module(x, mask=mask), whole.detach(), 1e-13)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_without_a_graph_the_layer_is_the_same_and_writes_into_nothing_it_was_given(train: bool, padded: bool) -> None:
    module, x = layer(dropout=0.1).train(train), randn(B, N, D)
    mask = torch.arange(N) < torch.tensor([[N], [N - 6]]) if padded else None
    before = x.clone()
    torch.manual_seed(1)
    wanted = module(x, mask=mask).detach()
    torch.manual_seed(1)
    with torch.no_grad():
        close(module(x, mask=mask), wanted, 1e-12)
        assert torch.equal(x, before)
        # rows that are not beside each other
        torch.manual_seed(1)
        close(module(x.mT.contiguous().mT, mask=mask), wanted, 1e-12)


@pytest.mark.parametrize(
    "name", ["attention", "attention.light", "attention.light.out", "feed_forward", "feed_forward.light.out"]
)
def test_what_a_hook_sees_is_not_written_over(name: str) -> None:
    module, x, seen = layer(), randn(B, N, D), []
    wanted = module(x).detach()
    part = module.get_submodule(name)
    part.register_forward_hook(lambda module, inputs, output: seen.extend((output, output.clone())))
    with torch.no_grad():
        close(module(x), wanted, 1e-12)
    assert torch.equal(*seen)


def test_a_branch_that_returns_its_input_is_not_written_over() -> None:
    module, x = feed_forward().double().eval(), randn(B, N, D)
    module.light = nn.Identity()  # type: ignore[assignment]
    before = x.clone()
    with torch.no_grad():
        close(module(x, onto=x), x + module(x), 1e-14)
    assert torch.equal(x, before)


def test_what_a_branch_is_added_to_is_written_into_only_without_a_graph() -> None:
    module, x = feed_forward().double().eval(), randn(B, N, D)
    for grad in (True, False):
        onto = randn(B, N, D, seed=1)
        before = onto.clone()
        with torch.set_grad_enabled(grad):
            y = module(x, onto=onto)
        close(y, before + module(x), 1e-13)
        assert torch.equal(onto, before) == grad


def test_autocast_without_a_graph_is_as_with_one() -> None:
    module, x = layer(dtype=torch.float32), randn(B, N, D, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = module(x).detach()
        with torch.no_grad():
            # a few roundings of bfloat16 at outputs of size one
            close(module(x), wanted, 5e-2)


def test_rows_that_are_no_power_of_two_apart_hold_the_same_numbers() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(D, 256, bias=False).double(), randn(B, N, D)
    with torch.no_grad():
        y = layers.spaced(linear, x)
        assert y.stride(1) == 272
        close(y, linear(x), 1e-14)
    assert layers.spaced(linear, x).requires_grad


def modern(**options: object) -> ConditionalAttention:
    """Rotary positions and normalised queries and keys in both branches, fewer heads of keys, no table of distance."""
    made = {"heads": (2, 4), "light_bias": None, "heavy_bias": None, "head_dim": 4}
    turns = {
        "light_turn": NormedTurn(head_dim=4, then=RoPE(base=50.0)),
        "heavy_turn": NormedTurn(head_dim=4, then=RoPE(base=50.0)),
    }
    torch.manual_seed(0)
    module = attention(**(made | turns | {"light_kv_heads": 1, "heavy_kv_heads": 2} | options)).double()  # type: ignore[arg-type]
    disturb(module)
    return module.eval()


def test_rotary_positions_normalised_scores_and_grouped_keys_equal_loops_over_heads() -> None:
    module, x = modern(), randn(1, N, D)
    at = 3 * torch.arange(N)[None] + 5
    with record() as seen:
        y = module(x, positions=at)
    q_in, kv_in = seen["routed"]
    w_q, w_kv = seen["routing_weights"]
    light, heavy = module.light, module.heavy
    keys = take(x, kv_in) * w_kv[..., None]
    near = (torch.arange(N)[:, None] - torch.arange(N)).abs() <= 4
    wanted = []
    for branch, weights, q_x, k_x, q_at, k_at, groups, seen_by in (
        (light, light.qkv.weight.split([8, 4, 4]), x, x, at, at, 1, near),
        (
            heavy,
            (heavy.q.weight, *heavy.kv.weight.chunk(2)),
            take(x, q_in),
            keys,
            at[:, q_in[0]],
            at[:, kv_in[0]],
            2,
            None,
        ),
    ):
        heads = []
        for h in range(branch.heads):
            g = h * groups // branch.heads
            q, k, v = (z @ w[4 * i : 4 * i + 4].mT for z, w, i in zip((q_x, k_x, k_x), weights, (h, g, g), strict=True))
            q, k = (
                z / (z.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
                for z, norm in ((q, branch.turn.q_norm), (k, branch.turn.k_norm))
            )
            q, k = (rotate(z[:, None], a, 50.0)[:, 0] for z, a in ((q, q_at), (k, k_at)))
            s = q @ k.mT / 2
            heads.append((s if seen_by is None else s.masked_fill(~seen_by, -torch.inf)).softmax(-1) @ v)
        wanted.append(torch.cat(heads, -1) @ branch.out.weight.mT)
    close(y, add_at(wanted[0], q_in, wanted[1] * w_q[..., None]), 1e-12)


def test_rotary_layers_see_differences_of_positions_only_and_no_padding() -> None:
    module, x = modern(), randn(B, N, D)
    at = torch.arange(N)[None]
    close(module(x, positions=at + 100), module(x, positions=at), 1e-11)
    padded, mask = F.pad(x, (0, 0, 6, 3), value=torch.nan), F.pad(torch.ones(B, N, dtype=torch.bool), (6, 3))
    close(module(padded, mask=mask)[:, 6:-3], module(x), 1e-11)


def test_packed_documents_are_as_if_alone() -> None:
    made = layer(dtype=torch.float32)
    x = randn(2, 41, D, dtype=torch.float32)
    documents = torch.full((2, 41), -1)
    pieces = [(0, 0, 17, 4), (0, 17, 18, 9), (0, 20, 41, 1), (1, 5, 39, 4)]
    for row, start, end, name in pieces:
        documents[row, start:end] = name
    with record() as packed:
        y = by_document(lambda rows, mask: made(rows, mask=mask), x, documents)
    assert not y[documents < 0].any()
    # documents are in the order of their rows, and of their numbers there
    for i, (row, start, end, _) in enumerate(sorted(pieces, key=lambda piece: (piece[0], piece[3]))):
        with record() as alone:
            close(y[row, start:end], made(x[row : row + 1, start:end])[0], 1e-5)
        for ours, theirs in zip(packed["routed"], alone["routed"], strict=True):
            assert torch.equal(ours[i, : theirs.shape[1]], theirs[0])


def test_packing_passes_gradients_and_takes_rows_without_tokens() -> None:
    x = randn(1, 9, D).requires_grad_()
    documents = torch.tensor([[0, 1, 1, -1, 0, 0, 2, 2, 2]])
    y = by_document(lambda rows, mask: rows.cumsum(1), x, documents)
    close(y[0, [0, 4, 5]], x[0, [0, 4, 5]].cumsum(0), 1e-14)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient[0, :, 0].tolist() == [3, 2, 1, 0, 2, 1, 3, 2, 1]
    empty = by_document(lambda rows, mask: rows, x, torch.full((1, 9), -1))
    assert not empty.any()
    assert empty.shape == x.shape
