"""Delta-rule fast weights: one outer product at a time, over the real tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def products(x: Tensor, nu: int) -> Tensor:
    """DPFP-nu of one vector (e,), entry by entry: entry i of block j is r_i r_{i-j}."""
    r = [torch.relu(value) for value in x] + [torch.relu(-value) for value in x]
    return torch.stack([r[i] * r[i - j] for j in range(1, nu + 1) for i in range(len(r))])


def features(module: nn.Module, x: Tensor) -> Tensor:
    """Features of one vector (e,) that sum to one, or to less where they nearly vanish."""
    if module.nu is None:
        f = torch.where(x > 0, x + 1, torch.exp(torch.clamp(x, max=0)))
    else:
        f = products(x, module.nu)
    total = sum(f)
    return f / total if float(total.detach()) > 1e-6 else f / 1e-6


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    b, n, d = x.shape
    h = module.heads.heads
    e = d // h
    rows = []
    for i in range(b):
        fast: list[Tensor | None] = [None] * h
        for t in range(n):
            if mask is not None and not bool(mask[i, t]):
                rows.append(torch.zeros_like(x[i, t]))
                continue
            u, joined = x[i, t], []
            for head in range(h):
                part = slice(head * e, (head + 1) * e)
                q = features(module, module.heads.q.weight[part] @ u)
                k = features(module, module.heads.kv.weight[:d][part] @ u)
                v = module.heads.kv.weight[d:][part] @ u
                strength = 1 / (1 + torch.exp(-(module.beta.weight[head] @ u)))
                w = fast[head]
                if w is None:
                    w = torch.zeros(e, len(k), dtype=x.dtype)
                w = w + strength * torch.outer(v - w @ k, k)
                joined.append(w @ q * e**-0.5)
                fast[head] = w
            rows.append(module.heads.out.weight @ torch.cat(joined))
    return torch.stack(rows).reshape(b, n, d)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    d, heads, e = 12, int(arrays["heads"]), int(arrays["d_head"])
    # rows of the official projection are grouped by head: q, k, v, beta
    blocks = torch.arange(heads * (3 * e + 1)).reshape(heads, 3 * e + 1)
    rows = torch.cat([blocks[:, part].flatten() for part in (slice(e), slice(e, 2 * e), slice(2 * e, 3 * e))])
    rows = torch.cat([rows, blocks[:, 3 * e]])
    for case, suffix, nu in (("DPFP", "", int(arrays["nu"])), ("elu + 1", "_elu", None)):
        x = arrays["x"].transpose(0, 1).clone().requires_grad_()
        ours = system.DeltaNet(dim=d, heads=heads, nu=nu).double()
        norm = nn.LayerNorm(d).double()
        with torch.no_grad():
            stacked = arrays["w.qkvb_net.weight"][rows]
            ours.heads.q.weight.copy_(stacked[:d])
            ours.heads.kv.weight.copy_(stacked[d : 3 * d])
            ours.beta.weight.copy_(stacked[3 * d :])
            ours.heads.out.weight.copy_(arrays["w.o_net.weight"])
            norm.weight.copy_(arrays["w.layer_norm.weight"])
            norm.bias.copy_(arrays["w.layer_norm.bias"])
        y = norm(x + ours(x))
        yield f"{case}: output", y.transpose(0, 1), arrays[f"out{suffix}"], 1e-12
        leaves = (x, ours.heads.q.weight, ours.heads.kv.weight, ours.beta.weight, ours.heads.out.weight)
        gx, gq, gkv, gb, go, gw, gs = torch.autograd.grad(
            y, (*leaves, norm.weight, norm.bias), arrays["cotangent"].transpose(0, 1)
        )
        given = f"grad{suffix}"
        yield f"{case}: gradient of x", gx.transpose(0, 1), arrays[f"{given}.x"], 1e-12
        theirs = arrays[f"{given}.qkvb_net.weight"][rows]
        yield f"{case}: gradient of the projections", torch.cat([gq, gkv, gb]), theirs, 1e-12
        yield f"{case}: gradient of the output projection", go, arrays[f"{given}.o_net.weight"], 1e-12
        yield f"{case}: gradient of the norm's gain", gw, arrays[f"{given}.layer_norm.weight"], 1e-12
        yield f"{case}: gradient of the norm's bias", gs, arrays[f"{given}.layer_norm.bias"], 1e-12
        if nu is None:
            continue
        first, second = arrays["x"].transpose(0, 1), arrays["x2"].transpose(0, 1)
        _, state = ours.step(first, ours.init_state(2))
        yield "state after one segment", state[0], arrays["state1"], 1e-12
        y, state = ours.step(second, state)
        yield "second segment: output", norm(second + y).transpose(0, 1), arrays["out2_carried"], 1e-12
        yield "second segment: state", state[0], arrays["state2"], 1e-12
