"""XLNet's loss, one predicted token at a time: each of its streams written out, query by query."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    z = x - x.mean()
    return z / (z.square().mean() + layer.eps).sqrt() * layer.weight + layer.bias


def _sinusoid(distance: int, d: int, like: Tensor) -> Tensor:
    angles = [distance / 10000 ** (2 * j / d) for j in range(d // 2)]
    return like.new_tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def _layer(layer: nn.Module, x: Tensor, i: int, keys: list[tuple[int, Tensor]], kind: dict[int, int]) -> Tensor:
    """One query at position i over pairs of a position and a vector."""
    heads = layer.heads
    inner, d = heads.q.weight.shape
    e = inner // heads.heads
    parts = []
    for h in range(heads.heads):
        own = slice(h * e, (h + 1) * e)
        q = heads.q.weight[own] @ x
        total, power = 0.0 * q, 0.0
        for j, y in keys:
            k, v = heads.kv.weight[:inner][own] @ y, heads.kv.weight[inner:][own] @ y
            place = layer.r.weight[own] @ _sinusoid(i - j, d, x)
            score = (q + layer.u[h]) @ k + (q + layer.w[h]) @ place + (q + layer.z[h]) @ layer.kinds[kind[j], h]
            weight = (score / math.sqrt(e)).exp()
            total, power = total + weight * v, power + weight
        parts.append(total / power if keys else total)
    first, second = layer.residual.norms
    y = _norm(first, x + heads.out.weight @ torch.cat(parts))
    a = layer.channel.into.weight @ y + layer.channel.into.bias
    inside = a * (1 + torch.erf(a / math.sqrt(2))) / 2
    return _norm(second, y + layer.channel.out.weight @ inside + layer.channel.out.bias)


def reference(objective: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Equations (1) to (5)."""
    nats = []
    for b in range(len(batch["tokens"])):
        rank, segment = batch["rank"][b].tolist(), batch["segments"][b].tolist()
        real = [i for i in range(len(rank)) if bool(batch["mask"][b, i])]
        targets = [t for t, c in zip(batch["places"][b].tolist(), batch["chosen"][b].tolist(), strict=True) if c]
        h = {i: model.embedding.weight[batch["tokens"][b, i]] for i in real}
        g = dict.fromkeys(targets, model.query)
        for layer in model.layers:
            # 1 where the segments differ
            kinds = {i: {j: int(segment[i] != segment[j]) for j in real} for i in real}
            keys = {i: [(j, h[j]) for j in real if rank[j] <= rank[i]] for i in real}
            others = {t: [(j, h[j]) for j in real if rank[j] < rank[t]] for t in targets}
            g = {t: _layer(layer, g[t], t, others[t], kinds[t]) for t in targets}
            h = {i: _layer(layer, h[i], i, keys[i], kinds[i]) for i in real}
        for t in targets:
            logits = torch.stack([word @ g[t] for word in model.embedding.weight]) + objective.bias
            nats.append(logits.exp().sum().log() - logits[batch["tokens"][b, t]])
    return torch.stack(nats).mean()


def corruption(objective: nn.Module, batch: dict[str, Tensor]) -> Iterator[tuple[str, bool]]:
    """What must hold of a batch: which tokens are predicted, and in which order they are factorised."""
    n = batch["tokens"].shape[1]
    block = n if objective.block is None else objective.block
    for tokens, real, rank, places, counts in zip(
        *(batch[name].tolist() for name in ("tokens", "mask", "rank", "places", "chosen")), strict=True
    ):
        targets = [p for p, counted in zip(places, counts, strict=True) if counted]
        possible = [j for j in range(n) if real[j] and tokens[j] not in objective.functional]
        goal = min(max(1, sum(real) // objective.share), len(possible))
        yield "one token in share is predicted", len(targets) == goal
        yield "targets are different, real and not special", len(set(targets) & set(possible)) == len(targets)
        ranked = [j for j in range(n) if j in targets or (real[j] and tokens[j] in objective.functional)]
        yield "ranks are of targets and special tokens alone", [j for j in range(n) if rank[j] >= 0] == ranked
        yield "all others come before every rank", all(rank[j] == -1 for j in range(n) if j not in ranked)
        yield "no two tokens share a rank", len({rank[j] for j in ranked}) == len(ranked)
        yield "ranks stay in their tokens' blocks", all(rank[j] // block == j // block for j in ranked)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Two streams with segments and memory: hidden vectors, memories, logits, loss, gradients; and the content alone,
    padded, whose gradients count padding rows and are not compared.
    """
    import torch.nn.functional as F

    from tevo.taps import record

    model = system.TwoStream(vocab=23, dim=12, depth=2, heads=3, head_dim=5, hidden_dim=17, memory=7, reuse=8).double()
    objective = system.XLNet(vocab=23, separator=4, functional=(3,)).double()
    same: list[tuple[Tensor, str]] = [
        (model.embedding.weight, "transformer.word_embedding.weight"),
        (objective.bias, "lm_loss.bias"),
    ]
    folded: list[tuple[Tensor, list[str]]] = []
    for i, layer in enumerate(model.layers):
        own = f"transformer.layer.{i}."
        first, second = layer.residual.norms
        same += [
            (layer.u, f"{own}rel_attn.r_w_bias"),
            (layer.w, f"{own}rel_attn.r_r_bias"),
            (layer.z, f"{own}rel_attn.r_s_bias"),
            (layer.kinds, f"{own}rel_attn.seg_embed"),
            (first.weight, f"{own}rel_attn.layer_norm.weight"),
            (first.bias, f"{own}rel_attn.layer_norm.bias"),
            (second.weight, f"{own}ff.layer_norm.weight"),
            (second.bias, f"{own}ff.layer_norm.bias"),
            (layer.channel.into.weight, f"{own}ff.layer_1.weight"),
            (layer.channel.into.bias, f"{own}ff.layer_1.bias"),
            (layer.channel.out.weight, f"{own}ff.layer_2.weight"),
            (layer.channel.out.bias, f"{own}ff.layer_2.bias"),
        ]
        folded += [
            (layer.heads.q.weight, [f"{own}rel_attn.q"]),
            (layer.heads.kv.weight, [f"{own}rel_attn.k", f"{own}rel_attn.v"]),
            (layer.r.weight, [f"{own}rel_attn.r"]),
        ]

    def ours(names: list[str], prefix: str) -> Tensor:
        # official matrices are (d, h, e)
        return torch.cat([arrays[f"{prefix}{name}"].flatten(1).T for name in names])

    with torch.no_grad():
        for parameter, name in same:
            parameter.copy_(arrays[f"w.{name}"])
        for parameter, names in folded:
            parameter.copy_(ours(names, "w."))
        for i, layer in enumerate(model.layers):
            layer.heads.out.weight.copy_(arrays[f"w.transformer.layer.{i}.rel_attn.o"].flatten(1))
        model.query.copy_(arrays["w.transformer.mask_emb"].flatten())

    def compare(case: str, loss: Tensor) -> Iterator[tuple[str, Tensor, Tensor, float]]:
        every = [p for p, _ in same] + [p for p, _ in folded] + [layer.heads.out.weight for layer in model.layers]
        gradients = torch.autograd.grad(loss, [*every, model.query], allow_unused=True)
        found = {id(p): g for p, g in zip([*every, model.query], gradients, strict=True)}
        for parameter, name in same:
            if f"{case}.grad.w.{name}" in arrays:
                yield f"{case}.grad.w.{name}", found[id(parameter)], arrays[f"{case}.grad.w.{name}"], 1e-10
        for parameter, names in folded:
            yield f"{case}.grad.w.{names[0]}", found[id(parameter)], ours(names, f"{case}.grad.w."), 1e-10
        for i, layer in enumerate(model.layers):
            name = f"{case}.grad.w.transformer.layer.{i}.rel_attn.o"
            yield name, found[id(layer.heads.out.weight)], arrays[name].flatten(1), 1e-10
        name = f"{case}.grad.w.transformer.mask_emb"
        yield name, found[id(model.query)], arrays[name].flatten(), 1e-10

    ids, segments = arrays["in.ids"], arrays["in.segment"].long()
    memory = arrays["in.mems"].permute(2, 0, 1, 3)
    places = arrays["in.target_mapping"].argmax(-1)
    visible = arrays["in.perm_mask"] == 0
    content = visible | torch.eye(ids.shape[1], dtype=torch.bool)
    query = visible.gather(1, places[..., None].expand(-1, -1, ids.shape[1]))
    with record() as seen:
        g = model.streams(ids, places, content, query, segments=segments, memory=memory)
    for i in range(2):
        yield f"plm.out.h{i}", seen["content"][i], arrays[f"plm.out.h{i}"], 1e-10
        yield f"plm.out.g{i + 1}", seen["query"][i], arrays[f"plm.out.g{i + 1}"], 1e-10
    yield "plm.out.new_mems", seen["memory"][0].permute(1, 2, 0, 3), arrays["plm.out.new_mems"], 1e-10
    logits = F.linear(g, model.embedding.weight, objective.bias)
    yield "plm.out.logits", logits, arrays["plm.out.logits"], 1e-10
    loss = F.cross_entropy(logits.flatten(0, 1), arrays["in.targets"].flatten())
    yield "plm.out.loss", loss, arrays["plm.out.loss"], 1e-10
    yield from compare("plm", loss + (logits * arrays["plm.cot.logits"]).sum())

    mask = arrays["finetune.in.attention_mask"].bool()
    y = model(ids, segments=segments, mask=mask)
    real = mask[..., None]
    yield "finetune.out.y", y * real, arrays["finetune.out.y"] * real, 1e-10
