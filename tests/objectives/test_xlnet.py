from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tevo.objectives.xlnet import TwoStream, XLNet
from tevo.taps import record
from tevo.testing import RUNGS, relative_rms
from tevo.testing.subject import disturb


def built(**options: object) -> tuple[XLNet, TwoStream]:
    torch.manual_seed(0)
    model = TwoStream(vocab=11, dim=12, depth=3, heads=3, hidden_dim=7).double()
    disturb(model)
    return XLNet(vocab=11, separator=4, functional=(3,), share=3, **options).double(), model  # type: ignore[arg-type]


def tokens(b: int, n: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 11, (b, n), generator=generator), generator


def test_no_prediction_depends_on_itself_or_on_what_comes_later_in_the_order() -> None:
    objective, model = built(block=5)
    ids, generator = tokens(1, 13)
    batch = objective.corrupt(ids, generator=generator)
    # an embedding of its own for every token, so that each has its own gradient
    model.embedding, model.vocab = torch.nn.Embedding(13, 12).double(), 13
    rank, places = batch["rank"][0], batch["places"]
    assert places.shape[1] == 4
    g = model.streams(
        torch.arange(13)[None],
        places,
        rank[None, :, None] >= rank[None, None],
        rank[places][:, :, None] > rank[None, None],
        segments=batch["segments"],
    )
    for t, place in enumerate(places[0].tolist()):
        (gradient,) = torch.autograd.grad(g[0, t].sin().sum(), model.embedding.weight, retain_graph=True)
        later = rank >= rank[place]
        assert bool(later[place]) and not bool(gradient[later].any())
        assert bool(gradient[~later].any(1).all())


def test_contents_of_tokens_that_are_not_predicted_do_not_depend_on_those_that_are() -> None:
    objective, model = built()
    ids, generator = tokens(2, 13)
    batch = objective.corrupt(ids, generator=generator)
    other = dict(batch, tokens=torch.where(batch["rank"] >= 0, 7, ids))
    seen = []
    for given in (batch, other):
        with record() as found:
            objective(model, given)
        seen.append(found["content"][-1])
    free = batch["rank"] < 0
    assert torch.equal(seen[0][free], seen[1][free])
    assert not torch.equal(seen[0], seen[1])


def test_masks_are_those_of_the_released_rule() -> None:
    objective, _ = built(block=4)
    ids, generator = tokens(20, 13)
    batch = objective.corrupt(ids, generator=generator)
    for row in range(20):
        rank, targets = batch["rank"][row].tolist(), set(batch["places"][row][batch["chosen"][row]].tolist())
        for i in range(13):
            own = rank[i] if i in targets else rank[i] + 1
            for j in range(13):
                fixed = j in targets or int(ids[row, j]) in (3, 4)
                hidden = own <= rank[j] and fixed
                assert (rank[i] >= rank[j]) == (not hidden or i == j)
                if i in targets:
                    assert (rank[i] > rank[j]) == (not hidden)


def test_an_identity_order_is_an_ordinary_causal_model() -> None:
    objective, model = built()
    ids, _ = tokens(2, 13)
    places = torch.arange(1, 13)[None].expand(2, -1)
    batch = {
        "tokens": ids,
        "rank": torch.arange(13)[None].expand(2, -1),
        "segments": torch.zeros_like(ids),
        "places": places,
        "chosen": torch.ones_like(places, dtype=torch.bool),
        "mask": torch.ones_like(ids, dtype=torch.bool),
    }
    logits = objective.logits(model, batch)
    for n in (2, 7, 12):
        short = {name: value[:, :n] for name, value in batch.items() if name not in ("places", "chosen")}
        ahead = objective.logits(
            model, dict(batch, **short, places=places[:, : n - 1], chosen=batch["chosen"][:, : n - 1])
        )
        assert relative_rms(ahead, logits[:, : n - 1]) <= RUNGS["F64"]


def test_as_many_tokens_are_predicted_as_asked_and_none_that_has_a_function() -> None:
    objective, _ = built()
    ids, generator = tokens(50, 40)
    mask = torch.arange(40)[None] < torch.arange(1, 51)[:, None].clamp(max=40)
    batch = objective.corrupt(ids, mask=mask, generator=generator)
    for row in range(50):
        places = batch["places"][row][batch["chosen"][row]]
        possible = mask[row] & (ids[row] != 3) & (ids[row] != 4)
        assert len(set(places.tolist())) == len(places) == min(max(1, int(mask[row].sum()) // 3), int(possible.sum()))
        assert bool(possible[places].all())


def test_ranks_stay_in_their_block_and_segments_follow_the_separator() -> None:
    objective, _ = built(block=4)
    ids, generator = tokens(30, 14)
    batch = objective.corrupt(ids, generator=generator)
    drawn = batch["rank"] >= 0
    assert torch.equal((batch["rank"] // 4)[drawn], (torch.arange(14) // 4).expand(30, -1)[drawn])
    before = [[int((row[:i] == 4).sum()) for i in range(14)] for row in ids]
    assert batch["segments"].tolist() == before


def test_padding_changes_nothing() -> None:
    objective, model = built()
    ids, generator = tokens(2, 13)
    batch = objective.corrupt(ids, generator=generator)
    padded = {name: F.pad(batch[name], (0, 4)) for name in ("tokens", "rank", "segments", "mask")}
    assert relative_rms(objective(model, dict(batch, **padded)).total, objective(model, batch).total) <= RUNGS["F64"]


def test_memory_is_what_was_read_before_without_gradient() -> None:
    torch.manual_seed(0)
    model = TwoStream(vocab=11, dim=12, depth=1, heads=3, memory=20).double()
    disturb(model)
    ids, _ = tokens(2, 13)
    with record() as seen:
        model(ids[:, :6])
    memory = seen["memory"][0]
    assert memory.shape == (2, 1, 6, 12) and not memory.requires_grad
    # one layer: its inputs are embeddings, so a memory of them is the longer sequence
    assert relative_rms(model(ids[:, 6:], memory=memory), model(ids)[:, 6:]) <= RUNGS["F64"]


def test_a_query_that_may_see_nothing_gets_no_content() -> None:
    _, model = built()
    ids, _ = tokens(1, 5)
    none = torch.zeros(1, 1, 5, dtype=torch.bool)
    places = torch.tensor([[2]])
    own = torch.eye(5, dtype=torch.bool)[None]
    one, other = (model.streams(t, places, own, none) for t in (ids, (ids + 1) % 11))
    assert torch.equal(one, other)


def test_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="share >= 2"):
        XLNet(vocab=11, share=1)
    with pytest.raises(ValueError, match="expected an even dim"):
        TwoStream(vocab=11, dim=5, depth=1, heads=1)
