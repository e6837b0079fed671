"""Linear attention on features that the caller has already applied: the core of kernel, retention and delta-rule mixers.

    S_t = e^{g_t} S_{t-1} + k_t u_t^T,    y_t = S_t^T q_t                                           (1)
    u_t = v_t,    or with the delta rule    u_t = beta_t (v_t - e^{g_t} S_{t-1}^T k_t)              (2)

and, bidirectional, y_t = (sum_s k_s v_s^T)^T q_t. The normalised form divides y_t by q_t . z_t + eps, where z is the sum of
the keys under the same decay: a column of ones appended to v. Letters: p features of a key, v width of a value, r chunks,
c tokens of a chunk, G_i = g_1 + ... + g_i inside a chunk. Cost of the chunked form, per token and head: about
2 c (p + v) + 4 p v FLOPs; state: p v numbers a head. Sources: arXiv:2006.16236, arXiv:2307.08621, arXiv:2406.06484.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tevo.functional.precision import island
from tevo.functional.scan import matrix_scan, scan

__all__ = [
    "causal_linear_attention",
    "linear_attention",
    "normalised_causal_linear_attention",
    "normalised_linear_attention",
    "recurrent_linear_attention",
]


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every query sees every key: q (b, h, n, p), k (b, h, m, p), v (b, h, m, v) give y (b, h, n, v).

    Padding is left out by zeroing its rows of k.
    """
    return q @ (k.mT @ v)


def normalised_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-6) -> Tensor:
    """:func:`linear_attention` divided by q . sum(k) + eps, so that non-negative features average v."""
    return _divide(linear_attention(q, k, _append_ones(v)), eps)


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Equations (1) and (2), chunk by chunk: products inside a chunk, a scan of the states between chunks.

    A single token is one step of :func:`recurrent_linear_attention`, so that the same call decodes. Half precision is
    computed in float32; y comes back in the dtype of v, the state in float32.

    Args:
        q: queries (b, h, n, p).
        k: keys (b, h, n, p); with the delta rule of norm <= 1, or the state may grow.
        v: values (b, h, n, v).
        g: log-decay <= 0 of each step (b, h, n), or of each head (h,); None is no decay.
        beta: writing strength of the delta rule (b, h, n); None writes v itself.
        state: S_0 (b, h, p, v); None is zero.
        chunk: tokens of a chunk, >= 1.

    Returns:
        y (b, h, n, v), and S_n (b, h, p, v).

    Raises:
        ValueError: if the shapes do not fit.
    """
    dtype = v.dtype
    q, k, v, g, beta, state = _prepare("causal_linear_attention", q, k, v, g, beta, state)
    if chunk < 1:
        raise ValueError(f"causal_linear_attention got chunk={chunk}, expected >= 1")
    # the inputs were widened, and autocast would narrow the products again
    with island(q):
        y, state = _in_chunks(q, k, v, g, beta, state, chunk)
    return y.to(dtype), state


def _in_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    n = q.shape[2]
    if n <= 1:
        return _recurrent(q, k, v, g, beta, state)
    c = min(chunk, n)
    # split rather than slices: the gradient of a slice has the size of the whole
    sizes = [n - n % c, n % c] if n % c else [n]
    q_i, k_i, v_i = (t.split(sizes, 2) for t in (q, k, v))
    g_i = [g] * len(sizes) if g is None or g.dim() == 1 else g.split(sizes, 2)
    beta_i = [beta] * len(sizes) if beta is None else beta.split(sizes, 2)
    ys = []
    for i, size in enumerate(sizes):
        y, state = _chunked(q_i[i], k_i[i], v_i[i], g_i[i], beta_i[i], state, min(c, size))
        ys.append(y)
    return torch.cat(ys, 2) if len(ys) > 1 else ys[0], state


def normalised_causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    state: Tensor | None = None,
    eps: float = 1e-6,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """:func:`causal_linear_attention` divided by q_t . z_t + eps; the state (b, h, p, v + 1) holds z as its last column."""
    y, state = causal_linear_attention(q, k, _append_ones(v), g=g, state=state, chunk=chunk)
    return _divide(y, eps), state


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain form of :func:`causal_linear_attention`, one token after another: the reference."""
    y, last = _recurrent(*_prepare("recurrent_linear_attention", q, k, v, g, beta, state))
    return y.to(v.dtype), last


def _prepare(
    name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Check shapes and bring all to one dtype."""
    if q.dim() != 4 or k.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"{name} got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, expected (b, h, n, p) twice and "
            "(b, h, n, v); repeat shared heads"
        )
    b, h, n, p = q.shape
    if g is not None and g.shape not in ((b, h, n), (h,)):
        raise ValueError(f"{name} got g of shape {tuple(g.shape)}, expected (b, h, n) = {(b, h, n)} or (h,) = ({h},)")
    if beta is not None and beta.shape != (b, h, n):
        raise ValueError(f"{name} got beta of shape {tuple(beta.shape)}, expected (b, h, n) = {(b, h, n)}")
    if state is None:
        state = v.new_zeros(b, h, p, v.shape[-1])
    elif state.shape != (b, h, p, v.shape[-1]):
        raise ValueError(f"{name} got state of shape {tuple(state.shape)}, expected {(b, h, p, v.shape[-1])}")
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.promote_types(v.dtype, state.dtype))
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    q, k, v, state = q.to(dtype), k.to(dtype), v.to(dtype), state.to(dtype)
    return q, k, v, None if g is None else g.to(dtype), None if beta is None else beta.to(dtype), state


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, s: Tensor
) -> tuple[Tensor, Tensor]:
    decay = None if g is None else (g[:, None].expand(-1, q.shape[2]) if g.dim() == 1 else g).exp()[..., None, None]
    ys = []
    # unbind rather than indexing: the gradient of an index has the size of the whole
    for t, (q_t, k_t, u) in enumerate(zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True)):
        if decay is not None:
            s = decay[..., t, :, :] * s
        if beta is not None:
            u = beta[:, :, t, None] * (u - (k_t[..., None, :] @ s).squeeze(2))  # (eq. 2)
        s = torch.addcmul(s, k_t[..., None], u[..., None, :])
        ys.append(q_t[..., None, :] @ s)  # b h 1 v
    return torch.cat(ys, 2) if ys else v, s


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, state: Tensor, c: int
) -> tuple[Tensor, Tensor]:
    """The chunked form; c divides n."""
    b, h, n, p = q.shape
    r = n // c
    q, k, u = (t.reshape(b * h, r, c, t.shape[-1]) for t in (q, k, v))
    state = state.flatten(0, 1)
    scores = q @ k.mT  # bh r c c
    if g is None:
        scores = scores.tril()
    left = q.new_ones(1)  # of a state after a whole chunk
    earlier = k  # keys as a state's end of chunk sees them
    if g is not None:
        g = g.repeat(b)[:, None, None].expand(-1, 1, c) if g.dim() == 1 else g.reshape(b * h, r, c)
        sums = g.cumsum(-1)  # bh #r c
        # exponents are differences within a chunk, <= 0 where they count: nothing overflows and nothing is divided
        within = _difference(sums).exp()  # bh #r c c
        scores = scores * within
        fade = sums.exp()[..., None]
        left, q = fade[..., -1, :], q * fade
        earlier = k * (sums[..., -1:] - sums).exp()[..., None]
    if beta is None:
        added = (earlier.mT @ u).flatten(2)  # bh r pv
        states, last = scan(left, added, state.flatten(1))
        states = _before(states, state.flatten(1)).unflatten(2, (p, -1))
        last = last.unflatten(1, (p, -1))
    else:
        # with S the state before the chunk, u = x - w S solves (eq. 2) for all tokens of a chunk at once
        strength = beta.reshape(b * h, r, c, 1)
        lower = (strength * (k @ k.mT)).tril(-1)
        seen = k
        if g is not None:
            lower, seen = lower * within, k * fade
        x, w = torch.linalg.solve_triangular(
            lower, strength * torch.cat([u, seen], -1), upper=False, unitriangular=True
        ).split([u.shape[-1], p], -1)
        keep = left[..., None] * torch.eye(p, dtype=q.dtype, device=q.device) - earlier.mT @ w  # bh r p p
        states, last = matrix_scan(keep, earlier.mT @ x, state)
        states = _before(states, state)
        u = x - w @ states
    y = scores @ u + q @ states
    return y.reshape(b, h, n, v.shape[-1]), last.unflatten(0, (b, h))


def _difference(sums: Tensor) -> Tensor:
    """G_i - G_j for j <= i, and -inf above the diagonal."""
    c = sums.shape[-1]
    future = torch.ones(c, c, dtype=torch.bool, device=sums.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(future, -torch.inf)


def _before(states: Tensor, first: Tensor) -> Tensor:
    """first, S_1..S_{r-1}."""
    return torch.cat([first[:, None], states[:, :-1]], 1)


def _append_ones(v: Tensor) -> Tensor:
    return torch.cat([v, torch.ones_like(v[..., :1])], -1)


def _divide(y: Tensor, eps: float) -> Tensor:
    return y[..., :-1] / (y[..., -1:] + eps)
