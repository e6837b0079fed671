from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from tevo.functional import local_attention as module
from tevo.functional.local_attention import local_attention, local_attention_reference

H, E, V, G = 3, 4, 5, 6

# n and radius: one block, several, a last one that is full or not, windows wider than the sequence, the smallest ones
SIZES = [(13, 3), (13, 2), (12, 3), (16, 3), (13, 0), (13, 20), (13, 12), (13, 6), (1, 0), (1, 4), (2, 1), (5, 1)]
PARTS = [
    (),
    ("mask",),
    ("bias",),
    ("globals",),
    ("mask", "bias"),
    ("mask", "globals", "global_mask"),
    ("bias", "globals", "global_bias"),
    ("mask", "bias", "globals", "global_bias", "global_mask"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # so that sequences of a few tokens have several blocks
    monkeypatch.setattr(module, "SMALLEST_BLOCK", 2)


def example(n: int, radius: int, parts: tuple[str, ...] = (), b: int = 2, dtype: torch.dtype = torch.float64) -> dict:
    rng = torch.Generator().manual_seed(n + 31 * radius)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    made = {"q": randn(b, H, n, E), "k": randn(b, H, n, E), "v": randn(b, H, n, V), "radius": radius}
    if "mask" in parts:
        made["mask"] = torch.rand(b, n, generator=rng) < 0.6
    if "bias" in parts:
        made["bias"] = randn(H, 2 * radius + 1)
    if "globals" in parts:
        made |= {"global_k": randn(b, H, G, E), "global_v": randn(b, H, G, V)}
    if "global_bias" in parts:
        made["global_bias"] = randn(1, H, n, G)
    if "global_mask" in parts:
        made["global_mask"] = torch.rand(b, 1, n, G, generator=rng) < 0.3
    return made


def value_and_gradients(f, made: dict, **options) -> dict[str, Tensor]:
    o = f(**made, **options)
    dy = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o.dtype)
    leaves = {name: x for name, x in made.items() if isinstance(x, Tensor) and x.requires_grad}
    return {"o": o.detach(), **dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), dy), strict=True))}


def by_loops(
    q,
    k,
    v,
    radius,
    causal=False,
    mask=None,
    bias=None,
    global_k=None,
    global_v=None,
    global_bias=None,
    global_mask=None,
) -> Tensor:
    b, h, n, _ = q.shape
    o = torch.zeros(b, h, n, v.shape[-1], dtype=q.dtype)
    for t in range(b):
        for a in range(h):
            for i in range(n):
                s, values = [], []
                for j in range(max(0, i - radius), min(n, i + (0 if causal else radius) + 1)):
                    if mask is None or mask[t, j]:
                        addend = 0.0 if bias is None else bias[a, j - i + radius]
                        s.append((q[t, a, i] @ k[t, a, j]) / math.sqrt(E) + addend)
                        values.append(v[t, a, j])
                for g in range(0 if global_k is None else G):
                    if global_mask is None or global_mask[t, 0, i, g]:
                        addend = 0.0 if global_bias is None else global_bias[0, a, i, g]
                        s.append((q[t, a, i] @ global_k[t, a, g]) / math.sqrt(E) + addend)
                        values.append(global_v[t, a, g])
                if s:
                    o[t, a, i] = torch.stack(s).softmax(0) @ torch.stack(values)
    return o


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_the_dense_reference_equals_loops(parts, causal):
    made = example(7, 2, parts)
    torch.testing.assert_close(local_attention_reference(**made, causal=causal), by_loops(**made, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize(("n", "radius"), SIZES)
def test_equals_the_dense_reference_with_every_gradient(n, radius, parts, causal):
    made = example(n, radius, parts)
    ours = value_and_gradients(local_attention, made, causal=causal)
    assert_same(ours, value_and_gradients(local_attention_reference, made, causal=causal))


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_equals_the_dense_reference_without_a_graph(parts):
    made = {k: x.detach() if isinstance(x, Tensor) else x for k, x in example(13, 3, parts).items()}
    torch.testing.assert_close(local_attention(**made), local_attention_reference(**made), rtol=1e-12, atol=1e-12)


def test_blocks_of_the_usual_size_equal_the_dense_reference(monkeypatch):
    monkeypatch.undo()
    made = example(101, 5, ("mask", "bias"))
    assert_same(value_and_gradients(local_attention, made), value_and_gradients(local_attention_reference, made))


def test_a_window_over_the_whole_sequence_is_softmax_attention():
    made = example(13, 12)
    q, k, v = (made[x] for x in "qkv")
    torch.testing.assert_close(local_attention(**made), torch.softmax(q @ k.mT / math.sqrt(E), -1) @ v)


def test_tokens_outside_the_window_receive_no_gradient():
    n, radius, i = 13, 3, 7
    for causal in (False, True):
        made = example(n, radius)
        o = local_attention(**made, causal=causal)
        dk, dv = torch.autograd.grad(o[:, :, i].sum(), (made["k"], made["v"]))
        seen = range(i - radius, i + (0 if causal else radius) + 1)
        for j in range(n):
            assert (dv[:, :, j] != 0).all() == (j in seen)
            assert (dk[:, :, j] != 0).any() == (j in seen)


def test_what_masked_keys_hold_changes_nothing():
    made = example(13, 3, ("mask", "bias", "globals"))
    clean = value_and_gradients(local_attention, made)
    for name in "kv":
        spoilt = made[name].detach().clone()
        spoilt[~made["mask"][:, None].expand(-1, H, -1)] = torch.nan
        made[name] = spoilt.requires_grad_()
    assert_same(value_and_gradients(local_attention, made), clean)


@pytest.mark.parametrize("parts", [("bias",), ()])
@pytest.mark.parametrize("trained", [True, False])
def test_a_query_without_keys_gives_zeros_and_finite_gradients(parts, trained):
    made = example(13, 2, parts)
    made["mask"] = torch.arange(13).expand(2, 13) >= 6
    if not trained and "bias" in made:
        made["bias"] = made["bias"].detach()
    got = value_and_gradients(local_attention, made)
    assert torch.equal(got["o"][:, :, :4], torch.zeros(2, H, 4, V, dtype=torch.float64))
    assert (got["o"][:, :, 4:] != 0).all()
    assert all(x.isfinite().all() for x in got.values())
    made["mask"] = torch.zeros(2, 13, dtype=torch.bool)
    got = value_and_gradients(local_attention, made)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in got.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_bias_revives_no_masked_key(dtype):
    made = {
        k: x.detach() if isinstance(x, Tensor) else x for k, x in example(13, 2, ("mask", "bias"), dtype=dtype).items()
    }
    made["mask"] = torch.arange(13).expand(2, 13) >= 6
    made["bias"] = torch.full((H, 5), 50.0, dtype=dtype)
    o = local_attention(**made)
    assert torch.equal(o[:, :, :4], torch.zeros(2, H, 4, V, dtype=dtype))
    # the same addend for every key changes nothing; rounding of scores near 50 does, in the dtype of the addend
    want = local_attention(**{k: x for k, x in made.items() if k != "bias"})
    torch.testing.assert_close(o, want, rtol=0, atol=100 * torch.finfo(dtype).eps)


def test_no_tokens_give_no_output_and_gradients_of_zero():
    made = example(0, 3)
    got = value_and_gradients(local_attention, made)
    assert got["o"].shape == (2, H, 0, V)
    made = example(0, 3, ("mask", "bias", "globals", "global_bias", "global_mask"))
    got = value_and_gradients(local_attention, made)
    assert all(not x.any() for x in got.values())


def test_no_global_keys_are_the_same_as_none():
    made = example(13, 3, ("bias",))
    empty = torch.zeros(2, H, 0, E, dtype=torch.float64), torch.zeros(2, H, 0, V, dtype=torch.float64)
    torch.testing.assert_close(local_attention(**made, global_k=empty[0], global_v=empty[1]), local_attention(**made))


def test_scale_multiplies_the_products_only():
    made = example(13, 3, ("bias",))
    scaled = made | {"q": made["q"] * 0.7 * math.sqrt(E)}
    torch.testing.assert_close(local_attention(**made, scale=0.7), local_attention(**scaled))


def test_second_derivatives_are_right():
    made = example(5, 1, ("bias", "globals"), b=1)
    tensors = {name: x.detach() for name, x in made.items() if isinstance(x, Tensor)}
    # one head of width two: the number of differences grows with the square of the inputs
    tensors = {name: (x[:1] if name == "bias" else x[:, :1, :, :2]).requires_grad_() for name, x in tensors.items()}

    def f(*values: Tensor) -> Tensor:
        return local_attention(radius=1, **dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradgradcheck(f, tuple(tensors.values()))


def test_vmap_equals_a_loop():
    made = example(13, 3)
    q, k, v = (torch.stack([made[x].detach(), made[x].detach().flip(2)]) for x in "qkv")
    bias = torch.randn(2, H, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return local_attention(q, k, v, radius=3, bias=bias).pow(2).sum()

    every = (0, 1, 2, 3)
    batched = vmap(grad(loss, every))(q, k, v, bias)
    for i in range(2):
        for got, want in zip(batched, grad(loss, every)(q[i], k[i], v[i], bias[i]), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_float64(dtype):
    made = example(13, 3, ("mask", "bias", "globals"), dtype=dtype)
    exact = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in made.items()}
    o, want = local_attention(**made), local_attention_reference(**exact)
    assert o.dtype == dtype
    # a dozen roundings of numbers of size one
    assert (o.double() - want).abs().max() <= 12 * torch.finfo(dtype).eps


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph_with_the_same_gradients():
    torch.compiler.reset()
    made = example(13, 3, ("mask", "bias", "globals"))
    compiled = torch.compile(local_attention, fullgraph=True, backend="aot_eager")
    assert_same(value_and_gradients(compiled, made), value_and_gradients(local_attention, made))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"radius": -1}, "radius=-1"),
        ({"k": torch.zeros(2, H, 12, E)}, r"expected q and k \(b, h, n, e\)"),
        ({"v": torch.zeros(2, H, 12, V)}, "of one sequence"),
        ({"mask": torch.ones(2, 12, dtype=torch.bool)}, "expected torch.bool of shape"),
        ({"bias": torch.zeros(H, 3)}, r"expected \(h, 2 radius \+ 1\) = \(3, 7\)"),
        ({"global_k": torch.zeros(2, H, G, E)}, "pass both or neither"),
        ({"global_mask": torch.ones(2, 1, 13, G, dtype=torch.bool)}, "without global_k"),
        ({"global_k": torch.zeros(2, H, G, E), "global_v": torch.zeros(2, H, 2, V)}, "expected .*G, 4"),
        (
            {
                "global_k": torch.zeros(2, H, G, E),
                "global_v": torch.zeros(2, H, G, V),
                "global_bias": torch.zeros(13, G),
            },
            "global_bias of shape",
        ),
        (
            {
                "global_k": torch.zeros(2, H, G, E),
                "global_v": torch.zeros(2, H, G, V),
                "global_mask": torch.ones(2, 1, 1, G),
            },
            "expected torch.bool",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, complaint):
    made = example(13, 3, dtype=torch.float32) | change
    with pytest.raises(ValueError, match=complaint):
        local_attention(**made)
