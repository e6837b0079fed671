"""Recurrent memory: each segment's rows one after another through pre-norm blocks, one query at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    z = x - x.mean()
    return z / (z.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def _rotated(x: Tensor, i: int, base: float) -> Tensor:
    """Pairs (j, j + e/2) of a vector turned by i base^(-2j/e)."""
    e = len(x)
    out = [x[0]] * e
    for j in range(e // 2):
        c, s = math.cos(i * base ** (-2 * j / e)), math.sin(i * base ** (-2 * j / e))
        out[j], out[j + e // 2] = x[j] * c - x[j + e // 2] * s, x[j + e // 2] * c + x[j] * s
    return torch.stack(out)


def _transformer(module: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    encoder = module.encoder
    position = encoder.position
    table = getattr(position, "table", None)
    if table is not None:
        rows = [x + table[i] for i, x in enumerate(rows)]
    turns = position is not None and table is None
    for block in encoder.blocks:
        heads, (first, second) = block.mixer.heads, block.residual.norms
        q = [heads.q.weight @ _norm(first, x) for x in rows]
        kv = [heads.kv.weight @ _norm(first, x) for x in rows]
        d = len(q[0])
        e = d // heads.heads
        after = []
        for i, x in enumerate(rows):
            parts = []
            for h in range(heads.heads):
                own = slice(h * e, (h + 1) * e)
                seen = range(i + 1 if module.causal else len(rows))
                query = _rotated(q[i][own], i, position.base) if turns else q[i][own]
                keys = [_rotated(kv[j][:d][own], j, position.base) if turns else kv[j][:d][own] for j in seen]
                power = torch.stack([query @ key for key in keys]).div(math.sqrt(e)).exp()
                parts.append(power @ torch.stack([kv[j][d:][own] for j in seen]) / power.sum())
            y = x + heads.out.weight @ torch.cat(parts)
            a = block.channel.into.weight @ _norm(second, y) + block.channel.into.bias
            inside = a * (1 + torch.erf(a / math.sqrt(2))) / 2
            after.append(y + block.channel.out.weight @ inside + block.channel.out.bias)
        rows = [_norm(block.residual.final, y) if block.residual.final is not None else y for y in after]
    return rows


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """Equations (1) and (2); every memory is written, the last one in vain."""
    b, n, d = x.shape
    length, c = module.memory.shape[0], module.segment
    outputs = []
    for row in x:
        memory = list(module.memory)
        for handed, start in enumerate(range(0, n, c), 1):
            tokens = list(row[start : start + c])
            if module.causal:
                y = _transformer(module, memory + tokens + memory)
                h, memory = y[length : length + len(tokens)], y[length + len(tokens) :]
            else:
                y = _transformer(module, memory + tokens)
                memory, h = y[:length], y[length:]
            outputs += h
            if module.unroll is not None and handed % (module.unroll + 1) == 0:
                memory = [m.detach() for m in memory]
    return torch.stack(outputs).reshape(b, n, d)


class TanhGELU(nn.Module):
    """GPT-2's feed-forward."""

    def __init__(self, *, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """(..., d) gives (..., d)."""
        return self.out(F.gelu(self.into(x), approximate="tanh"))


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The authors' cell and wrapper around GPT-2: logits, memories, loss and gradients, and logits with padding."""
    from tevo.taps import record

    prefix = "memory_cell.model.transformer."
    stack = system.RecurrentMemoryTransformer(
        dim=12,
        heads=3,
        depth=2,
        causal=True,
        segment=int(arrays["segment_lengths"][0]),
        memory=3,
        mixer="multi_head(bias=True)",
        channel=TanhGELU,
        position="learned",
        hidden_dim=48,
    ).double()
    table = arrays[f"w.{prefix}wte.weight"].clone().requires_grad_()
    length = stack.segment + 6
    plain: list[tuple[Tensor, str]] = [(stack.memory, "memory_cell.memory"), (table, f"{prefix}wte.weight")]
    turned: list[tuple[Tensor, str, slice]] = []
    for i, block in enumerate(stack.encoder.blocks):
        own, (first, second), heads = f"{prefix}h.{i}.", block.residual.norms, block.mixer.heads
        plain += [(first.weight, f"{own}ln_1.weight"), (first.bias, f"{own}ln_1.bias")]
        plain += [(second.weight, f"{own}ln_2.weight"), (second.bias, f"{own}ln_2.bias")]
        for layer, name, part in (
            (heads.q, "attn.c_attn", slice(0, 12)),
            (heads.kv, "attn.c_attn", slice(12, 36)),
            (heads.out, "attn.c_proj", slice(None)),
            (block.channel.into, "mlp.c_fc", slice(None)),
            (block.channel.out, "mlp.c_proj", slice(None)),
        ):
            turned += [(layer.weight, f"{own}{name}.weight", part), (layer.bias, f"{own}{name}.bias", part)]
    final = stack.encoder.blocks[-1].residual.final
    plain += [(final.weight, f"{prefix}ln_f.weight"), (final.bias, f"{prefix}ln_f.bias")]
    with torch.no_grad():
        for parameter, name in plain:
            parameter.copy_(arrays[f"w.{name}"])
        for parameter, name, part in turned:
            parameter.copy_(arrays[f"w.{name}"].mT[part] if parameter.ndim == 2 else arrays[f"w.{name}"][part])
        stack.encoder.position.table.copy_(arrays[f"w.{prefix}wpe.weight"][:length])
    ids = arrays["in.ids"]
    with record() as seen:
        logits = stack(table[ids]) @ table.T
    for i, memory in enumerate(seen["memory"]):
        yield f"plain.out.mem_after_{i}", memory, arrays[f"plain.out.mem_after_{i}"], 1e-10
    yield "plain.out.logits", logits, arrays["plain.out.logits"], 1e-10
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    yield "plain.out.loss", loss, arrays["plain.out.loss"], 1e-10
    mask = arrays["in.attention_mask"].bool()
    masked = stack(table[ids], mask=mask) @ table.T
    real = mask[..., None]
    yield "masked.out.logits", masked * real, arrays["masked.out.logits"] * real, 1e-10
    for case, total in (
        ("plain", loss + (logits * arrays["plain.cot.logits"]).sum()),
        ("masked", (masked * arrays["masked.cot.logits"] * real).sum()),
    ):
        leaves = [p for p, _ in plain] + [p for p, _, _ in turned] + [stack.encoder.position.table]
        gradients = dict(zip(map(id, leaves), torch.autograd.grad(total, leaves), strict=True))
        for parameter, name in plain:
            yield f"{case}.grad.w.{name}", gradients[id(parameter)], arrays[f"{case}.grad.w.{name}"], 1e-10
        for parameter, name, part in turned:
            theirs = arrays[f"{case}.grad.w.{name}"]
            theirs = theirs.mT if parameter.ndim == 2 else theirs
            yield f"{case}.grad.w.{name}", gradients[id(parameter)], theirs[part], 1e-10
        wpe = arrays[f"{case}.grad.w.{prefix}wpe.weight"][:length]
        yield f"{case}.grad.w.{prefix}wpe.weight", gradients[id(stack.encoder.position.table)], wpe, 1e-10
    # streamed, one segment and a half at a time
    with torch.no_grad():
        state, pieces = stack.init_state(2), []
        for start in range(0, ids.shape[1], 7):
            y, state = stack.step(table[ids[:, start : start + 7]], state)
            pieces.append(y @ table.T)
    yield "plain.out.logits, streamed", torch.cat(pieces, 1), arrays["plain.out.logits"], 1e-10
