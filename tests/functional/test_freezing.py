from __future__ import annotations

import pytest
from torch import nn

from tevo.functional.freezing import freeze, owned, trained


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.middle, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5)
        self.head.weight = self.words.weight


def test_parameters_are_found_by_name() -> None:
    model = Tied()
    assert owned(model, ("*.bias",)) == [(model.middle, "bias"), (model.head, "bias")]
    assert owned(model, ("middle.*",)) == [(model.middle, "weight"), (model.middle, "bias")]


def test_tied_weights_are_not_adapted_in_one_place() -> None:
    with pytest.raises(ValueError, match=r"words.weight belongs to several modules"):
        owned(Tied(), ("words.*",))


def test_only_what_is_named_stays_trained() -> None:
    model = Tied()
    freeze(model, ("head.bias",))
    (left,) = trained(model)
    assert left is model.head.bias


def test_a_name_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="named like headd"):
        freeze(Tied(), ("headd.*",))
    with pytest.raises(ValueError, match="named like"):
        owned(Tied(), ("x*",))
