"""Time the cases, each in a fresh process, and store the ratios.

python -m benchmarks.run                                  every case
python -m benchmarks.run --case 'local_attention/*'       some, by name or pattern
python -m benchmarks.run --list                           their names
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tevo.bench.timing import BOUND

ROOT = Path(__file__).resolve().parent.parent

# glibc maps and unmaps every large temporary by default, so that each is page-faulted anew; the tuned mode keeps the
# memory, and is the fair one for claims about arithmetic. The default mode is what users get.
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "100000000000"},
}


def main() -> int:
    arguments = _parse()
    if arguments.child:
        return _child(arguments.child, arguments.threads, arguments.seconds, arguments.result)
    from benchmarks.harness import discover

    names = sorted(discover())
    if arguments.list:
        print("\n".join(names))
        return 0
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in arguments.case or ["*"])]
    for pattern in arguments.case or []:
        if not fnmatch.filter(names, pattern):
            print(f"no case is called {pattern!r}; the cases are {', '.join(names)}", file=sys.stderr)
            return 2
    modes = list(ALLOCATORS) if arguments.allocator == "both" else [arguments.allocator]
    failed = 0
    for name in chosen:
        for mode in modes:
            record = _in_fresh_process(name, mode, arguments.threads, arguments.seconds)
            if record is None:
                failed += 1
                continue
            _store(arguments.out, name, mode, record)
            _show(name, mode, record)
    return 1 if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--case", nargs="+", metavar="NAME", help="names or shell patterns; default all")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both", help="glibc's setting")
    parser.add_argument("--seconds", type=float, default=20.0, help="timing limit per case and mode (default 20)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(name: str, threads: int, seconds: float, result: Path) -> int:
    import torch

    from benchmarks.harness import discover, machine, measure

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    case = discover()[name]()
    record = {"baseline": case.baseline, "note": case.note, **measure(case, seconds), "machine": machine()}
    result.write_text(json.dumps(record), encoding="utf-8")
    return 0


def _in_fresh_process(name: str, mode: str, threads: int, seconds: float) -> dict[str, object] | None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": str(threads), **BOUND, **ALLOCATORS[mode]}
    options = ["--threads", str(threads), "--seconds", f"{seconds:g}"]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.run", "--child", name, "--result", str(result), *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            print(f"{name} ({mode}): failed, nothing stored\n{done.stderr}", file=sys.stderr)
            return None
        record: dict[str, object] = json.loads(result.read_text(encoding="utf-8"))
    reproduce = ["python", "-m", "benchmarks.run", "--case", name, "--allocator", mode, *options]
    return {**record, "environment": {**BOUND, **ALLOCATORS[mode]}, "command": " ".join(reproduce)}


def _store(out: Path, name: str, mode: str, record: dict[str, object]) -> None:
    path = out / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    # the other mode's record stays
    stored = {"case": name, "allocators": {**stored.get("allocators", {}), mode: record}}
    path.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def _show(name: str, mode: str, record: dict[str, object]) -> None:
    variants = record["variants"]
    assert isinstance(variants, dict)
    print(f"{name}  ({mode} allocator, {record['rounds']} rounds; times the time of {record['baseline']})")
    for variant, row in variants.items():
        noisy = "  noisy" if variant in record["noisy"] else ""  # type: ignore[operator]
        print(f"  {variant:<28} {row['ratio']:>8g}x   of minima {row['ratio_of_minima']:>8g}x{noisy}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
