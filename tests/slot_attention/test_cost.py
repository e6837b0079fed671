"""Live costs: every form is measured."""

from __future__ import annotations

import importlib.util

import pytest

from tevo.slot_attention import cost

TINY = {"batch": 2, "inputs": 40, "width": 8, "slots": 3, "iterations": 2}


@pytest.mark.slow
def test_all_forms_have_time_and_memory() -> None:
    said: list[str] = []
    found = cost.measure(threads=1, seconds=0.0, shape=TINY, say=said.append)
    names = {*cost.FORMS, *({cost.PEER} if importlib.util.find_spec("slot_attention") else ())}
    assert set(found["forms"]) == names
    for numbers in found["forms"].values():
        assert numbers["forward_s"] > 0 and numbers["train_s"] > 0
        assert numbers["forward_bytes"] >= 0 and numbers["train_bytes"] >= 0
    assert found["rounds"] == 3 and "40 inputs of width 8" in found["shape"]
    assert len(said) == 1


@pytest.mark.parametrize("name", cost.FORMS)
def test_a_training_pass_has_gradients_anew(name: str) -> None:
    runs = cost.passes(name, TINY)
    runs["forward"]()
    runs["train"]()
    runs["train"]()
