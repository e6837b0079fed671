"""Every shared check, on every exported class of every present system, with every example of its card."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tevo.card import CLAIMS
from tevo.catalogue.rows import PACKAGE, rows
from tevo.testing import parametrised
from tevo.testing.checks import CHECKS, FAST, GROUPS, Check
from tevo.testing.evidence import official
from tevo.testing.subject import Subject, subjects

PRESENT = [row for row in rows().values() if row.card]


SLOW = "".join(set(GROUPS) - set(FAST))


def present() -> Iterator[Subject]:
    for row in PRESENT:
        yield from subjects(row)


@pytest.mark.parametrize(**parametrised(present(), groups=FAST))  # type: ignore[arg-type]
def test_check(subject: Subject, check: Check) -> None:
    check.run(subject)


@pytest.mark.slow
@pytest.mark.parametrize(**parametrised(present(), groups=SLOW))  # type: ignore[arg-type]
def test_check_of_the_slower_groups(subject: Subject, check: Check) -> None:
    check.run(subject)


@pytest.mark.parametrize("word", CLAIMS)
def test_every_claim_raises_a_check(word: str) -> None:
    text = "".join(path.read_text() for path in (PACKAGE / "testing").glob("*.py"))
    asked = f'claims("{word}")' in text
    # a linear cost is what the growth of FLOPs is held against; the others say how a part is built
    assert asked or word in ("linear", "position", "grid", "fixed_length", "shared_across_layers")


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
