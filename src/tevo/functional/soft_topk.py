"""Soft top-k: weights between 0 and 1 that sum to k, in place of the choice of the k largest scores.

    x = argmax <s, x> + eps H(x)  subject to  sum x = k,  0 <= x <= 1,    H(x) = -sum x log x            (1)
    x_i = min(1, exp((s_i + a) / eps)),  one number a for each row                                         (2)

With s sorted downwards and y = exp(s / eps),

    exp(a / eps) = max over j = 0..ceil(k) of (k - j) / (sum over i > j of y_i)                            (3)

because the quotient grows with j for as long as y_j exp(a / eps) > 1: the best j counts the entries at 1 ("taken"; the
others are "free"). So only the ceil(k) largest scores need sorting. *Newton* finds the set without sorting: assume all
free, take those with x > 1, repeat. Where a few of its steps are enough, on scores that spread little beside eps, the exact
solver takes them instead. By the implicit function theorem, over the free entries, with p = x / sum of free x:

    ds = x (g - <p, g>) / eps,    dk = <p, g>,    deps = -<ds, log x>                                      (4)

*Iterations* stops the alternating updates a = eps log k - eps logsumexp((s + b) / eps), b = min(0, -(s + a)) after T of
them, as published. Because s + b = min(s, -a), they are a recursion of one number:

    a_{t+1} = eps log k - eps logsumexp(min(s, -a_t) / eps),   x = min(1, exp((s + a_T) / eps))            (5)

Its fixed point is (2). Near it the error shrinks by J / k an iteration: 50 of them are exact at eps = 1 with scores of unit
variance, and far from it at eps = 0.03. Cost: O(n + k log k); Newton O(n) a step, with 2 of them at eps = 1 and some 20 at
0.02; iterations O(n T). Saved for backward: x; for iterations s, x and T numbers. k = 1 is the softmax of s / eps.
On a CUDA device a kernel takes Newton's steps (:mod:`tevo.kernels.soft_topk`).
Source: CoLT5 (arXiv 2303.09752), section 3.1 and appendix C.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Iterations", "Solver", "readable", "soft_topk"]

# exp of this, times as many terms as a row may have, is finite in single precision; an entry so far above the ceil(k)-th
# is taken, however far it is
_FAR = 60.0
# the greatest less the mean score, in units of eps, up to which few of Newton's steps are enough; steps after which sorting
# is no slower; the least share of the greatest term that loses no digits of single precision
_LITTLE = 6.0
_FEW = 5
_SMALLEST = 1e-25


@dataclass(frozen=True)
class Iterations:
    """T updates of equation (5), as published; the sum is k only if they converge.

    Args:
        steps: T >= 1.
        eps_start: the first update's eps, if above the target; None: the target.
        eps_decay: factor in (0, 1] from one update's eps to the next, down to the target.
        from_zero: b = 0 at first, as in the equations, which makes the result independent of a shift of the scores;
            otherwise b = -s, as the public PyTorch code has it.
    """

    steps: int = 50
    eps_start: float | None = None
    eps_decay: float = 0.7
    from_zero: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no schedule."""
        if self.steps < 1:
            raise ValueError(f"Iterations got steps={self.steps}, expected at least 1")
        if self.eps_start is not None and self.eps_start <= 0:
            raise ValueError(f"Iterations got eps_start={self.eps_start}, expected a number above 0")
        if not 0 < self.eps_decay <= 1:
            raise ValueError(f"Iterations got eps_decay={self.eps_decay}, expected a number above 0, at most 1")


# scores (..., n), k and eps (numbers, or (..., 1) each) give x
Solve: TypeAlias = Callable[[Tensor, float | Tensor, float | Tensor], Tensor]
Solver: TypeAlias = Literal["exact", "newton", "iterations"] | Iterations


def soft_topk(
    scores: Tensor,
    k: float | Tensor,
    *,
    eps: float | Tensor = 1.0,
    mask: Tensor | None = None,
    solver: Solver = "exact",
    at_most: int | None = None,
) -> Tensor:
    """Equation (1) for each row of ``scores`` (..., n); differentiable, twice too, in scores, k and eps.

    Half precision is computed in float32. A row with no more than k real entries gets 1 for each of them, from
    ``iterations`` only in the limit.

    Args:
        scores: (..., n); minus infinity excludes an entry as a mask does.
        k: sum of the weights, > 0, a fraction too; a number, or a tensor that broadcasts to (...), where a row with k = 0
            gets zeros.
        eps: weight of the entropy, > 0; as k. Towards 0 the weights become those of the hard choice.
        mask: bool, broadcastable to (..., n), True = real; the others get exactly 0.
        solver: ``exact`` (equation 3), ``newton`` (the same without sorting), ``iterations`` for ``Iterations()``.
        at_most: greatest entry of a tensor k, which spares looking into it: ``exact`` needs it in a compiled graph.

    Returns:
        (..., n) in the dtype of ``scores``, non-decreasing in them.

    Raises:
        ValueError: for shapes that do not broadcast, numbers out of range, an unknown solver.
    """
    steps = _check(scores, k, eps, mask, solver, at_most)
    s = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    n = s.shape[-1]
    if s.numel() == 0:
        return scores.clone()
    k_row, eps_row = _per_row("k", k, s), _per_row("eps", eps, s)
    if steps is not None:
        return _Iterations.apply(s, _tensor(k_row, s), _tensor(eps_row, s), steps)[0].to(scores.dtype)
    if not isinstance(k, Tensor) and k >= n:
        solve: Solve = _all
    elif solver == "newton" or _has_kernel(s):
        solve = _newton_rows
    else:
        greatest = math.ceil(k) if not isinstance(k, Tensor) else at_most or math.ceil(float(k.detach().max()))
        solve = partial(_exact, top=min(max(greatest, 1), n))
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (s, k_row, eps_row)):
        return _SoftTopk.apply(s, k_row, eps_row, solve).to(scores.dtype)
    # a call through autograd takes as long as a third of the operations on a short row
    return solve(s, k_row, eps_row).to(scores.dtype)


def _check(
    scores: Tensor, k: float | Tensor, eps: float | Tensor, mask: Tensor | None, solver: Solver, at_most: int | None
) -> Iterations | None:
    """Raise what can be told without looking into a tensor; return the iterations if that is the solver."""
    if not scores.is_floating_point() or scores.ndim == 0:
        raise ValueError(
            f"soft_topk got scores of dtype {scores.dtype} and shape {tuple(scores.shape)}, expected floating point (..., n)"
        )
    for name, value in (("k", k), ("eps", eps)):
        if not isinstance(value, Tensor) and not 0 < value < math.inf:
            raise ValueError(f"soft_topk got {name}={value}, expected a finite number above 0")
    if mask is not None and (mask.dtype != torch.bool or not _broadcasts(mask.shape, scores.shape)):
        raise ValueError(
            f"soft_topk got a mask of dtype {mask.dtype} and shape {tuple(mask.shape)}, expected torch.bool that broadcasts "
            f"to {tuple(scores.shape)} with True for real entries"
        )
    if at_most is not None and at_most < 1:
        raise ValueError(f"soft_topk got at_most={at_most}, expected the greatest k, at least 1")
    if isinstance(solver, Iterations):
        return solver
    if solver not in ("exact", "newton", "iterations"):
        raise ValueError(
            f"soft_topk got solver={solver!r}, expected 'exact', 'newton', 'iterations' or an Iterations(...)"
        )
    return Iterations() if solver == "iterations" else None


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _wide(s: Tensor) -> torch.dtype:
    """The dtype of what there is little of."""
    return s.dtype if s.device.type == "mps" else torch.float64


def _per_row(name: str, value: float | Tensor, s: Tensor) -> float | Tensor:
    """A number, or one for each row, with as many dimensions as ``s``, the last of them 1."""
    if not isinstance(value, Tensor):
        return float(value)
    if not _broadcasts(value.shape, s.shape[:-1]):
        raise ValueError(
            f"soft_topk got {name} of shape {tuple(value.shape)}, expected one that broadcasts to {tuple(s.shape[:-1])}, "
            "the shape of the scores without their last dimension"
        )
    return value.to(s.device, _wide(s)).reshape((1,) * (s.ndim - 1 - value.ndim) + (*value.shape, 1))


def _below_one(dtype: torch.dtype) -> float:
    """The largest number below 1: a free entry never rounds to 1, so that x itself says which entries are free."""
    return 1.0 - torch.finfo(dtype).eps / 2


def _all(s: Tensor, k: float | Tensor, eps: float | Tensor) -> Tensor:
    """For k >= n: 1 wherever there is a score."""
    return (s > -math.inf).to(s.dtype)


def _exact(s: Tensor, k: float | Tensor, eps: float | Tensor, *, top: int) -> Tensor:
    """Newton's steps where a few of them are enough, otherwise equation (3)."""
    # which of both looks into the numbers
    found = _few_steps(s, k, eps) if readable(s) else None
    return sorted_form(s, k, eps, top=top) if found is None else found


def _few_steps(s: Tensor, k: float | Tensor, eps: float | Tensor) -> Tensor | None:
    """Newton's steps with one exponential for all, where scores spread little beside eps; None where they do not."""
    ref = s.amax(-1, keepdim=True)
    # minus infinity spreads without limit
    if not bool((ref - s.mean(-1, keepdim=True) <= _LITTLE * eps).all()):
        return None
    y = _over(s - ref, _like(eps, s)).exp_()
    tau = y.sum(-1, keepdim=True).to(_wide(s)) / k
    taken = torch.zeros_like(tau, dtype=torch.long)
    for _ in range(_FEW):
        over = y > tau.to(s.dtype)
        before, taken = taken, over.sum(-1, keepdim=True)
        if bool((taken == before).all()):
            # smaller quotients would stand on terms that may have been rounded to nothing; 0 / 0 is no answer either
            if not bool((tau > _SMALLEST).all()):
                return None
            return y.div_(tau.to(s.dtype)).clamp_(max=_below_one(s.dtype)).masked_fill_(over, 1.0)
        # a number less a whole one would be of single precision
        tau = y.masked_fill(over, 0.0).sum(-1, keepdim=True).to(tau.dtype) / (k - taken.to(tau.dtype))
    return None


def sorted_form(s: Tensor, k: float | Tensor, eps: float | Tensor, *, top: int) -> Tensor:
    """Equation (3) with the ``top`` >= ceil(k) largest scores."""
    v, places = s.topk(top, -1)
    # exponents are taken relative to the ceil(k)-th score: the tail cannot overflow, and what could is taken anyway; with
    # the largest score as reference everything free might underflow
    ref = v[..., -1:] if isinstance(k, float) else _at(v, k.ceil().long() - 1)
    ref = ref.clamp(min=torch.finfo(s.dtype).min)
    # not in place: vmap has no rule for that
    x = _over(s - ref, _like(eps, s)).exp_().scatter(-1, places, 0.0)
    wide = _wide(s)
    y = _over(v.to(wide) - ref, eps).clamp(max=_FAR).exp_()
    # rest[i], sum over the tail and the i smallest of y, is added from the small end
    rest = torch.cat([x.sum(-1, keepdim=True), y.flip(-1)], -1).cumsum(-1)
    # the addend makes 0 / 0 infinite: with nothing left, not even by rounding, all of k are taken
    spare = torch.arange(top + 1, dtype=wide, device=s.device) + (k - top)
    # infinite ones must not meet y = 0; no free entry has more than 1
    scale = (spare.add_(torch.finfo(wide).tiny) / rest).amax(-1, keepdim=True).clamp(0.0, 2.0)  # (eq. 3)
    tops, below = y * scale, _below_one(s.dtype)
    tops = torch.where(tops > 1, 1.0, tops.clamp(max=below))
    return x.mul_(scale.to(s.dtype).clamp(max=below)).scatter(-1, places, tops.to(s.dtype))


def _over(x: Tensor, eps: float | Tensor) -> Tensor:
    """``x`` / eps in its own memory; by the paper's eps of 1 there is nothing to divide."""
    return x if isinstance(eps, float) and eps == 1.0 else x.div_(eps)


def _at(v: Tensor, place: Tensor) -> Tensor:
    """The entry of every row of ``v`` (..., top) at its own ``place`` (..., 1), or at the nearest there is."""
    shape = torch.broadcast_shapes(v.shape[:-1], place.shape[:-1])
    return v.expand(*shape, -1).gather(-1, place.clamp(0, v.shape[-1] - 1).expand(*shape, 1))


def _like(value: float | Tensor, s: Tensor) -> float | Tensor:
    return value.to(s.dtype) if isinstance(value, Tensor) else value


def _newton_rows(s: Tensor, k: float | Tensor, eps: float | Tensor) -> Tensor:
    # an operator of one's own takes as long as a third of the solution of a short row
    solve = _until_rest if readable(s) else _newton
    return solve(s, _tensor(k, s), _tensor(eps, s))


def readable(x: Tensor) -> bool:
    """Whether the numbers of ``x`` can be looked into, without waiting: nobody records, fakes, or maps over them."""
    if x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _tensor(value: float | Tensor, s: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else s.new_full((1,) * s.ndim, value, dtype=_wide(s))


def _has_kernel(s: Tensor) -> bool:
    if s.device.type != "cuda":
        return False
    from tevo.kernels.soft_topk import runs

    return runs(s)


# an operator, since a loop until rest cannot be traced
@torch.library.custom_op("tevo::soft_topk_newton", mutates_args=())
def _newton(s: Tensor, k: Tensor, eps: Tensor) -> Tensor:
    if _has_kernel(s):
        from tevo.kernels.soft_topk import solve

        return solve(s, k, eps)
    return _until_rest(s, k, eps)


@_newton.register_fake
def _(s: Tensor, k: Tensor, eps: Tensor) -> Tensor:
    return torch.empty_like(s)


@_newton.register_vmap
def _(info: Any, dims: tuple[int | None, ...], s: Tensor, k: Tensor, eps: Tensor) -> tuple[Tensor, int]:
    s, k, eps = _to_front(info.batch_size, dims, s, k, eps)
    return _newton(s, k, eps), 0


def _until_rest(s: Tensor, k: Tensor, eps: Tensor) -> Tensor:
    real = s > -math.inf
    count = real.sum(-1, keepdim=True)
    free = real & (k < count)
    e = eps.to(s.dtype)
    while True:
        left = s.masked_fill(~free, -math.inf)
        ref = left.amax(-1, keepdim=True)
        y = (left - ref.masked_fill(ref == -math.inf, 0.0)).div_(e).exp_()
        tau = y.sum(-1, keepdim=True).to(k.dtype) / (k - count + free.sum(-1, keepdim=True))
        over = y > tau.to(s.dtype)
        # the set, not the number, must come to rest: a number may go on changing by rounding
        if not bool(over.any()):
            below = _below_one(s.dtype)
            return torch.where(free, (y / tau.to(s.dtype)).clamp(max=below), real.to(s.dtype))
        free &= ~over


def _to_front(size: int, dims: tuple[int | None, ...], *inputs: Any) -> list[Any]:
    """Vmap: the mapped dimension becomes the first one of the rows; scores, the first of the inputs, have it in full."""
    s, *others = (
        t if not isinstance(t, Tensor) else t[None] if dim is None else t.movedim(dim, 0)
        for t, dim in zip(inputs, dims, strict=True)
    )
    return [s.expand(size, *s.shape[1:]), *others]


class _SoftTopk(torch.autograd.Function):
    """Any solver of equation (1), with equation (4)."""

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return _SoftTopk.apply(*_to_front(info.batch_size, dims, *inputs)), 0

    @staticmethod
    def forward(s: Tensor, k: float | Tensor, eps: float | Tensor, solve: Solve) -> Tensor:
        return solve(s, k, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *(t for t in inputs[1:3] if isinstance(t, Tensor)))
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in inputs[1:3]]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        # x is this function's own output, so that these lines are differentiable in everything they come from
        x, *rest = ctx.saved_tensors
        k, eps = (rest.pop(0) if number is None else number for number in ctx.numbers)
        w = torch.where(x < 1, x, 0.0)
        # the shares first: a row with one free entry then has a gradient of exactly 0
        mean = torch.linalg.vecdot(w / _positive(w.sum(-1, keepdim=True)), g)[..., None]
        ds = (g - mean) * w
        if not (isinstance(eps, float) and eps == 1.0):
            ds = ds / _like(eps, x)
        dk = _collect(mean, k) if ctx.needs_input_grad[1] else None
        deps = _collect(-(ds * _positive(w).log()).sum(-1, keepdim=True), eps) if ctx.needs_input_grad[2] else None
        return ds, dk, deps, None


# torch asks for the signature at each call; unless it is kept, finding it takes a tenth of the time of a short row
_SoftTopk.forward.__signature__ = inspect.signature(_SoftTopk.forward)  # type: ignore[attr-defined]


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _collect(gradient: Tensor, of: Tensor) -> Tensor:
    return gradient.sum_to_size(of.shape).to(of.dtype)


def _schedule(eps: Tensor, steps: Iterations) -> list[Tensor]:
    """The eps of each update, and of the output."""
    start = eps if steps.eps_start is None else eps.clamp(min=steps.eps_start)
    return [torch.maximum(start * steps.eps_decay**t, eps) for t in range(steps.steps + 1)]


class _Iterations(torch.autograd.Function):
    """Equation (5), with its exact gradients: all a_t are outputs too, which makes the backward pass differentiable."""

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _Iterations.apply(*_to_front(info.batch_size, dims, *inputs)), (0, 0)

    @staticmethod
    def forward(s: Tensor, k: Tensor, eps: Tensor, steps: Iterations) -> tuple[Tensor, Tensor]:
        real = s > -math.inf
        log_k = k.log().to(s.dtype)
        *updates, final = [e.to(s.dtype) for e in _schedule(eps, steps)]
        u = s if steps.from_zero else torch.where(real, 0.0, s)
        path = []
        for e in updates:
            a = e * (log_k - (u / e).logsumexp(-1, keepdim=True))
            # a row without a real entry
            path.append(a.masked_fill(a == math.inf, 0.0))
            u = torch.minimum(s, -path[-1])
        x = ((s + path[-1]).clamp(max=0.0) / final).exp()
        return x, torch.cat(path, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        s, k, eps, ctx.steps = inputs
        ctx.save_for_backward(s, k, eps, *output)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_path: Tensor) -> tuple[Tensor | None, ...]:
        s, k, eps, x, path = ctx.saved_tensors
        steps: Iterations = ctx.steps
        schedule = _schedule(eps, steps)
        *updates, final = [e.to(s.dtype) for e in schedule]
        k_s, real = k.to(s.dtype), s > -math.inf
        a, g_a = path.split(1, -1), list(g_path.split(1, -1))
        ds = torch.where(s + a[-1] < 0, g * x, 0.0) / final
        dk, deps = torch.zeros_like(g_a[0]), torch.zeros_like(g_a[0])
        # where an eps of the schedule lies above the target, the target has no part in it
        at_target = [(e == eps).to(s.dtype) for e in schedule]
        if ctx.needs_input_grad[2]:
            deps = deps - at_target[-1] * (ds * _positive(x).log()).sum(-1, keepdim=True)
        g_a[-1] = g_a[-1] + ds.sum(-1, keepdim=True)
        for t in reversed(range(steps.steps)):
            e = updates[t]
            if t > 0:
                u, free = torch.minimum(s, -a[t - 1]), s < -a[t - 1]
            elif steps.from_zero:
                u, free = s, real
            else:
                u, free = torch.where(real, 0.0, s), torch.zeros_like(real)
            # an infinite quotient would have no derivative
            q = torch.where(real, ((torch.where(real, u, 0.0) + a[t]) / e).exp(), 0.0)
            w = q / k_s * g_a[t]
            ds = ds - torch.where(free, w, 0.0)
            if t > 0:
                g_a[t - 1] = g_a[t - 1] + torch.where(free, 0.0, w).sum(-1, keepdim=True)
            dk = dk + g_a[t] * e / k_s
            if ctx.needs_input_grad[2]:
                deps = deps + at_target[t] * (w * _positive(q).log()).sum(-1, keepdim=True)
        return ds, _collect(dk, k), _collect(deps, eps), None
