from __future__ import annotations

import ast
import json

import pytest
from tests.mutants.mutate import apply, mutants, variants
from tests.mutants.run import EQUIVALENTS, RESULTS, fate, sampled

from tevo.catalogue.rows import rows


def changes(expression: str) -> set[str]:
    node = ast.parse(expression, mode="eval").body
    return {ast.unparse(new) for _, new in variants(node)}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("a + b", {"a - b", "a", "b"}),
        ("a * b", {"a / b", "a"}),
        ("a < b", {"a <= b"}),
        ("3", {"4", "2"}),
        ("-1", {"-2"}),
        ("-x", {"x"}),
        ("~mask", {"mask"}),
        ("f(x, y)", {"f(x)"}),
        ("f(x, dim=1)", {"f(x)"}),
        ("x.detach()", {"x"}),
        ("a if b else c", {"a if not b else c"}),
        ("a and b", {"a or b"}),
        ("x", set()),
    ],
)
def test_every_kind_of_change_is_made(expression: str, expected: set[str]) -> None:
    assert changes(expression) == expected


def test_refusals_constructors_and_docstrings_are_left_alone() -> None:
    row = rows()["rope"]
    assert row.path is not None
    found = mutants("rope", row.path)
    assert found
    assert not any(m.function.endswith("__init__") or "raise" in m.what or "% 2" in m.what for m in found)


def test_a_mutant_differs_in_one_place() -> None:
    row = rows()["rope"]
    assert row.path is not None
    for mutant in mutants("rope", row.path):
        original, changed = apply(mutant)
        before, after = ast.unparse(original).splitlines(), ast.unparse(changed).splitlines()
        assert len(before) == len(after)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_every_mutant_of_the_residual_wirings_is_killed() -> None:
    for system in ("post_norm", "rezero", "b2t_connection"):
        row = rows()[system]
        assert row.path is not None
        for mutant in mutants(system, row.path):
            # strict guards against another number of sublayers than the wiring was built for
            if "strict=True" not in mutant.what:
                assert fate(mutant) is not None, mutant.name


def test_the_sample_is_the_same_each_time() -> None:
    assert sampled(20) == sampled(20)


def test_the_stored_run_killed_at_least_95_percent_and_gives_a_reason_for_every_equivalent() -> None:
    stored = json.loads(RESULTS.read_text(encoding="utf-8"))
    reasons = json.loads(EQUIVALENTS.read_text(encoding="utf-8"))
    assert stored["sampled"] >= 299
    assert stored["killed"] + stored["equivalent"] + stored["survived"] == stored["sampled"]
    assert stored["killed"] / (stored["sampled"] - stored["equivalent"]) >= 0.95
    assert all(reasons[name] == reason and len(reason) > 10 for name, reason in stored["equivalents"].items())
    # whatever survived is named, not only counted
    assert len(stored["survivors"]) == stored["survived"]
