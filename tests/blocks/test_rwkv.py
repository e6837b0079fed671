from __future__ import annotations

import pytest
import torch

from tevo.blocks.rwkv import RWKV
from tevo.models.causal_lm import CausalLM
from tevo.testing.subject import disturb


def tokens(n: int, d: int) -> torch.Tensor:
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(**arguments: object) -> RWKV:
    torch.manual_seed(0)
    block = RWKV(dim=12, **arguments).double()  # type: ignore[arg-type]
    disturb(block)
    return block


def test_a_new_block_inside_a_stack_returns_its_input() -> None:
    x = tokens(13, 12).float()
    assert torch.equal(RWKV(dim=12, depth=5, index=2)(x), x)


def test_only_output_and_value_matrices_learn_at_the_first_step() -> None:
    block = RWKV(dim=12, depth=5, index=2)
    block(tokens(13, 12).float()).square().sum().backward()
    learning = {name for name, p in block.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert learning == {"time.output.weight", "channel.value.weight"}


def test_the_first_block_has_a_norm_before_and_the_last_a_norm_after() -> None:
    depth = 3
    for index in range(depth):
        block = RWKV(dim=12, depth=depth, index=index)
        assert (block.first is not None) == (index == 0)
        assert (block.last is not None) == (index == depth - 1)


def test_decays_and_shifts_start_as_released() -> None:
    # computed by hand from the released formulas for d = 3, block 1 of 3
    time = RWKV(dim=3, depth=3, index=1).time
    half = 0.5 ** (0.7 + 1.3 * 0.5)
    torch.testing.assert_close(time.decay, torch.tensor([-5.0, -5 + 8 * half, 3.0]))
    torch.testing.assert_close(time.bonus.exp() / 0.3, torch.tensor([0.0, 0.5, -0.5]).exp())
    keys = torch.tensor([0.0, (1 / 3) ** (2 / 3), (2 / 3) ** (2 / 3)])
    torch.testing.assert_close(time.mix_k, keys)
    torch.testing.assert_close(time.mix_v, keys + 0.15)
    torch.testing.assert_close(time.mix_r, keys.sqrt())


def test_padding_in_the_middle_and_across_steps_is_as_if_it_were_not_there() -> None:
    block, x = built(depth=2, index=0), tokens(13, 12)
    mask = torch.rand(2, 13, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[1, 4:9] = False
    x = x.masked_fill(~mask[..., None], float("nan"))
    whole = block(x, mask=mask)
    state, pieces = block.init_state(2), []
    for start, stop in ((0, 4), (4, 9), (9, 10), (10, 13)):
        y, state = block.step(x[:, start:stop], state, mask=mask[:, start:stop])
        pieces.append(y)
    stepped = torch.cat(pieces, 1)
    for row in range(2):
        alone = block(x[row, mask[row]][None])[0]
        torch.testing.assert_close(whole[row, mask[row]], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stepped[row, mask[row]], alone, rtol=1e-12, atol=1e-12)


def test_half_precision_keeps_its_sums_in_float32() -> None:
    block = RWKV(dim=12).bfloat16()
    y, state = block.step(tokens(13, 12).bfloat16(), block.init_state(2))
    assert y.dtype == torch.bfloat16
    assert all(leaf.dtype == torch.float32 for leaf in state[1])


def test_dropout_acts_in_training_only() -> None:
    block, x = built(dropout=0.5), tokens(13, 12)
    torch.manual_seed(1)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        RWKV(dim=12, causal=False)
    with pytest.raises(ValueError, match="context"):
        RWKV(dim=12).init_state(2, context=tokens(3, 12))


def test_a_language_model_generates_from_left_padded_prompts_as_from_plain_ones() -> None:
    torch.manual_seed(0)
    model = CausalLM(vocab=11, dim=12, depth=2, mixer="rwkv").double()
    disturb(model)
    prompt = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(3))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    mask = torch.arange(8)[None].expand(2, -1) >= 3
    plain = model.generate(prompt, new_tokens=9, temperature=0)
    assert torch.equal(model.generate(padded, new_tokens=9, temperature=0, mask=mask)[:, 3:], plain)
    whole = plain[:, :5]
    for _ in range(9):
        whole = torch.cat([whole, model(whole)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(whole, plain)
