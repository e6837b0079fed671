from __future__ import annotations

import pytest
from tests.mutants.bugs import Bug, seen

PARAMETERS, REVERSIBLE = "adapters/pafi_hiwi.py", "adapters/meft.py"
BUGS = (
    Bug("nothing is frozen", "pafi_hiwi", "functional/freezing.py",
        "any(fnmatch.fnmatchcase(name, pattern) for pattern in also))", "True)", "trains_its_own"),
    Bug("the adapter starts at random", "pafi_hiwi", PARAMETERS, "nn.init.zeros_(self.up)", "nn.init.normal_(self.up)",
        "unchanged_at_start"),
    Bug("merging throws away what was learned", "pafi_hiwi", PARAMETERS, "leave_parametrized=True",
        "leave_parametrized=False", "merges"),
    Bug("the parameter itself is lost under its adapter", "pafi_hiwi", PARAMETERS, "return w + F.gelu", "return F.gelu",
        "unchanged_at_start"),
    Bug("gradients of the streams are not swapped", "meft", REVERSIBLE, "(h2, h1, d2, d1) if", "(h2, h1, d1, d2) if", "oracle"),
    Bug("the inverse forgets a factor", "meft", REVERSIBLE, "(y2 - g) / shift", "y2 - g", "oracle"),
    Bug("the gradient of the second stream forgets its factor", "meft", REVERSIBLE, "shift * d2 + through", "d2 + through",
        "oracle"),
    Bug("activations are kept", "meft", REVERSIBLE, "k = self.recomputed if ", "k = self.recomputed if False and ",
        "recomputes"),
)  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_seen_by_its_check(bug: Bug) -> None:
    found = seen(bug)
    assert found is not None, f"{bug.name} goes unseen by {bug.check}"
    assert found.check == bug.check
