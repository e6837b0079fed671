from __future__ import annotations

import torch

from tevo.mixers.softmax.grouped_query_qk_norm import GroupedQueryQKNorm
from tevo.mixers.softmax.qk_norm import QKRMSNorm
from tevo.mixers.softmax.softmax import SoftmaxAttention
from tevo.models.causal_lm import CausalLM
from tevo.testing import RUNGS, relative_rms
from tevo.testing.subject import disturb


def test_equals_grouped_queries_with_the_normaliser() -> None:
    torch.manual_seed(0)
    heads = GroupedQueryQKNorm(dim=12, heads=6, groups=2)
    mixer = SoftmaxAttention(dim=12, heads=heads, causal=True).double()
    disturb(mixer)
    normaliser = QKRMSNorm(dim=12, heads=6).double()
    normaliser.q_norm, normaliser.k_norm = heads.q_norm, heads.k_norm
    other = SoftmaxAttention(dim=12, heads=heads.project, causal=True, normaliser=normaliser)
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    assert relative_rms(mixer(x), other(x)) <= RUNGS["F64"]


def test_large_queries_do_not_make_weights_sharper() -> None:
    torch.manual_seed(0)
    mixer = SoftmaxAttention(dim=12, heads=GroupedQueryQKNorm(dim=12, heads=6, groups=2, eps=0.0)).double()
    x = torch.randn(2, 13, 12, dtype=torch.float64)
    plain = mixer(x)
    with torch.no_grad():
        mixer.heads.project.q.weight.mul_(1000)
    assert relative_rms(mixer(x), plain) <= RUNGS["F64"]


def test_a_language_model_with_rotation_generates_as_one_pass_says() -> None:
    torch.manual_seed(0)
    model = CausalLM(
        vocab=11, dim=12, depth=2, heads=6, mixer="grouped_query_qk_norm(groups=2, head_dim=4)", position="rope"
    ).double()
    prompt = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    out = model.generate(prompt, new_tokens=5, temperature=0)
    for n in range(5, 10):
        assert torch.equal(model(out[:, :n])[:, -1].argmax(-1), out[:, n])
