"""Live costs: every layer is measured, a missing peer is named, and a failure is a result."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from tevo.bench import timing
from tevo.colt5 import cost

TINY = {"tokens": 200, "width": 16, "heads": 4, "radius": 7}


def test_all_forms_have_time_and_memory_and_the_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(timing, "BOUND", {})
    said: list[str] = []
    found = cost.measure(threads=1, seconds=0.0, shape=TINY, say=said.append)
    assert set(found["forms"]) == set(cost.FORMS) - {cost.PEER}
    for numbers in found["forms"].values():
        assert numbers["forward_s"] > 0 and numbers["forward_bytes"] >= 0
    assert found["rounds"] == 2 and "200 tokens" in found["shape"] and len(said) == 1
    assert found["skipped"] == ["LongT5 is not measured: the package transformers is missing; pip install 'tevo[hf]'"]


@pytest.mark.parametrize("name", cost.FORMS)
def test_a_pass_runs(name: str) -> None:
    if name == cost.PEER:
        pytest.importorskip("transformers")
    cost.passes(name, TINY)["forward"]()


def test_the_dense_layer_has_the_feed_forward_that_the_light_one_halves() -> None:
    light, dense = cost._colt5(TINY), cost._dense(TINY)
    assert dense.feed_forward.out.in_features == 2 * light.feed_forward.light.out.in_features
    assert 4 * dense.feed_forward.out.in_features == light.feed_forward.heavy.out.in_features
    x = torch.randn(1, 33, 16)
    assert light(x).shape == dense(x).shape == x.shape
