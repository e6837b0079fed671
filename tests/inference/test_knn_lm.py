from __future__ import annotations

import pytest
import torch

from tevo.inference import knn_lm
from tevo.inference.knn_lm import KNNLM, nearest, vote
from tevo.models.causal_lm import CausalLM
from tevo.testing.tolerances import RUNGS, relative_rms


def built(**options: object) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(vocab=11, dim=12, depth=2, heads=3, **options).double().eval()  # type: ignore[arg-type]


def test_a_store_that_holds_the_query_alone_is_sure_of_what_followed() -> None:
    reader = KNNLM(model=built(position="rope"), share=1.0)
    text = torch.tensor([[3, 1, 4, 1, 5]])
    reader.remember(text, skip=3)
    assert reader.keys.shape == (1, 12) and reader.values.tolist() == [5]
    scores, _ = reader.step(text[:, 3:4], reader.start([text[:, :3]]))
    assert scores.softmax(-1)[0, 0].tolist() == [0.0] * 5 + [1.0] + [0.0] * 5


def test_search_in_pieces_equals_search_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(41, 5, generator=generator, dtype=torch.float64)
    q = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    every = (q[..., None, :] - keys).square().sum(-1).sort(-1)
    for k in (1, 8, 41, 99):
        for piece in (65536, 7, 1):
            monkeypatch.setattr(knn_lm, "PIECE", piece)
            distances, found = nearest(q, keys, k)
            assert torch.equal(found, every.indices[..., :k])
            assert relative_rms(distances, every.values[..., :k]) <= RUNGS["F64"]


def test_a_shift_far_from_zero_does_not_blur_near_keys_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    offsets = 0.1 * torch.randn(9, 5, generator=generator)
    distances, _ = nearest(100 + torch.zeros(1, 5), 100 + offsets, 9)
    wanted = ((100 + offsets) - 100).square().sum(-1).sort().values
    assert relative_rms(distances[0], wanted) <= RUNGS["F32"]


def test_with_all_entries_the_vote_is_a_kernel_density_over_the_store() -> None:
    generator = torch.Generator().manual_seed(3)
    distances = torch.rand(4, 9, generator=generator, dtype=torch.float64) * 5
    values = torch.randint(6, (4, 9), generator=generator)
    density = torch.zeros(4, 6, dtype=torch.float64)
    for b in range(4):
        for i in range(9):
            density[b, values[b, i]] += (-distances[b, i] / 2.0).exp()
    wanted = density / density.sum(-1, keepdim=True)
    assert relative_rms(vote(distances, values, 6, 2.0).exp(), wanted) <= RUNGS["F64"]


def test_texts_are_stored_apart_and_together() -> None:
    reader, texts = KNNLM(model=built(position="rope")), torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    reader.remember(texts)
    apart = KNNLM(model=built(position="rope"))
    for text in texts:
        apart.remember(text[None])
    assert torch.equal(reader.values, apart.values) and reader.values.tolist() == [1, 4, 1, 9, 2, 6]
    assert relative_rms(reader.keys, apart.keys) <= RUNGS["F64"]


def test_what_cannot_be_honoured_is_refused() -> None:
    with pytest.raises(ValueError, match="empty datastore"):
        reader = KNNLM(model=built())
        reader.step(torch.tensor([[3]]), reader.start([torch.tensor([[1]])]))
    with pytest.raises(ValueError, match="0 <= share <= 1"):
        KNNLM(model=built(), share=1.5)
    with pytest.raises(ValueError, match="which CausalLM does not show"):
        KNNLM(model=built(mixer="rwkv")).remember(torch.tensor([[3, 1]]))
