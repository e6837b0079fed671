"""Our parts against the same layer of torch, transformers and x-transformers, with equal weights and outputs.

Needs the extra ``bench``; without it only the case against torch is there. The peer is the baseline: a ratio of at most
1 / 0.95 means that ours is never slower than 0.95 of its speed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, inference, training
from tevo import create

Mode = Callable[..., Callable[[], object]]
Pair = Callable[[int, int, int], tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int]]


def with_parameters(mode: Mode, f: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Callable[[], object]:
    """A variant that in training also computes (and drops) the gradients of the module's parameters."""
    if mode is inference:
        return inference(f, x)
    parameters = [p for p in module.parameters() if p.requires_grad]
    leaf = x.detach().requires_grad_()
    dy = torch.randn(f(leaf).shape, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[Tensor, ...]:
        y = f(leaf)
        gradient, *_ = torch.autograd.grad(y, [leaf, *parameters], dy, allow_unused=True)
        return y.detach(), gradient

    return run


def case(build: Callable[[int], tuple[nn.Module, Callable[[Tensor], Tensor], nn.Module, Callable[[Tensor], Tensor]]],
         peer: str, mode: Mode, n: int, batch: int = 2) -> Case:  # fmt: skip
    """``build(d)`` gives our module, its call, the peer's module and its call, with equal weights."""
    d = 256
    ours, call, theirs, peer_call = build(d)
    ours.eval()
    theirs.eval()
    x = torch.randn(batch, n, d)
    return Case(
        variants={peer: with_parameters(mode, peer_call, theirs, x), "tevo": with_parameters(mode, call, ours, x)},
        baseline=peer,
        tolerance=1e-5,
    )


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.copy_(theirs)


def torch_attention(d: int, causal: bool = False):
    """nn.MultiheadAttention on its fused path."""
    theirs = nn.MultiheadAttention(d, 8, bias=False, batch_first=True)
    ours = create("softmax", dim=d, heads=8, causal=causal)
    q, k, v = theirs.in_proj_weight.chunk(3)
    _copy(
        [
            (ours.heads.q.weight, q),
            (ours.heads.kv.weight, torch.cat([k, v])),
            (ours.heads.out.weight, theirs.out_proj.weight),
        ]
    )

    def call(x: Tensor) -> Tensor:
        if not causal:
            return theirs(x, x, x, need_weights=False)[0]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return theirs(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0]

    return ours, ours, theirs, call


def x_attention(d: int, topk: int | None = None):
    """x-transformers' Attention; with ``topk`` its sparse form."""
    from x_transformers.x_transformers import Attention

    theirs = Attention(dim=d, heads=8, dim_head=d // 8, causal=True, flash=topk is None, sparse_topk=topk)
    if topk is None:
        ours = create("softmax", dim=d, heads=8, causal=True)
    else:
        ours = create("softmax", dim=d, heads=8, causal=True, normaliser=create("explicit_sparse_attention", topk=topk))
    kv = torch.cat([theirs.to_k.weight, theirs.to_v.weight])
    _copy(
        [
            (ours.heads.q.weight, theirs.to_q.weight),
            (ours.heads.kv.weight, kv),
            (ours.heads.out.weight, theirs.to_out.weight),
        ]
    )

    def call(x: Tensor) -> Tensor:
        out = theirs(x)
        return out[0] if isinstance(out, tuple) else out

    return ours, ours, theirs, call


def llama_attention(d: int, groups: int = 8):
    """Transformers' LlamaAttention (SDPA), rotary; with fewer groups multi-query attention."""
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=d, num_attention_heads=8, num_key_value_heads=groups, head_dim=d // 8, attn_implementation="sdpa"
    )
    theirs, rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)
    heads = 8 if groups == 8 else create("multi_query_attention", dim=d, heads=8, groups=groups)
    ours = create("softmax", dim=d, heads=heads, causal=True, position=create("rope"))
    kv = torch.cat([theirs.k_proj.weight, theirs.v_proj.weight])
    _copy(
        [
            (ours.heads.q.weight, theirs.q_proj.weight),
            (ours.heads.kv.weight, kv),
            (ours.heads.out.weight, theirs.o_proj.weight),
        ]
    )

    def call(x: Tensor) -> Tensor:
        places = rotary(x, torch.arange(x.shape[1])[None])
        return theirs(x, position_embeddings=places, attention_mask=None)[0]

    return ours, ours, theirs, call


def llama_mlp(d: int):
    """Transformers' LlamaMLP."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    theirs = LlamaMLP(LlamaConfig(hidden_size=d, intermediate_size=2 * d))
    ours = create("swiglu", dim=d, hidden_dim=2 * d, match_parameters=False)
    _copy(
        [
            (ours.into.weight, torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight])),
            (ours.out.weight, theirs.down_proj.weight),
        ]
    )
    return ours, ours, theirs, theirs


def llama_norm(d: int):
    """Transformers' LlamaRMSNorm."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(d, eps=1e-6)
    ours = create("rms_norm", dim=d)
    return ours, ours, theirs, theirs


def fnet(d: int):
    """Transformers' FNetBasicFourierTransform."""
    from transformers.models.fnet.modeling_fnet import FNetBasicFourierTransform, FNetConfig

    theirs = FNetBasicFourierTransform(FNetConfig(hidden_size=d, use_tpu_fourier_optimizations=False))
    ours = create("fnet", dim=d)
    return ours, ours, theirs, lambda x: theirs(x)[0]


def rwkv(d: int):
    """Transformers' RwkvSelfAttention (its CPU path) against the time mixing of ours."""
    from transformers.models.rwkv.modeling_rwkv import RwkvConfig, RwkvSelfAttention

    from tevo.blocks.rwkv import TimeMix
    from tevo.functional.exponential import wkv_state

    theirs = RwkvSelfAttention(RwkvConfig(hidden_size=d, attention_hidden_size=d, num_hidden_layers=2), layer_id=0)
    ours = TimeMix(dim=d, depth=2, index=0)
    nn.init.uniform_(theirs.time_decay, -5, 0)
    nn.init.uniform_(theirs.time_first, -1, 0)
    for name in ("time_mix_key", "time_mix_value", "time_mix_receptance"):
        nn.init.uniform_(getattr(theirs, name))
    _copy(
        [
            (ours.decay, theirs.time_decay),
            (ours.bonus, theirs.time_first),
            (ours.mix_k, theirs.time_mix_key.flatten()),
            (ours.mix_v, theirs.time_mix_value.flatten()),
            (ours.mix_r, theirs.time_mix_receptance.flatten()),
            (ours.key.weight, theirs.key.weight),
            (ours.value.weight, theirs.value.weight),
            (ours.receptance.weight, theirs.receptance.weight),
            (ours.output.weight, theirs.output.weight),
        ]
    )

    def call(x: Tensor) -> Tensor:
        return ours(x, x.new_zeros(len(x), d), wkv_state(len(x), ours.decay), None)[0]

    return ours, call, theirs, lambda x: theirs(x)[0]


def longt5(d: int, local: bool = False):
    """Transformers' LongT5 attention, transient-global or local, with a mask of ones (without one it skips the radius)."""
    from transformers.models.longt5 import modeling_longt5 as m

    config = m.LongT5Config(d_model=d, d_kv=d // 8, num_heads=8, dropout_rate=0.0)
    kind = m.LongT5LocalAttention if local else m.LongT5TransientGlobalAttention
    theirs = kind(config, has_relative_attention_bias=True)
    ours = create("longt5_local" if local else "longt5", dim=d, heads=8)
    pairs = [
        (ours.q.weight, theirs.q.weight),
        (ours.kv.weight, torch.cat([theirs.k.weight, theirs.v.weight])),
        (ours.out.weight, theirs.o.weight),
        (ours.bias, theirs.relative_attention_bias.weight.T),
    ]
    if not local:
        pairs.append((ours.global_bias, theirs.global_relative_attention_bias.weight.T))
    _copy(pairs)

    def call(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[:2], dtype=torch.long)
        if local:
            blocks = m._get_local_attention_mask(mask, theirs.block_len, x.device)
            return theirs(x, blocks)[0]
        return theirs(x, mask)[0]

    return ours, ours, theirs, call


def perceiver_attention(d: int):
    """Torch's attention across two sequences: 64 queries read the whole input."""
    theirs = nn.MultiheadAttention(d, 8, bias=False, batch_first=True)
    ours = create("softmax", dim=d, heads=8)
    q, k, v = theirs.in_proj_weight.chunk(3)
    _copy(
        [
            (ours.heads.q.weight, q),
            (ours.heads.kv.weight, torch.cat([k, v])),
            (ours.heads.out.weight, theirs.out_proj.weight),
        ]
    )
    return ours, lambda x: ours(x[:, :64], x), theirs, lambda x: theirs(x[:, :64], x, x, need_weights=False)[0]


_TORCH = {
    "softmax": (torch_attention, "torch nn.MultiheadAttention", (512, 2048)),
    "softmax_causal": (partial(torch_attention, causal=True), "torch nn.MultiheadAttention causal", (512, 2048)),
    "softmax_cross": (perceiver_attention, "torch nn.MultiheadAttention cross", (2048,)),
}
_X = {
    "softmax_x": (x_attention, "x-transformers Attention flash", (512, 2048)),
    "explicit_sparse": (partial(x_attention, topk=8), "x-transformers Attention sparse_topk", (512,)),
}
_HF = {
    "rope": (llama_attention, "transformers LlamaAttention", (512, 2048)),
    "multi_query": (partial(llama_attention, groups=1), "transformers LlamaAttention, 1 key head", (512, 2048)),
    "swiglu": (llama_mlp, "transformers LlamaMLP", (2048,)),
    "rms_norm": (llama_norm, "transformers LlamaRMSNorm", (2048,)),
    "fnet": (fnet, "transformers FNetBasicFourierTransform", (2048,)),
    "rwkv": (rwkv, "transformers RwkvSelfAttention", (512,)),
    "longt5": (longt5, "transformers LongT5TransientGlobalAttention", (2048,)),
    "longt5_local": (partial(longt5, local=True), "transformers LongT5LocalAttention", (2048,)),
}

CASES: dict[str, Callable[[], Case]] = {
    f"peers/{name}/{mode_name}/{n}": partial(case, build, peer, mode, n)
    for library, table in (("torch", _TORCH), ("x_transformers", _X), ("transformers", _HF))
    if importlib.util.find_spec(library)
    for name, (build, peer, lengths) in table.items()
    for n in lengths
    for mode_name, mode in (("forward", inference), ("training", training))
}
