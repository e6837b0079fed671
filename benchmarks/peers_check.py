# ruff: noqa: D102, E501 - each forward is the call that the class translates
"""Attention modules of other libraries, asked what the shared checks ask of ours.

``python -m benchmarks.peers_check`` writes ``benchmarks/peers_check.json``: per configuration what holds, and of
what does not the sentence with the smallest input. Each module stands behind a wrapper that only translates the call.
Groups A to C; a claim that a peer does not make is not asked.
"""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tevo.testing import examine, user_subject

RESULT = Path(__file__).parent / "peers_check.json"


class TorchAttention(nn.Module):
    """torch.nn.MultiheadAttention."""

    def __init__(self, dim: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.inner, self.causal = nn.MultiheadAttention(dim, heads, batch_first=True), causal

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        y = x if context is None else context
        later = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool, device=x.device).triu(1) if self.causal else None
        return self.inner(
            x, y, y, key_padding_mask=None if mask is None else ~mask, attn_mask=later, need_weights=False
        )[0]


class TorchEncoderLayer(nn.Module):
    """torch.nn.TransformerEncoderLayer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.inner(x, src_key_padding_mask=None if mask is None else ~mask)


class LlamaSelf(nn.Module):
    """transformers' LlamaAttention with its rotation, through its own causal mask."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

        config = LlamaConfig(
            hidden_size=dim, num_attention_heads=heads, num_key_value_heads=heads, attn_implementation="sdpa"
        )
        self.inner, self.rotary = LlamaAttention(config, 0), LlamaRotaryEmbedding(config)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1], device=x.device)[None]
        return self.inner(x, position_embeddings=self.rotary(x, at), attention_mask=None)[0]


class T5Self(nn.Module):
    """transformers' T5Attention of the encoder, with its bias."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        from transformers.models.t5.modeling_t5 import T5Attention, T5Config

        config = T5Config(d_model=dim, d_kv=dim // heads, num_heads=heads, dropout_rate=0.0)
        self.inner = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)[:, None, None]
        return self.inner(x, mask=bias)[0]


class LongT5(nn.Module):
    """transformers' LongT5 attention of the encoder, of either kind."""

    def __init__(self, dim: int, heads: int, kind: str) -> None:
        super().__init__()
        from transformers.models.longt5 import modeling_longt5 as peer

        config = peer.LongT5Config(
            d_model=dim, d_kv=dim // heads, num_heads=heads, dropout_rate=0.0, local_radius=3, global_block_size=4
        )
        cls = {"local": peer.LongT5LocalAttention, "global": peer.LongT5TransientGlobalAttention}[kind]
        self.inner, self.kind = cls(config, has_relative_attention_bias=True), kind

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        return self.inner(x, mask=mask if self.kind == "global" else None)[0]


class XAttention(nn.Module):
    """x-transformers' Attention."""

    def __init__(self, dim: int, heads: int, options: dict[str, Any]) -> None:
        super().__init__()
        from x_transformers.x_transformers import Attention

        self.inner = Attention(dim=dim, heads=heads, dim_head=dim // heads, **options)

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        y = self.inner(x, context=context, **{"mask" if context is None else "context_mask": mask})
        return y[0] if isinstance(y, tuple) else y


class XDecoder(nn.Module):
    """x-transformers' Decoder of one layer."""

    def __init__(self, dim: int, heads: int, options: dict[str, Any]) -> None:
        super().__init__()
        from x_transformers import Decoder

        self.inner = Decoder(dim=dim, heads=heads, depth=1, attn_dim_head=dim // heads, **options)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.inner(x, mask=mask)


class ColT5Self(nn.Module):
    """colt5-attention's ConditionalRoutedAttention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        from colt5_attention import ConditionalRoutedAttention

        self.inner = ConditionalRoutedAttention(
            dim, num_heavy_tokens_q=4, num_heavy_tokens_kv=4, light_dim_head=4, light_heads=heads, light_window_size=4,
            heavy_dim_head=4, heavy_heads=heads,
        )  # fmt: skip

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.inner(x, mask=mask)


class Slots(nn.Module):
    """slot-attention's SlotAttention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        from slot_attention import SlotAttention

        self.inner = SlotAttention(num_slots=5, dim=dim, iters=3, hidden_dim=2 * dim)
        # slots without spread: what is drawn for a row depends on the batch, which is no fault of the part
        del self.inner.slots_logsigma
        self.inner.register_buffer("slots_logsigma", torch.full((1, 1, dim), -1e4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng():
            return self.inner(x)


# how a failure is to be read, where its sentence alone could mislead
READINGS = {
    "padding": "zeros and 1e3 in the padding are tried before NaN: where the sentence says NaN, finite padding is harmless",
    "gradient": "a step in float32 inside the module is enough to fail this check of float64, with gradients that are right",
    "prefix": "differences near 1e-8 are those of a step in float32 inside the module, not of a look ahead",
    "equivariant": "differences near 1e-8 are those of a step in float32 inside the module",
    "copies": "deep copies agree; what fails is pickling the module, not saving its state dict",
    "short_lengths": "the input has no token or no row",
}


# name -> what it takes to build the peer alone, and to call it with tokens x and a mask of the real ones
ALONE = {
    "MultiheadAttention": (
        "m = torch.nn.MultiheadAttention(12, 3, batch_first=True).double()",
        "m(x, x, x, key_padding_mask=~mask)[0]",
    ),
    "TransformerEncoderLayer": (
        "m = torch.nn.TransformerEncoderLayer(12, 3, 24, dropout=0.0, batch_first=True).double()",
        "m(x, src_key_padding_mask=~mask)",
    ),
    "Attention": (
        X
        := "from x_transformers.x_transformers import Attention; m = Attention(dim=12, heads=3, dim_head=4{}).double()",
        "m(x, mask=mask)",
    ),
    "Attention, causal": (X, "m(x, mask=mask)"),
    "Attention, flash": (X, "m(x, mask=mask)"),
    "Attention, sparse_topk=4": (X, "m(x, mask=mask)"),
    "Attention, qk_norm": (X, "m(x, mask=mask)"),
    "Attention, one key head": (X, "m(x, mask=mask)"),
    "Decoder, rotary": (
        D := "from x_transformers import Decoder; m = Decoder(dim=12, heads=3, depth=1, attn_dim_head=4, {}).double()",
        "m(x)",
    ),
    "Decoder, alibi": (D, "m(x)"),
    "ConditionalRoutedAttention": (
        "from colt5_attention import ConditionalRoutedAttention as C; m = C(12, num_heavy_tokens_q=4, num_heavy_tokens_kv=4, "
        "light_dim_head=4, light_heads=3, light_window_size=4, heavy_dim_head=4, heavy_heads=3).double()",
        "m(x, mask=mask)",
    ),
    "SlotAttention": (
        "from slot_attention import SlotAttention; m = SlotAttention(num_slots=5, dim=12).double()",
        "m(x)",
    ),
}
OPTIONS = {
    "Attention, causal": ", causal=True",
    "Attention, flash": ", flash=True",
    "Attention, sparse_topk=4": ", sparse_topk=4",
    "Attention, qk_norm": ", qk_norm=True",
    "Attention, one key head": ", kv_heads=1",
    "Decoder, rotary": "rotary_pos_emb=True, rotary_emb_dim=4",
    "Decoder, alibi": "alibi_pos_bias=True",
}
# check -> two lines that show the failure: by raising, or by a last number that ought to be zero
SHOW = {
    "short_lengths": ("x = torch.zeros({b}, {n}, 12).double()", "print(f(x))"),
    "lengths": ("x = torch.zeros({b}, {n}, 12).double()", "print(f(x))"),
    "padding": (
        "x = torch.randn(2, 8, 12).double(); z = torch.cat([x, x[:, :3] * {junk}], 1)",
        "print((f(z, torch.arange(11).expand(2, 11) < 8)[:, :8] - f(x)).abs().max().item())",
    ),
    "all_padding": (
        "x = torch.randn(1, 3, 12).double().requires_grad_(); f(x, torch.zeros(1, 3).bool()).sum().backward()",
        "print((x.grad - 0 * x.grad).abs().max().item() if x.grad.isnan().any() else 0.0)",
    ),
    "equivariant": ("x = torch.randn(1, 9, 12).double()", "print((f(x.flip(1)) - f(x).flip(1)).abs().max().item())"),
    "prefix": ("x = torch.randn(1, 29, 12).double()", "print((f(x)[:, :5] - f(x[:, :5])).abs().max().item())"),
    "gradient": (
        "x = torch.randn(1, 5, 12).double().requires_grad_()",
        "torch.autograd.gradcheck(f, x, fast_mode=True, eps=1e-6, atol=1e-9, rtol=1e-5)",
    ),
    "copies": ("import pickle", "pickle.dumps(m)"),
}


def script_of(name: str, check: str, failure: dict[str, str]) -> str | None:
    """Five lines of Python that show a failure with the peer alone; None where a wrapper of this file is needed for it."""
    if name not in ALONE or check not in SHOW:
        return None
    build, call = ALONE[name]
    shape = re.search(r"shape \((\w+), (\d+),", failure.get("smallest", ""))
    b, n = shape.groups() if shape else ("2", "0")
    junk = "float('nan')" if "filled with nan" in failure["what"] else "0"
    first, second = (
        line.format(b=b, n=n, junk=junk) if "{" in line and "item()" not in line else line for line in SHOW[check]
    )
    default = "" if "mask" not in call else "; mask = torch.ones(x.shape[:2]).bool() if mask is None else mask"
    lines = [
        "import torch; torch.manual_seed(0)",
        build.format(OPTIONS.get(name, "")),
        f"def f(x, mask=None): {default.removeprefix('; ') or 'pass'}; return {call}",
        first,
        second,
    ]
    return "\n".join(lines) + "\n"


def reproduced(script: str) -> str | None:
    """What a script shows: the last line of its error, or its number that ought to be zero; None if all is well."""
    out = io.StringIO()
    try:
        with redirect_stdout(out):
            exec(script, {})
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    last = (out.getvalue().strip().splitlines() or [""])[-1]
    # rounding is no failure; NaN is one
    return last if last not in ("", "None") and not float(last) <= 1e-12 else None


def configurations() -> list[tuple[str, str, str, Callable[..., nn.Module], tuple[str, ...]]]:
    """(name, library, role, factory, claims)."""
    padded = ("bidirectional", "padding")

    def x(**options: Any) -> Callable[..., nn.Module]:
        return lambda: XAttention(12, 3, options)

    return [
        ("MultiheadAttention", "torch", "mixer", lambda: TorchAttention(12, 3), (*padded, "cross", "equivariant")),
        ("MultiheadAttention, causal", "torch", "mixer", lambda: TorchAttention(12, 3, True), ("causal",)),
        ("TransformerEncoderLayer", "torch", "block", lambda: TorchEncoderLayer(12, 3), (*padded, "equivariant")),
        ("LlamaAttention", "transformers", "mixer", lambda: LlamaSelf(12, 3), ("causal",)),
        ("T5Attention", "transformers", "mixer", lambda: T5Self(12, 3), padded),
        ("LongT5LocalAttention", "transformers", "mixer", lambda: LongT5(12, 3, "local"), ("bidirectional",)),
        ("LongT5TransientGlobalAttention", "transformers", "mixer", lambda: LongT5(12, 3, "global"), ("bidirectional",)),
        ("Attention", "x-transformers", "mixer", x(), (*padded, "cross", "equivariant")),
        ("Attention, causal", "x-transformers", "mixer", x(causal=True), ("causal", "padding")),
        ("Attention, flash", "x-transformers", "mixer", x(flash=True), padded),
        ("Attention, sparse_topk=4", "x-transformers", "mixer", x(sparse_topk=4), padded),
        ("Attention, qk_norm", "x-transformers", "mixer", x(qk_norm=True), padded),
        ("Attention, one key head", "x-transformers", "mixer", x(kv_heads=1), padded),
        ("Decoder, rotary", "x-transformers", "block", lambda: XDecoder(12, 3, {"rotary_pos_emb": True, "rotary_emb_dim": 4}), ("causal",)),
        ("Decoder, alibi", "x-transformers", "block", lambda: XDecoder(12, 3, {"alibi_pos_bias": True}), ("causal",)),
        ("ConditionalRoutedAttention", "colt5-attention", "mixer", lambda: ColT5Self(12, 3), padded),
        ("SlotAttention", "slot-attention", "stack", lambda: Slots(12), ("bidirectional",)),
    ]  # fmt: skip


def main() -> int:
    """Run all, write the table."""
    warnings.simplefilter("ignore")
    found: list[dict[str, object]] = []
    for name, library, role, factory, claims in configurations():
        entry: dict[str, object] = {
            "name": name,
            "library": library,
            "version": version(library),
            "claims": list(claims),
        }
        try:
            report = examine(name, [user_subject(factory, role=role, name=name, dim=12, claims=claims)])
        except ValueError as error:
            found.append(entry | {"refused": str(error)})
            print(f"{library} {name}: {error}")
            continue
        held = [r.check for r in report.results.values() if not r.failures]
        failed = {r.check: r.failures[0] for r in report.failed}
        for check, failure in failed.items():
            script = script_of(name, check, failure)
            shown = reproduced(script) if script else None
            if script and shown:
                failure |= {"script": script, "shows": shown}
        known = {check: text for check, text in READINGS.items() if check in failed}
        found.append(entry | {"holds": held, "fails": failed, "readings": known})
        print(f"{library} {name}: {len(held)} of {len(report.results)} hold; fails {', '.join(failed) or 'nothing'}")
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
