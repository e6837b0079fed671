from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

from tevo.catalogue.rows import rows
from tevo.testing import examine, parametrised, user_subject
from tevo.testing.report import Report, Result, memory_of, recall, remember


class Doubles(nn.Module):
    """Looks at other rows."""

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * len(x)


def test_a_report_counts_cases_and_inputs_and_names_what_fails() -> None:
    report = examine("Doubles", [user_subject(Doubles, role="mixer")], groups="A")
    assert {result.check for result in report.failed} == {"batch_consistency"}
    assert all(result.cases == 1 and result.inputs >= result.cases for result in report.results.values())
    assert "batch_consistency" in report.table() and "FAILED" in report.table()
    with pytest.raises(AssertionError, match=r"(?s)^Doubles fails 1 of \d+ checks.*smallest input: x of shape"):
        report.raise_if_failed()


def test_a_table_shows_a_few_failures_of_a_check_and_counts_the_others() -> None:
    failures = [{"what": f"number {i}"} for i in range(5)]
    text = Report("x", results={"c": Result("c", "A", "It holds.", failures=failures)}).table()
    assert "number 2" in text and "number 3" not in text and "and 2 more" in text


def test_a_report_without_a_failure_is_kept_for_this_source_and_one_with_a_failure_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    row, other = rows()["rope"], rows()["alibi"]
    good = Report("rope", results={"c": Result("c", "A", "It holds.", cases=3)})
    remember(row, "A", good)
    found = recall(row, "A")
    assert found is not None and found.stored and found.results == good.results
    assert recall(other, "A") is None and recall(row, "AB") is None
    remember(other, "A", Report("alibi", results={"c": Result("c", "A", "It holds.", failures=[{"what": "no"}])}))
    assert recall(other, "A") is None


def test_a_stored_report_that_cannot_be_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = memory_of(rows()["rope"], "A")
    path.parent.mkdir(parents=True)
    path.write_text('{"part": "rope"')
    assert recall(rows()["rope"], "A") is None


def test_what_is_parametrised_has_names_of_its_own_and_slow_checks_for_the_first_example_only() -> None:
    made = parametrised([user_subject(Doubles, role="mixer")] * 2, groups="AD")
    ids = made["ids"]
    assert isinstance(ids, list) and len(set(ids)) == len(ids)
    assert [name for name in ids if name.endswith("-compiles")] == ["Doubles-Doubles-0-compiles"]
