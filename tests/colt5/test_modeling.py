from __future__ import annotations

import math
import runpy
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from transformers import AutoModel, AutoModelForSeq2SeqLM, ByT5Tokenizer
from transformers.modeling_outputs import BaseModelOutput

from tevo import record
from tevo.colt5.config import CoLT5Config
from tevo.colt5.layers import (
    ConditionalAttention,
    ConditionalFeedForward,
    ConditionalLayer,
    NormedTurn,
    by_document,
)
from tevo.colt5.modeling import CoLT5EncoderModel, CoLT5ForConditionalGeneration, CoLT5Model
from tevo.colt5.routers import Router
from tevo.positions.rope import RoPE
from tevo.positions.t5_bias import bucket


def _config(**changes: object) -> CoLT5Config:
    sizes = {"vocab_size": 61, "dim": 12, "layers": 2, "decoder_layers": 3, "light_heads": 1, "heavy_heads": 2}
    widths = {"heads": 3, "head_dim": 5, "light_dim": 7, "heavy_dim": 33, "hidden_dim": 11, "radius": 4, "m": 1 / 4}
    return CoLT5Config(**{**sizes, **widths, **changes})


def _model(**changes: object) -> CoLT5ForConditionalGeneration:
    torch.manual_seed(0)
    return CoLT5ForConditionalGeneration(_config(**changes)).double().eval()


def _ids(b: int = 2, n: int = 23, seed: int = 1) -> Tensor:
    return torch.randint(2, 61, (b, n), generator=torch.Generator().manual_seed(seed))


def _padded(n: int = 23, real: int = 17) -> Tensor:
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, real:] = 0
    return mask


@pytest.mark.parametrize(("size", "total"), [("base", 432_810_240), ("large", 1_462_701_056), ("xl", 5_297_281_024)])
def test_sizes_have_the_papers_numbers_of_parameters(size: str, total: int) -> None:
    with torch.device("meta"):
        model = CoLT5ForConditionalGeneration(getattr(CoLT5Config, size)())
    assert sum(p.numel() for p in model.parameters()) == total


def test_initial_weights_are_t5s() -> None:
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(CoLT5Config.tiny())
    d, e, h = 128, 32, 4
    attention, layer = model.encoder.layers[1].attention, model.decoder.layers[1]
    expected = [
        (model.encoder.embed_tokens.weight, 1.0),
        (model.lm_head.weight, d**-0.5),
        (attention.light.qkv.weight[:e], (d * e) ** -0.5),
        (attention.light.qkv.weight[e:], d**-0.5),
        (attention.heavy.out.weight, (3 * e) ** -0.5),
        (attention.q_router.weight, d**-0.5),
        (model.encoder.heavy_bias.table, d**-0.5),
        (model.decoder.bias.table, d**-0.5),
        (layer.cross_attention.q.weight, (d * e) ** -0.5),
        (layer.cross_attention.out.weight, (h * e) ** -0.5),
        (layer.feed_forward.out.weight, 256**-0.5),
        (model.encoder.layers[0].feed_forward.heavy.out.weight, 1024**-0.5),
    ]
    for weight, std in expected:
        # five standard errors of a standard deviation
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))


def test_the_decoder_equals_loops_over_heads_and_keys() -> None:
    model = _model()
    encoded = torch.randn(2, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids = _ids(n=5)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    found = model(encoder_outputs=(encoded,), attention_mask=mask, decoder_input_ids=ids).logits
    for row in range(2):
        x = model.encoder.embed_tokens.weight[ids[row]]
        for layer in model.decoder.layers:
            y = _normed(x, layer.self_attention_norm)
            x = x + _attend(layer.self_attention, y, y, model.decoder.bias.table, None)
            y = _normed(x, layer.cross_attention_norm)
            x = x + _attend(layer.cross_attention, y, encoded[row, : mask[row].sum()], None, 1)
            y = _normed(x, layer.feed_forward_norm)
            gate, value = (y @ w.mT for w in layer.feed_forward.into.weight.chunk(2))
            cube = gate + 0.044715 * gate**3
            x = (
                x
                + (gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * cube)) / 2 * value)
                @ layer.feed_forward.out.weight.mT
            )
        logits = _normed(x, model.decoder.norm) @ model.lm_head.weight.mT
        torch.testing.assert_close(found[row], logits, rtol=1e-10, atol=1e-10)


def _normed(x: Tensor, norm: nn.Module) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def _attend(attention: nn.Module, x: Tensor, source: Tensor, table: Tensor | None, kv_heads: int | None) -> Tensor:
    h, e = 3, 5
    q = x @ attention.q.weight.mT
    k, v = (source @ w.mT for w in attention.kv.weight.chunk(2))
    out = torch.zeros(len(x), h * e, dtype=x.dtype)
    for head in range(h):
        at = slice(head * e, (head + 1) * e)
        own = at if kv_heads is None else slice(0, e)
        for i in range(len(x)):
            keys = range(i + 1) if table is not None else range(len(source))
            s = torch.stack([q[i, at] @ k[j, own] for j in keys])
            if table is not None:
                offset = torch.tensor([j - i for j in keys])
                s = s + table[head, bucket(offset, causal=True, buckets=32, max_distance=128)]
            out[i, at] = torch.softmax(s, 0) @ v[list(keys), own]
    return out @ attention.out.weight.mT


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_decoding_with_a_cache_in_pieces_equals_one_pass(kv_heads: int) -> None:
    model, ids, mask, targets = _model(cross_kv_heads=kv_heads), _ids(), _padded(), _ids(n=9, seed=2)
    whole = model(ids, attention_mask=mask, decoder_input_ids=targets, use_cache=False)
    assert whole.past_key_values is None
    outputs, cache, logits = model.encoder(ids, mask), None, []
    for part in targets.split([4, 1, 1, 3], 1):
        out = model(
            encoder_outputs=outputs, attention_mask=mask, decoder_input_ids=part, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=1e-10, atol=1e-10)


def test_later_targets_do_not_change_earlier_logits() -> None:
    model, targets = _model(), _ids(n=9, seed=2)
    changed = targets.clone()
    changed[:, 5:] = 3
    first, second = (model(_ids(), decoder_input_ids=t).logits for t in (targets, changed))
    assert torch.equal(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])


@pytest.mark.parametrize("left", [True, False])
def test_padding_of_either_side_changes_no_logits(left: bool) -> None:
    model, ids, targets = _model(), _ids(1, 19), _ids(1, 6, 2)
    alone = model(ids, decoder_input_ids=targets).logits
    pad, ones = torch.full((1, 8), 5), torch.ones_like(ids)
    sides = (pad, ids) if left else (ids, pad)
    masks = (torch.zeros_like(pad), ones) if left else (ones, torch.zeros_like(pad))
    padded = model(torch.cat(sides, 1), attention_mask=torch.cat(masks, 1), decoder_input_ids=targets).logits
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 80), st.integers(0, 50), st.integers(0, 50), st.booleans(), st.integers(0, 2**31))
def test_padding_other_rows_and_packing_change_nothing_in_float32(
    n: int, before: int, after: int, nothing: bool, seed: int
) -> None:
    model = _model().float()
    width, text, targets = before + n + after, _ids(1, n, seed), _ids(1, 5, seed + 1)
    ids, mask = _ids(3, width, seed + 2), torch.ones(3, width, dtype=torch.long)
    ids[1, before : before + n] = text
    mask[1] = 0
    mask[1, before : before + n] = 1
    if nothing:
        mask[2] = 0
    with torch.no_grad(), record() as alone:
        wanted = model(text, decoder_input_ids=targets)
    with torch.no_grad(), record() as together:
        found = model(ids, attention_mask=mask, decoder_input_ids=targets.expand(3, -1))
    encoded = wanted.encoder_last_hidden_state[0]
    # the figure that is asked for
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    close(found.encoder_last_hidden_state[1, before : before + n], encoded)
    close(found.logits[1], wanted.logits[0])
    assert found.logits.isfinite().all()
    for ours, theirs in zip(together["routed"], alone["routed"], strict=True):
        assert torch.equal(ours[1, : theirs.shape[1]] - before, theirs[0])
    # three documents in one row: other tokens, the text, other tokens
    at = torch.arange(width)[None]
    documents = (at >= before).long() + (at >= before + n)

    def encode(rows: Tensor, real: Tensor) -> Tensor:
        return model.encoder(rows, real).last_hidden_state

    with torch.no_grad():
        close(by_document(encode, ids[1:2], documents)[0, before : before + n], encoded)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_generation_with_and_without_a_cache_is_the_same(options: dict[str, object]) -> None:
    model, found = _model(), []
    for cached in (True, False):
        torch.manual_seed(4)
        found.append(model.generate(_ids(), attention_mask=_padded(), max_new_tokens=7, use_cache=cached, **options))
    assert torch.equal(*found)
    assert found[0].shape == (2, 8)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generation_with_a_cache_of_fixed_size_is_the_same(options: dict[str, object]) -> None:
    # what of the cache is not filled yet is masked by generation itself, in four dimensions
    model, given = _model(), {"attention_mask": _padded(), "max_new_tokens": 7, **options}
    fixed = model.generate(_ids(), cache_implementation="static", disable_compile=True, **given)
    assert torch.equal(fixed, model.generate(_ids(), **given))


def test_generation_with_a_draft_is_the_same() -> None:
    model, draft, ids = _model(), _model(dropout=0.5), _ids(1)
    found = model.generate(ids, assistant_model=draft, max_new_tokens=7, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=7, do_sample=False))


def test_generated_tokens_are_the_likeliest_ones() -> None:
    model, ids = _model(), _ids(1)
    tokens = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(6):
        following = model(ids, decoder_input_ids=tokens).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, following], 1)
        if following.item() == 1:
            break
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)


def test_labels_of_minus_100_do_not_count() -> None:
    model, ids, labels = _model(), _ids(), _ids(n=6, seed=2)
    labels[1, 4:] = -100
    out = model(ids, labels=labels)
    assert out.past_key_values is None
    inputs = torch.cat([torch.zeros(2, 1, dtype=torch.long), labels[:, :-1]], 1).clamp(min=0)
    logits = model(ids, decoder_input_ids=inputs).logits.float()
    kept = [(b, i) for b in range(2) for i in range(6) if labels[b, i] != -100]
    nll = [-torch.log_softmax(logits[b, i], 0)[labels[b, i]] for b, i in kept]
    torch.testing.assert_close(out.loss.float(), torch.stack(nll).mean(), rtol=1e-5, atol=1e-6)
    # accumulated steps divide by the labels of all of them
    torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=20).loss, out.loss * len(kept) / 20)


def test_every_parameter_gets_a_gradient() -> None:
    model = _model().train()
    model(_ids(), attention_mask=_padded(), labels=_ids(n=6, seed=2)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_have_the_same_gradients_and_are_seen_once(reentrant: bool) -> None:
    model, grads, seen = _model().train(), [], []
    for recompute in (False, True):
        if recompute:
            model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=reentrant))
        model.zero_grad()
        with record() as taps:
            model(_ids(), labels=_ids(n=6, seed=2)).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        seen.append({name: len(values) for name, values in taps.items()})
    torch.testing.assert_close(grads[1], grads[0])
    assert seen[0] == seen[1]
    # three routers in each of two layers
    assert seen[0]["routed"] == 6


def test_a_saved_model_is_read_back_by_every_class(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(_config()).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, CoLT5ForConditionalGeneration)
    assert _equal(model.state_dict(), again.state_dict())
    body, encoder = AutoModel.from_pretrained(tmp_path).eval(), CoLT5EncoderModel.from_pretrained(tmp_path).eval()
    assert isinstance(body, CoLT5Model)
    out = model(_ids(), decoder_input_ids=_ids(n=4), output_hidden_states=True)
    assert torch.equal(encoder(_ids()).last_hidden_state, out.encoder_last_hidden_state)
    assert torch.equal(body(_ids(), decoder_input_ids=_ids(n=4)).last_hidden_state, out.decoder_hidden_states[-1])
    assert len(out.encoder_hidden_states) == 3
    assert len(out.decoder_hidden_states) == 4


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_tables_of_distance_are_saved_once_and_used_by_all_layers() -> None:
    model = _model(layers=3)
    assert [name for name in model.state_dict() if name.endswith("table")] == [
        "encoder.light_bias.table",
        "encoder.heavy_bias.table",
        "decoder.bias.table",
    ]
    x = torch.randn(1, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    before = [layer(x) for layer in model.encoder.layers]
    with torch.no_grad():
        model.encoder.light_bias.table.copy_(torch.arange(32))
    after = [layer(x) for layer in model.encoder.layers]
    assert all(not torch.allclose(a, b) for a, b in zip(after, before, strict=True))


def test_rows_are_added_to_embedding_and_head() -> None:
    model = _model()
    before = model(_ids(), decoder_input_ids=_ids(n=4)).logits
    model.resize_token_embeddings(70, mean_resizing=False)
    after = model(_ids(), decoder_input_ids=_ids(n=4)).logits
    assert after.shape[-1] == model.config.vocab_size == 70
    torch.testing.assert_close(after[..., :61], before)


def test_a_tied_head_is_the_embedding_and_its_logits_are_scaled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(_config(tie_word_embeddings=True)).eval()
    assert model.lm_head.weight is model.encoder.embed_tokens.weight
    out = model(_ids(), decoder_input_ids=_ids(n=4), output_hidden_states=True)
    scaled = out.decoder_hidden_states[-1] @ model.encoder.embed_tokens.weight.mT / math.sqrt(12)
    torch.testing.assert_close(out.logits, scaled)
    model.save_pretrained(tmp_path)
    again = CoLT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(_ids(), decoder_input_ids=_ids(n=4)).logits, out.logits)


def test_another_share_is_routed_from_now_on() -> None:
    model = _model()
    with record() as seen:
        model.encoder(_ids())
        model.set_routed(m=3, v=1.0)
        model.encoder(_ids())
    # queries, keys and feed-forward, of two layers
    assert [x.shape[1] for x in seen["routed"]] == [6, 12, 6] * 2 + [3, 23, 3] * 2
    assert (model.config.m, model.config.q, model.config.v) == (3, None, 1.0)


def test_forced_tokens_are_routed_and_forbidden_ones_are_not() -> None:
    model, forced = _model(), torch.zeros(2, 23, dtype=torch.bool)
    forced[:, 3:5] = True
    with record() as seen:
        model(_ids(), decoder_input_ids=_ids(n=2), forced=forced, forbidden=_padded(real=10) == 0)
    for indices in seen["routed"]:
        assert all({3, 4} <= set(row) for row in indices.tolist())
        assert max(indices[1].tolist()) < 10
    tokens = model.generate(_ids(), forced=forced, max_new_tokens=3)
    assert tokens.shape[0] == 2


def test_the_notes_form_is_a_model_too() -> None:
    sizes = {name: value for name, value in _config().to_dict().items() if name in ("vocab_size", "dim", "layers")}
    config = CoLT5Config.note(
        **sizes, light_heads=1, heavy_heads=2, heads=3, head_dim=5, light_dim=7, heavy_dim=9, hidden_dim=11, radius=4
    )
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(config).train()
    model(_ids(), attention_mask=_padded(), labels=_ids(n=4)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with record() as seen:
        model.eval()(_ids(), decoder_input_ids=_ids(n=2))
    assert all(torch.allclose(w.sum(-1), torch.ones(2)) for w in seen["routing_weights"])


def test_a_plain_tuple_is_given_where_it_is_asked_for() -> None:
    model = _model()
    loss, logits, *_ = model(_ids(), labels=_ids(n=4), return_dict=False)
    assert loss.ndim == 0
    assert logits.shape == (2, 4, 61)
    assert isinstance(CoLT5EncoderModel(_config())(_ids(), return_dict=False), tuple)


def test_encoder_outputs_may_be_a_tuple() -> None:
    model = _model()
    out = model.encoder(_ids())
    assert isinstance(out, BaseModelOutput)
    found = [model(encoder_outputs=o, decoder_input_ids=_ids(n=4)).logits for o in (out, (out.last_hidden_state,))]
    assert torch.equal(*found)


def test_bytes_in_byt5s_scheme_need_no_files() -> None:
    tokens = ByT5Tokenizer()
    assert len(tokens) == CoLT5Config.tiny().vocab_size
    ids = tokens("héé <extra_id_0>").input_ids
    assert tokens.decode(ids, skip_special_tokens=True).startswith("héé")
    # 3 specials, then bytes; sentinels at the end
    assert ids[0] == ord("h") + 3
    assert 259 <= ids[-2] < 384


@pytest.mark.slow
def test_the_models_compile_without_graph_breaks() -> None:
    model, ids, labels = _model(), _ids(), _ids(n=6, seed=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(ids, attention_mask=_padded(), labels=labels).loss,
        model(ids, attention_mask=_padded(), labels=labels).loss,
    )


def test_the_encoder_is_exported() -> None:
    torch.manual_seed(0)
    encoder = CoLT5EncoderModel(_config()).eval()
    with torch.no_grad():
        program = torch.export.export(encoder, (_ids(), _padded()))
        found = program.module()(_ids(seed=5), _padded())
        torch.testing.assert_close(found.last_hidden_state, encoder(_ids(seed=5), _padded()).last_hidden_state)


@pytest.mark.slow
def test_one_exported_encoder_takes_inputs_of_any_length_in_a_range() -> None:
    torch.manual_seed(0)
    encoder = CoLT5EncoderModel(_config()).eval()
    # lengths that the window covers, and those from 8,192 on, need a program of their own
    n = torch.export.Dim("n", min=40, max=8191)
    with torch.no_grad():
        program = torch.export.export(
            encoder,
            (_ids(n=101), _padded(101, 90)),
            dynamic_shapes=({1: n}, {1: n}),
            prefer_deferred_runtime_asserts_over_guards=True,
        ).module()
        for length in (40, 128, 333):
            ids, mask = _ids(n=length, seed=5), _padded(length, 31)
            found, wanted = program(ids, mask), encoder(ids, mask)
            torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)


MODERN = {"rotary": 50.0, "qk_norm": True, "light_heads": 2, "light_kv_heads": 1, "heavy_kv_heads": 1, "head_dim": 4}


@pytest.mark.parametrize("changes", [MODERN, {"rotary": 50.0, "head_dim": 4}, {"qk_norm": True}, {"heavy_kv_heads": 1}])
def test_an_encoder_of_rotary_normalised_or_grouped_heads_equals_its_layers_put_together(
    changes: dict[str, object],
) -> None:
    encoder, c = _model(**changes).encoder, _config(**changes)
    for p in encoder.parameters():
        # gains of norms too, so that each matters
        nn.init.normal_(p, std=0.5, generator=torch.Generator().manual_seed(p.numel()))
    tables = {"light_bias": None, "heavy_bias": None}
    if c.rotary is None:
        tables = {"light_bias": encoder.light_bias, "heavy_bias": encoder.heavy_bias}
    x = encoder.embed_tokens(_ids())
    mask = _padded().bool()
    for own in encoder.layers:
        m, q, v = (Router(dim=12, budget=budget) for budget in c.budgets())
        then = None if c.rotary is None else RoPE(base=50.0)
        turns = [NormedTurn(head_dim=c.head_dim, then=then) if c.qk_norm else then for _ in range(2)]
        attention = ConditionalAttention(
            dim=12,
            light_heads=c.light_heads,
            heavy_heads=c.heavy_heads,
            head_dim=c.head_dim,
            radius=4,
            q_router=q,
            kv_router=v,
            **tables,
            light_kv_heads=c.light_kv_heads,
            heavy_kv_heads=c.heavy_kv_heads,
            light_turn=turns[0],
            heavy_turn=turns[1],
        )
        feed_forward = ConditionalFeedForward(dim=12, light_dim=7, heavy_dim=33, router=m)
        layer = ConditionalLayer(dim=12, attention=attention, feed_forward=feed_forward).double().eval()
        missing, strange = layer.load_state_dict(own.state_dict(), strict=False)
        assert not strange and all(name.endswith("bias.table") for name in missing)
        x = layer(x, mask=mask)
    wanted = encoder.norm(x)
    found = encoder(_ids(), _padded()).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert ("light_bias.table" in encoder.state_dict()) == (c.rotary is None)


def test_a_modern_model_is_saved_and_generates(tmp_path: Path) -> None:
    model = _model(**MODERN)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = [
        one.generate(_ids(), attention_mask=_padded(), max_new_tokens=5, do_sample=False) for one in (model, again)
    ]
    assert torch.equal(*tokens)


def test_the_example_generates_the_same_tokens_after_saving(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "examples" / "colt5_seq2seq.py"
    first, second = runpy.run_path(str(file))["main"](str(tmp_path), 3)
    assert first == second
    assert len(first) > 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"decoder_input_ids": _ids(n=2)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": _ids()}, "exactly one of decoder_input_ids"),
        (
            {"input_ids": _ids(), "decoder_input_ids": _ids(n=2), "attention_mask": torch.ones(2, 5)},
            r"attention_mask of shape \(2, 5\), expected \(2, 23\)",
        ),
        ({"input_ids": _ids(), "labels": _ids(n=2), "output_attentions": True}, "output_attentions=True"),
        ({"input_ids": _ids()[0], "labels": _ids(n=2)}, r"input_ids of shape \(23,\), expected input_ids \(b, n\)"),
        ({"inputs_embeds": torch.zeros(2, 5, 7), "labels": _ids(n=2)}, r"expected .* inputs_embeds \(b, n, 12\)"),
        ({"input_ids": _ids(), "labels": _ids(3, 2)}, r"decoder_input_ids of shape \(3, 2\) for 2 encoded rows"),
        (
            {"input_ids": _ids(), "labels": _ids(n=2), "decoder_attention_mask": torch.ones(2, 5)},
            r"decoder_attention_mask of shape \(2, 5\), expected \(2, 2\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _model()(**inputs)


def test_float16_is_refused_and_bfloat16_is_not() -> None:
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(_config()).eval()
    assert model.bfloat16()(_ids(), labels=_ids(n=3)).loss.isfinite()
    with pytest.raises(ValueError, match="use bfloat16 or float32"):
        model.half()(_ids(), labels=_ids(n=3))


@pytest.mark.parametrize("targets", ["all-linear", ["q", "kv"], r".*heavy\.(q|kv|into)"])
def test_adapters_of_peft_find_their_targets(targets: object) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=targets, r=2)
    with warnings.catch_warnings():
        # it asks for a name that transformers is about to drop
        warnings.simplefilter("ignore", FutureWarning)
        adapted = peft.get_peft_model(_model(), config).train()
    adapted(input_ids=_ids(), labels=_ids(n=4)).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) > 0
    assert [name for name, p in trained.items() if p.grad is None] == []
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1)
    adapted.eval()
    before = adapted(input_ids=_ids(), decoder_input_ids=_ids(n=4)).logits
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(_ids(), decoder_input_ids=_ids(n=4)).logits, before)
    assert merged.generate(_ids(), max_new_tokens=3).shape[0] == 2


def test_with_one_router_queries_and_keys_are_the_same_tokens_and_it_is_stored_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(_config(one_router=True)).eval()
    ids = torch.randint(2, 61, (2, 33))
    with record() as seen:
        wanted = model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    # the routers of a layer: one for attention, one for the feed-forward
    assert len(seen["routed"]) == 2 * model.config.layers
    for layer in model.encoder.layers:
        assert layer.attention.kv_router is layer.attention.q_router
    assert sum("router.weight" in name for name in model.state_dict()) == 2 * model.config.layers
    model.save_pretrained(tmp_path)
    again = CoLT5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids, decoder_input_ids=ids[:, :5]).logits, wanted)
    again.set_routed(m=1 / 2)
    assert again.encoder.layers[0].attention.q_router.budget.fraction == pytest.approx(1 / 2)


def test_the_shared_router_learns_from_both_of_its_uses() -> None:
    torch.manual_seed(0)
    config = _config(one_router=True, layers=1)
    model = CoLT5EncoderModel(config).double()
    twin = CoLT5EncoderModel(_config(q=1 / 4, v=1 / 4, layers=1)).double()
    state = model.state_dict()
    name = "encoder.layers.0.attention.{}_router"
    state |= {key.replace("q_router", "kv_router"): value for key, value in state.items() if name.format("q") in key}
    twin.load_state_dict(state)
    x = torch.randn(2, 33, 12, dtype=torch.float64)
    outputs = [one(inputs_embeds=x).last_hidden_state for one in (model, twin)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for out in outputs:
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    q, kv = (twin.get_parameter(name.format(which) + ".weight").grad for which in ("q", "kv"))
    assert min(float(q.abs().max()), float(kv.abs().max())) > 1e-6
    shared = model.get_parameter(name.format("q") + ".weight").grad
    torch.testing.assert_close(shared, q + kv, rtol=1e-9, atol=1e-12)


def test_without_a_graph_the_inputs_of_layers_are_let_go_unless_they_are_asked_for() -> None:
    torch.manual_seed(0)
    model = CoLT5EncoderModel(_config(layers=4)).eval()
    ids, alive = torch.randint(2, 61, (1, 33)), []

    def seen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        before.append(weakref.ref(inputs[0]))
        alive.append(sum(ref() is not None for ref in before))

    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(seen)
    for asked, expected in ((None, [1, 1, 1, 1]), (True, [1, 2, 3, 4])):
        before: list[weakref.ref[Tensor]] = []
        alive.clear()
        with torch.no_grad():
            out = model(ids, output_hidden_states=asked)
        assert alive == expected
        assert (out.hidden_states is None) == (asked is None)
