"""The mimetic start and the copying one, as they are described."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tevo.colt5 import CoLT5Config, CoLT5ForConditionalGeneration
from tevo.colt5.start import copying_start, mimetic_start


def models(**changes: object) -> tuple[CoLT5ForConditionalGeneration, CoLT5ForConditionalGeneration]:
    """T5's start, and the mimetic one made of it."""
    config = CoLT5Config.tiny(dim=64, layers=2, decoder_layers=1, heavy_heads=2, light_heads=2, radius=3, **changes)
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(CoLT5ForConditionalGeneration(config))
    mimetic_start(pair[1])
    return pair[0], pair[1]


def test_equal_tokens_find_each_other_and_bring_what_they_have() -> None:
    heavy = models()[1].encoder.layers[1].attention.heavy
    x = torch.nn.functional.rms_norm(torch.randn(400, 64, generator=torch.Generator().manual_seed(0)), (64,))
    with torch.no_grad():
        k, v = (z.unflatten(-1, (2, 32)) for z in heavy.kv(x).chunk(2, -1))
        s = torch.einsum("nhe,mhe->hnm", heavy.q(x).unflatten(-1, (2, 32)), k)
        brought = heavy.out(v.flatten(1))
    # keys have variance 1, so that |k|^2 is e in the mean: 4 e^-1/2 e = 4 e^1/2
    assert s.diagonal(dim1=1, dim2=2).mean().item() == pytest.approx(4 * 32**0.5, rel=0.1)
    assert abs(s[:, ~torch.eye(400, dtype=torch.bool)].mean().item()) < 0.1
    # g W_v^T W_v / h: two heads of half the width have a trace of d together, so that x comes back once in the mean
    assert ((brought * x).sum(-1) / x.square().sum(-1)).mean().item() == pytest.approx(1.0, rel=0.1)


def test_biases_point_to_the_token_before_and_away_from_the_window() -> None:
    plain, changed = models()
    light = changed.encoder.light_bias.by_offset(3) - plain.encoder.light_bias.by_offset(3)
    assert torch.equal(light.detach().round(), torch.tensor([[0, 0, 4, 0, 0, 0, 0]] * 2).float())
    heavy = changed.encoder.heavy_bias.by_offset(40) - plain.encoder.heavy_bias.by_offset(40)
    near = torch.arange(-40, 41).abs() <= 9
    assert (heavy[:, near] < -5.9).all()
    # offsets that share a bucket with one of nine tokens
    assert (heavy[:, torch.arange(-40, 41).abs() >= 12].abs() < 1e-6).all()


def test_other_output_maps_are_a_tenth_and_everything_is_trained() -> None:
    plain, changed = models()
    for name in ("encoder.layers.0.feed_forward.heavy.out", "decoder.layers.0.cross_attention.out"):
        torch.testing.assert_close(
            changed.get_submodule(name).weight, 0.1 * plain.get_submodule(name).weight, rtol=0.0, atol=0.0
        )
    assert torch.equal(
        changed.encoder.layers[0].attention.light.out.weight, plain.encoder.layers[0].attention.light.out.weight
    )
    assert all(p.requires_grad for p in changed.parameters())


def test_a_model_without_a_heavy_bias_has_a_start_too() -> None:
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(CoLT5Config.tiny(layers=1, decoder_layers=1))
    del model.encoder.heavy_bias
    mimetic_start(model)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_copying_start_finds_tokens_by_their_neighbours_and_repeats_them() -> None:
    torch.manual_seed(0)
    sizes = {"dim": 128, "layers": 2, "decoder_layers": 1, "head_dim": 128, "heavy_heads": 2, "light_heads": 2}
    config = CoLT5Config.tiny(**sizes, radius=3, vocab_size=300, m=1.0)
    model = CoLT5ForConditionalGeneration(config).eval()
    mimetic_start(model, looks=(-1, -2))
    copying_start(model)
    generator = torch.Generator().manual_seed(0)
    right = 0
    for _ in range(50):
        tokens = 20 + torch.randperm(280, generator=generator)[:80]
        # [5, 6, x] ... [5, 6, y]: what stands behind the same two tokens
        tokens[:2], tokens[2], tokens[50:52] = torch.tensor([5, 6]), 7, torch.tensor([5, 6])
        with torch.no_grad():
            logits = model(input_ids=tokens[None], decoder_input_ids=torch.tensor([[7]])).logits[0, 0]
        rank = (logits > logits[tokens[52]]).sum()
        right += int(rank < 30)
    # a tenth of the tokens would be there by chance: 5 rows of 50, with a standard deviation of 2
    assert right > 15


def test_the_copying_start_keeps_heavy_heads_away_from_what_light_ones_see() -> None:
    plain, changed = models()
    copying_start(changed)
    heavy = changed.encoder.heavy_bias.by_offset(40) - plain.encoder.heavy_bias.by_offset(40)
    assert (heavy[:, torch.arange(-40, 41).abs() <= 9] < -29.9).all()
    torch.testing.assert_close(
        changed.lm_head.weight, changed.get_input_embeddings().weight * 64**-0.5, rtol=0.0, atol=0.0
    )
