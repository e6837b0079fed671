from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tevo.functional.exponential import WkvState, sequential_wkv, wkv, wkv_state

B, D = 2, 5


def make(n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    k = 3 * torch.randn(B, n, D, dtype=dtype, generator=rng)
    v = torch.randn(B, n, D, dtype=dtype, generator=rng)
    decay = torch.rand(D, dtype=dtype, generator=rng)
    bonus = torch.randn(D, dtype=dtype, generator=rng)
    k, v, decay, bonus = (t.requires_grad_() for t in (k, v, decay, bonus))
    return k, v, decay, bonus


def by_definition(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor | None) -> Tensor:
    """A softmax over all pairs of positions."""
    n = k.shape[1]
    lag = torch.arange(n)[:, None] - torch.arange(n)
    if bonus is None:
        w = k[:, None] - lag[..., None] * decay  # b t s d
    else:
        w = torch.where((lag == 0)[..., None], k[:, None] + bonus, k[:, None] - (lag[..., None] - 1) * decay)
    return (w.masked_fill((lag < 0)[..., None], -torch.inf).softmax(2) * v[:, None]).sum(2)


@pytest.mark.parametrize("with_bonus", [True, False])
@pytest.mark.parametrize("form", [wkv, sequential_wkv])
@pytest.mark.parametrize("n", [1, 13, 75])
def test_equals_a_softmax_over_all_pairs(form, n: int, with_bonus: bool) -> None:
    k, v, decay, bonus = make(n)
    inputs = (k, v, decay, bonus) if with_bonus else (k, v, decay)
    mine, _ = form(k, v, decay=decay, bonus=bonus if with_bonus else None)
    plain = by_definition(k, v, decay, bonus if with_bonus else None)
    torch.testing.assert_close(mine, plain, rtol=1e-11, atol=1e-11)
    weight = torch.linspace(-1, 2, mine.numel(), dtype=torch.float64).view(mine.shape)
    g_mine, g_plain = (torch.autograd.grad((y * weight).sum(), inputs, materialize_grads=True) for y in (mine, plain))
    torch.testing.assert_close(g_mine, g_plain, rtol=1e-10, atol=1e-10)


def test_without_decay_it_is_the_running_softmax_average() -> None:
    k, v, _, _ = make(13)
    y, _ = wkv(k, v, decay=torch.zeros(D, dtype=torch.float64), bonus=None)
    torch.testing.assert_close(y, (k.exp() * v).cumsum(1) / k.exp().cumsum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("with_bonus", [True, False])
def test_any_split_equals_one_pass_with_gradients(with_bonus: bool) -> None:
    k, v, decay, bonus = make(50)
    inputs = (k, v, decay, bonus)[: 3 + with_bonus]
    u = bonus if with_bonus else None
    whole, last = wkv(k, v, decay=decay, bonus=u)
    state: WkvState | None = None
    parts = []
    for form, start, end in ((wkv, 0, 7), (sequential_wkv, 7, 8), (wkv, 8, 8), (wkv, 8, 48), (sequential_wkv, 48, 50)):
        part, state = form(k[:, start:end], v[:, start:end], decay=decay, bonus=u, state=state)
        parts.append(part)
    assert state is not None
    split = torch.cat(parts, 1)
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 2, whole.numel(), dtype=torch.float64).view(whole.shape)
    g_split, g_whole = (torch.autograd.grad((y * weight).sum(), inputs) for y in (split, whole))
    torch.testing.assert_close(g_split, g_whole, rtol=1e-10, atol=1e-10)


def test_first_derivatives_are_exact_from_a_carried_in_state() -> None:
    k, v, decay, bonus = make(3)
    rng = torch.Generator().manual_seed(4)
    num, den, top = (torch.rand(B, D, dtype=torch.float64, generator=rng) for _ in range(3))

    def run(*inputs: Tensor) -> Tensor:
        k, v, decay, bonus, num, den = inputs
        return wkv(k, v, decay=decay, bonus=bonus, state=(num, den, top))[0]

    assert gradcheck(run, (k, v, decay, bonus, num.requires_grad_(), den.requires_grad_()))


@pytest.mark.parametrize("with_bonus", [True, False])
def test_future_tokens_do_not_change_the_past(with_bonus: bool) -> None:
    k, v, decay, bonus = make(60)
    y, _ = wkv(k, v, decay=decay, bonus=bonus if with_bonus else None)
    for t in (0, 31, 58):
        for g in torch.autograd.grad(y[:, t].sum(), (k, v), retain_graph=True):
            assert (g[:, t + 1 :] == 0).all()
        assert g[:, t].abs().min() > 0
    # a huge later log-weight must not make the earlier ones underflow
    with torch.no_grad():
        k[:, 40] = 1e4
        later, _ = wkv(k, v, decay=decay, bonus=bonus if with_bonus else None)
    assert torch.equal(later[:, :40], y[:, :40])


def test_log_weights_of_any_size_stay_finite_in_single_precision() -> None:
    k, v, decay, bonus = (t.detach() for t in make(200))
    k = 300 * k
    y, state = wkv(k.float(), v.float(), decay=5 * decay.float(), bonus=bonus.float())
    expected = by_definition(k.float().double(), v.float().double(), 5 * decay.float().double(), bonus.float().double())
    assert all(s.isfinite().all() for s in state)
    # log-weights near 1e3 have float32 spacings of 6e-5, which weights inherit
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-3)


def test_left_out_tokens_weigh_nothing_and_no_token_gives_zero() -> None:
    k, v, decay, _ = make(20)
    real = torch.ones(20, dtype=torch.bool)
    real[:6] = False
    real[11] = False
    left_out = k.masked_fill(~real[:, None], -torch.inf)
    y, _ = wkv(left_out, v, decay=decay, bonus=None)
    plain, _ = sequential_wkv(left_out, v, decay=decay, bonus=None)
    torch.testing.assert_close(y, plain, rtol=1e-12, atol=1e-12)
    assert (y[:, :6] == 0).all()
    alone, _ = wkv(k[:, 6:11], v[:, 6:11], decay=decay, bonus=None)
    torch.testing.assert_close(y[:, 6:11], alone, rtol=1e-12, atol=1e-12)
    for form_y in (y, plain):
        g = torch.autograd.grad(form_y.square().sum(), (k, v, decay), retain_graph=True)
        assert all(t.isfinite().all() for t in g) and (g[1][:, ~real] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_single(dtype: torch.dtype) -> None:
    k, v, decay, bonus = (t.detach().to(dtype) for t in make(300))
    y, state = wkv(k, v, decay=decay, bonus=bonus)
    assert y.dtype == dtype and all(s.dtype == torch.float32 for s in state)
    expected = by_definition(k.double(), v.double(), decay.double(), bonus.double())
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_no_tokens_return_the_state() -> None:
    k, v, decay, bonus = make(0)
    state = wkv_state(B, decay)
    for form in (wkv, sequential_wkv):
        y, after = form(k, v, decay=decay, bonus=bonus, state=state)
        assert y.shape == (B, 0, D)
        torch.testing.assert_close(after, state)


# torch's own compiler makes an instance of every autograd function
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph() -> None:
    k, v, decay, bonus = make(40)
    compiled = torch.compile(wkv, backend="aot_eager", fullgraph=True)
    y, _ = compiled(k, v, decay=decay, bonus=bonus)
    torch.testing.assert_close(y, wkv(k, v, decay=decay, bonus=bonus)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 40])
def test_vmap_over_models_equals_a_loop(n: int) -> None:
    k, v, _, _ = make(n)
    rng = torch.Generator().manual_seed(5)
    decay = torch.rand(3, D, dtype=torch.float64, generator=rng)
    bonus = torch.randn(3, D, dtype=torch.float64, generator=rng)

    def total(decay: Tensor, bonus: Tensor) -> Tensor:
        return wkv(k.detach(), v.detach(), decay=decay, bonus=bonus)[0].square().sum()

    mapped = torch.func.vmap(torch.func.grad(total, argnums=(0, 1)))(decay, bonus)
    for i in range(3):
        looped = torch.func.grad(total, argnums=(0, 1))(decay[i], bonus[i])
        torch.testing.assert_close(tuple(g[i] for g in mapped), looped, rtol=1e-10, atol=1e-12)


def test_refuses_shapes_that_do_not_fit() -> None:
    k, v, decay, bonus = make(4)
    with pytest.raises(ValueError, match=r"expected both \(b, n, d\)"):
        wkv(k, v[:, :2], decay=decay, bonus=bonus)
    with pytest.raises(ValueError, match="bonus of shape"):
        wkv(k, v, decay=decay, bonus=bonus[:2])
    with pytest.raises(ValueError, match="states of shapes"):
        wkv(k, v, decay=decay, bonus=bonus, state=(k[:, 0], k[:, 0], k[:1, 0]))
