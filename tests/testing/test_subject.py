from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tevo.catalogue.rows import rows
from tevo.testing import user_subject
from tevo.testing.subject import Subject, stateful, subjects


def first(system: str) -> Subject:
    return next(iter(subjects(rows()[system])))


@pytest.mark.parametrize("system", ["qk_norm", "multi_head", "rope", "pre_norm", "softmax", "gelu", "rwkv", "luna"])
def test_every_role_is_seated_as_a_map_of_tokens(system: str) -> None:
    subject = first({"gelu": "feed_forward"}.get(system, system))
    module, x = subject.make(), subject.inputs(2, subject.sizes()[0])
    assert subject.call(module, x).shape == x.shape
    assert isinstance(subject.part_of(module), subject.cls if isinstance(subject.cls, type) else nn.Module)


def test_the_same_seed_builds_the_same_part_and_disturbing_moves_every_parameter() -> None:
    subject = first("pre_norm")
    one, two, plain = subject.make(), subject.make(), subject.make(disturbed=False)
    for a, b, c in zip(one.parameters(), two.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) and not (a == c).any()


def test_lengths_and_rows_may_be_given_and_are_kept_to() -> None:
    small = replace(first("softmax"), lengths=(3,), rows=1)
    assert small.sizes() == (3,) and small.inputs(2, 3).shape == (1, 3, 12)


def test_boundaries_stand_around_the_part_s_own_sizes_and_no_longer_than_it_takes() -> None:
    assert {10, 11, 12} <= set(first("memorizing_transformer").boundaries())
    assert max(first("hyena").boundaries()) <= 17


def test_inputs_that_are_run_are_counted() -> None:
    subject = user_subject(lambda dim: nn.Linear(dim, dim), role="mixer")
    before = subject.runs["inputs"]
    subject.call(subject.make(), subject.inputs(2, 5))
    assert subject.runs["inputs"] == before + 1 and (subject.runs["b"], subject.runs["n"]) == (2, 5)


def test_a_state_that_is_not_there_is_said() -> None:
    with pytest.raises(AssertionError, match="the card claims a state, but Linear has no init_state and step"):
        stateful(nn.Linear(2, 2))
