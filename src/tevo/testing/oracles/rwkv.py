"""RWKV-4 by the direct double sum, one token and one earlier token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _norm(layer: nn.Module, x: Tensor) -> Tensor:
    z = x - x.mean(-1, keepdim=True)
    return z / (z.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def _shifted(x: list[Tensor], t: int, mu: Tensor) -> Tensor:
    earlier = x[t - 1] if t else torch.zeros_like(x[t])
    return mu * x[t] + (1 - mu) * earlier


def _time(module: nn.Module, x: list[Tensor]) -> list[Tensor]:
    k = [module.key.weight @ _shifted(x, t, module.mix_k) for t in range(len(x))]
    v = [module.value.weight @ _shifted(x, t, module.mix_v) for t in range(len(x))]
    w, outputs = module.decay.exp(), []
    for t in range(len(x)):
        now = (module.bonus + k[t]).exp()
        top, bottom = now * v[t], now
        for i in range(t):
            weight = (k[i] - (t - 1 - i) * w).exp()
            top, bottom = top + weight * v[i], bottom + weight
        r = module.receptance.weight @ _shifted(x, t, module.mix_r)
        outputs.append(module.output.weight @ (top / bottom / (1 + (-r).exp())))
    return outputs


def _channel(module: nn.Module, x: list[Tensor]) -> list[Tensor]:
    outputs = []
    for t in range(len(x)):
        k = module.key.weight @ _shifted(x, t, module.mix_k)
        r = module.receptance.weight @ _shifted(x, t, module.mix_r)
        outputs.append((module.value.weight @ k.clamp(min=0) ** 2) / (1 + (-r).exp()))
    return outputs


def reference(
    module: nn.Module, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, at: Tensor | None = None
) -> Tensor:
    """Each row by itself, its padding taken out; padding gives zeros."""
    rows = []
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if mask is None or bool(mask[b, t])]
        z = [x[b, t] if module.first is None else _norm(module.first, x[b, t]) for t in real]
        time = _time(module.time, [_norm(module.time_norm, y) for y in z])
        z = [y + add for y, add in zip(z, time, strict=True)]
        channel = _channel(module.channel, [_norm(module.channel_norm, y) for y in z])
        z = [y + add for y, add in zip(z, channel, strict=True)]
        if module.last is not None:
            z = [_norm(module.last, y) for y in z]
        places = dict(zip(real, z, strict=True))
        rows.append(torch.stack([places.get(t, torch.zeros_like(x[b, t])) for t in range(x.shape[1])]))
    return torch.stack(rows)


NORMS = {"pre_ln": "first", "ln1": "time_norm", "ln2": "channel_norm"}
VECTORS = {
    "time_decay": "decay",
    "time_first": "bonus",
    "time_mix_key": "mix_k",
    "time_mix_value": "mix_v",
    "time_mix_receptance": "mix_r",
}


def _ours(name: str) -> str:
    """The name of one parameter of a block, translated from the official one."""
    part, _, rest = name.partition(".")
    if part in NORMS:
        return f"{NORMS[part]}.{rest}"
    return {"attention": "time", "feed_forward": "channel"}[part] + "." + VECTORS.get(rest, rest)


def official(system: ModuleType, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """The package transformers: whole model, both mixers, states after chunks, and keys too large for a plain sum."""
    blocks = [system.RWKV(dim=12, hidden_dim=20, depth=2, index=i).double() for i in range(2)]
    parameters = {}  # official name -> our tensor
    for name, array in arrays.items():
        if name.startswith("w.rwkv.blocks."):
            i, _, rest = name.removeprefix("w.rwkv.blocks.").partition(".")
            parameters[name[2:]] = blocks[int(i)].get_parameter(_ours(rest))
        elif name.startswith("w.rwkv.ln_out."):
            parameters[name[2:]] = blocks[1].last.get_parameter(name.removeprefix("w.rwkv.ln_out."))
        elif name.startswith("w."):
            parameters[name[2:]] = array.clone().requires_grad_()
        if name.startswith("w."):
            with torch.no_grad():
                parameters[name[2:]].copy_(array.reshape(parameters[name[2:]].shape))
    embeddings = parameters["rwkv.embeddings.weight"]
    ids = arrays["ids"]
    logits = blocks[1](blocks[0](F.embedding(ids, embeddings))) @ parameters["head.weight"].T
    logits.backward(arrays["cotangent"])
    yield "logits", logits, arrays["logits"], 1e-12
    for name, parameter in parameters.items():
        yield f"grad.{name}", parameter.grad.reshape(arrays[f"grad.{name}"].shape), arrays[f"grad.{name}"], 1e-12

    time, channel = blocks[0].time, blocks[0].channel
    zero, sums = torch.zeros(2, 12, dtype=torch.float64), blocks[0].init_state(2)[1]
    for which, run in (
        ("time_mix", lambda z: time(z, zero, sums, None)[0]),
        ("channel_mix", lambda z: channel(z, zero)),
    ):
        x = arrays["x"].clone().requires_grad_()
        y = run(x)
        y.backward(arrays["x.cotangent"])
        yield f"{which}.out", y, arrays[f"{which}.out"], 1e-12
        yield f"{which}.grad.x", x.grad, arrays[f"{which}.grad.x"], 1e-12

    from tevo.functional.exponential import wkv

    with torch.no_grad():
        for split, piece in (("mid", ids[:, :MIDDLE]), ("end", ids)):
            y, states = F.embedding(piece, embeddings), []
            for block in blocks:
                y, state = block.step(y, block.init_state(2))
                states.append(state)
            for name, pick in STATE.items():
                ours = torch.stack([pick(state) for state in states], -1)
                yield f"state_{split}.{name}", ours, arrays[f"state_{split}.{name}"], 1e-12
        large, _ = wkv(arrays["wkv.k_large"], arrays["wkv.v"], decay=time.decay.exp(), bonus=time.bonus)
        yield "wkv.out_large", large, arrays["wkv.out_large"], 1e-11


MIDDLE = 6
STATE = {
    "att_x": lambda state: state[0],
    "num": lambda state: state[1][0],
    "den": lambda state: state[1][1],
    "max": lambda state: state[1][2],
    "ffn_x": lambda state: state[2],
}
