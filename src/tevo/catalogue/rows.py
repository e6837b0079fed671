"""Rows of the catalogue and their status, derived from files: planned, present, verified."""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from tevo.card import CLAIMS, ROLES, Card, read_card
from tevo.names import suggest as suggest

PACKAGE = Path(__file__).resolve().parent.parent

# the folder(s) of each role; a system lives in <folder>/**/<id>.py
FOLDERS = {
    "mixer": "mixers",
    "normaliser": "mixers/softmax",
    "heads": "mixers/softmax",
    "channel": "channels",
    "position": "positions",
    "norm": "norms",
    "residual": "residuals",
    "embedding": "embeddings",
    "block": "blocks",
    "stack": "stacks",
    "model": "models",
    "objective": "objectives",
    "inference": "inference",
    "adapter": "adapters",
    "recipe": "training/recipes",
    "study": "studies",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system as data. ``baseline`` rows stand outside the 144."""

    id: str
    name: str
    role: str
    section: str
    title: str
    year: int
    arxiv: str = ""
    url: str = ""
    note: str = ""
    baseline: bool = False

    @cached_property
    def path(self) -> Path | None:
        """The source file, or None while planned."""
        return _files().get(self.id)

    @cached_property
    def card(self) -> Card | None:
        """The card of the source file, or None while planned."""
        return read_card(self.path) if self.path else None

    @cached_property
    def evidence(self) -> dict[str, object] | None:
        """The stored evidence, whether or not it is still valid."""
        path = evidence_folder() / f"{self.id}.json"
        if not path.is_file():
            return None
        return json.loads(path.read_text(encoding="utf-8"))

    @cached_property
    def status(self) -> str:
        """``planned``; ``present``: its file exists; ``verified``: its evidence is complete and of this very source."""
        if self.path is None or self.card is None:
            return "planned"
        evidence = self.evidence
        if evidence and evidence.get("complete") is True and evidence.get("source_sha256") == source_hash(self.id):
            return "verified"
        return "present"

    @property
    def link(self) -> str:
        """Where to read the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else self.url

    def claims(self) -> tuple[str, ...]:
        """The claim words of the card, ``linear`` included where the cost says so; empty while planned."""
        if self.card is None:
            return ()
        return tuple(word for word in CLAIMS if self.card.claims_word(word))


def evidence_folder() -> Path:
    """The folder of evidence: the checkout's, else the one shipped in the wheel."""
    checkout = PACKAGE.parent.parent / "evidence"
    return checkout if (PACKAGE.parent.parent / "pyproject.toml").is_file() else PACKAGE / "_evidence"


@cache
def _files() -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in sorted(set(FOLDERS.values())):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            if "oracles" not in path.parts and not path.name.startswith("_"):
                found.setdefault(path.stem, path)
    return found


@cache
def rows() -> dict[str, Row]:
    """All rows by id: the 144 in the catalogue's order, then the baselines."""
    here = Path(__file__).resolve().parent
    table = {}
    for file, baseline in (("rows.json", False), ("baselines.json", True)):
        for entry in json.loads((here / file).read_text(encoding="utf-8")):
            table[entry["id"]] = Row(**entry, baseline=baseline)
    return table


@cache
def _exports() -> dict[str, tuple[str, str]]:
    """Part name -> (row id, class name), for every name that a present file exports."""
    names: dict[str, tuple[str, str]] = {}
    for row in rows().values():
        if row.card:
            for name, cls in row.card.exports.items():
                names[name] = (row.id, cls)
    return names


def find(name: str) -> tuple[Row, str]:
    """The row and the class name behind a part's name.

    Raises:
        ValueError: unknown, with the nearest match; or still planned.
    """
    if name in _exports():
        row_id, cls = _exports()[name]
        return rows()[row_id], cls
    if name in rows():
        row = rows()[name]
        if row.card:
            return row, next(iter(row.card.exports.values()))
        raise ValueError(f"{name} is in the catalogue but not implemented yet (status planned); see `tevo list --todo`")
    raise ValueError(f"unknown part {name!r}{suggest(name, [*_exports(), *rows()])}; see `tevo list`")


def list_systems(
    pattern: str = "*",
    *,
    role: str | None = None,
    where: Sequence[str] = (),
    status: str | None = None,
    baselines: bool = False,
) -> list[Row]:
    """Rows whose id matches ``pattern`` (shell wildcards; a plain word matches anywhere).

    Args:
        pattern: matched against id and exported part names.
        role: one of ``tevo.card.ROLES``.
        where: claim words that must all hold.
        status: planned, present or verified.
        baselines: also the rows outside the 144.

    Raises:
        ValueError: unknown role, claim word or status.
    """
    if role is not None and role not in ROLES:
        raise ValueError(f"unknown role {role!r}{suggest(role, ROLES)}; roles are {', '.join(ROLES)}")
    if status is not None and status not in ("planned", "present", "verified"):
        raise ValueError(f"unknown status {status!r}; expected planned, present or verified")
    for word in where:
        if word not in CLAIMS:
            raise ValueError(f"unknown claim {word!r}{suggest(word, CLAIMS)}; claims are {', '.join(CLAIMS)}")
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    found = []
    for row in rows().values():
        if row.baseline and not baselines:
            continue
        names = [row.id, *(row.card.exports if row.card else ())]
        if not any(fnmatch.fnmatch(name, wild) for name in names):
            continue
        if role is not None and row.role != role:
            continue
        if not set(where) <= set(row.claims()):
            continue
        if status is not None and row.status != status:
            continue
        found.append(row)
    return found


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """The tevo source files that a source file imports, read from its text."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tevo"):
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.startswith("tevo.")]
        else:
            continue
        for module in modules:
            base = PACKAGE.joinpath(*module.split(".")[1:])
            for candidate in (base.with_suffix(".py"), base / "__init__.py"):
                if candidate.is_file() and candidate != PACKAGE / "__init__.py":
                    found.add(candidate)
    return tuple(sorted(found))


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source_files(system: str) -> list[Path]:
    """The system's file, its oracle, and every tevo module that they import, directly or not."""
    row = rows()[system]
    if row.path is None:
        return []
    oracle = PACKAGE / "testing" / "oracles" / f"{system}.py"
    todo = [row.path, *([oracle] if oracle.is_file() else [])]
    seen: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            # the catalogue and the cards describe systems; what they say does not change a system's numbers
            todo += [p for p in _imports(path) if "catalogue" not in p.parts and p.name != "card.py"]
    return sorted(seen)


def source_hash(system: str) -> str:
    """SHA-256 over names and contents of :func:`source_files`."""
    whole = hashlib.sha256()
    for path in source_files(system):
        whole.update(f"{path.relative_to(PACKAGE).as_posix()} {_digest(path)}\n".encode())
    return whole.hexdigest()
