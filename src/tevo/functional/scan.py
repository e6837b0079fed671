"""Linear recurrences over time: the core of state-space, gated recurrent and linear-attention mixers.

    x_t = a_t x_{t-1} + b_t,    t = 1..n, from a carried-in x_0

with ``a`` diagonal, real or complex (:func:`scan`), or a matrix (:func:`matrix_scan`). Any sign of ``a``, and a = 0,
are allowed: no logarithm is taken. Cost: O(n d) FLOPs; state: d numbers.

Each recurrence and its adjoint, the same recurrence backwards in time,

    y_t = a_{t+1} y_{t+1} + g_t,    t = n..1, with a_{n+1} y_{n+1} = c carried in and a_1 y_1 carried out

is a custom operator, so that a compiler sees one node whatever the length, inside an autograd function; each of the two
is the derivative of the other, so that derivatives of any order are exact. Letters: b batch, n tokens, d channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["matrix_scan", "scan", "sequential_scan"]

# steps that all rows of a level take together; 16 and 32 are equally fast from n = 1k to 16k, and 16 needs fewer tails
_CHUNK = 16


def scan(a: Tensor, b: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All x_t of x_t = a_t x_{t-1} + b_t, in O(log n) levels of about 3 x 16 kernels.

    Half precision is computed in float32; x comes back in the dtype of the inputs, the state in float32.

    Args:
        a: multipliers that broadcast to b: (b, n, d), (n, d), a constant (d,), or with 1 in any place.
        b: inputs (b, n, d).
        state: x_0 (b, d); None is zero.

    Returns:
        x (b, n, d), and x_n (b, d), which is x_0 when n = 0.

    Raises:
        ValueError: if the shapes do not fit.
    """
    a, b, state, dtype = _prepare("scan", a, b, state)
    x, last = _run(_Scan, a, b, state)
    return x.to(dtype), last


def sequential_scan(a: Tensor, b: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The plain form of :func:`scan`, one step after another: the reference, slow to train through."""
    a, b, x, dtype = _prepare("sequential_scan", a, b, state)
    xs = []
    # unbind: indexing inside the loop would make the backward quadratic, as each index has a full-size gradient
    for a_t, b_t in zip(a.expand(-1, b.shape[1], -1).unbind(1), b.unbind(1), strict=True):
        x = a_t * x + b_t
        xs.append(x)
    return (torch.stack(xs, 1) if xs else b).to(dtype), x


def matrix_scan(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All x_t of x_t = a_t x_{t-1} + b_t with matrices, one batched product after another.

    For recurrences over few steps (chunks, not tokens).

    Args:
        a: (b, n, p, p).
        b: (b, n, p, v), of the same dtype.
        state: x_0 (b, p, v).

    Returns:
        x (b, n, p, v), and x_n (b, p, v).

    Raises:
        ValueError: if the shapes do not fit.
    """
    if b.dim() != 4 or a.shape != (*b.shape[:3], b.shape[2]) or state.shape != (b.shape[0], *b.shape[2:]):
        raise ValueError(
            f"matrix_scan got a {tuple(a.shape)}, b {tuple(b.shape)}, state {tuple(state.shape)}, expected (b, n, p, p), "
            "(b, n, p, v), (b, p, v)"
        )
    return _run(_MatrixScan, a, b, state)


def _prepare(name: str, a: Tensor, b: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
    """Check shapes and bring all to one dtype: a (#b, #n, #d), b (b, n, d), state (b, d), and the dtype of x."""
    if b.dim() != 3:
        raise ValueError(
            f"{name} got b of shape {tuple(b.shape)}, expected (b, n, d); fold heads into batch or channels"
        )
    a = a.reshape((1,) * (3 - a.dim()) + a.shape)
    if a.dim() != 3 or any(i not in (1, j) for i, j in zip(a.shape, b.shape, strict=True)):
        raise ValueError(f"{name} got a of shape {tuple(a.shape)}, expected one that broadcasts to b {tuple(b.shape)}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    if state is None:
        state = b.new_zeros(b.shape[0], b.shape[2])
    elif state.shape != (b.shape[0], b.shape[2]):
        raise ValueError(
            f"{name} got state of shape {tuple(state.shape)}, expected (b, d) = {(b.shape[0], b.shape[2])}"
        )
    inner = torch.promote_types(dtype, state.dtype)
    if inner in (torch.float16, torch.bfloat16):
        inner = torch.float32
    return a.to(inner), b.to(inner), state.to(inner), dtype


def _steps(a: Tensor, b: Tensor, x: Tensor, carry: Tensor, reverse: bool) -> Tensor:
    """Fill x (b, n, d) step by step; all time axes are dimension 1."""
    n = b.shape[1]
    a_t, b_t, x_t = a.expand(-1, n, *a.shape[2:]).unbind(1), b.unbind(1), x.unbind(1)
    for t in reversed(range(n)) if reverse else range(n):
        carry = torch.addcmul(b_t[t], a_t[t], carry, out=x_t[t])
    return carry


def _fill(a: Tensor, b: Tensor, x: Tensor, carry: Tensor, reverse: bool) -> Tensor:
    """Fill x (b, n, d) by rows of ``_CHUNK`` steps that advance together, and return the last state.

    First every row's own effect: x_end = p x_start + e. Then the states at the row ends, a scan of n / _CHUNK steps
    over (p, e). Then every row again, from its true start. Recomputing the rows moves fewer bytes than storing the
    running products of ``a`` and correcting.
    """
    n = b.shape[1]
    if n < 2 * _CHUNK:
        return _steps(a, b, x, carry, reverse)
    rows = n // _CHUNK
    cut = rows * _CHUNK
    whole, rest = (slice(n - cut, n), slice(n - cut)) if reverse else (slice(cut), slice(cut, n))
    # each of the _CHUNK entries: (b, r, d)
    a_j = (a[:, whole] if a.shape[1] > 1 else a.expand(-1, cut, -1)).unfold(1, _CHUNK, _CHUNK).unbind(-1)
    b_j, x_j = (t[:, whole].unfold(1, _CHUNK, _CHUNK).unbind(-1) for t in (b, x))
    first, *others = reversed(range(_CHUNK)) if reverse else range(_CHUNK)
    p, e = a_j[first].clone(), b_j[first].clone()
    for j in others:
        torch.addcmul(b_j[j], a_j[j], e, out=e)
        torch.mul(p, a_j[j], out=p)
    ends = torch.empty_like(e)
    _fill(p, e, ends, carry, reverse)
    if reverse:
        start, last = torch.cat([ends[:, 1:], carry[:, None]], 1), ends[:, 0]
    else:
        start, last = torch.cat([carry[:, None], ends[:, :-1]], 1), ends[:, -1]
    for j in (first, *others):
        start = torch.addcmul(b_j[j], a_j[j], start, out=x_j[j])
    return _steps(a[:, rest] if a.shape[1] > 1 else a, b[:, rest], x[:, rest], last, reverse)


def _later(a: Tensor) -> Tensor:
    """a_2..a_n, or the constant."""
    return a[:, 1:] if a.shape[1] > 1 else a


@torch.library.custom_op("tevo::scan", mutates_args=())
def _scan(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    x = b.new_empty(b.shape)
    # an operator's outputs may not share memory with each other or with its inputs
    return x, _fill(a, b, x, state, False).clone()


@torch.library.custom_op("tevo::scan_adjoint", mutates_args=())
def _scan_adjoint(a: Tensor, g: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    y = g.new_empty(g.shape)
    if g.shape[1] == 0:
        return y, carry.clone()
    torch.add(g[:, -1], carry, out=y[:, -1])
    return y, a[:, 0] * _fill(_later(a), g[:, :-1], y[:, :-1], y[:, -1], True)


@torch.library.custom_op("tevo::matrix_scan", mutates_args=())
def _matrix_scan(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    x = b.new_empty(b.shape)
    for a_t, b_t, x_t in zip(a.unbind(1), b.unbind(1), x.unbind(1), strict=True):
        state = torch.baddbmm(b_t, a_t, state, out=x_t)
    return x, state.clone()


@torch.library.custom_op("tevo::matrix_scan_adjoint", mutates_args=())
def _matrix_scan_adjoint(a: Tensor, g: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    y = g.new_empty(g.shape)
    for a_t, g_t, y_t in zip(reversed(a.unbind(1)), reversed(g.unbind(1)), reversed(y.unbind(1)), strict=True):
        torch.add(g_t, carry, out=y_t)
        carry = a_t @ y_t
    return y, carry.clone()


def _fake(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), state.new_empty(state.shape)


def _batched(run: Any, info: Any, dims: tuple[int | None, ...], a: Tensor, b: Tensor, state: Tensor) -> Any:
    """Vmap: the mapped dimension joins the batch."""
    b, state = (
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in ((b, dims[1]), (state, dims[2]))
    )
    if dims[0] is not None:
        a = a.movedim(dims[0], 0)
    elif a.shape[0] > 1:
        a = a[None]
    if a.dim() == b.dim():
        a = a.expand(*b.shape[:2], *a.shape[2:]).flatten(0, 1)
    outputs = run(a, b.flatten(0, 1), state.flatten(0, 1))
    return tuple(t.unflatten(0, b.shape[:2]) for t in outputs), (0, 0)


for _operator in (_scan, _scan_adjoint, _matrix_scan, _matrix_scan_adjoint):
    _operator.register_fake(_fake)
    _operator.register_vmap(partial(_batched, _operator))


def _run(function: Any, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return function.apply(a, b, state)


def _before(x: Tensor, first: Tensor) -> Tensor:
    """first, x_1..x_{n-1}."""
    return torch.cat([first[:, None], x], 1)[:, : x.shape[1]]


# functions rather than derivatives registered with the operators, which torch.func refuses


class _Recurrence(torch.autograd.Function):
    """A forward recurrence; ``adjoint`` is the function that runs its transpose backwards in time."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        a, _, state = inputs
        ctx.save_for_backward(a, state, output[0])


class _Scan(_Recurrence):
    @staticmethod
    def forward(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return _scan(a, b, state)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_last: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        a, state, x = ctx.saved_tensors
        y, g_state = _run(_ScanAdjoint, a.conj(), g, g_last)
        g_a = (y * _before(x, state).conj()).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        return g_a, y, g_state


class _ScanAdjoint(_Recurrence):
    @staticmethod
    def forward(a: Tensor, g: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return _scan_adjoint(a, g, carry)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_first: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        a, _, y = ctx.saved_tensors
        x, g_carry = _run(_Scan, a.conj(), g, g_first)
        g_a = (_before(x, g_first) * y.conj()).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        return g_a, x, g_carry


class _MatrixScan(_Recurrence):
    @staticmethod
    def forward(a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return _matrix_scan(a, b, state)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_last: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        a, state, x = ctx.saved_tensors
        y, g_state = _run(_MatrixScanAdjoint, a.mH, g, g_last)
        return y @ _before(x, state).mH if ctx.needs_input_grad[0] else None, y, g_state


class _MatrixScanAdjoint(_Recurrence):
    @staticmethod
    def forward(a: Tensor, g: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
        return _matrix_scan_adjoint(a, g, carry)

    @staticmethod
    def backward(ctx: Any, g: Tensor, g_first: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        a, _, y = ctx.saved_tensors
        x, g_carry = _run(_MatrixScan, a.mH, g, g_first)
        return _before(x, g_first) @ y.mH if ctx.needs_input_grad[0] else None, x, g_carry
