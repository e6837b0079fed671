"""The three forms of one pass over the inputs, against its equations written as loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.functional.slot_attention import (
    Folded,
    absorb,
    absorption_pays,
    compete,
    folded_read,
    messages,
    normalised,
    read,
    reciprocal_deviation,
    unabsorb,
)

B, N, D, H, K, E = 2, 13, 6, 3, 5, 4


def inputs(seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    return {
        "q": draw(B, H, K, E),
        "x": draw(B, N, D),
        "gain": draw(D),
        "bias": draw(D),
        "key": draw(H * E, D),
        "value": draw(H * E, D),
    }


def masks() -> tuple[Tensor, Tensor]:
    mask, slot_mask = torch.ones(B, N, dtype=torch.bool), torch.ones(B, K, dtype=torch.bool)
    mask[0, 9:] = False
    mask[1, :2] = False
    slot_mask[1, 3] = False
    return mask, slot_mask


def every_slot() -> tuple[Tensor, None]:
    return masks()[0], None


def by_loops(
    t: dict[str, Tensor], joint: bool, norm: bool, eps: float, mask: Tensor, slot_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = F.layer_norm(t["x"], (D,), t["gain"], t["bias"], 1e-3) if norm else t["x"]
    total, mass = {}, {}
    for b in range(B):
        real = [k for k in range(K) if slot_mask is None or slot_mask[b, k]]
        for h in range(H):
            for k in range(K):
                total[b, h, k], mass[b, h, k] = torch.zeros(E, dtype=y.dtype), torch.zeros((), dtype=y.dtype)
        for n in range(N):
            if not mask[b, n]:
                continue
            keys, values = (t["key"] @ y[b, n]).view(H, E), (t["value"] @ y[b, n]).view(H, E)
            score = {(h, k): (t["q"][b, h, k] * keys[h]).sum().exp() for h in range(H) for k in real}
            for h in range(H):
                rivals = [s for (other, _), s in score.items() if joint or other == h]
                for k in range(K):
                    w = score.get((h, k), torch.zeros((), dtype=y.dtype)) / torch.stack(rivals).sum() + eps
                    total[b, h, k] = total[b, h, k] + w * values[h]
                    mass[b, h, k] = mass[b, h, k] + w
    shape = [(b, h, k) for b in range(B) for h in range(H) for k in range(K)]
    return (
        torch.stack([total[i] for i in shape]).view(B, H, K, E),
        torch.stack([mass[i] for i in shape]).view(B, H, K),
    )


def plain(
    t: dict[str, Tensor], joint: bool, norm: bool, eps: float, mask: Tensor, slot_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = F.layer_norm(t["x"], (D,), t["gain"], t["bias"], 1e-3) if norm else t["x"]
    keys, values = ((y @ t[name].mT).unflatten(-1, (H, E)).transpose(1, 2) for name in ("key", "value"))
    return read(compete(t["q"] @ keys.mT, joint=joint, mask=mask, slot_mask=slot_mask), values, eps=eps, mask=mask)


def absorbed(
    t: dict[str, Tensor], joint: bool, norm: bool, eps: float, mask: Tensor, slot_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    affine = (t["gain"], t["bias"]) if norm else (None, None)
    qk, offset = absorb(t["q"], t["key"], *affine)
    xh = normalised(t["x"], 1e-3 if norm else None)
    logits = qk @ xh[:, None].mT + (0.0 if offset is None else offset[..., None])
    a = compete(logits, joint=joint, mask=mask, slot_mask=slot_mask)
    total, mass = read(a, xh[:, None], eps=eps, mask=mask)
    return unabsorb(total, mass, t["value"], *affine), mass


def lean(
    t: dict[str, Tensor], joint: bool, norm: bool, eps: float, mask: Tensor, slot_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    return folded(t, joint, norm, eps, mask, slot_mask, keep=False)


def folded(
    t: dict[str, Tensor], joint: bool, norm: bool, eps: float, mask: Tensor, slot_mask: Tensor | None, keep: bool = True
) -> tuple[Tensor, Tensor]:
    # 3 tokens at a time
    shared = Folded(H, joint, eps, keep, chunk=3 * D)
    affine = (t["gain"], t["bias"]) if norm else (None, None)
    qk, offset = absorb(t["q"], t["key"], *affine)
    masks = {"mask": mask, "slot_mask": slot_mask}
    rstd = reciprocal_deviation(t["x"], 1e-3 if norm else None, mask)
    message = next(messages(t["x"], rstd, 1, H * K, shared, **masks))
    total, mass, a, _ = folded_read(qk, offset, t["x"], rstd, shared, message=message, **masks)
    assert (a is None) != keep
    return unabsorb(total, mass, t["value"], *affine), mass


@pytest.mark.parametrize("form", [plain, absorbed, lean, folded])
@pytest.mark.parametrize(("joint", "norm", "eps"), [(False, True, 0.1), (True, True, 0.0), (False, False, 0.1)])
@pytest.mark.parametrize("real", [masks, every_slot])
def test_each_form_equals_the_loops_with_gradients(form, joint: bool, norm: bool, eps: float, real) -> None:
    outs, grads = [], []
    for function in (by_loops, form):
        t = inputs()
        total, mass = function(t, joint, norm, eps, *real())
        rng = torch.Generator().manual_seed(1)
        loss = (total * torch.randn(total.shape, generator=rng, dtype=total.dtype)).sum()
        loss = loss + (mass * torch.randn(mass.shape, generator=rng, dtype=mass.dtype)).sum()
        outs.append((total, mass))
        names = [name for name in t if norm or name not in ("gain", "bias")]
        grads.append(torch.autograd.grad(loss, [t[name] for name in names]))
    torch.testing.assert_close(outs[0], outs[1], rtol=0.0, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("form", [lean, folded])
def test_great_logits_take_the_careful_softmax(form) -> None:
    # exponentials of these would overflow
    outs = []
    for function in (absorbed, form):
        t = inputs()
        t["q"] = (t["q"] * 300).detach()
        total, mass = function(t, False, True, 0.1, *masks())
        outs.append((total, mass))
    assert outs[0][0].isfinite().all()
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("away", [0.0, 3.0, 1e4])
def test_the_deviation_is_exact_however_far_a_token_is_from_the_origin(away: float) -> None:
    x = torch.randn(3, 50, 17, generator=torch.Generator().manual_seed(5)) + away
    found = reciprocal_deviation(x, 1e-3)
    expected = (x.double().var(-1, correction=0) + 1e-3).rsqrt()
    # what float32 leaves of x itself, when its mean is taken away
    torch.testing.assert_close(found.double(), expected, rtol=2e-6 + 1e-6 * away, atol=0.0)


@pytest.mark.parametrize("chunk", [3 * D, 1000], ids=["pieces", "whole"])
@pytest.mark.parametrize("real", [masks, every_slot])
def test_a_pass_finds_the_deviation_on_its_way(real, chunk: int) -> None:
    mask, slot_mask = real()
    rng = torch.Generator().manual_seed(7)
    q = torch.randn(B, H, K, D, generator=rng, dtype=torch.float64)
    x = 2 * torch.randn(B, N, D, generator=rng, dtype=torch.float64) + 1
    shared = Folded(H, False, 0.1, chunk=chunk)
    rstd = reciprocal_deviation(x, 1e-3, mask)
    expected = folded_read(q, None, x, rstd, shared, mask=mask, slot_mask=slot_mask)
    found = folded_read(q, None, x, None, shared, mask=mask, slot_mask=slot_mask, norm_eps=1e-3)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    assert expected[3] is rstd


def three_passes(x: Tensor, q: Tensor, chunk: int, tracked: int = 3, keep: bool = False) -> Tensor:
    shared, rstd = Folded(1, False, 1e-8, keep, chunk=chunk), reciprocal_deviation(x, 1e-3)
    messenger = messages(x, rstd, tracked, K, shared)
    for _ in range(3):
        total, mass, *_ = folded_read(q, None, x, rstd, shared, message=next(messenger))
        q = torch.tanh(total / mass[..., None])
    return q


@pytest.mark.parametrize("chunk", [1, 5 * D, 2 * N * D, 10**6])
def test_gradients_do_not_depend_on_the_chunks_and_messages_may_stay_unused(chunk: int) -> None:
    results = []
    for size, tracked in ((10**6, 3), (chunk, 5)):
        rng = torch.Generator().manual_seed(3)
        x = torch.randn(3, N, D, generator=rng, dtype=torch.float64).requires_grad_()
        q = torch.randn(3, 1, K, D, generator=rng, dtype=torch.float64).requires_grad_()
        out = three_passes(x, q, size, tracked)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, q))))
    torch.testing.assert_close(results[0], results[1], rtol=0.0, atol=1e-12)


def test_the_joint_gradient_of_all_passes_is_right() -> None:
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(2, 7, D, generator=rng, dtype=torch.float64).requires_grad_()
    q = torch.randn(2, 1, K, D, generator=rng, dtype=torch.float64).requires_grad_()
    for keep in (False, True):
        assert torch.autograd.gradcheck(lambda x, q, keep=keep: three_passes(x, q, 4 * D, keep=keep), (x, q))


def test_lean_saves_of_each_input_itself_and_a_number() -> None:
    x = torch.randn(2, 101, D, requires_grad=True)
    q = torch.randn(2, 1, K, D, requires_grad=True)
    seen: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        three_passes(x, q, 10 * D)
    long = [t.shape for t in seen.values() if 101 in t.shape]
    assert sorted(long) == [(2, 101), x.shape]


def test_a_gradient_of_the_weights_alone_leaves_the_next_one_right() -> None:
    x = torch.randn(2, N, D, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 1, K, D, dtype=torch.float64, requires_grad=True)
    loss = three_passes(x, q, 4 * D).square().sum()
    (only_q,) = torch.autograd.grad(loss, q, retain_graph=True)
    first = torch.autograd.grad(loss, (x, q), retain_graph=True)
    second = torch.autograd.grad(loss, (x, q))
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)
    torch.testing.assert_close(only_q, first[1], rtol=0.0, atol=0.0)


def test_a_second_derivative_of_the_lean_form_is_refused() -> None:
    x = torch.randn(2, N, D, requires_grad=True)
    q = torch.randn(2, 1, K, D, requires_grad=True)
    (grad,) = torch.autograd.grad(three_passes(x, q, 4 * D).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("width", "inner", "slots", "iterations", "heads"),
    # the greatest number of heads with which the absorbed form still saves products
    [(64, 64, 7, 3, 4), (768, 256, 11, 3, 8), (64, 64, 16, 3, 2)],
)
def test_absorption_pays_up_to_the_break_even(width: int, inner: int, slots: int, iterations: int, heads: int) -> None:
    facts = {"tokens": 10**6, "width": width, "inner": inner, "slots": slots, "iterations": iterations}
    ratio = inner * (width + iterations * slots) / (width * iterations * slots)
    assert heads <= ratio < heads + 1
    assert absorption_pays(**facts, heads=heads)
    assert not absorption_pays(**facts, heads=heads + 1)


def test_absorption_needs_enough_inputs() -> None:
    facts = {"width": 64, "inner": 64, "slots": 7, "iterations": 3}
    assert absorption_pays(**facts, tokens=64)
    assert not absorption_pays(**facts, tokens=8)


def test_few_slots_of_wide_inputs_break_even_where_their_product_says() -> None:
    facts = {"tokens": 10**8, "width": 768, "inner": 256, "iterations": 1}
    assert absorption_pays(**facts, slots=383)
    assert not absorption_pays(**facts, slots=385)
