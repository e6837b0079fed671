"""Transformer-XL's relative scores, one query and one key at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn


def reference(module: nn.Module, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
    """((q_i + u) . k_j + (q_i + v) . W r_{i-j}) / sqrt(e) with r the sinusoid of the signed distance."""
    b, h, n, e = q.shape
    d = module.r.weight.shape[1]
    weights = module.r.weight.reshape(h, e, d)
    batches = []
    for i in range(b):
        here = q_at[min(i, len(q_at) - 1)].tolist()
        there = k_at[min(i, len(k_at) - 1)].tolist()
        rows = [[r(s - t, d, module.base, q) for t in there] for s in here]
        heads = []
        for head in range(h):
            scores = [
                (q[i, head, s] + module.u[head]) @ k[i, head, t]
                + (q[i, head, s] + module.v[head]) @ (weights[head] @ rows[s][t])
                for s in range(n)
                for t in range(len(there))
            ]
            heads.append(
                torch.stack(scores).reshape(n, len(there)) / math.sqrt(e) if scores else q.new_zeros(n, len(there))
            )
        batches.append(torch.stack(heads))
    return torch.stack(batches)


def r(distance: int, d: int, base: float, like: Tensor) -> Tensor:
    """All sines, then all cosines, of the distance times base^(-2j/d)."""
    angles = [distance * base ** (-2 * j / d) for j in range(d // 2)]
    return like.new_tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The authors' language model over three segments with memory (states, memories, likelihoods, gradients), and its
    first layer alone, with every token seeing the same number of keys too.
    """
    from tevo.mixers.softmax.softmax import SoftmaxAttention
    from tevo.models.encoder import Encoder

    positions = [system.TransformerXL(dim=12, heads=3) for _ in range(2)]
    mixers = [SoftmaxAttention(dim=12, heads=3, causal=True, position=p, memory=5) for p in positions]
    model = Encoder(
        dim=12, depth=2, heads=3, mixer=mixers, channel="relu", hidden_dim=20, residual="post_norm", causal=True
    ).double()
    pairs: list[tuple[str, Tensor]] = []
    for i, (block, position) in enumerate(zip(model.blocks, positions, strict=True)):
        heads, norms, channel = block.mixer.heads, block.residual.norms, block.channel
        pairs += [
            (f"layers.{i}.dec_attn.o_net.weight", heads.out.weight),
            (f"layers.{i}.dec_attn.r_net.weight", position.r.weight),
            (f"layers.{i}.dec_attn.layer_norm.weight", norms[0].weight),
            (f"layers.{i}.dec_attn.layer_norm.bias", norms[0].bias),
            (f"layers.{i}.pos_ff.CoreNet.0.weight", channel.into.weight),
            (f"layers.{i}.pos_ff.CoreNet.0.bias", channel.into.bias),
            (f"layers.{i}.pos_ff.CoreNet.3.weight", channel.out.weight),
            (f"layers.{i}.pos_ff.CoreNet.3.bias", channel.out.bias),
            (f"layers.{i}.pos_ff.layer_norm.weight", norms[1].weight),
            (f"layers.{i}.pos_ff.layer_norm.bias", norms[1].bias),
        ]
        with torch.no_grad():
            q, kv = arrays[f"w.layers.{i}.dec_attn.qkv_net.weight"].split([12, 24])
            heads.q.weight.copy_(q)
            heads.kv.weight.copy_(kv)
            position.u.copy_(arrays["w.r_w_bias"])
            position.v.copy_(arrays["w.r_r_bias"])
    table = arrays["w.word_emb.emb_layers.0.weight"].clone().requires_grad_()
    with torch.no_grad():
        for name, parameter in pairs:
            parameter.copy_(arrays[f"w.{name}"])

    ids = arrays["ids"].T  # b 3n
    state = model.init_state(2)
    for segment in range(3):
        x = table[ids[:, 7 * segment : 7 * segment + 7]] * 12**0.5
        if segment == 2:
            yield from _first_layer(model, arrays, x.detach(), state)
        y, state = model.step(x, state)
        yield f"out_seg{segment}", y.transpose(0, 1), arrays[f"out_seg{segment}"], 1e-12
        for layer in range(2):
            memory = state[1][layer][0][0]
            yield f"mem{segment + 1}.{layer}", memory.transpose(0, 1), arrays[f"mem{segment + 1}.{layer}"], 1e-12
    logits = y @ table.T + arrays["w.crit.out_layers.0.bias"]
    nll = -logits.log_softmax(-1).gather(-1, arrays["targets"].T[..., None])[..., 0]
    yield "nll_seg2", nll.T, arrays["nll_seg2"], 1e-12

    (y * arrays["cotangent"].transpose(0, 1)).sum().backward()
    for name, parameter in [*pairs, ("word_emb.emb_layers.0.weight", table)]:
        yield f"grad_seg2.{name}", parameter.grad, arrays[f"grad_seg2.{name}"], 1e-12
    for i, block in enumerate(model.blocks):
        qkv = torch.cat([block.mixer.heads.q.weight.grad, block.mixer.heads.kv.weight.grad])
        name = f"grad_seg2.layers.{i}.dec_attn.qkv_net.weight"
        yield name, qkv, arrays[name], 1e-12
    # the official model shares u and v: their gradient is the sum over layers
    yield "grad_seg2.r_w_bias", sum(p.u.grad for p in positions), arrays["grad_seg2.r_w_bias"], 1e-12
    yield "grad_seg2.r_r_bias", sum(p.v.grad for p in positions), arrays["grad_seg2.r_r_bias"], 1e-12


def _first_layer(
    model: nn.Module, arrays: dict[str, Tensor], x_2: Tensor, state: tuple
) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """One layer over [memory; x] given as context: gradients of both; and the whole model with equal numbers of keys."""

    def layer(block: nn.Module, x: Tensor, memory: Tensor, attend: Tensor | None) -> Tensor:
        def mix(y: Tensor) -> Tensor:
            return block.mixer(y, torch.cat([memory, y], 1), attend=attend)

        return block.residual(x, (mix, block.channel))

    x = arrays["layer0.x"].transpose(0, 1).clone().requires_grad_()
    memory = arrays["layer0.mem"].transpose(0, 1).clone().requires_grad_()
    y = layer(model.blocks[0], x, memory, None)
    yield "layer0.out", y.transpose(0, 1), arrays["layer0.out"], 1e-12
    wanted = torch.autograd.grad(y, (x, memory), arrays["layer0.cotangent"].transpose(0, 1))
    for name, gradient in zip(("x", "mem"), wanted, strict=True):
        yield f"layer0.grad.{name}", gradient.transpose(0, 1), arrays[f"layer0.grad.{name}"], 1e-12
    query, key = torch.arange(7)[:, None], torch.arange(12)[None]
    same = ((key > query) & (key <= query + 5))[None]
    with torch.no_grad():
        y = x_2
        for block, (own, _) in zip(model.blocks, state[1], strict=True):
            y = layer(block, y, own[0], same)
    yield "out_seg2_samelength", y.transpose(0, 1), arrays["out_seg2_samelength"], 1e-12
