"""ALiBi, one head and one distance at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn

GOLDEN = "softmax_alibi_a.npz"


def reference(module: nn.Module, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
    """Scaled products minus slope times |i - j|."""
    h, e = q.shape[1], q.shape[-1]
    rows = []
    for head, slope in enumerate(slopes(h)):
        s = torch.einsum("bne,bme->bnm", q[:, head], k[:, head]) / math.sqrt(e)
        rows.append(s - slope * (q_at[:, :, None] - k_at[:, None, :]).abs().to(q.dtype))
    return torch.stack(rows, 1)


def slopes(h: int) -> list[float]:
    """A geometric sequence from 2^(-8/h) with that ratio; other counts borrow every other slope of the next power."""
    power = 2 ** math.floor(math.log2(h))
    own = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    next_power = [2.0 ** (-8.0 * (i + 1) / (2 * power)) for i in range(2 * power)]
    return own + next_power[0::2][: h - power]


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The transformers package's Bloom attention: causal, causal with left padding, decoded; and its slopes."""
    from tevo.mixers.softmax.multi_head import MultiHead
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    for name, theirs in arrays.items():
        if name.startswith("slopes_"):
            ours = system.ALiBi(heads=len(theirs)).double().exponents.exp2()
            yield name, ours, theirs, 1e-12
    heads = MultiHead(dim=12, heads=3, bias=True)
    mixer = SoftmaxAttention(dim=12, heads=heads, position=system.ALiBi(heads=3), causal=True).double()
    with torch.no_grad():
        for kind in ("weight", "bias"):
            # rows per head: q, k, v
            q, k, v = arrays[f"w.query_key_value.{kind}"].unflatten(0, (3, 3, 4)).unbind(1)
            getattr(heads.q, kind).copy_(q.flatten(0, 1))
            getattr(heads.kv, kind).copy_(torch.cat([k.flatten(0, 1), v.flatten(0, 1)]))
            getattr(heads.out, kind).copy_(arrays[f"w.dense.{kind}"])
    for case in ("causal", "causal_leftpad"):
        mask = arrays["left_pad_keep"].bool() if case == "causal_leftpad" else None
        x = arrays["x"].clone().requires_grad_()
        mixer.zero_grad()
        y = mixer(x, mask=mask)
        real = torch.ones(y.shape[:2], dtype=torch.bool) if mask is None else mask
        # what comes out at padding is nobody's business
        cotangent = arrays["cotangent"] if mask is None else arrays["cotangent"] * mask[..., None]
        y.backward(cotangent)
        yield f"out_{case}", y[real], arrays[f"out_{case}"][real], 1e-12
        yield f"grad_{case}.x", x.grad, arrays[f"grad_{case}.x"], 1e-12
        for kind in ("weight", "bias"):
            q, k, v = arrays[f"grad_{case}.query_key_value.{kind}"].unflatten(0, (3, 3, 4)).unbind(1)
            yield f"grad_{case}.q.{kind}", getattr(heads.q, kind).grad, q.flatten(0, 1), 1e-12
            kv = torch.cat([k.flatten(0, 1), v.flatten(0, 1)])
            yield f"grad_{case}.kv.{kind}", getattr(heads.kv, kind).grad, kv, 1e-12
            yield f"grad_{case}.out.{kind}", getattr(heads.out, kind).grad, arrays[f"grad_{case}.dense.{kind}"], 1e-12
    with torch.no_grad():
        state, steps = mixer.init_state(2), []
        for t in range(13):
            y, state = mixer.step(arrays["x"][:, t : t + 1], state)
            steps.append(y)
    yield "out_decode_steps", torch.cat(steps, 1), arrays["out_decode_steps"], 1e-12
