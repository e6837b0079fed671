"""Multi-head attention, one head at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def reference(module: nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Sum over heads of softmax(x W_q (y W_k)^T / sqrt(e)) (y W_v) W_o, each head with its rows of the matrices."""
    y = x if context is None else context
    h = module.heads
    e = module.q.weight.shape[0] // h
    total = x.new_zeros(*x.shape[:2], module.out.weight.shape[0])
    for i in range(h):
        q = _affine(module.q, x, i * e, e)
        k = _affine(module.kv, y, i * e, e)
        v = _affine(module.kv, y, (h + i) * e, e)
        s = torch.einsum("bne,bme->bnm", q, k) / e**0.5
        w = s.exp() / s.exp().sum(-1, keepdim=True)
        total = total + torch.einsum("bnm,bmv,dv->bnd", w, v, module.out.weight[:, i * e : (i + 1) * e])
    return total if module.out.bias is None else total + module.out.bias


def _affine(linear: nn.Linear, x: Tensor, start: int, rows: int) -> Tensor:
    y = torch.einsum("bnd,ed->bne", x, linear.weight[start : start + rows])
    return y if linear.bias is None else y + linear.bias[start : start + rows]
