"""Forms side by side: memory in forks, time in turn, and what fails is a result of its own."""

from __future__ import annotations

import pytest

from tevo.bench import forms, timing

SLOTS = "tevo.slot_attention.cost"
SHAPE = {"batch": 4, "inputs": 8192, "width": 32, "slots": 5, "iterations": 3}
SHORT = {**SHAPE, "inputs": 64}


@pytest.fixture(autouse=True)
def _unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    # tests run side by side; bound to one CPU they would wait for each other
    monkeypatch.setattr(timing, "BOUND", {})


def test_memory_is_of_the_form_that_was_asked_for_and_a_failure_takes_no_other_form_with_it() -> None:
    found = forms.measure(
        SLOTS, ["plain", "nothing", "lean"], shape=SHAPE, short=SHORT, threads=1, seconds=0.0, rounds=2
    )
    plain, lean = found["forms"]["plain"], found["forms"]["lean"]
    # keys, values and the normed inputs are 4 MiB each; the lean form has none of them
    assert plain["forward_bytes"] > 8 << 20
    assert plain["forward_bytes"] > 3 * lean["forward_bytes"]
    for one in (plain, lean):
        assert 0 < one["forward_s"] < one["train_s"] and one["forward_bytes"] < one["train_bytes"]
    assert found["forms"]["nothing"] == {"error": "KeyError: 'nothing'"}
    assert found["rounds"] == 2


def test_a_module_that_is_not_there_is_said_of_every_form() -> None:
    found = forms.measure("tevo.nowhere", ["a", "b"], shape={}, short={}, threads=1, seconds=0.0, rounds=1)
    why = {"error": "ModuleNotFoundError: No module named 'tevo.nowhere'"}
    assert found["forms"] == {"a": why, "b": why}


def test_what_takes_too_long_is_ended() -> None:
    job = {"module": SLOTS, "names": ["plain"], "shape": SHAPE, "short": SHORT, "threads": 1}
    assert forms._child({**job, "seconds": 60.0, "rounds": 1}, 0.5) == {"error": "took longer than 0.5 s"}


def test_where_the_process_fails_every_form_says_why() -> None:
    found = forms.measure(SLOTS, ["plain", "lean"], shape=SHAPE, short=SHORT, threads=-1, seconds=0.0, rounds=1)
    assert found["rounds"] == 0 and set(found["forms"]) == {"plain", "lean"}
    assert all("expects a positive integer" in one["error"] for one in found["forms"].values())


def test_the_separate_process_of_other_systems_measures_memory_alone() -> None:
    job = {"module": SLOTS, "names": ["lean"], "shape": SHAPE, "short": SHORT, "threads": 1, "only": "memory"}
    found = forms._child(job, 60.0)
    assert set(found) == {"forward_bytes", "train_bytes"} and found["train_bytes"] > 0
