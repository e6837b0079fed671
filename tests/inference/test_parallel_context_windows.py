from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.contracts import Joinable
from tevo.inference.parallel_context_windows import ParallelContextWindows
from tevo.models.causal_lm import CausalLM
from tevo.testing.oracles.parallel_context_windows import reference
from tevo.testing.tolerances import RUNGS, relative_rms


def built(position: str, **options: object) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(vocab=11, dim=12, depth=2, heads=3, position=position, length=40, **options).double().eval()  # type: ignore[arg-type]


def ids(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.cat([torch.ones(1, 1).long(), torch.randint(11, (1, n - 1), generator=generator)], 1) for n in lengths
    ]


@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
def test_joined_caches_equal_one_pass_with_an_explicit_mask(position: str, right: bool) -> None:
    model, windows, task = built(position), ids(5, 8, 4), torch.tensor([[3, 5, 2, 8]])
    reader = ParallelContextWindows(model=model, right=right)
    logits, _ = reader.step(task, reader.start(windows))
    with torch.no_grad():
        assert relative_rms(logits.softmax(-1), reference(reader, windows, task)) <= RUNGS["F64"]


def test_the_order_of_windows_of_equal_beginnings_changes_nothing() -> None:
    reader, windows = ParallelContextWindows(model=built("rope")), ids(5, 8, 4)
    task = torch.tensor([[3, 5, 2, 8]])
    first, _ = reader.step(task, reader.start(windows))
    other, _ = reader.step(task, reader.start(windows[::-1]))
    assert relative_rms(other, first) <= RUNGS["F64"]


def test_a_window_read_twice_weighs_twice_against_what_follows() -> None:
    reader, (window,), task = ParallelContextWindows(model=built("rope", mixer=SEEN)), ids(6), torch.tensor([[3]])
    from tevo import record

    weights = []
    for count in (1, 2):
        with record() as seen:
            reader.step(task, reader.start([window] * count))
        weights.append(seen["attention"][-2][0, :, -1])  # the first layer at the token that follows
    once, twice = weights
    # keys: the first token, five others, the same five again, the token itself
    for h in range(len(once)):
        expected = torch.cat([once[h, :6], once[h, 1:6], once[h, 6:]])
        assert relative_rms(twice[h], expected / expected.sum()) <= RUNGS["F64"]


# a normaliser in its seat shows the weights, which the fused kernel does not
SEEN = "explicit_sparse_attention(topk=40)"


def test_models_without_keys_to_join_are_refused() -> None:
    model = CausalLM(vocab=11, dim=12, depth=1, heads=3, mixer="linear_attention")
    assert isinstance(model, Joinable)
    with pytest.raises(ValueError, match="LinearAttention keeps a state that cannot be joined"):
        ParallelContextWindows(model=model)
    with pytest.raises(ValueError, match="expected at least one"):
        ParallelContextWindows(model=built("rope")).start([])


def test_a_state_of_a_channel_mixer_cannot_be_joined() -> None:
    from tevo.models.block import Block

    block = Block(dim=12, heads=3, causal=True)
    with pytest.raises(ValueError, match="GELU keeps a state that cannot be joined"):
        block.join([(block.mixer.init_state(1), torch.zeros(1, 12))], [0])  # type: ignore[operator]
