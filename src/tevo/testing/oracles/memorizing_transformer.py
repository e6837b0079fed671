"""Memorizing Transformer, one token at a time, with a memory that is a list."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _bucket(distance: int, buckets: int, most: int) -> int:
    exact = buckets // 2
    if distance < exact:
        return distance
    # bucket edges in single precision, as T5's
    ratio = torch.log(torch.tensor(distance / exact, dtype=torch.float32)) / math.log(most / exact)
    return min(buckets - 1, exact + int(ratio * (buckets - exact)))


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    b, n, d = x.shape
    h = module.heads.heads
    e, w = d // h, module.window
    rows = []
    for row in x:
        parts: list[list[Tensor]] = [[] for _ in range(n)]
        for head in range(h):
            own = slice(head * e, (head + 1) * e)
            q = [module.heads.q.weight[own] @ u for u in row]
            k = [module.heads.kv.weight[:d][own] @ u for u in row]
            v = [module.heads.kv.weight[d:][own] @ u for u in row]
            q, k = ([u / (u @ u + 1e-6).sqrt() for u in us] for us in (q, k))
            g = module.scale[head] * module.scale[head].sign().detach()
            memory: list[tuple[Tensor, Tensor]] = []
            for i in range(n):
                window = range(max(0, i - w + 1), i + 1)
                table = module.table[head]
                s = [g * (q[i] @ k[j] + table[_bucket(i - j, module.buckets, module.max_distance)]) for j in window]
                power = torch.stack(s).exp()
                y = power @ torch.stack([v[j] for j in window]) / power.sum()
                if memory:
                    best = sorted(memory, key=lambda pair: -float((q[i] @ pair[0]).detach()))[: module.topk]
                    power = torch.stack([g * (q[i] @ key) for key, _ in best]).exp()
                    read = power @ torch.stack([value for _, value in best]) / power.sum()
                    beta = 1 / (1 + (-module.gate[head]).exp())
                    y = (1 - beta) * y + beta * read
                parts[i].append(y)
                if (i + 1) % w == 0:
                    memory += [(k[j].detach(), v[j].detach()) for j in range(i + 1 - w, i + 1)]
                    memory = memory[max(0, len(memory) - module.memory) :]
        rows.append(torch.stack([module.heads.out.weight @ torch.cat(part) for part in parts]) if n else row)
    return torch.stack(rows).reshape(b, n, d)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The published model's two attentions and their gate. The file's other cases are of a port with one softmax."""
    from tevo.taps import record

    given = {name.removeprefix("meliad.in."): a for name, a in arrays.items() if name.startswith("meliad.in.")}
    names = ("q", "keys", "values", "bias", "scale", "gate")
    leaf = {name: given[name].clone().requires_grad_() for name in names}
    q, k, v = (leaf[name].transpose(1, 2) for name in ("q", "keys", "values"))
    g, b = leaf["scale"].abs()[:, None, None], leaf["gate"][:, None, None]
    every = torch.ones(1, given["memory_keys"].shape[2], dtype=torch.bool)
    with record() as seen:
        local = system.local_read(q, k, v, leaf["bias"], g, given["causal_mask"].bool())
        read = system.memory_read(q, given["memory_keys"], given["memory_values"], g, every, int(given["topk"]))
    y = system.gated(local, read, b, every.any())
    yield "meliad.out.y_local", local.transpose(1, 2), arrays["meliad.out.y_local"], 1e-10
    yield "meliad.out.y_external", read.transpose(1, 2), arrays["meliad.out.y_external"], 1e-10
    yield "meliad.out.y", y.transpose(1, 2), arrays["meliad.out.y"], 1e-10
    found = seen["retrieved"][0].transpose(1, 2).sort().values
    wanted = arrays["meliad.out.retrieved_index"].long().sort().values
    yield "meliad.out.retrieved_index", found, wanted, 0.0
    gradients = torch.autograd.grad((y.transpose(1, 2) * arrays["meliad.cot.y"]).sum(), list(leaf.values()))
    for name, gradient in zip(names, gradients, strict=True):
        yield f"meliad.grad.in.{name}", gradient, arrays[f"meliad.grad.in.{name}"], 1e-10
