"""Runs the shared checks of subjects, finds the smallest input on which one fails, and says what it saw."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tevo.catalogue.rows import PACKAGE, Row, source_hash
from tevo.testing.checks import FAST, GROUPS, Check, applicable
from tevo.testing.shrink import described, shrink
from tevo.testing.subject import Subject
from tevo.testing.user import user_subject


@dataclass
class Result:
    """What one check saw of one part, over all its examples."""

    check: str
    group: str
    asks: str
    cases: int = 0
    inputs: int = 0
    largest_difference: float = 0.0
    seconds: float = 0.0
    failures: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Report:
    """What all checks saw of one part."""

    part: str
    inferred: tuple[str, ...] = ()
    results: dict[str, Result] = field(default_factory=dict)
    stored: bool = False  # read from an earlier run on the same source

    @property
    def failed(self) -> list[Result]:
        """The checks that failed."""
        return [r for r in self.results.values() if r.failures]

    def table(self, *, most: int = 3) -> str:
        """A line for each check, and what was seen of each failure, of which ``most`` are shown for one check."""
        width = max((len(name) for name in self.results), default=0)
        lines = []
        for r in self.results.values():
            said = "FAILED" if r.failures else "ok"
            gap = f"{r.largest_difference:7.1e}" if r.largest_difference else 7 * " "
            lines.append(f"  {r.group}  {r.check:<{width}}  {said:<6}  {gap}  {r.cases:3} cases  {r.seconds:5.1f} s")
            for failure in r.failures[:most]:
                lines.append(f"       {failure['what']}")
                if failure.get("smallest"):
                    lines.append(f"       smallest input: {failure['smallest']}")
            if len(r.failures) > most:
                lines.append(f"       and {len(r.failures) - most} more")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """All of it as plain values."""
        return asdict(self) | {"results": [asdict(r) for r in self.results.values()]}

    def raise_if_failed(self) -> None:
        """Raise AssertionError with the table's lines of what failed."""
        if self.failed:
            short = Report(self.part, results={r.check: r for r in self.failed})
            raise AssertionError(f"{self.part} fails {len(self.failed)} of {len(self.results)} checks\n{short.table()}")


def examine(
    part: str,
    subjects: Iterable[Subject],
    *,
    groups: str = FAST,
    watch: Callable[[Subject, Check], None] | None = None,
) -> Report:
    """Run every check of the groups that the subjects' claims raise.

    Args:
        part: for the report.
        subjects: of one system, in the card's order.
        groups: letters of ``GROUPS``.
        watch: called before each check.
    """
    report, seen = Report(part), set()
    for subject in subjects:
        first = subject.part not in seen
        seen.add(subject.part)
        for check in applicable(subject, first=first, groups=groups):
            if watch is not None:
                watch(subject, check)
            result = report.results.setdefault(check.name, Result(check.name, check.group, check.asks))
            before, start = subject.runs["inputs"], time.perf_counter()
            result.cases += 1
            try:
                gap = check.run(subject)
                result.largest_difference = max(result.largest_difference, float(f"{gap:.1e}"))
            except Exception as error:
                result.failures.append(describe(subject, check, error, smallest=not result.failures))
            result.inputs += subject.runs["inputs"] - before
            result.seconds += time.perf_counter() - start
    report.results = {r.check: r for r in sorted(report.results.values(), key=lambda r: r.group)}
    return report


def describe(subject: Subject, check: Check, error: Exception, *, smallest: bool) -> dict[str, str]:
    """The failure, if wanted on the smallest input that fails alike."""
    small, error = shrink(subject, check, error) if smallest else (subject, error)
    said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
    found = {"what": " ".join(said.split())[:600]}
    if not isinstance(error, AssertionError) and small.runs["inputs"]:
        # what raised knows the input that it was given, which the check may have chosen itself
        found["smallest"] = f"x of shape ({small.runs['b']}, {small.runs['n']}, {small.dim}) to {small.name}"
    elif small is not subject:
        found["smallest"] = described(small, subject)
    return found


def parametrised(subjects: Iterable[Subject], *, groups: str = "".join(GROUPS)) -> dict[str, object]:
    """Arguments of ``pytest.mark.parametrize`` for a test of (subject, check) over everything that claims raise.

    ::

        @pytest.mark.parametrize(**parametrised([user_subject(MyMixer, claims=["causal"])]))
        def test_conforms(subject, check):
            check.run(subject)
    """
    values: list[tuple[Subject, Check]] = []
    ids: list[str] = []
    seen: dict[tuple[str, str], int] = {}
    for subject in subjects:
        key = (subject.card.id, subject.part)
        index = seen[key] = seen.get(key, -1) + 1
        for check in applicable(subject, first=index == 0, groups=groups):
            values.append((subject, check))
            ids.append(f"{subject.card.id}-{subject.part}-{index}-{check.name}")
    return {"argnames": ("subject", "check"), "argvalues": values, "ids": ids}


def memory_of(row: Row, groups: str) -> Path:
    """Where the report on a system is kept: named by its source, the checks', torch's version and the groups."""
    # softmax attention is the seat of positions, normalisers and heads
    sources = f"{source_hash(row.id)} {source_hash('softmax')}"
    whole = hashlib.sha256(f"{sources} {torch.__version__} {platform.python_version()}".encode())
    for path in sorted(p for p in (PACKAGE / "testing").glob("*.py")):
        whole.update(path.read_bytes())
    whole.update((row.path.read_bytes() if row.path else b"") + (PACKAGE / "card.py").read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tevo" / "checks" / f"{row.id}-{groups}-{whole.hexdigest()[:24]}.json"


def recall(row: Row, groups: str) -> Report | None:
    """The stored report on this very source, if there is one and nothing failed in it."""
    try:
        stored = json.loads(memory_of(row, groups).read_text(encoding="utf-8"))
        results = {r["check"]: Result(**r) for r in stored["results"]}
        return Report(stored["part"], results=results, stored=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(row: Row, groups: str, report: Report) -> None:
    """Keep a report in which nothing failed; a folder that cannot be written to is no error."""
    if report.failed:
        return
    path = memory_of(row, groups)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(report.as_json()), encoding="utf-8")
        new.replace(path)


def check_part(
    part: nn.Module | Callable[..., nn.Module],
    *,
    role: str | None = None,
    groups: str = FAST,
    dim: int | None = None,
    heads: int | None = None,
    options: Mapping[str, object] | None = None,
    claims: Sequence[str] = (),
    **card_fields: Any,
) -> Report:
    """Ask a user's part whatever its claims raise; arguments as for :func:`~tevo.testing.user.user_subject`.

    Raises:
        AssertionError: a check fails, with the smallest input found.
        ValueError: the part cannot be built or called.
    """
    subject = user_subject(part, role=role, dim=dim, heads=heads, options=options, claims=claims, **card_fields)
    report = examine(subject.part, [subject], groups=groups)
    report.inferred = subject.inferred
    report.raise_if_failed()
    return report


check_mixer = partial(check_part, role="mixer")
check_channel = partial(check_part, role="channel")
check_position = partial(check_part, role="position")
check_normaliser = partial(check_part, role="normaliser")
check_heads = partial(check_part, role="heads")
check_residual = partial(check_part, role="residual")
check_norm = partial(check_part, role="norm")
check_block = partial(check_part, role="block")
check_stack = partial(check_part, role="stack")
