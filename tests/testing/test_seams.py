from __future__ import annotations

import pytest
from tests.mutants.bugs import Bug, seen

from tevo.testing import CHECKS, seams

CORE, SOFTMAX, LRU = "functional/attention.py", "mixers/softmax/softmax.py", "mixers/recurrent/lru.py"
LINEAR, ELECTRA = "mixers/linear/linear_attention.py", "objectives/electra.py"
BUGS = (
    Bug("padding counts as a token of the mean", "average_attention_network", "mixers/linear/average_attention_network.py",
        "count = seen[:, None] + real.cumsum(1)", "count = seen[:, None] + torch.ones_like(real).cumsum(1)",
        "padded_continuation"),
    Bug("a padded context is read whole while decoding", "softmax", SOFTMAX, "mask=seen, queries=None", "mask=None, queries=None",
        "cross_state"),
    Bug("queries before the first key see it", "softmax", CORE, ".tril(m - n)", ".tril(max(m - n, 0))", "before_the_first_key"),
    Bug("dropout in evaluation", "lru", LRU, "self.dropout, self.training)", "self.dropout, True)", "dropout"),
    Bug("no dropout in training", "lru", LRU, "self.dropout, self.training)", "self.dropout, False)", "dropout"),
    Bug("what a step gives stays wide", "linear_attention", LINEAR, "self.heads.merge(y.to(x.dtype)), (S,)",
        "self.heads.merge(y), (S,)", "bfloat16_steps"),
    Bug("values of the wrong group", "multi_query_attention", CORE, "@ spread(v, weights.shape[1])",
        "@ v.repeat(1, weights.shape[1] // v.shape[1], 1, 1)", "written_out_weights"),
    Bug("keys that may not be seen keep their share", "sinkformer", "mixers/softmax/sinkformer.py",
        "logs if allowed is None else logs.masked_fill(~allowed, -torch.inf)", "logs", "no_allowed_key"),
    Bug("scaled twice", "qk_norm", "mixers/softmax/qk_norm.py", "cosine_scores(q, k, self.g)",
        "cosine_scores(q, k, self.g * q.shape[-1] ** -0.5)", "scores"),
    Bug("a slope that forgets a factor", "activation_zoo", "channels/activation_zoo.py",
        "sigma + beta * z * sigma * (1 - sigma)", "sigma + beta * sigma * (1 - sigma)", "beside"),
    Bug("every chosen token is hidden", "electra", ELECTRA, "here.masked_fill(hidden, ", "here.masked_fill(chosen, ",
        "corruption"),
    Bug("special tokens are chosen too", "electra", ELECTRA, ".masked_fill(~open_, -1.0)", ".masked_fill(~real, -1.0)",
        "corruption"),
)  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_seen_by_its_check(bug: Bug) -> None:
    found = seen(bug)
    assert found is not None, f"{bug.name} goes unseen by {bug.check}"
    assert found.check == bug.check


def test_every_check_of_the_module_has_a_bug_of_its_own() -> None:
    own = {check.name for check in CHECKS if check.run.__module__ == seams.__name__}
    assert own == {bug.check for bug in BUGS}
