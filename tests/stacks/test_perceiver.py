from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tevo.models.encoder import Encoder, SequenceClassifier
from tevo.models.image import ImageClassifier
from tevo.stacks.perceiver import Perceiver, PerceiverLayer, fourier_features
from tevo.testing.subject import disturb


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(**arguments: object) -> Perceiver:
    torch.manual_seed(0)
    stack = Perceiver(dim=12, heads=3, latents=5, depth=2, repeats=3, **arguments).double()  # type: ignore[arg-type]
    disturb(stack)
    return stack


def test_the_order_of_the_inputs_does_not_matter() -> None:
    stack, x = built(), tokens(2, 13, 12)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(stack(x[:, order]), stack(x), rtol=1e-12, atol=1e-12)


def test_permuted_latents_give_permuted_outputs() -> None:
    stack, x = built(), tokens(2, 13, 12)
    plain, order = stack(x), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        stack.latents.copy_(stack.latents[order])
    torch.testing.assert_close(stack(x), plain[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("before", "after"), [(0, 3), (4, 0), (2, 1)])
@pytest.mark.parametrize("junk", [0.0, math.nan])
def test_padding_on_either_side_changes_nothing(before: int, after: int, junk: float) -> None:
    stack, x = built(), tokens(2, 9, 12)
    padded = torch.full((2, before + 9 + after, 12), junk, dtype=x.dtype)
    padded[:, before : before + 9] = x
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    mask[:, before : before + 9] = True
    torch.testing.assert_close(stack(padded, mask=mask), stack(x), rtol=1e-12, atol=1e-12)


def test_a_reading_equals_torch_multi_head_attention_with_the_same_weights() -> None:
    layer = PerceiverLayer(dim=10, heads=2, input_dim=6).double()
    disturb(layer)
    z, y = tokens(2, 5, 10), tokens(2, 13, 6)
    theirs = torch.nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        # its queries have the width of the inputs: they are projected before it
        theirs.in_proj_weight.copy_(torch.cat([torch.eye(6, dtype=torch.float64), layer.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([torch.zeros(6, dtype=torch.float64), layer.kv.bias]))
        theirs.out_proj.weight.copy_(torch.eye(6))
        theirs.out_proj.bias.zero_()
    inputs = layer.input_norm(y)
    o = layer.out(theirs(layer.q(layer.query_norm(z)), inputs, inputs)[0])
    wanted = z + o
    wanted = wanted + layer.back(torch.nn.functional.gelu(layer.into(layer.mlp_norm(wanted))))
    torch.testing.assert_close(layer(z, y), wanted, rtol=1e-12, atol=1e-12)


def test_later_readings_share_weights_and_all_towers_do() -> None:
    assert len(built().readings) == 2
    assert len(built().tower) == 2


def test_image_net_features_are_258_numbers_as_the_paper_counts() -> None:
    assert fourier_features((3, 4), 64).shape == (12, 258)
    row = fourier_features((224, 224), 64)[1]
    assert row[0] == -1.0
    assert row[1] == pytest.approx(-1 + 2 / 223)
    # the highest frequency of the second axis: 112 half periods
    assert row[2 + 127] == pytest.approx(math.sin(math.pi * 112 * (-1 + 2 / 223)), abs=1e-9)


def test_hosts_classify_sequences_and_images_with_it() -> None:
    torch.manual_seed(0)
    text = SequenceClassifier(vocab=11, classes=3, dim=12, depth=2, heads=3, position="sinusoidal", stack="perceiver")
    ids = torch.randint(0, 11, (2, 13))
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[0, 9:] = False
    assert text(ids, mask=mask).shape == (2, 3)
    image = ImageClassifier(image_size=(6, 10), patch=2, classes=4, dim=6, depth=1, heads=3, stack="perceiver")
    image(torch.randn(2, 3, 6, 10)).sum().backward()
    assert image.encoder.outputs(None, 15) == (None, 512)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="causal"):
        Encoder(dim=12, depth=2, heads=3, causal=True, stack="perceiver")
    with pytest.raises(ValueError, match=r"grid=\(3, 5\), 15 tokens, got 14"):
        Perceiver(dim=3, latents=2, latent_dim=8, grid=(3, 5), bands=2)(torch.zeros(1, 14, 3))
    with pytest.raises(ValueError, match="repeats=0"):
        Perceiver(dim=8, repeats=0)
