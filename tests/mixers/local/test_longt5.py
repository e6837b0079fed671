from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.mixers.local.longt5 import LongT5, LongT5Local
from tevo.mixers.softmax.multi_head import MultiHead
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.models.causal_lm import CausalLM
from tevo.positions.t5_bias import T5Bias
from tevo.testing.oracles.longt5 import reference
from tevo.testing.subject import disturb

CLOSE = {"rtol": 1e-11, "atol": 1e-12}
SMALL = {"dim": 12, "heads": 3, "radius": 3, "buckets": 8, "max_distance": 9}


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(cls: type = LongT5, **arguments: object) -> LongT5:
    torch.manual_seed(0)
    mixer = cls(**{**SMALL, **arguments}).double()
    disturb(mixer)
    return mixer


@pytest.mark.parametrize("causal", [False, True])
def test_a_radius_of_all_tokens_is_t5_attention(causal: bool) -> None:
    local = built(LongT5Local, radius=13, causal=causal)
    heads, position = MultiHead(dim=12, heads=3), T5Bias(heads=3, causal=causal, buckets=8, max_distance=9)
    dense = SoftmaxAttention(dim=12, heads=heads, position=position, causal=causal).double()
    with torch.no_grad():
        heads.q.weight.copy_(local.q.weight)
        heads.kv.weight.copy_(local.kv.weight)
        heads.out.weight.copy_(local.out.weight)
        position.table.copy_(local.bias)
    torch.testing.assert_close(local(tokens(13)), dense(tokens(13)), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_full_block_it_is_the_local_form(causal: bool) -> None:
    whole, local = built(block=8, causal=causal), built(LongT5Local, causal=causal)
    local.load_state_dict({name: p for name, p in whole.state_dict().items() if not name.startswith("global")})
    torch.testing.assert_close(whole(tokens(7)), local(tokens(7)), **CLOSE)
    mask = torch.arange(13)[None].expand(2, -1) < 7
    torch.testing.assert_close(whole(tokens(13), mask=mask)[:, :7], local(tokens(13)[:, :7]), **CLOSE)


@pytest.mark.parametrize("causal", [False, True])
def test_the_local_form_equals_its_oracle_with_and_without_padding(causal: bool) -> None:
    # the generic checks see the form with summaries
    mixer, x = built(LongT5Local, causal=causal), tokens(13)
    torch.testing.assert_close(mixer(x), reference(mixer, x), **CLOSE)
    mask = torch.rand(2, 13, generator=torch.Generator().manual_seed(2)) < 0.6
    ours = mixer(x.masked_fill(~mask[..., None], float("nan")), mask=mask)
    torch.testing.assert_close(ours[mask], reference(mixer, x, mask=mask)[mask], **CLOSE)


@pytest.mark.parametrize("cls", [LongT5, LongT5Local])
def test_padding_in_the_middle_and_across_steps_is_as_if_it_were_not_there(cls: type) -> None:
    mixer, x = built(cls, causal=True, **({"block": 3} if cls is LongT5 else {})), tokens(29)
    mask = torch.rand(2, 29, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[1, 4:11] = False
    x = x.masked_fill(~mask[..., None], float("nan"))
    whole, state, pieces = mixer(x, mask=mask), mixer.init_state(2), []
    for start, stop in ((0, 4), (4, 9), (9, 10), (10, 27), (27, 28), (28, 29)):
        y, state = mixer.step(x[:, start:stop], state, mask=mask[:, start:stop])
        pieces.append(y)
    stepped = torch.cat(pieces, 1)
    for row in range(2):
        alone = mixer(x[row, mask[row]][None])[0]
        torch.testing.assert_close(whole[row, mask[row]], alone, **CLOSE)
        torch.testing.assert_close(stepped[row, mask[row]], alone, **CLOSE)


def test_only_summaries_carry_news_beyond_the_radius() -> None:
    for cls, reaches in ((LongT5, True), (LongT5Local, False)):
        mixer, x = built(cls, **({"block": 4} if cls is LongT5 else {})), tokens(29).requires_grad_()
        (gradient,) = torch.autograd.grad(mixer(x)[:, -1].sum(), x)
        assert bool((gradient[:, :20] != 0).any()) == reaches


def test_a_language_model_generates_from_left_padded_prompts_as_from_plain_ones() -> None:
    torch.manual_seed(0)
    spec = "longt5(radius=3, block=2, buckets=8, max_distance=9)"
    model = CausalLM(vocab=11, dim=12, depth=2, heads=3, mixer=spec).double()
    disturb(model)
    prompt = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(3))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    mask = torch.arange(8)[None].expand(2, -1) >= 3
    plain = model.generate(prompt, new_tokens=9, temperature=0)
    assert torch.equal(model.generate(padded, new_tokens=9, temperature=0, mask=mask)[:, 3:], plain)
    whole = prompt
    for _ in range(9):
        whole = torch.cat([whole, model(whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(whole, plain)


def test_what_it_cannot_do_is_refused() -> None:
    x = tokens(13)
    with pytest.raises(ValueError, match="radius=0"):
        built(radius=0)
    with pytest.raises(ValueError, match="buckets=2"):
        built(buckets=2)
    with pytest.raises(ValueError, match="causal=True"):
        built().init_state(2)
    with pytest.raises(ValueError, match="context"):
        built()(x, x)
