"""Sampled mutants of every present system against the fast checks of its card: ``python -m tests.mutants.run``.

Each mutant of ``SAMPLE`` (fixed seed) is planted alone; it is killed when any check fails. What survives stands in
``results.json`` with the reason written in ``equivalents.json``, or without one: then it counts against the suite.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from tests.mutants.mutate import Mutant, apply, mutants
from tests.mutants.planting import Failure, caught

from tevo.catalogue.rows import rows

SAMPLE, SEED = 300, 20
# rows whose seats run what a file's own seat does not: weights written out for a normaliser, caches joined for inference
ALSO = {"softmax": ("qk_norm", "parallel_context_windows")}
HERE = Path(__file__).parent
RESULTS, EQUIVALENTS = HERE / "results.json", HERE / "equivalents.json"


def sampled(count: int = SAMPLE, seed: int = SEED) -> list[Mutant]:
    """The sample, drawn from all mutants of the systems' files."""
    every = [m for row in rows().values() if row.card and row.path for m in mutants(row.id, row.path)]

    def lot(mutant: Mutant) -> bytes:
        # by hash, so that a new system changes little of it
        words = f"{seed} {mutant.path.stem}.{mutant.function}: {mutant.what} {mutant.place}"
        return hashlib.sha256(words.encode()).digest()

    chosen = sorted(every, key=lot)[:count]
    return sorted(chosen, key=lambda m: (m.system, m.line, m.place, m.option))


def fate(mutant: Mutant) -> Failure | None:
    """The check that kills a mutant, of its own row or of those that run its file too; None if it survives."""
    systems = (mutant.system, *ALSO.get(mutant.system, ()))
    return next((found for system in systems if (found := caught(system, mutant.path, apply(mutant)))), None)


def summary(fates: dict[str, dict[str, object]]) -> dict[str, object]:
    """Counts, and survivors with their reasons."""
    reasons: dict[str, str] = json.loads(EQUIVALENTS.read_text(encoding="utf-8")) if EQUIVALENTS.exists() else {}
    alive = [name for name, found in fates.items() if found["check"] is None]
    equivalent = {name: reasons[name] for name in alive if name in reasons}
    survivors = [name for name in alive if name not in reasons]
    by: dict[str, int] = {}
    for found in fates.values():
        if found["check"] is not None:
            by[str(found["check"])] = by.get(str(found["check"]), 0) + 1
    killed = len(fates) - len(alive)
    return {
        "sampled": len(fates),
        "seed": SEED,
        "killed": killed,
        "equivalent": len(equivalent),
        "survived": len(survivors),
        "killed_share": round(killed / max(1, len(fates) - len(equivalent)), 4),
        "killed_by": dict(sorted(by.items(), key=lambda pair: -pair[1])),
        "equivalents": equivalent,
        "survivors": survivors,
    }


def main(names: list[str]) -> int:
    """Run what is not stored yet of the sample, and those mutants of it whose name holds one of ``names`` again."""
    torch.set_num_threads(1)
    stored = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"fates": {}, "seconds": 0}
    sample = {mutant.name: mutant for mutant in sampled()}
    again = {n for n in sample if any(word in n for word in names)}
    fates: dict[str, dict[str, object]] = {n: f for n, f in stored["fates"].items() if n in sample and n not in again}
    seconds = stored["seconds"] if fates else 0
    for name, mutant in sample.items():
        if name in fates:
            continue
        start = time.process_time()
        found = fate(mutant)
        took = time.process_time() - start
        seconds += took
        fates[name] = {"check": found and found.check, "why": found.why if found is not None else ""}
        sys.stdout.write(f"{took:6.1f} s  {found.check if found else 'SURVIVED':<18} {mutant.line}: {name}\n")
        sys.stdout.flush()
        # stored each time, so that a run that is cut off goes on where it was
        result = {**summary(fates), "seconds": round(seconds, 1), "fates": {n: fates[n] for n in sample if n in fates}}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    result = {**summary(fates), "seconds": round(seconds, 1), "fates": {n: fates[n] for n in sample}}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({k: v for k, v in result.items() if k != "fates"}, indent=1) + "\n")
    return 0 if not result["survivors"] else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
