from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from tevo.functional.scan import matrix_scan, scan, sequential_scan

B, D = 2, 5


def make(n: int, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Signed a (of the given shape, with a zero in it), b and state, all requiring gradients."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(shape or (B, n, D), dtype=dtype, generator=rng) * 0.7
    if a.numel() > 3:
        a.view(-1)[3] = 0
    b = torch.randn(B, n, D, dtype=dtype, generator=rng)
    state = torch.randn(B, D, dtype=dtype, generator=rng)
    return a.requires_grad_(), b.requires_grad_(), state.requires_grad_()


def gradients(outputs: tuple[Tensor, Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, last = outputs
    weight = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape)
    loss = (x * weight).abs().square().sum() + (x * weight).real.sum() + 3 * last.abs().square().sum()
    return torch.autograd.grad(loss, inputs, materialize_grads=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [0, 1, 2, 13, 31, 32, 33, 47, 48, 300, 1025])
def test_equals_one_step_after_another(n: int, dtype: torch.dtype) -> None:
    inputs = make(n, dtype=dtype)
    mine, plain = scan(*inputs), sequential_scan(*inputs)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(mine, inputs), gradients(plain, inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n", [7, 100])
@pytest.mark.parametrize("shape", [(D,), (1,), (1, 1, D), (B, 1, 1), (0, D), (1, 0, 1), (B, 0, 1)])
def test_a_broadcasts(n: int, shape: tuple[int, ...]) -> None:
    inputs = make(n, *(n if i == 0 else i for i in shape))
    mine = scan(*inputs)
    plain = sequential_scan(inputs[0].expand(B, n, D), *inputs[1:])
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(mine, inputs), gradients(plain, inputs), rtol=1e-11, atol=1e-11)


def test_equals_the_sum_over_the_past_with_products_of_a() -> None:
    a, b, state = make(13)
    expected = []
    for t in range(13):
        x = a[:, : t + 1].prod(1) * state
        for s in range(t + 1):
            x = x + a[:, s + 1 : t + 1].prod(1) * b[:, s]
        expected.append(x)
    torch.testing.assert_close(scan(a, b, state)[0], torch.stack(expected, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [3, 33])
def test_first_and_second_derivatives_are_exact(n: int, dtype: torch.dtype) -> None:
    inputs = make(n, n, D, dtype=dtype)
    assert gradcheck(scan, inputs, fast_mode=n > 10)
    assert gradgradcheck(scan, inputs, fast_mode=n > 10)


def test_any_split_equals_one_pass() -> None:
    a, b, state = make(101)
    whole, last = scan(a, b, state)
    parts = []
    for start, end in ((0, 1), (1, 40), (40, 40), (40, 101)):
        part, state = scan(a[:, start:end], b[:, start:end], state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0, 20, 63, 98])
def test_future_inputs_do_not_change_the_past(t: int) -> None:
    a, b, state = make(100)
    g_a, g_b = torch.autograd.grad(scan(a, b, state)[0][:, t].sum(), (a, b))
    for g in (g_a, g_b):
        assert (g[:, t + 1 :] == 0).all()
        assert g[:, max(t - 1, 0) : t + 1].abs().max() > 0


def test_a_nan_never_reaches_earlier_steps_or_other_rows_of_the_batch() -> None:
    a, b, state = make(100)
    with torch.no_grad():
        b[0, 57] = torch.nan
    x, _ = scan(a, b, state)
    assert x[0, :57].isfinite().all() and x[0, 57:60].isnan().all() and x[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_single(dtype: torch.dtype) -> None:
    a, b, state = (t.detach() for t in make(1000))
    a = a.tanh().abs().to(dtype)
    b, state = b.to(dtype), state.to(dtype)
    x, last = scan(a, b, state)
    expected, _ = sequential_scan(a.double(), b.double(), state.double())
    assert x.dtype == dtype and last.dtype == torch.float32
    # one rounding of the result, whatever the length
    torch.testing.assert_close(x.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dims", [(0, 0, 0), (None, 0, None), (1, None, 1), (0, 2, None)])
def test_vmap_equals_a_loop(dims: tuple[int | None, ...]) -> None:
    rng = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(*shape[: d or 0], 3, *shape[d or 0 :], dtype=torch.float64, generator=rng)
        if d is not None
        else torch.randn(*shape, dtype=torch.float64, generator=rng)
        for shape, d in zip(((B, 40, D), (B, 40, D), (B, D)), dims, strict=True)
    ]

    def total(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        return scan(a, b, state)[0].square().sum()

    mapped = torch.func.vmap(torch.func.grad(total, argnums=(0, 1, 2)), in_dims=dims)(*inputs)
    for i in range(3):
        alone = [t if d is None else t.select(d, i) for t, d in zip(inputs, dims, strict=True)]
        looped = torch.func.grad(total, argnums=(0, 1, 2))(*alone)
        torch.testing.assert_close(tuple(g[i] for g in mapped), looped, rtol=1e-10, atol=1e-10)


# torch's own compiler makes an instance of every autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_one_graph_node_whatever_the_length() -> None:
    compiled = torch.compile(scan, backend="aot_eager", fullgraph=True)
    for n in range(30, 45):
        inputs = make(n)
        mine, plain = compiled(*inputs), sequential_scan(*inputs)
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradients(mine, inputs), gradients(plain, inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["scan", "scan_adjoint", "matrix_scan", "matrix_scan_adjoint"])
def test_operators_keep_the_rules_of_custom_operators(name: str) -> None:
    inputs = tuple(t.detach() for t in make(37))
    if name.startswith("matrix"):
        a, b, state = inputs
        inputs = (torch.diag_embed(a), b[..., None], state[..., None])
    torch.library.opcheck(getattr(torch.ops.tevo, name).default, inputs)


@pytest.mark.parametrize("n", [0, 1, 6])
def test_matrix_scan_equals_a_loop(n: int) -> None:
    rng = torch.Generator().manual_seed(2)
    a = (torch.randn(B, n, 3, 3, dtype=torch.float64, generator=rng) * 0.5).requires_grad_()
    b = torch.randn(B, n, 3, 4, dtype=torch.float64, generator=rng).requires_grad_()
    state = torch.randn(B, 3, 4, dtype=torch.float64, generator=rng).requires_grad_()
    x, xs = state, []
    for t in range(n):
        x = torch.einsum("bij,bjk->bik", a[:, t], x) + b[:, t]
        xs.append(x)
    plain = (torch.stack(xs, 1) if xs else b, x)
    mine = matrix_scan(a, b, state)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(mine, (a, b, state)), gradients(plain, (a, b, state)), rtol=1e-11, atol=1e-11)
    assert gradcheck(matrix_scan, (a, b, state), fast_mode=True)
    assert gradgradcheck(matrix_scan, (a, b, state), fast_mode=True)


def test_matrix_scan_under_vmap_equals_a_loop() -> None:
    rng = torch.Generator().manual_seed(3)
    a = torch.randn(3, B, 4, 3, 3, dtype=torch.float64, generator=rng)
    b = torch.randn(B, 4, 3, 2, dtype=torch.float64, generator=rng)
    state = torch.randn(B, 3, 2, dtype=torch.float64, generator=rng)
    mapped = torch.func.vmap(matrix_scan, in_dims=(0, None, None))(a, b, state)
    for i in range(3):
        torch.testing.assert_close(tuple(t[i] for t in mapped), matrix_scan(a[i], b, state), rtol=1e-12, atol=1e-12)


def test_refuses_shapes_that_do_not_fit() -> None:
    a, b, state = make(7)
    with pytest.raises(ValueError, match=r"expected \(b, n, d\)"):
        scan(a, b[0], state)
    with pytest.raises(ValueError, match="broadcasts to b"):
        scan(a[:, :3], b, state)
    with pytest.raises(ValueError, match="state of shape"):
        scan(a, b, state[:, :2])
    with pytest.raises(ValueError, match="matrix_scan got a"):
        matrix_scan(a[..., None], b[..., None], state[..., None])
