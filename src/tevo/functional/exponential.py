"""Running exponential averages: the core of AFT and of RWKV-4's time mixing.

    y_t = (e^{b_t} v_t + sum_{s<t} e^{k_s - (t-1-s) w} v_s) / (e^{b_t} + sum_{s<t} e^{k_s - (t-1-s) w}),   b_t = u + k_t

and, without a bonus u, the plain decayed average whose current token weighs e^{k_t}:

    y_t = sum_{s<=t} e^{k_s - (t-s) w} v_s / sum_{s<=t} e^{k_s - (t-s) w}

Every exponent is taken relative to the running maximum m_t = max(m_{t-1} - w, k_t), which never looks at the future, so
that no size of k overflows. Cost: O(n d) FLOPs; state: 3 d numbers. Source: arXiv:2305.13048, arXiv:2105.14103.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from tevo.functional.scan import scan

__all__ = ["WkvState", "sequential_wkv", "wkv", "wkv_state"]

# the maximum over no token: finite, so that differences of maxima are never NaN, and below any log-weight
_LOWEST = -1e38
_EMPTY = 1e-30
_CHUNK = 16

WkvState: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


def wkv(
    k: Tensor, v: Tensor, *, decay: Tensor, bonus: Tensor | None, state: WkvState | None = None
) -> tuple[Tensor, WkvState]:
    """Average v over the past with weights e^k that decay.

    With the running maximum taken out, numerator and denominator are two diagonal recurrences with the same factors
    e^{m_{t-1} - w - m_t} <= 1. Half precision is computed in float32; y comes back in the dtype of v, the state stays
    in the wider one.

    Args:
        k: log-weights (b, n, d); -inf leaves a token out.
        v: values (b, n, d).
        decay: w (d,), what a log-weight loses per step, >= 0; the sums must not grow.
        bonus: u (d,), added to the current token's log-weight in its own output only; None is the plain average.
        state: (numerator, denominator, maximum), each (b, d), as returned; None is :func:`wkv_state`.

    Returns:
        y (b, n, d), zero where no token has been seen, and the state after the last token.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if k.shape[1:2] == (1,):
        # the scan's kernels do not pay for a single token
        return sequential_wkv(k, v, decay=decay, bonus=bonus, state=state)
    dtype = v.dtype
    k, v, decay, bonus, (num, den, top) = _prepare("wkv", k, v, decay, bonus, state)
    with torch.no_grad():
        # the result does not depend on the maxima: they are constants to autograd
        tops = _decayed_maximum(k, decay[None], top)
        earlier = _before(tops, top)
    a = (earlier - tops - decay).exp()
    e = (k - tops).exp()
    nums, num_last = scan(a, e * v, num)
    dens, den_last = scan(a, e, den)
    if bonus is not None:
        nums, dens = _with_bonus(k + bonus, v, _before(nums, num), _before(dens, den), earlier)
    return _ratio(nums, dens).to(dtype), (num_last, den_last, tops[:, -1] if k.shape[1] else top)


def sequential_wkv(
    k: Tensor, v: Tensor, *, decay: Tensor, bonus: Tensor | None, state: WkvState | None = None
) -> tuple[Tensor, WkvState]:
    """The plain form of :func:`wkv`, one token after another: the reference."""
    dtype = v.dtype
    k, v, decay, bonus, (num, den, top) = _prepare("sequential_wkv", k, v, decay, bonus, state)
    ys = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        if bonus is not None:
            ys.append(_ratio(*_with_bonus(k_t + bonus, v_t, num, den, top)))
        new = torch.maximum(top - decay, k_t).detach()
        fade, e = (top - decay - new).exp(), (k_t - new).exp()
        num, den, top = fade * num + e * v_t, fade * den + e, new
        if bonus is None:
            ys.append(_ratio(num, den))
    return (torch.stack(ys, 1) if ys else v).to(dtype), (num, den, top)


def wkv_state(batch: int, like: Tensor) -> WkvState:
    """The state before the first token for ``batch`` sequences, in the width, dtype and device of ``like`` (d,)."""
    like = like.new_zeros(batch, like.shape[-1], dtype=_inner(like.dtype))
    return like, like.clone(), torch.full_like(like, _LOWEST)


def _inner(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _prepare(
    name: str, k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor | None, state: WkvState | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, WkvState]:
    """Check shapes and bring all to one dtype."""
    if k.dim() != 3 or k.shape != v.shape:
        raise ValueError(f"{name} got k {tuple(k.shape)} and v {tuple(v.shape)}, expected both (b, n, d)")
    b, _, d = k.shape
    for what, vector in (("decay", decay), ("bonus", bonus)):
        if vector is not None and vector.shape != (d,):
            raise ValueError(f"{name} got {what} of shape {tuple(vector.shape)}, expected (d,) = ({d},)")
    if state is None:
        state = wkv_state(b, k[0, 0] if k.numel() else k.new_zeros(d))
    elif any(s.shape != (b, d) for s in state):
        raise ValueError(f"{name} got states of shapes {[tuple(s.shape) for s in state]}, expected (b, d) = ({b}, {d})")
    dtype = _inner(torch.promote_types(torch.promote_types(k.dtype, v.dtype), decay.dtype))
    num, den, top = (s.to(dtype) for s in state)
    return (
        k.to(dtype),
        v.to(dtype),
        decay.to(dtype),
        None if bonus is None else bonus.to(dtype),
        (num, den, top.detach()),
    )


def _with_bonus(b: Tensor, v: Tensor, num: Tensor, den: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of the past (num, den, top) and a current token of log-weight b."""
    new = torch.maximum(top, b).detach()
    past, now = (top - new).exp(), (b - new).exp()
    return past * num + now * v, past * den + now


def _before(x: Tensor, first: Tensor) -> Tensor:
    """first, x_1..x_{n-1}."""
    return torch.cat([first[:, None], x], 1)[:, : x.shape[1]]


def _ratio(num: Tensor, den: Tensor) -> Tensor:
    # the largest weight is 1, so that only a sum over no token is smaller
    return num / den.clamp_min(_EMPTY)


@torch.library.custom_op("tevo::decayed_maximum", mutates_args=())
def _decayed_maximum(k: Tensor, decay: Tensor, top: Tensor) -> Tensor:
    """All m_t = max(m_{t-1} - w, k_t) for w (#b, d), by rows that advance together as in :func:`tevo.functional.scan.scan`."""
    x = k.new_empty(k.shape)
    _fill(k, x, decay, top)
    return x


@_decayed_maximum.register_fake
def _(k: Tensor, decay: Tensor, top: Tensor) -> Tensor:
    return k.new_empty(k.shape)


@_decayed_maximum.register_vmap
def _(info: Any, dims: tuple[int | None, ...], k: Tensor, decay: Tensor, top: Tensor) -> tuple[Tensor, int]:
    """The mapped dimension joins the batch; each row then has a decay of its own."""
    k, decay, top = (
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((k, decay, top), dims, strict=True)
    )
    x = _decayed_maximum(k.flatten(0, 1), decay.expand_as(top).flatten(0, 1), top.flatten(0, 1))
    return x.unflatten(0, k.shape[:2]), 0


def _fill(k: Tensor, x: Tensor, decay: Tensor, top: Tensor) -> Tensor:
    rows = k.shape[1] // _CHUNK
    cut = rows * _CHUNK if rows > 1 else 0
    if cut:
        k_j, x_j = (t.unfold(1, _CHUNK, _CHUNK).unbind(-1) for t in (k, x))  # each of the _CHUNK entries: b r d
        end = k_j[0]
        for j in range(1, _CHUNK):
            end = torch.maximum(end - decay[:, None], k_j[j])
        ends = torch.empty_like(end)
        _fill(end, ends, decay * _CHUNK, top)
        start = torch.cat([top[:, None], ends[:, :-1]], 1)
        for j in range(_CHUNK):
            start = torch.maximum(start - decay[:, None], k_j[j], out=x_j[j])
        top = ends[:, -1]
    for k_t, x_t in zip(k[:, cut:].unbind(1), x[:, cut:].unbind(1), strict=True):
        top = torch.maximum(top - decay, k_t, out=x_t)
    return top
