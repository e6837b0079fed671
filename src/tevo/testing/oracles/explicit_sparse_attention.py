"""Top-k softmax, one row at a time, by sorting."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(module: nn.Module, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Each row's allowed keys are sorted by score; the first k, and those that tie with the last of them, share 1."""
    m = scores.shape[-1]
    rows = scores.reshape(-1, m)
    values = rows.detach()
    may = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
    out = []
    for row, value, ok in zip(rows, values, may.reshape(-1, m), strict=True):
        keys = sorted((j for j in range(m) if ok[j]), key=lambda j: -float(value[j]))
        if keys:
            last = float(value[keys[: module.topk][-1]])
            keys = [j for j in keys if float(value[j]) >= last]
        total = sum(torch.exp(row[j] - row[keys[0]]) for j in keys)
        zero = row.new_zeros(())
        weights = [torch.exp(row[j] - row[keys[0]]) / total if j in keys else zero for j in range(m)]
        out.append(torch.stack(weights) if weights else row)
    return torch.stack(out).reshape(scores.shape) if out else scores


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The authors' attention (self, causal, padded, cross, cross padded) and x-transformers' bare normaliser."""
    from tevo import record
    from tevo.mixers.softmax.multi_head import MultiHead
    from tevo.mixers.softmax.softmax import SoftmaxAttention

    linears = (("q", ("q_proj",)), ("kv", ("k_proj", "v_proj")), ("out", ("out_proj",)))
    for case in ("self_full", "self_causal", "self_pad", "cross_full", "cross_pad"):
        heads = MultiHead(dim=12, heads=3, bias=True)
        normaliser = system.ExplicitSparse(topk=4)
        mixer = SoftmaxAttention(dim=12, heads=heads, causal=case == "self_causal", normaliser=normaliser).double()
        with torch.no_grad():
            for ours, theirs in linears:
                for kind in ("weight", "bias"):
                    value = torch.cat([arrays[f"w.{name}.{kind}"] for name in theirs])
                    getattr(getattr(heads, ours), kind).copy_(value)
        x = arrays["x"].transpose(0, 1).clone().requires_grad_()
        memory = arrays["memory"].transpose(0, 1).clone().requires_grad_()
        mask = {"self_pad": ~arrays["self_pad"], "cross_pad": ~arrays["memory_pad"]}.get(case)
        with record() as seen:
            # padded tokens as a context of themselves: the official code lets padding ask too
            y = mixer(x, memory if case.startswith("cross") else x if case == "self_pad" else None, mask=mask)
        y.backward(arrays["cotangent"].transpose(0, 1))
        yield f"out_{case}", y.transpose(0, 1), arrays[f"out_{case}"], 1e-12
        yield f"attn_{case}", seen["attention"][0].transpose(0, 1), arrays[f"attn_{case}"], 1e-12
        yield f"grad_{case}.x", x.grad.transpose(0, 1), arrays[f"grad_{case}.x"], 1e-12
        if case.startswith("cross"):
            yield f"grad_{case}.memory", memory.grad.transpose(0, 1), arrays[f"grad_{case}.memory"], 1e-12
        for ours, theirs in linears:
            for kind in ("weight", "bias"):
                value = torch.cat([arrays[f"grad_{case}.{name}.{kind}"] for name in theirs])
                yield f"grad_{case}.{ours}.{kind}", getattr(getattr(heads, ours), kind).grad, value, 1e-12
    scores = arrays["normaliser.scores"].clone().requires_grad_()
    weights = system.ExplicitSparse(topk=4)(scores)
    weights.backward(arrays["normaliser.cotangent"])
    yield "normaliser.weights", weights, arrays["normaliser.weights"], 1e-12
    yield "normaliser.grad", scores.grad, arrays["normaliser.grad"], 1e-12
