"""Multi-query attention as multi-head attention whose heads of a group have equal keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(module: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Head i reads x through its own queries and y through the keys and values of group floor(i g / h)."""
    y = x if context is None else context
    h, g = module.heads, module.groups
    e = module.q.weight.shape[0] // h
    total = x.new_zeros(*x.shape[:2], module.out.weight.shape[0])
    for i in range(h):
        group = i * g // h
        q = _affine(module.q, x, i * e, e)
        k = _affine(module.kv, y, group * e, e)
        v = _affine(module.kv, y, (g + group) * e, e)
        w = (torch.einsum("bne,bme->bnm", q, k) / e**0.5).exp()
        o = torch.einsum("bnm,bmv->bnv", w, v) / w.sum(-1, keepdim=True)
        total = total + o @ module.out.weight[:, i * e : (i + 1) * e].T
    return total if module.out.bias is None else total + module.out.bias


def _affine(linear: nn.Linear, x: Tensor, start: int, rows: int) -> Tensor:
    y = x @ linear.weight[start : start + rows].T
    return y if linear.bias is None else y + linear.bias[start : start + rows]


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The transformers package's Llama attention (full, causal, padded, decoded, caches) and Falcon attention, one group."""
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    linears = (("q", ("q",)), ("kv", ("k", "v")), ("out", ("o",)))
    for case in ("full", "pad", "causal"):
        heads = system.MultiQuery(dim=12, heads=3, bias=True)
        mixer = SoftmaxAttention(dim=12, heads=heads, causal=case == "causal").double()
        with torch.no_grad():
            for ours, theirs in linears:
                for kind in ("weight", "bias"):
                    value = torch.cat([arrays[f"w.{name}_proj.{kind}"] for name in theirs])
                    getattr(getattr(heads, ours), kind).copy_(value)
        x = arrays["x"].clone().requires_grad_()
        # what comes out at padding is nobody's business, and the official gradients are of the real tokens' outputs
        real = arrays["pad_keep"] if case == "pad" else torch.ones(2, 13, dtype=torch.bool)
        y = mixer(x, mask=real if case == "pad" else None)
        y.backward(arrays["cotangent"] * real[..., None])
        yield f"out_{case}", y[real], arrays[f"out_{case}"][real], 1e-12
        yield f"grad_{case}.x", x.grad, arrays[f"grad_{case}.x"], 1e-12
        for ours, theirs in linears:
            for kind in ("weight", "bias"):
                value = torch.cat([arrays[f"grad_{case}.{name}_proj.{kind}"] for name in theirs])
                yield f"grad_{case}.{ours}.{kind}", getattr(getattr(heads, ours), kind).grad, value, 1e-12
    with torch.no_grad():
        state, steps = mixer.init_state(2), []
        for t in range(13):
            y, state = mixer.step(arrays["x"][:, t : t + 1], state)
            steps.append(y)
    yield "out_decode_steps", torch.cat(steps, 1), arrays["out_decode_steps"], 1e-12
    yield "cache_k", state[0][:, :, :13], arrays["cache_k"], 1e-12
    yield "cache_v", state[1][:, :, :13], arrays["cache_v"], 1e-12

    heads = system.MultiQuery(dim=12, heads=3)
    mixer = SoftmaxAttention(dim=12, heads=heads, causal=True).double()
    with torch.no_grad():
        # rows: three query heads, the key head, the value head
        heads.q.weight.copy_(arrays["falcon.w.query_key_value.weight"][:12])
        heads.kv.weight.copy_(arrays["falcon.w.query_key_value.weight"][12:])
        heads.out.weight.copy_(arrays["falcon.w.dense.weight"])
    x = arrays["falcon.x"].clone().requires_grad_()
    y = mixer(x)
    y.backward(arrays["falcon.cotangent"])
    yield "falcon.out_causal", y, arrays["falcon.out_causal"], 1e-12
    yield "falcon.grad.x", x.grad, arrays["falcon.grad.x"], 1e-12
    fused = torch.cat([heads.q.weight.grad, heads.kv.weight.grad])
    yield "falcon.grad.query_key_value", fused, arrays["falcon.grad.query_key_value.weight"], 1e-12
    yield "falcon.grad.dense", heads.out.weight.grad, arrays["falcon.grad.dense.weight"], 1e-12
