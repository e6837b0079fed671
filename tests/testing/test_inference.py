from __future__ import annotations

import pytest
from tests.mutants.bugs import Bug, seen

WINDOWS, NBCE, KNN = "inference/parallel_context_windows.py", "inference/nbce.py", "inference/knn_lm.py"
BUGS = (
    Bug("every window keeps its first token", "parallel_context_windows", WINDOWS, "[0, *(1 for _ in windows[1:])]",
        "[0 for _ in windows]", "inference_oracle"),
    Bug("windows begin one place late", "parallel_context_windows", WINDOWS, "if self.right else at", "if self.right else at + 1",
        "one_context_is_the_model"),
    Bug("what follows stands behind all tokens", "parallel_context_windows", "models/encoder.py", "torch.stack(counts).amax(0)",
        "torch.stack(counts).sum(0)", "inference_oracle"),
    Bug("the last token is dropped instead of the first", "parallel_context_windows", "mixers/softmax/softmax.py",
        "cache.narrow(dim, min(less, filled), ", "cache.narrow(dim, 0, ", "inference_oracle"),
    Bug("only the first window is read", "parallel_context_windows", WINDOWS, "self.model.join(states, ",
        "self.model.join(states[:1], [0]) or (states, ", "inference_oracle"),
    Bug("no context may be chosen too", "nbce", NBCE, "[:, 1:].argmin(1) + 1", ".argmin(1)", "inference_oracle"),
    Bug("logits are pooled unnormalised", "nbce", NBCE, "logp = logits.log_softmax(-1)", "logp = logits", "inference_oracle"),
    Bug("the contrast has the wrong sign", "nbce", NBCE, "pooled - beta * empty", "pooled + beta * empty", "inference_oracle"),
    Bug("the likeliest word is filtered with the rest", "nbce", NBCE, "late[..., 0] = False", "late[..., 0] = True",
        "inference_oracle"),
    Bug("the distance is not squared", "knn_lm", KNN, "keys[index].to(q.dtype)).square().sum(-1)",
        "keys[index].to(q.dtype)).square().sum(-1).sqrt()", "inference_oracle"),
    Bug("the shares are exchanged", "knn_lm", KNN, "in (share, 1 - share)", "in (1 - share, share)", "one_context_is_the_model"),
    Bug("the contexts are not read", "knn_lm", KNN, "return self.model.step(torch.cat(list(contexts), 1), ",
        "return self.model.step(torch.cat(list(contexts), 1)[:, :1], ", "every_context_matters"),
)  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_seen_by_its_check(bug: Bug) -> None:
    found = seen(bug)
    assert found is not None, f"{bug.name} goes unseen by {bug.check}"
    assert found.check == bug.check
