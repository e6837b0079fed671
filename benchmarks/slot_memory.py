"""Extra memory of Slot Attention and of its peers, each in a fresh process, stored in results/slot_attention/memory.csv.

python -m benchmarks.slot_memory                 the shape of 16,384 inputs
python -m benchmarks.slot_memory --shape D       another one of benchmarks/cases/slot_attention.py

Extra memory is the growth of the resident set from before a pass to its highest point, freed pages going back at once;
the inputs are there before, the gradient of the inputs is part of it.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tevo.bench.timing import BOUND

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "slot_attention" / "memory.csv"
OURS = {"tevo": {}, "tevo lean": {"memory": "lean"}}
PEERS = ("authors' layer", "early module", "slot-attention")
THREADS = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slot_memory", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", nargs="+", default=["B"], help="names of shapes (default B)")
    parser.add_argument("--out", type=Path, default=OUT, help="the table to write")
    parser.add_argument("--child", nargs=3, metavar=("SHAPE", "MODE", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(measure(*arguments.child))
        return 0
    rows = []
    for shape in arguments.shape:
        for mode in ("forward", "training"):
            for variant in (*OURS, *PEERS):
                size = in_fresh_process(shape, mode, variant)
                rows.append((shape, mode, variant, size))
                print(f"{shape}  {mode:<9} {variant:<16} {size / 2**20:8.1f} MiB", flush=True)
    with arguments.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("shape", "mode", "variant", "extra bytes"), *rows])
    return 0


def in_fresh_process(shape: str, mode: str, variant: str) -> int:
    """Extra bytes of one pass."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": str(THREADS), **BOUND}
    command = [sys.executable, "-m", "benchmarks.slot_memory", "--child", shape, mode, variant]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def measure(shape: str, mode: str, variant: str) -> int:
    """Extra bytes of one pass, in this process."""
    import torch

    from benchmarks.cases import slot_attention as cases
    from tevo.bench.timing import peak_bytes, return_pages

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return_pages()

    def run(size: cases.Shape) -> Callable[[], object]:
        module = cases.ours(size, **OURS.get(variant, {}))
        chosen = (module, cases.OURS) if variant in OURS else cases.peers(size, module)[variant]
        return cases.forward(chosen[0], size) if mode == "forward" else cases.training(*chosen, size)

    # what a first pass of any size loads is nobody's extra memory
    size = cases.SHAPES[shape]
    run(size._replace(b=1, n=64))()
    return peak_bytes(run(size))


if __name__ == "__main__":
    raise SystemExit(main())
