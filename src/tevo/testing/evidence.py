"""Evidence: what was compared with what, how large the differences were, and of which source.

``python -m tevo.testing.evidence [ID ...]`` runs every check of the named systems (all present ones by default) and
writes ``evidence/<id>.json``. A row is *verified* while its evidence is complete and bound to the hash of its source.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import traceback
from pathlib import Path

import torch

from tevo.catalogue.rows import PACKAGE, Row, evidence_folder, rows, source_hash
from tevo.testing.checks import applicable, oracle_of
from tevo.testing.cost import growth
from tevo.testing.subject import Subject, subjects

SCHEMA = 1


def golden_folder() -> Path:
    """Reference values of the authors' code, in the checkout."""
    return PACKAGE.parent.parent / "tests" / "golden"


def official(row: Row) -> list[dict[str, object]]:
    """Comparisons with the authors' numbers, as the system's oracle file makes them; empty without any.

    Raises:
        AssertionError: a difference above the tolerance that the golden file's README states.
    """
    import numpy as np

    assert row.path is not None
    oracle = importlib.import_module(f"tevo.testing.oracles.{row.id}")
    if not hasattr(oracle, "official"):
        return []
    path = golden_folder() / getattr(oracle, "GOLDEN", f"{row.id}_a.npz")
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    system = importlib.import_module("tevo." + ".".join(row.path.relative_to(PACKAGE).with_suffix("").parts))
    found: list[dict[str, object]] = []
    for what, ours, theirs, tolerance in oracle.official(system, arrays):
        if ours.shape != theirs.shape:
            raise AssertionError(f"{row.id}, {what}: shape {tuple(ours.shape)}, official {tuple(theirs.shape)}")
        gap = float((ours.detach() - theirs).abs().max()) if theirs.numel() else 0.0
        allowed = tolerance * max(1.0, float(theirs.abs().max()) if theirs.numel() else 1.0)
        if not gap <= allowed:
            raise AssertionError(
                f"{row.id}, {what}: largest difference {gap:.2e} from the official code, {allowed:.1e} allowed"
            )
        found.append({"what": what, "largest_difference": float(f"{gap:.1e}"), "allowed": float(f"{allowed:.1e}")})
    if not found:
        raise AssertionError(f"{row.id}: official() of the oracle compared nothing")
    return found


def golden_hash(row: Row) -> str:
    """SHA-256 of the golden file, empty without one."""
    oracle = importlib.import_module(f"tevo.testing.oracles.{row.id}")
    path = golden_folder() / getattr(oracle, "GOLDEN", f"{row.id}_a.npz")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and hasattr(oracle, "official") else ""


def summary(subject: Subject) -> dict[str, list[int]]:
    """Names and shapes of the state dict."""
    return {name: list(tensor.shape) for name, tensor in subject.make().state_dict().items()}


def gather(row: Row) -> dict[str, object]:
    """Run every check of one system."""
    results: dict[str, dict[str, object]] = {}
    parameters: dict[str, dict[str, list[int]]] = {}
    failures: list[str] = []
    largest = 0.0
    seen: set[str] = set()
    for subject in subjects(row):
        first = subject.part not in seen
        seen.add(subject.part)
        parameters.setdefault(subject.name, summary(subject))
        for check in applicable(subject, first=first):
            entry = results.setdefault(check.name, {"asks": check.asks, "cases": 0, "largest_difference": 0.0})
            try:
                gap = check.run(subject)
            except Exception as error:
                failures.append(f"{subject.name}, {check.name}: {type(error).__name__}: {error}")
                continue
            entry["cases"] = int(str(entry["cases"])) + 1
            entry["largest_difference"] = max(float(str(entry["largest_difference"])), float(f"{gap:.1e}"))
            if check.name.endswith("oracle"):
                largest = max(largest, gap)
    compared: list[dict[str, object]] = []
    try:
        oracle_of(next(iter(subjects(row))))
        compared = official(row)
    except Exception as error:
        failures.append(f"official: {type(error).__name__}: {error}")
    return {
        "schema": SCHEMA,
        "id": row.id,
        "complete": not failures,
        "failures": failures,
        "source_sha256": source_hash(row.id),
        "golden_sha256": golden_hash(row) if not failures or compared else "",
        "oracle": {"relative_rms": float(f"{largest:.1e}"), "allowed": 1e-10},
        "official": compared,
        "cost": growth(next(iter(subjects(row)))),
        "checks": results,
        "parameters": parameters,
    }


def write(row: Row) -> dict[str, object]:
    """Gather and store."""
    found = gather(row)
    folder = evidence_folder()
    folder.mkdir(exist_ok=True)
    (folder / f"{row.id}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main(names: list[str]) -> int:
    """Write the evidence of the named systems, or of all present ones."""
    torch.set_num_threads(2)
    unknown = [name for name in names if name not in rows() or not rows()[name].card]
    if unknown:
        sys.stderr.write(f"error: not present in the catalogue: {', '.join(unknown)}\n")
        return 2
    wanted = [rows()[name] for name in names] or [row for row in rows().values() if row.card]
    bad = 0
    for row in wanted:
        try:
            found = write(row)
        except Exception:
            traceback.print_exc()
            bad += 1
            continue
        failures = found["failures"]
        assert isinstance(failures, list)
        sys.stdout.write(f"{row.id}: {'complete' if found['complete'] else 'INCOMPLETE'} {found['oracle']}\n")
        for failure in failures:
            sys.stdout.write(f"    {failure}\n")
        bad += bool(failures)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
