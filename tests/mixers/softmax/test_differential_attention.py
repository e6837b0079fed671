from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.mixers.softmax.differential_attention import DifferentialAttention, first_lambda
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.models.causal_lm import CausalLM
from tevo.testing import RUNGS, relative_rms


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(**arguments: int) -> SoftmaxAttention:
    torch.manual_seed(0)
    return SoftmaxAttention(dim=12, heads=DifferentialAttention(dim=12, heads=4, **arguments)).double()


def test_what_both_maps_read_alike_cancels_at_lambda_one() -> None:
    mixer = built()
    heads = mixer.heads
    with torch.no_grad():
        heads.lambdas.zero_()
        heads.first = 1.0
        # the second half's queries and keys are the first half's
        heads.q.weight[6:] = heads.q.weight[:6]
        heads.kv.weight[6:12] = heads.kv.weight[:6]
    heads.norm.weight.data.fill_(1.0)
    o = heads.split(tokens(2, 13, 12), tokens(2, 13, 12))[0]
    assert torch.equal(o[:, :2], o[:, 2:])
    assert not mixer(tokens(2, 13, 12)).any()


def test_lambda_starts_at_the_value_of_its_layer() -> None:
    assert first_lambda(0) == pytest.approx(0.2)
    assert first_lambda(1) == pytest.approx(0.8 - 0.6 * 2.718281828459045**-0.3)
    heads = DifferentialAttention(dim=12, heads=4, index=5)
    torch.nn.init.zeros_(heads.lambdas)
    assert heads.factor().item() == pytest.approx(first_lambda(5))


def test_layers_of_a_model_have_their_own_lambda() -> None:
    model = CausalLM(vocab=11, dim=12, depth=3, heads=4, mixer="differential_attention", position="rope")
    firsts = [block.mixer.heads.first for block in model.encoder.blocks]
    assert firsts == [first_lambda(i) for i in range(3)]


def test_groups_of_one_map_each_are_no_groups() -> None:
    one, other, x = built(), built(groups=4), tokens(2, 13, 12)
    assert relative_rms(one(x), other(x)) <= RUNGS["F64"]


def test_refuses_maps_without_a_partner() -> None:
    for arguments in ({"heads": 3}, {"heads": 6, "groups": 3}, {"heads": 4, "groups": 6}):
        with pytest.raises(ValueError, match="maps come in pairs"):
            DifferentialAttention(dim=12, **arguments)
