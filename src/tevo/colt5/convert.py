"""Weights of T5 v1.1 and LongT5, as transformers has them, made into a CoLT5.

    heads          the first are light, the others heavy                                                  (1)
    hidden units   the first are light, the others heavy; heavy ones beyond them are new, with W_2 = 0    (2)
    decoder        as it is; keys and values of cross-attention are means of their heads                  (3)

Where all tokens are routed and see each other, weights are 1 and the encoder is the source's. With fewer, routers begin as
drawn, and the model has to be trained. Means of heads are those of Ainslie et al. (arXiv 2305.13245), section 2.1. LongT5's
summaries have no place here and are left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tevo.colt5.config import CoLT5Config
from tevo.colt5.modeling import CoLT5ForConditionalGeneration

__all__ = ["upcycle"]

_TABLE = "relative_attention_bias.weight"
_SELF = ("SelfAttention", "LocalSelfAttention", "TransientGlobalSelfAttention")


@torch.no_grad()
def upcycle(source: nn.Module, config: CoLT5Config) -> CoLT5ForConditionalGeneration:
    """A CoLT5 with the weights of ``source``.

    Args:
        source: a T5ForConditionalGeneration with gated GELU (v1.1, FLAN) or a LongT5ForConditionalGeneration.
        config: of the model that is made; sizes as the source's, light and heavy heads as many as its heads, and light and
            heavy hidden units at least as many as its units.

    Raises:
        ValueError: if the source is another model, or a size does not fit.
    """
    given: Any = getattr(source, "config", None)
    if getattr(given, "model_type", None) not in ("t5", "longt5") or not hasattr(source, "lm_head"):
        raise ValueError(f"upcycle got a {type(source).__name__}, expected T5 or LongT5 for conditional generation")
    _check(given, config)
    model = CoLT5ForConditionalGeneration(config)
    theirs = source.state_dict()
    # a tied head gets outputs that are scaled; ours has a head of its own
    scaled = getattr(given, "scale_decoder_outputs", given.tie_word_embeddings)
    ours = {
        "encoder.embed_tokens.weight": theirs["shared.weight"],
        "lm_head.weight": theirs["lm_head.weight"] * (config.dim**-0.5 if scaled else 1.0),
        "encoder.norm.weight": theirs["encoder.final_layer_norm.weight"],
        "decoder.norm.weight": theirs["decoder.final_layer_norm.weight"],
        "decoder.bias.table": theirs[f"decoder.block.0.layer.0.SelfAttention.{_TABLE}"].mT,
    }
    tables = _attention(theirs, "encoder.block.0.layer.0.")[_TABLE].mT.split([config.light_heads, config.heavy_heads])
    ours |= {f"encoder.{name}_bias.table": table for name, table in zip(("light", "heavy"), tables, strict=True)}
    fresh = model.state_dict()
    for i in range(config.layers):
        ours |= _encoder_layer(theirs, f"encoder.block.{i}.layer.", fresh, f"encoder.layers.{i}.", config)
    for i in range(config.decoder_layers):
        ours |= _decoder_layer(theirs, f"decoder.block.{i}.layer.", f"decoder.layers.{i}.", config)
    # routers and the softness of what they choose are ours alone
    model.load_state_dict(fresh | ours)
    return model


def _encoder_layer(
    theirs: Mapping[str, Tensor], source: str, fresh: Mapping[str, Tensor], to: str, config: CoLT5Config
) -> dict[str, Tensor]:
    w = _attention(theirs, f"{source}0.")
    light = config.light_heads * config.head_dim
    q, k, v = (w[f"{name}.weight"] for name in "qkv")
    attention = {
        "light.qkv": torch.cat([z[:light] for z in (q, k, v)]),
        "light.out": w["o.weight"][:, :light],
        "heavy.q": q[light:],
        "heavy.kv": torch.cat([z[light:] for z in (k, v)]),
        "heavy.out": w["o.weight"][:, light:],
    }
    wi_0, wi_1, wo = _feed_forward(theirs, f"{source}1.")
    f = config.light_dim
    feed_forward = {"light.into": torch.cat([wi_0[:f], wi_1[:f]]), "light.out": wo[:, :f]}
    gate, value = (z.clone() for z in fresh[f"{to}feed_forward.heavy.into.weight"].chunk(2))
    moved = len(wi_0) - f
    gate[:moved], value[:moved] = wi_0[f:], wi_1[f:]
    out = torch.zeros_like(fresh[f"{to}feed_forward.heavy.out.weight"])
    out[:, :moved] = wo[:, f:]
    feed_forward |= {"heavy.into": torch.cat([gate, value]), "heavy.out": out}
    return {
        **{f"{to}attention.{name}.weight": z for name, z in attention.items()},
        **{f"{to}feed_forward.{name}.weight": z for name, z in feed_forward.items()},
        f"{to}attention_norm.weight": theirs[f"{source}0.layer_norm.weight"],
        f"{to}feed_forward_norm.weight": theirs[f"{source}1.layer_norm.weight"],
    }


def _decoder_layer(theirs: Mapping[str, Tensor], source: str, to: str, config: CoLT5Config) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for i, (name, kind) in enumerate((("self_attention", "SelfAttention"), ("cross_attention", "EncDecAttention"))):
        q, k, v, o = (theirs[f"{source}{i}.{kind}.{z}.weight"] for z in "qkvo")
        if i == 1:
            k, v = (_means(z, config.heads, config.cross_kv_heads) for z in (k, v))
        made |= {f"{to}{name}.q.weight": q, f"{to}{name}.kv.weight": torch.cat([k, v]), f"{to}{name}.out.weight": o}
        made[f"{to}{name}_norm.weight"] = theirs[f"{source}{i}.layer_norm.weight"]
    wi_0, wi_1, wo = _feed_forward(theirs, f"{source}2.")
    made |= {f"{to}feed_forward.into.weight": torch.cat([wi_0, wi_1]), f"{to}feed_forward.out.weight": wo}
    return {**made, f"{to}feed_forward_norm.weight": theirs[f"{source}2.layer_norm.weight"]}


def _attention(theirs: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Weights of an encoder layer's attention, whichever kind it is."""
    kinds = tuple(f"{layer}{kind}." for kind in _SELF)
    return {name.removeprefix(kind): w for name, w in theirs.items() for kind in kinds if name.startswith(kind)}


def _feed_forward(theirs: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor, Tensor]:
    wi_0, wi_1, wo = (theirs[f"{layer}DenseReluDense.{name}.weight"] for name in ("wi_0", "wi_1", "wo"))
    return wi_0, wi_1, wo


def _means(weight: Tensor, heads: int, groups: int) -> Tensor:
    """Weights (h e, d) of h heads as those of fewer, each the mean of heads that stand side by side."""
    return weight.unflatten(0, (groups, heads // groups, -1)).mean(1).flatten(0, 1)


def _check(given: object, config: CoLT5Config) -> None:
    def theirs(name: str) -> object:
        return getattr(given, name, None)

    if not theirs("is_gated_act") or theirs("dense_act_fn") != "gelu_new":
        raise ValueError(
            f"upcycle got feed_forward_proj={theirs('feed_forward_proj')!r}, expected 'gated-gelu' (T5 v1.1, LongT5)"
        )
    if config.tie_word_embeddings or config.global_tokens is not None:
        raise ValueError(
            f"upcycle got a config with tie_word_embeddings={config.tie_word_embeddings}, "
            f"global_tokens={config.global_tokens}; expected False and None"
        )
    modern = {name: getattr(config, name) for name in ("rotary", "qk_norm", "light_kv_heads", "heavy_kv_heads")}
    if any(value not in (None, False) for value in modern.values()):
        raise ValueError(f"upcycle got a config with {modern}, which T5's attention does not have; leave these out")
    same = {
        "vocab_size": "vocab_size",
        "dim": "d_model",
        "head_dim": "d_kv",
        "heads": "num_heads",
        "hidden_dim": "d_ff",
        "layers": "num_layers",
        "decoder_layers": "num_decoder_layers",
        "buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
    }
    for ours, name in same.items():
        if getattr(config, ours) != theirs(name):
            raise ValueError(
                f"upcycle got a config of {ours}={getattr(config, ours)}, expected the source's {theirs(name)}"
            )
    if config.light_heads + config.heavy_heads != config.heads:
        raise ValueError(
            f"upcycle got light_heads={config.light_heads} and heavy_heads={config.heavy_heads}, expected {config.heads} "
            "together, the source's heads"
        )
    if config.light_dim > config.hidden_dim or config.light_dim + config.heavy_dim < config.hidden_dim:
        raise ValueError(
            f"upcycle got light_dim={config.light_dim} and heavy_dim={config.heavy_dim}, expected at most {config.hidden_dim} "
            "light ones, the source's hidden units, and at least as many together"
        )
