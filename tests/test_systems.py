"""Every shared check, on every exported class of every present system, with every example of its card."""

from __future__ import annotations

import pytest

from tevo.catalogue.rows import PACKAGE, rows
from tevo.testing.checks import CHECKS, Check, applicable
from tevo.testing.evidence import official
from tevo.testing.subject import Subject, subjects

PRESENT = [row for row in rows().values() if row.card]


def cases() -> list[object]:
    found = []
    for row in PRESENT:
        seen: set[str] = set()
        for index, subject in enumerate(subjects(row)):
            for check in applicable(subject, first=subject.part not in seen):
                found.append(pytest.param(subject, check, id=f"{row.id}-{subject.part}-{index}-{check.name}"))
            seen.add(subject.part)
    return found


@pytest.mark.parametrize(("subject", "check"), cases())
def test_check(subject: Subject, check: Check) -> None:
    check.run(subject)


@pytest.mark.parametrize("row", PRESENT, ids=lambda row: row.id)
def test_equals_the_official_numbers(row: object) -> None:
    official(row)  # type: ignore[arg-type]


@pytest.mark.parametrize("row", PRESENT, ids=lambda row: row.id)
def test_is_verified_by_evidence_of_this_very_source(row: object) -> None:
    evidence = row.evidence  # type: ignore[attr-defined]
    assert evidence, f"{row.id} has no evidence: run `make evidence`"  # type: ignore[attr-defined]
    assert not evidence["failures"]
    assert row.status == "verified", f"the evidence of {row.id} is of another source: run `make evidence`"  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", PRESENT, ids=lambda row: row.id)
def test_card_is_complete(row: object) -> None:
    card = row.card  # type: ignore[attr-defined]
    assert card.id == row.id  # type: ignore[attr-defined]
    assert card.role == row.role  # type: ignore[attr-defined]
    assert card.equations and card.summary and card.examples
    for name, (rung, reason) in card.tolerances.items():
        assert name in {check.name for check in CHECKS}
        assert rung and reason


def test_every_source_file_in_a_role_folder_has_a_row() -> None:
    from tevo.catalogue.rows import _files

    strays = [path for name, path in _files().items() if name not in rows() and "CARD = Card(" in path.read_text()]
    assert not strays


def test_every_oracle_has_a_row_and_imports_torch_only() -> None:
    for path in (PACKAGE / "testing" / "oracles").glob("[a-z]*.py"):
        assert path.stem in rows()
        text = path.read_text()
        head = text.split("def official(")[0]
        assert "import tevo" not in head and "from tevo" not in head, f"{path.name} borrows from what it should judge"
