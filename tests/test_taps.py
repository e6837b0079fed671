from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tevo import record, tap
from tevo.taps import sealed, watched


def test_a_tap_returns_its_value_and_is_seen_only_while_recorded() -> None:
    x = torch.randn(3)
    assert tap("x", x) is x
    with record() as seen:
        tap("x", x)
        tap("x", x + 1)
    tap("x", x)
    assert [t.tolist() for t in seen["x"]] == [x.tolist(), (x + 1).tolist()]


def test_records_nest_and_a_sealed_one_hides() -> None:
    x = torch.zeros(1)
    with record() as outer:
        with record() as inner:
            tap("a", x)
        with sealed() as hidden:
            tap("b", x)
        tap("c", x)
    assert set(outer) == {"a", "c"} and set(inner) == {"a"} and set(hidden) == {"b"}


def test_watched_says_whether_a_record_is_open() -> None:
    assert not watched()
    with record():
        assert watched()
    assert not watched()


def test_a_record_closes_when_its_body_fails() -> None:
    with pytest.raises(RuntimeError), record() as seen:
        raise RuntimeError
    tap("x", torch.zeros(1))
    assert not seen


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_taps_survive_a_full_graph_compile(backend: str) -> None:
    def f(x: Tensor) -> Tensor:
        return tap("half", x / 2) * 3

    torch._dynamo.reset()
    with record() as seen:
        y = torch.compile(f, fullgraph=True, backend=backend)(torch.ones(4))
    assert y.tolist() == [1.5] * 4
    assert seen["half"][0].tolist() == [0.5] * 4
