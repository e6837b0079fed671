from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo.functional.attention import attention
from tevo.mixers.grid.neighborhood_attention import NeighborhoodAttention, neighborhood_attention, tiles
from tevo.models.causal_lm import CausalLM
from tevo.models.image import ImageClassifier
from tevo.testing.subject import disturb

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(**arguments: object) -> NeighborhoodAttention:
    torch.manual_seed(0)
    mixer = NeighborhoodAttention(dim=12, heads=3, **arguments).double()  # type: ignore[arg-type]
    disturb(mixer)
    return mixer


@pytest.mark.parametrize(("sizes", "causal"), [((7,), False), ((7,), True), ((5, 7), False), ((1, 3), False)])
def test_a_window_of_the_whole_map_is_full_attention(sizes: tuple[int, ...], causal: bool) -> None:
    n = int(torch.Size(sizes).numel())
    q, k, v = tokens(3, 2, 3, n, 4)
    plan = tiles(sizes, window=7, dilation=1, causal=(causal,) * len(sizes))
    torch.testing.assert_close(neighborhood_attention(q, k, v, plan, None), attention(q, k, v, causal=causal), **CLOSE)


@pytest.mark.parametrize(("sizes", "dilation"), [((150,), 1), ((150,), 3), ((20, 11), 1), ((20, 11), 2)])
def test_every_query_sees_exactly_one_window_of_different_tokens(sizes: tuple[int, ...], dilation: int) -> None:
    plan = tiles(sizes, window=5, dilation=dilation, causal=(False,) * len(sizes))
    place = plan.back
    allowed, keys = plan.allowed.flatten(0, 1)[place], plan.key.repeat_interleave(plan.query.shape[1], 0)[place]
    assert torch.equal(plan.query.flatten()[place], torch.arange(len(place)))
    assert bool((allowed.sum(1) == 5 ** len(sizes)).all())
    for seen, key in zip(allowed, keys, strict=True):
        assert len(set(key[seen].tolist())) == 5 ** len(sizes)


def test_away_from_the_borders_shifting_the_map_shifts_the_output() -> None:
    mixer, x = built(window=3, grid=(9, 8)), tokens(2, 9, 8, 12)
    moved = x.roll((1, 2), (1, 2))
    y, z = (mixer(m.flatten(1, 2)).reshape(x.shape) for m in (x, moved))
    torch.testing.assert_close(z.roll((-1, -2), (1, 2))[:, 1:-2, 1:-3], y[:, 1:-2, 1:-3], **CLOSE)


def test_many_tiles_equal_one_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    import tevo.mixers.grid.neighborhood_attention as module

    for arguments, n in (({"window": 5, "dilation": 2}, 45), ({"window": 3, "grid": (9, 5)}, 45)):
        mixer, x = built(**arguments), tokens(2, n, 12)
        one = mixer(x)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_TILE", {1: 4, 2: 2})
            torch.testing.assert_close(mixer(x), one, **CLOSE)


def test_regridding_keeps_parameters_and_changes_neighbours() -> None:
    mixer, other, x = built(window=3, grid=(5, 8)), built(window=3, grid=(8, 5)), tokens(2, 40, 12)
    mixer.regrid((8, 5))
    assert torch.equal(mixer(x), other(x))


def test_the_state_stops_growing() -> None:
    mixer, x = built(window=3, dilation=2, causal=True), tokens(2, 13, 12)
    _, state = mixer.step(x, mixer.init_state(2))
    assert [tuple(leaf.shape) for leaf in state] == [(2, 3, 4, 4), (2, 3, 4, 4), (2,)]


def test_hosts_classify_images_and_generate_text_with_it() -> None:
    torch.manual_seed(0)
    image = ImageClassifier(
        image_size=(6, 10), patch=2, classes=4, dim=6, depth=2, heads=3, mixer="neighborhood_attention(window=3)"
    )
    image(torch.randn(2, 3, 6, 10)).sum().backward()
    model = CausalLM(vocab=11, dim=12, depth=2, heads=3, mixer="neighborhood_attention(window=3)").double()
    disturb(model)
    tokens = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(3))
    generated = model.generate(tokens, new_tokens=9, temperature=0)
    for _ in range(9):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, tokens)


def test_what_it_cannot_do_is_refused() -> None:
    x = tokens(2, 13, 12)
    with pytest.raises(ValueError, match="window=4"):
        built(window=4)
    with pytest.raises(ValueError, match=r"grid=\(3, 5\), 15 tokens, got 13"):
        built(grid=(3, 5))(x)
    with pytest.raises(ValueError, match="built for sequences"):
        built().regrid((3, 5))
    with pytest.raises(ValueError, match="causal=True"):
        built().init_state(2)
    with pytest.raises(ValueError, match="context"):
        built()(x, x)
