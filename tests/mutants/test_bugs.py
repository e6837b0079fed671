from __future__ import annotations

import pytest
from tests.mutants.bugs import BUGS, Bug, plant, seen
from tests.mutants.planting import module_of, outcome

from tevo.catalogue.rows import PACKAGE
from tevo.testing import CHECKS

# a tenth of a second each: one bug of each kind of check
QUICK = {
    "explicit_sparse_attention: causal mask one too far right",
    "explicit_sparse_attention: masked by a small number only",
    "explicit_sparse_attention: missing scale",
    "multi_head: mask ignored",
    "multi_head: heads merged in the wrong order",
    "multi_head: lost bias of the projections",
    "multi_query_attention: heads assigned to the wrong group",
    "transformer_xl: bias of the first row for all",
    "aft: running maximum over the future",
    "alibi: ALiBi of zero while decoding",
    "alibi: absolute slopes in a relative part",
    "rope: positions are ignored",
    "rope: padding counted as tokens while decoding",
    "rezero: alpha without effect at the start",
    "feed_forward: norm over tokens",
    "feed_forward: noise in evaluation",
    "fnet: in-place change of the input",
    "pre_norm: double residual",
    "rwkv: state of a pass kept for the next",
}


def test_there_are_at_least_forty_bugs_of_different_names_and_every_check_named_exists() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= 40
    assert {bug.check for bug in BUGS} <= {check.name for check in CHECKS} | {"official"}
    assert {bug.name for bug in BUGS} >= QUICK


@pytest.mark.parametrize(
    "bug", [pytest.param(b, id=b.name, marks=() if b.name in QUICK else pytest.mark.slow) for b in BUGS]
)
def test_a_planted_bug_is_seen_by_its_check_and_the_intact_system_is_not(bug: Bug) -> None:
    found = seen(bug)
    assert found is not None, f"{bug.name} goes unseen by {bug.check}"
    assert found.check == bug.check


def test_a_bug_is_gone_afterwards() -> None:
    bug = next(b for b in BUGS if b.name == "pre_norm: double residual")
    before = module_of(PACKAGE / bug.file).PreNorm.forward.__code__
    found = seen(bug)
    assert found is not None
    assert module_of(PACKAGE / bug.file).PreNorm.forward.__code__ is before
    assert outcome(bug.system, found.case) is None


def test_a_bug_whose_source_has_changed_is_refused() -> None:
    stale = Bug("stale", "pre_norm", "residuals/pre_norm.py", "no such line", "", "oracle")
    with pytest.raises(ValueError, match="occurs 0 times"):
        plant(stale)
