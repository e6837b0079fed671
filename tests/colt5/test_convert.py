from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers
from transformers.modeling_outputs import BaseModelOutput

from tevo.colt5.config import CoLT5Config
from tevo.colt5.convert import upcycle
from tevo.colt5.layers import GatedFeedForward, LocalAttention, RelativeBias
from tevo.colt5.longt5 import LongT5Layer, from_transformers

_THEIRS = {
    "vocab_size": 61,
    "d_model": 12,
    "d_kv": 5,
    "d_ff": 11,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}


def _config(**changes: object) -> CoLT5Config:
    sizes = {"vocab_size": 61, "dim": 12, "layers": 2, "decoder_layers": 3, "light_heads": 1, "heavy_heads": 2}
    widths = {"heads": 3, "head_dim": 5, "light_dim": 4, "heavy_dim": 21, "hidden_dim": 11, "radius": 30}
    # all tokens are routed, and see each other; as many heads of keys as the source has
    return CoLT5Config(**{**sizes, **widths, "m": 1.0, "cross_kv_heads": 3, **changes})


def _source(kind: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    if kind == "T5":
        source = transformers.T5ForConditionalGeneration(transformers.T5Config(**_THEIRS, **changes))
    else:
        options = {"encoder_attention_type": "local", "local_radius": 30, **changes}
        source = transformers.LongT5ForConditionalGeneration(transformers.LongT5Config(**_THEIRS, **options))
    with torch.no_grad():
        # norms and tables that are not all alike
        for p in source.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return source.eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("T5", {}), ("T5", {"tie_word_embeddings": False}), ("LongT5", {}), ("LongT5", {"tie_word_embeddings": False})],
)
def test_with_all_tokens_routed_the_model_is_the_source(kind: str, changes: dict[str, object]) -> None:
    source = _source(kind, **changes)
    model = upcycle(source, _config()).eval()
    draw = torch.Generator().manual_seed(1)
    ids, targets = (torch.randint(2, 61, (2, n), generator=draw) for n in (23, 6))
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    expected = source(ids, attention_mask=mask, decoder_input_ids=targets).logits
    found = model(ids, attention_mask=mask, decoder_input_ids=targets).logits
    # float32 over five layers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


def test_summaries_of_longt5_are_left_behind() -> None:
    source = _source("LongT5", encoder_attention_type="transient-global")
    model = upcycle(source, _config())
    w = source.encoder.block[1].layer[0].TransientGlobalSelfAttention.q.weight
    assert torch.equal(model.encoder.layers[1].attention.heavy.q.weight, w[5:])


def test_keys_and_values_of_multi_query_attention_are_means_of_heads() -> None:
    source = _source("T5")
    model = upcycle(source, _config(cross_kv_heads=1))
    theirs = source.decoder.block[2].layer[1].EncDecAttention
    k, v = model.decoder.layers[2].cross_attention.kv.weight.chunk(2)
    for found, w in ((k, theirs.k.weight), (v, theirs.v.weight)):
        torch.testing.assert_close(found, (w[:5] + w[5:10] + w[10:]) / 3)


def test_new_hidden_units_can_learn() -> None:
    model = upcycle(_source("T5"), _config(m=1 / 2)).train()
    ids = torch.randint(2, 61, (2, 23), generator=torch.Generator().manual_seed(1))
    model(ids, labels=ids[:, :5]).loss.backward()
    heavy = model.encoder.layers[0].feed_forward.heavy
    assert torch.equal(heavy.out.weight[:, 7:], torch.zeros(12, 14))
    assert (heavy.out.weight.grad[:, 7:].abs().sum(0) > 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 13}, "dim=13, expected the source's 12"),
        ({"heavy_heads": 1}, "expected 3 together"),
        ({"heavy_dim": 5}, "heavy_dim=5, expected at most 11"),
        ({"tie_word_embeddings": True}, "expected False and None"),
        ({"qk_norm": True}, "'qk_norm': True.*, which T5's attention does not have"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(_source("T5"), _config(**changes))


def test_other_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="expected T5 or LongT5"):
        upcycle(nn.Linear(2, 2), _config())
    relu = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**_THEIRS, "feed_forward_proj": "relu"}))
    with pytest.raises(ValueError, match="expected 'gated-gelu'"):
        upcycle(relu, _config())


def _golden(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of transformers with stored weights, and what it gave when they were stored."""
    with np.load(Path(__file__).parents[1] / "golden" / "colt5" / "t5_longt5_a.npz") as file:
        a = {k.removeprefix(f"{name}__"): torch.tensor(file[k]) for k in file.files if k.startswith(f"{name}__")}
        a["mask"] = torch.tensor(file["mask"])
        radius = int(file["longt5__local_radius"])
    sizes = {**_THEIRS, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_decoder_layers": 2, "tie_word_embeddings": False}
    if name == "t5v11":
        source: nn.Module = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    else:
        local = transformers.LongT5Config(**sizes, encoder_attention_type="local", local_radius=radius)
        source = transformers.LongT5ForConditionalGeneration(local)
    weights = {k.removeprefix("w__"): w for k, w in a.items() if k.startswith("w__")}
    # transformers 5 makes one weight of embedding and head, whatever its configuration says
    source.lm_head.weight = nn.Parameter(source.lm_head.weight.detach().clone())
    missing, unexpected = source.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert all("embed_tokens" in k for k in missing)
    return source, a


@pytest.mark.parametrize("name", ["t5v11", "longt5_local"])
def test_upcycled_models_give_the_stored_outputs_and_tokens(name: str) -> None:
    source, a = _golden(name)
    sizes = {"dim": 24, "head_dim": 8, "hidden_dim": 40, "light_dim": 20, "heavy_dim": 40, "decoder_layers": 2}
    # within 60 tokens light heads see all that heavy heads do
    model = upcycle(source, _config(**sizes, radius=60)).eval()
    mask, real = a["mask"], a["mask"].bool()
    if name == "t5v11":
        encoded = model.encoder(a["ids"], mask).last_hidden_state
    else:
        # all heads are local here, which is what our own LongT5 has; the decoder is CoLT5's
        x = model.encoder.embed_tokens(a["ids"])
        for i in range(2):
            bias = RelativeBias(heads=3)
            attention = LocalAttention(dim=24, heads=3, head_dim=8, radius=7, bias=bias)
            layer = LongT5Layer(dim=24, attention=attention, feed_forward=GatedFeedForward(dim=24, hidden_dim=40))
            layer.load_state_dict(from_transformers(source.encoder.state_dict(), layer=i))
            x = layer(x, mask=real)
        encoded = model.encoder.norm(x)

    def close(ours: Tensor, theirs: Tensor) -> None:
        # relative to the size of the outputs, as the README of the stored values asks for
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * theirs.abs().max().item())

    close(encoded[real], a["enc"][real])
    given = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded), "attention_mask": mask}
    close(model(**given, decoder_input_ids=a["dec"]).logits, a["logits"])
    tokens = model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, a["greedy"])
