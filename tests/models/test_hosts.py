from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo.catalogue.create import alternatives, load
from tevo.catalogue.rows import find, list_systems
from tevo.contracts import TokenMixer
from tevo.mixers.recurrent.lru import LRU
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.models.block import Block
from tevo.models.causal_lm import CausalLM
from tevo.models.encoder import Encoder, SequenceClassifier
from tevo.models.image import ImageClassifier
from tevo.taps import record, tap


def present(*claims: str) -> list[str]:
    """Mixers and whole blocks that are there and make the claims."""
    return [
        row.id
        for role in ("mixer", "block")
        for row in list_systems(role=role, where=claims, baselines=True)
        if "grid" not in row.claims()
    ]


def language_model(mixer: object, **options: object) -> CausalLM:
    torch.manual_seed(0)
    settings: dict[str, object] = {"vocab": 11, "dim": 12, "depth": 2, "heads": 3, "length": 40} | options
    return CausalLM(mixer=mixer, **settings).double()  # type: ignore[arg-type]


def ids(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(1))


class Mean(TokenMixer):
    """Each token becomes the mean of itself and the earlier ones, times a matrix."""

    def __init__(self, *, dim: int, causal: bool = True) -> None:
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.out(tap("mean", x.cumsum(1) / counts))


class NeedsGrid(TokenMixer):
    def __init__(self, *, dim: int, grid: tuple[int, int], causal: bool = False) -> None:
        super().__init__()


# parts and how they are written


def test_layers_may_have_different_mixers() -> None:
    model = language_model(["lru", "softmax", "linear_attention(eps=0.5)", Mean], depth=4)
    kinds = [type(block.mixer).__name__ for block in model.encoder.blocks]
    assert kinds == ["LRU", "SoftmaxAttention", "LinearAttention", "Mean"]
    assert model.encoder.blocks[2].mixer.eps == 0.5
    assert model(ids(2, 7)).shape == (2, 7, 11)


def test_a_name_with_options_a_factory_and_an_instance_give_the_same_part() -> None:
    x, outputs, weights = torch.randn(2, 7, 12), [], {}
    for mixer in ("lru(state_dim=5)", partial(LRU, state_dim=5), LRU(dim=12, state_dim=5)):
        block = Block(dim=12, heads=3, mixer=mixer, causal=True)
        weights = weights or block.state_dict()
        block.load_state_dict(weights)
        outputs.append(block(x))
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_a_class_of_the_house_is_known_by_its_card() -> None:
    with pytest.raises(ValueError, match="LRU is a mixer, not a channel; give it as mixer='LRU'"):
        Block(dim=12, heads=3, channel=load("lru"))


def test_parts_that_sit_inside_attention_stand_for_attention_with_them() -> None:
    names = [row.id for role in ("normaliser", "heads") for row in list_systems(role=role, where=["causal"])]
    for name in names:
        model = language_model(name)
        assert isinstance(model.encoder.blocks[0].mixer, SoftmaxAttention)
        assert model(ids(2, 7)).isfinite().all()


def causality_leak(mixer: object) -> float:
    """The largest gradient of an output of a language model's encoder with respect to later tokens, of the largest."""
    block = Block(dim=12, heads=2, mixer=mixer, causal=True, length=7).double()
    x = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    y, worst, most = block(x), 0.0, 0.0
    for t in range(7):
        (gradient,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        most = max(most, float(gradient.abs().max()))
        worst = max(worst, float(gradient[:, t + 1 :].abs().max()) if t < 6 else 0.0)
    return worst / most


@pytest.mark.parametrize("part", [part for role in ("normaliser", "heads") for row in list_systems(role=role, baselines=True)
                                  if row.card for part in row.card.exports])  # fmt: skip
def test_a_part_inside_attention_is_causal_or_refused_where_that_is_needed(part: str) -> None:
    if "causal" in find(part)[0].claims():
        assert causality_leak(part) == 0
    else:
        assert sentence_of(lambda: language_model(part)).startswith(f"{part} has no causal form; ")


def test_a_built_mixer_that_sees_the_future_is_refused_in_a_language_model() -> None:
    said = sentence_of(lambda: Block(dim=12, mixer=SoftmaxAttention(dim=12, heads=3), causal=True))
    assert said == "SoftmaxAttention was built with causal=False, but is used causally; build it with causal=True"


# generation


@pytest.mark.parametrize("mixer", present("causal", "padding"))
def test_left_padding_does_not_change_what_is_generated(mixer: str) -> None:
    model = language_model(mixer)
    lengths, prompt = (9, 4, 6), ids(3, 9)
    mask = torch.arange(9)[None] >= 9 - torch.tensor(lengths)[:, None]
    together = model.generate(prompt, new_tokens=7, temperature=0, mask=mask)
    for row, n in enumerate(lengths):
        alone = model.generate(prompt[row : row + 1, 9 - n :], new_tokens=7, temperature=0)
        assert torch.equal(alone[0], together[row, 9 - n :])


@pytest.mark.parametrize("mixer", present("causal"))
def test_generation_continues_as_the_whole_pass_predicts(mixer: str) -> None:
    model, prompt = language_model(mixer), ids(2, 5)
    out = model.generate(prompt, new_tokens=6, temperature=0)
    assert torch.equal(out[:, :5], prompt)
    assert torch.equal(out[:, 5:], model(out)[:, 4:-1].argmax(-1))


@pytest.mark.parametrize("position", ["rope", "alibi", "learned", "t5_bias", "sinusoidal"])
def test_left_padding_takes_no_positions(position: str) -> None:
    model, prompt = language_model("softmax", position=position), ids(2, 9)
    mask = torch.arange(9)[None] >= torch.tensor([[0], [4]])
    together = model.generate(prompt, new_tokens=5, temperature=0, mask=mask)
    alone = model.generate(prompt[1:, 4:], new_tokens=5, temperature=0)
    assert torch.equal(alone[0], together[1, 4:])


def test_sampling_takes_the_likeliest_tokens_only_and_is_repeatable() -> None:
    model, prompt = language_model("softmax"), ids(2, 5)
    one, two = (
        model.generate(prompt, new_tokens=9, top_k=2, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(one, two)
    best = model(one)[:, 4:-1].topk(2).indices
    assert bool((best == one[:, 5:, None]).any(-1).all())


def test_generation_leaves_the_training_mode_as_it_was() -> None:
    model = language_model("softmax", dropout=0.5)
    model.train()
    model.generate(ids(1, 3), new_tokens=2)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"prompt": torch.zeros(1, 0, dtype=torch.long)},
            "generate needs a prompt of shape (b, n) with n >= 1, got (1, 0)",
        ),
        ({"temperature": -1.0}, "generate got temperature=-1.0, top_k=None; expected >= 0 and >= 1"),
        ({"mask": torch.tensor([[True, True, False]])}, "some rows end in padding; pad on the left"),
        ({"mask": torch.ones(1, 2, dtype=torch.bool)}, "generate got a mask of dtype torch.bool and shape (1, 2)"),
    ],
)
def test_generate_refuses_what_it_cannot_continue(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        language_model("softmax").generate(**({"prompt": ids(1, 3), "new_tokens": 2} | arguments))  # type: ignore[arg-type]


def test_a_mixer_without_the_padding_claim_refuses_a_mask_in_the_host() -> None:
    names = [name for name in present("causal") if name not in present("causal", "padding")]
    for name in names:
        with pytest.raises(ValueError, match="cannot honour a padding mask"):
            language_model(name)(ids(2, 7), mask=torch.ones(2, 7, dtype=torch.bool))


# compositions that cannot work


def sentence_of(action: object) -> str:
    with pytest.raises(ValueError) as refusal:
        action()  # type: ignore[operator]
    return str(refusal.value)


def test_a_mixer_that_sees_the_future_is_refused_in_a_language_model() -> None:
    said = sentence_of(lambda: language_model("fnet"))
    assert said == "fnet has no causal form" + alternatives("mixer", "causal")
    assert "mixers that do: " in said and "softmax" in said


def test_a_causal_mixer_is_refused_where_all_tokens_see_each_other() -> None:
    said = sentence_of(lambda: Encoder(dim=12, depth=1, mixer="hyena", length=9))
    assert said == (
        "hyena is causal only and cannot be used where all tokens see each other"
        + alternatives("mixer", "bidirectional")
    )


def test_a_position_is_refused_by_a_mixer_without_scores() -> None:
    said = sentence_of(lambda: language_model("lru", position="rope"))
    assert said == "lru has no use for the position system RoPE" + alternatives("mixer", "position")


def test_a_position_of_the_embeddings_serves_any_mixer() -> None:
    model, tokens = language_model("linear_attention", position="sinusoidal"), ids(1, 7)
    plain = language_model("linear_attention")
    assert not torch.allclose(model(tokens), plain(tokens))


def test_a_mixer_of_a_grid_is_refused_on_text() -> None:
    said = sentence_of(lambda: Encoder(dim=12, depth=1, mixer=NeedsGrid))
    assert said.startswith("NeedsGrid mixes a grid of rows and columns, which a sequence is not")
    assert "softmax" in said and said.endswith("or give grid=(rows, columns)")


@pytest.mark.parametrize(
    ("seat", "part", "sentence"),
    [
        ("mixer", "gelu", "gelu is a channel, not a mixer; give it as channel='gelu'"),
        ("channel", "softmax", "softmax is a mixer, not a channel; give it as mixer='softmax'"),
        ("position", "pre_norm", "pre_norm is a residual, not a position; give it as residual='pre_norm'"),
        ("residual", "rope", "rope is a position, not a residual; give it as position='rope'"),
    ],
)
def test_a_part_in_the_wrong_seat_is_told_its_own(seat: str, part: str, sentence: str) -> None:
    settings = {"dim": 12, "depth": 1, "heads": 3} | {seat: part}
    assert sentence_of(lambda: Encoder(**settings)) == sentence  # type: ignore[arg-type]


def test_one_built_part_is_refused_for_several_layers() -> None:
    said = sentence_of(lambda: language_model(LRU(dim=12)))
    assert said == (
        "one built LRU cannot serve depth=2 layers; give its class or name, or a list with one instance for each layer"
    )


def test_a_list_of_another_length_than_the_depth_is_refused() -> None:
    said = sentence_of(lambda: language_model(["lru", "lru", "lru"]))
    assert said == "mixer lists 3 parts for depth=2; give one for each layer"


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    said = sentence_of(lambda: language_model("lru(state=5)"))
    assert said.startswith("lru has no option 'state' (did you mean 'state_dim'?); its options are dim, state_dim, ")


# checkpointing and taps


@pytest.mark.parametrize("mixer", ["softmax", "lru", "linear_attention", "delta_net", "hyena"])
def test_recomputed_activations_give_the_same_gradients(mixer: str) -> None:
    tokens, gradients = ids(2, 13), []
    for recompute in (False, True):
        model = language_model(mixer)
        model.checkpoint_activations = recompute
        F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("recompute", [False, True])
def test_a_tap_is_recorded_once_for_each_layer_and_carries_gradient(recompute: bool) -> None:
    model, tokens = language_model(Mean, depth=3), ids(2, 7)
    model.checkpoint_activations = recompute
    with record() as seen:
        y = model(tokens)
        assert len(seen["mean"]) == 3
        (y.square().mean() + sum(value.square().mean() for value in seen["mean"])).backward()
    assert len(seen["mean"]) == 3
    plain = language_model(Mean, depth=3)
    with record() as again:
        z = plain(tokens)
    (z.square().mean() + sum(value.square().mean() for value in again["mean"])).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_compiles_as_one_graph_while_a_record_is_open() -> None:
    model, x = language_model(Mean).encoder, torch.randn(2, 7, 12, dtype=torch.float64)

    def watched(x: Tensor) -> tuple[Tensor, list[Tensor]]:
        with record() as seen:
            y = model(x)
        return y, seen["mean"]

    torch._dynamo.reset()
    try:
        y, taps = torch.compile(watched, fullgraph=True, backend="aot_eager")(x)
    finally:
        torch._dynamo.reset()
    z, wanted = watched(x)
    torch.testing.assert_close(y, z)
    assert len(taps) == 2
    torch.testing.assert_close(taps, wanted)


# ids, classifiers


def test_token_ids_are_checked_at_the_door() -> None:
    model = language_model("softmax")
    said = sentence_of(lambda: model(torch.zeros(1, 3)))
    assert said == "CausalLM needs integer token ids, got torch.float32; convert them with .long()"
    said = sentence_of(lambda: model(torch.tensor([[0, 11]])))
    assert said == "CausalLM got token ids from 0 to 11, but its vocabulary is 0..10"
    said = sentence_of(lambda: model(torch.tensor([[-1, 3]])))
    assert said == "CausalLM got token ids from -1 to 3, but its vocabulary is 0..10"


@pytest.mark.parametrize("mixer", present("bidirectional"))
def test_sequences_are_classified_whatever_their_padding(mixer: str) -> None:
    torch.manual_seed(0)
    # long enough for a block summary of LongT5
    model = SequenceClassifier(vocab=11, classes=5, dim=12, depth=2, heads=3, mixer=mixer, length=23).double()
    tokens = ids(2, 19)
    plain = model(tokens)
    assert plain.shape == (2, 5)
    F.cross_entropy(plain, torch.tensor([1, 4])).backward()
    assert all(p.grad is not None for p in model.parameters())
    if mixer in present("padding"):
        mask = torch.arange(23)[None] < torch.tensor([[19], [19]])
        padded = torch.cat([tokens, torch.full((2, 4), 7)], 1)
        torch.testing.assert_close(model(padded, mask=mask), plain, rtol=0, atol=1e-12)


def test_a_sequence_of_padding_alone_is_classified_by_nothing() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(vocab=11, classes=5, dim=12, depth=1, heads=3)
    y = model(ids(2, 4), mask=torch.tensor([[True] * 4, [False] * 4]))
    torch.testing.assert_close(y[1], model.head.bias)


@pytest.mark.parametrize("mixer", ["softmax", "linear_attention", "lru"])
def test_images_are_classified_as_rows_of_patches(mixer: str) -> None:
    torch.manual_seed(0)
    model = ImageClassifier(image_size=(6, 15), patch=3, classes=5, channels=2, dim=12, depth=2, heads=3, mixer=mixer)
    images = torch.randn(3, 2, 6, 15)
    y = model(images)
    assert y.shape == (3, 5)
    F.cross_entropy(y, torch.tensor([1, 4, 0])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot cut an image of 6 x 14 pixels into patches of 3"):
        ImageClassifier(image_size=(6, 14), patch=3, classes=5, dim=12, depth=1)
    model = ImageClassifier(image_size=(6, 15), patch=3, classes=5, dim=12, depth=1, heads=3)
    with pytest.raises(ValueError, match="was built for images of 6 x 15 pixels, got a tensor of shape"):
        model(torch.zeros(1, 3, 15, 6))


# a part of the user's own

MINE = '''
import torch
from torch import nn

class Previous(nn.Module):
    """Each token sees itself and the one before."""

    def __init__(self, *, dim, causal=True, scale=1.0):
        super().__init__()
        self.out = nn.Linear(2 * dim, dim)
        self.scale = scale

    def forward(self, x, context=None, *, mask=None, at=None):
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return self.scale * self.out(torch.cat([x, before], -1))
'''


def test_a_part_in_a_file_of_the_users_trains(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    torch.manual_seed(0)
    model = CausalLM(vocab=11, dim=12, depth=2, heads=3, mixer=f"{file}:Previous(scale=0.5)")
    assert model.encoder.blocks[1].mixer.scale == 0.5
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # every token is the sum of the two before: no single token tells it
    tokens = torch.randint(11, (16, 2), generator=torch.Generator().manual_seed(1))
    for _ in range(14):
        tokens = torch.cat([tokens, (tokens[:, -1:] + tokens[:, -2:-1]) % 11], 1)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(tokens)[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] > 2.0 and losses[-1] < 0.5 * losses[0]
    # without a state it decodes by whole passes
    assert not model.stateful()
    assert model.generate(tokens[:1, :5], new_tokens=3, temperature=0).shape == (1, 8)
