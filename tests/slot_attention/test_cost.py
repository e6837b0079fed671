"""Live costs: every form is measured in a process of its own, and a failure is a result."""

from __future__ import annotations

import importlib.util

import pytest

from tevo.bench import timing
from tevo.slot_attention import cost

HERE = "tevo.slot_attention.cost"
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
    assert len(said) == 1 + len(names)


def test_memory_is_of_the_form_that_was_asked_for() -> None:
    shape = {"batch": 4, "inputs": 8192, "width": 32, "slots": 5, "iterations": 3}
    job = {"shape": shape, "threads": 1, "seconds": 0.0, "what": "memory"}
    plain, lean = (timing.child(HERE, {**job, "forms": [name]}, patience=60) for name in ("plain", "lean"))
    # keys, values and the normed inputs are 4 MiB each; the lean form has none of them
    assert plain["forward_bytes"] > 8 << 20
    assert plain["forward_bytes"] > 3 * lean["forward_bytes"]


def test_what_fails_says_so_in_a_line() -> None:
    found = timing.child(HERE, {"shape": TINY, "threads": 1, "what": "memory", "forms": ["nothing"]}, patience=60)
    assert found == {"error": "KeyError: 'nothing'"}


@pytest.mark.parametrize("name", cost.FORMS)
def test_a_training_pass_has_gradients_anew(name: str) -> None:
    forward, train = cost._passes(name, TINY)
    forward()
    train()
    train()
