from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from tevo.functional import norms
from tevo.functional.norms import rms_norm, rms_norm_reference

EPS = 1e-5


@pytest.fixture(autouse=True, params=[0, norms.SMALL], ids=["function", "torch"])
def small(request, monkeypatch):
    # every claim holds for both forms, whatever the size
    monkeypatch.setattr(norms, "SMALL", request.param)
    return request.param


def inputs(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x = (scale * torch.randn(*shape, generator=rng, dtype=torch.float64)).to(dtype)
    weight = torch.randn(shape[-1], generator=rng, dtype=torch.float64).to(dtype)
    dy = torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), dy


def value_and_gradients(f, x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    y = f(x, weight, EPS)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def by_loops(x: Tensor, weight: Tensor) -> Tensor:
    rows = []
    for row in x.flatten(0, -2).tolist():
        rms = math.sqrt(math.fsum(v * v for v in row) / len(row) + EPS)
        rows.append([v / rms * w for v, w in zip(row, weight.tolist(), strict=True)])
    return torch.tensor(rows, dtype=x.dtype).view_as(x)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_equals_the_loop(scale):
    x, weight, _ = inputs(3, 13, 12, scale=scale)
    torch.testing.assert_close(rms_norm(x, weight, EPS), by_loops(x, weight), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("shape", [(3, 13, 12), (7, 1), (12,), (0, 12), (2, 0, 5)])
@pytest.mark.parametrize("peer", [rms_norm_reference, lambda x, w, eps: F.rms_norm(x, w.shape, w, eps)])
def test_equals_the_reference_with_gradients(shape, peer):
    example = inputs(*shape)
    for ours, theirs in zip(value_and_gradients(rms_norm, *example), value_and_gradients(peer, *example), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_a_large_mean_costs_no_precision():
    # the fused kernel subtracts a constant per token that is added back: rounding must stay that of float32
    x, weight, dy = inputs(13, 96, dtype=torch.float32)
    x = (x.detach() + 100.0).requires_grad_()
    exact = value_and_gradients(rms_norm_reference, x.double(), weight.double(), dy.double())
    for ours, theirs in zip(value_and_gradients(rms_norm, x, weight, dy), exact, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_non_contiguous_input_gives_the_same():
    x, weight, dy = inputs(7, 13, 12)
    turned = x.detach().transpose(0, 1).requires_grad_()
    ours = value_and_gradients(rms_norm, turned, weight, dy.transpose(0, 1))
    theirs = value_and_gradients(rms_norm, x, weight, dy)
    torch.testing.assert_close(ours[0], theirs[0].transpose(0, 1))
    torch.testing.assert_close(ours[1], theirs[1].transpose(0, 1))
    torch.testing.assert_close(ours[2], theirs[2])


def test_first_and_second_derivatives_are_right():
    x, weight, _ = inputs(2, 3, 5)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, w: rms_norm(x, w, EPS), (x, weight))


def test_zeros_give_zeros_and_finite_gradients():
    weight = torch.ones(12, requires_grad=True)
    x = torch.zeros(7, 12, requires_grad=True)
    y, dx, dw = value_and_gradients(rms_norm, x, weight, torch.ones(7, 12))
    assert torch.equal(y, torch.zeros(7, 12)) and torch.equal(dw, torch.zeros(12))
    assert dx.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounding_of_float32(dtype):
    x, weight, dy = inputs(7, 12, dtype=dtype)
    exact = value_and_gradients(rms_norm_reference, x.float(), weight.float(), dy.float())
    for ours, theirs in zip(value_and_gradients(rms_norm, x, weight, dy), exact, strict=True):
        assert ours.dtype == dtype
        # one rounding of the result, and at most one more where the last bit of float32 decides it
        torch.testing.assert_close(ours.float(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_float32_weight_serves_half_precision_input():
    x, weight, dy = inputs(7, 12, dtype=torch.bfloat16)
    weight = weight.detach().float().requires_grad_()
    y, dx, dw = value_and_gradients(rms_norm, x, weight, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_backward_inside_autocast_keeps_float32():
    x, weight, dy = inputs(7, 12, dtype=torch.float32)
    outside = value_and_gradients(rms_norm, x, weight, dy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_gradients(rms_norm, x, weight, dy)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (1, 0)])
def test_vmap_equals_a_loop(in_dims):
    x, _, _ = inputs(4, 4, 12)
    weight, _, _ = inputs(4, 12)
    args = (x if in_dims[0] is not None else x[0], weight if in_dims[1] is not None else weight[0])

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, w, EPS).pow(3).sum()

    def pick(t: Tensor, dim: int | None, i: int) -> Tensor:
        return t if dim is None else t.select(dim, i)

    def loop(f) -> Tensor:
        picked = [tuple(pick(t, dim, i) for t, dim in zip(args, in_dims, strict=True)) for i in range(4)]
        return torch.stack([f(*p) for p in picked])

    for f in (lambda x, w: rms_norm(x, w, EPS), grad(loss), grad(loss, argnums=1)):
        torch.testing.assert_close(vmap(f, in_dims)(*args), loop(f), rtol=1e-12, atol=1e-12)


def test_batched_backward_equals_a_loop():
    x, weight, _ = inputs(7, 12)
    y = rms_norm(x, weight, EPS)
    dys = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    batched = torch.autograd.grad(y, (x, weight), dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for got, want in zip(batched, torch.autograd.grad(y, (x, weight), dy, retain_graph=True), strict=True):
            torch.testing.assert_close(got[i], want, rtol=1e-12, atol=1e-12)


def test_serves_a_module_in_functional_call():
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            return rms_norm(x, self.weight, EPS)

    weight = torch.linspace(-1, 1, 12)
    x = torch.linspace(-2, 3, 36).view(3, 12)
    torch.testing.assert_close(functional_call(Norm(), {"weight": weight}, (x,)), rms_norm_reference(x, weight, EPS))


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"weight has shape \(11,\) and x \(7, 12\)"):
        rms_norm(torch.randn(7, 12), torch.ones(11), EPS)


def test_saves_only_the_input_the_weight_and_one_number_per_token(monkeypatch):
    monkeypatch.setattr(norms, "SMALL", 0)
    saved: list[int] = []
    x, weight, _ = inputs(7, 12)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    assert sorted(saved) == [7, 12, 84]


# the tracer itself instantiates the Function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph_with_the_same_gradients():
    torch.compiler.reset()
    example = inputs(7, 13, 12)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        value_and_gradients(compiled, *example), value_and_gradients(rms_norm, *example), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
