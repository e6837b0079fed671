"""Transformer-XL: the released shift of a matrix, plain attention as a limit, and segments in a language model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.models.causal_lm import CausalLM
from tevo.models.encoder import Encoder
from tevo.positions.transformer_xl import TransformerXL, position_scores
from tevo.testing.tolerances import RUNGS, relative_rms


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_shift(q: Tensor, w: Tensor, m: int) -> Tensor:
    """Scores against distances m - 1 .. 0, each row then shifted to its own place; right for earlier keys only."""
    d, n = w.shape[-1], q.shape[2]
    f = 10000.0 ** (-torch.arange(0, d, 2, dtype=q.dtype) / d)
    angle = torch.arange(m - 1, -1, -1, dtype=q.dtype)[:, None] * f
    r = torch.cat([angle.sin(), angle.cos()], -1)  # m d
    raw = q @ (r @ w.mT).mT  # b h n m
    padded = torch.cat([raw.new_zeros(*raw.shape[:3], 1), raw], -1)
    return padded.reshape(*raw.shape[:2], m + 1, n)[:, :, 1:].reshape(raw.shape)


@pytest.mark.parametrize("memory", [0, 7])
def test_the_product_of_turned_queries_equals_the_released_shift(memory: int) -> None:
    n, m = 13, 13 + memory
    q, w = draw(2, 3, n, 4), draw(3, 4, 12, seed=2)
    ours = position_scores(q, w, torch.arange(memory, m)[None], torch.arange(m)[None], 10000.0)
    earlier = torch.ones(n, m, dtype=torch.bool).tril(memory)
    assert relative_rms(ours[:, :, earlier], by_shift(q, w, m)[:, :, earlier]) <= RUNGS["F64"]


def test_without_its_parameters_it_is_plain_attention() -> None:
    torch.manual_seed(0)
    position = TransformerXL(dim=12, heads=3)
    for parameter in position.parameters():
        torch.nn.init.zeros_(parameter)
    mixer = SoftmaxAttention(dim=12, heads=3, causal=True, position=position).double()
    plain = SoftmaxAttention(dim=12, heads=mixer.heads, causal=True).double()
    x = draw(2, 13, 12)
    assert relative_rms(mixer(x), plain(x)) <= RUNGS["F64"]


def stream(model: Encoder, x: Tensor, pieces: tuple[int, ...]) -> Tensor:
    state, outputs = model.init_state(len(x)), []
    for piece in x.split(pieces, 1):
        y, state = model.step(piece, state)
        outputs.append(y)
    return torch.cat(outputs, 1)


def language_model(depth: int, memory: int) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(
        dim=12, depth=depth, heads=3, mixer=f"softmax(memory={memory})", position="transformer_xl", causal=True
    ).double()
    for parameter in model.parameters():
        # the initial 0.02 of the positions would hide their errors
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("depth", [1, 3])
def test_segments_with_memory_of_the_whole_stream_equal_one_pass(depth: int) -> None:
    model, x = language_model(depth, 12), draw(2, 13, 12)
    assert relative_rms(stream(model, x, (5, 1, 7)), model(x)) <= RUNGS["F64"]


def test_the_receptive_field_grows_by_the_memory_with_each_layer() -> None:
    depth, memory, n = 2, 3, 12
    model, x = language_model(depth, memory), draw(1, n, 12)
    y = stream(model, x, (1,) * n)
    reach = depth * memory
    for back in range(1, n):
        other = x.clone()
        other[:, n - 1 - back] += 1
        moved = not torch.equal(stream(model, other, (1,) * n)[:, -1], y[:, -1])
        assert moved == (back <= reach), f"{back} tokens back"


def test_a_model_generates_from_its_memory() -> None:
    torch.manual_seed(0)
    model = CausalLM(vocab=11, dim=12, depth=2, heads=3, mixer="softmax(memory=20)", position="transformer_xl").double()
    prompt = torch.randint(11, (2, 5))
    out = model.generate(prompt, new_tokens=6, temperature=0)
    whole = prompt
    for _ in range(6):
        whole = torch.cat([whole, model(whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(out, whole)


@pytest.mark.parametrize(("dim", "heads"), [(9, 3), (12, 5)])
def test_refuses_widths_it_cannot_use(dim: int, heads: int) -> None:
    with pytest.raises(ValueError, match=f"dim={dim}, heads={heads}"):
        TransformerXL(dim=dim, heads=heads)
