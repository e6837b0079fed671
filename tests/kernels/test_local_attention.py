from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from tevo.functional import local_attention as plain
from tevo.kernels import local_attention as kernel
from tevo.kernels.local_attention import local_attention

B, H, E = 2, 3, 4

# n and radius, always more than four radii: the last block full or not, radius a multiple of the block or not
SIZES = [(13, 3), (12, 2), (29, 5), (31, 7), (9, 1)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # so that sequences of a few tokens have several blocks, and several pieces
    monkeypatch.setattr(plain, "SMALLEST_BLOCK", 2)
    monkeypatch.setattr(kernel, "PIECE", 40)
    monkeypatch.setattr(kernel, "SHORT", 0)


def example(n: int, radius: int, mask: str = "", dtype: torch.dtype = torch.float64) -> dict:
    rng = torch.Generator().manual_seed(n + 31 * radius)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()

    made = {"q": randn(B, H, n, E), "k": randn(B, H, n, E), "v": randn(B, H, n, E), "radius": radius}
    made["bias"] = randn(H, 2 * radius + 1)
    at = torch.arange(n)
    masks = {
        "random": torch.rand(B, n, generator=rng) < 0.6,
        "sides": torch.stack([at < n - 3, at > 2]),
        "row": torch.stack([at >= 0, at < 0]),
    }
    return made | ({"mask": masks[mask]} if mask else {})


def value_and_gradients(f, made: dict, **options) -> dict[str, Tensor]:
    o = f(**made, **options)
    dy = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(o.dtype)
    names = ("q", "k", "v", "bias")
    return {"o": o.detach(), **dict(zip(names, torch.autograd.grad(o, [made[x] for x in names], dy), strict=True))}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], most: float = 1e-12) -> None:
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=most, atol=most, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("mask", ["", "random", "sides", "row"])
@pytest.mark.parametrize(("n", "radius"), SIZES)
def test_equals_the_dense_reference_with_every_gradient(n, radius, mask):
    made = example(n, radius, mask)
    ours = value_and_gradients(local_attention, made)
    assert_same(ours, value_and_gradients(plain.local_attention_reference, made))


@pytest.mark.parametrize("mask", ["", "sides"])
def test_equals_the_dense_reference_without_a_graph(mask):
    made = {k: x.detach() if isinstance(x, Tensor) else x for k, x in example(29, 5, mask).items()}
    torch.testing.assert_close(local_attention(**made), plain.local_attention_reference(**made), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["", "sides"])
@pytest.mark.parametrize("n", [9, 23, 24, 25])
def test_rows_with_few_whole_windows_or_none_equal_the_dense_reference(n, mask, monkeypatch):
    # blocks of 8 and a radius of 1: windows of 24 keys
    monkeypatch.setattr(plain, "SMALLEST_BLOCK", 8)
    made = example(n, 1, mask)
    ours = value_and_gradients(local_attention, made)
    assert_same(ours, value_and_gradients(plain.local_attention_reference, made))


def test_usual_blocks_and_pieces_equal_the_plain_form_in_float32(monkeypatch):
    monkeypatch.undo()
    made = example(300, 20, "sides", torch.float32)
    exact = made | {k: made[k].detach().double().requires_grad_() for k in ("q", "k", "v", "bias")}
    ours = value_and_gradients(local_attention, made)
    theirs = value_and_gradients(plain.local_attention, exact)
    # sums of hundreds of numbers of size one, in float32
    assert_same({k: x.double() for k, x in ours.items()}, theirs, 5e-5)


def test_what_masked_keys_hold_changes_nothing():
    made = example(29, 5, "random")
    clean = value_and_gradients(local_attention, made)
    for name in "kv":
        spoilt = made[name].detach().clone()
        spoilt[~made["mask"][:, None].expand(-1, H, -1)] = torch.nan
        made[name] = spoilt.requires_grad_()
    assert_same(value_and_gradients(local_attention, made), clean)


def test_scale_multiplies_the_products_only():
    made = example(13, 3)
    assert_same(
        value_and_gradients(local_attention, made, scale=0.7),
        value_and_gradients(plain.local_attention, made, scale=0.7),
    )


def test_a_frozen_bias_and_frozen_tokens_get_no_gradient():
    made = example(13, 3)
    made["bias"] = made["bias"].detach()
    (dq,) = torch.autograd.grad(local_attention(**made).sum(), made["q"])
    (wanted,) = torch.autograd.grad(plain.local_attention_reference(**made).sum(), made["q"])
    torch.testing.assert_close(dq, wanted, rtol=0, atol=1e-12)


def test_second_derivatives_are_right():
    tensors = {name: x.detach() for name, x in example(9, 1).items() if isinstance(x, Tensor)}
    # one head of width one: the number of differences grows with the square of the inputs
    cut = {name: (x[:1] if name == "bias" else x[:1, :1, :, :1]).requires_grad_() for name, x in tensors.items()}

    def f(*values: Tensor) -> Tensor:
        return local_attention(radius=1, **dict(zip(cut, values, strict=True)))

    assert torch.autograd.gradcheck(f, tuple(cut.values()))
    assert torch.autograd.gradgradcheck(f, tuple(cut.values()))


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


def test_compiles_to_one_graph_with_the_same_gradients():
    torch.compiler.reset()
    made = example(29, 5, "sides")
    compiled = torch.compile(local_attention, fullgraph=True, backend="aot_eager")
    assert_same(value_and_gradients(compiled, made), value_and_gradients(local_attention, made))
    torch.compiler.reset()


@pytest.mark.parametrize("n", [0, 1, 12])
def test_short_sequences_are_the_plain_forms(n):
    made = example(n, 3)
    assert_same(value_and_gradients(local_attention, made), value_and_gradients(plain.local_attention, made), 0)


def test_half_precision_and_values_of_another_width_are_the_plain_forms():
    made = {k: x.detach() if isinstance(x, Tensor) else x for k, x in example(29, 5, dtype=torch.bfloat16).items()}
    assert torch.equal(local_attention(**made), plain.local_attention(**made))
    made = example(29, 5)
    made["v"] = made["v"].detach()[..., :3].requires_grad_()
    assert_same(value_and_gradients(local_attention, made), value_and_gradients(plain.local_attention, made), 0)


def test_what_does_not_fit_is_refused():
    made = example(29, 5) | {"bias": torch.zeros(H, 3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"expected \(h, 2 radius \+ 1\) = \(3, 11\)"):
        local_attention(**made)
