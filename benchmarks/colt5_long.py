"""CoLT5 on long inputs: seconds and memory of the encoder against length, and of generation, each in a fresh process.

python -m benchmarks.colt5_long                        go on with what is missing of benchmarks/colt5_long.json
python -m benchmarks.colt5_long --rows 'encode/float32/*'      some rows, by name or shell pattern

Random weights: what is chosen differs, what it costs does not. Extra memory is the growth of the resident set from before
the pass, with the weights and the input there, to its highest point, freed pages going back at once; seconds are those of
the same pass. A short input was encoded before. The estimate is made afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from torch import Tensor

from benchmarks.slot_grid import ROOT, store
from tevo.bench.timing import BOUND, peak_bytes, return_pages
from tevo.colt5.config import CoLT5Config
from tevo.colt5.estimate import estimate
from tevo.colt5.modeling import CoLT5ForConditionalGeneration

TARGET = ROOT / "benchmarks" / "colt5_long.json"
LENGTHS = (8192, 16384, 32768, 65536)
# the paper lets m = n / 16 grow up to 32k tokens and no further
HELD = [1 / 16, LENGTHS[-2] // 16]
DTYPES = ("float32", "bfloat16")
# beams -> new tokens
GENERATED = {1: 32, 4: 8}
THREADS = 2
# tokens of the input that is encoded first
SHORT = 1024
GIB = 2**30

Row = dict[str, Any]


def rows(*, size: str = "base", lengths: Sequence[int] = LENGTHS) -> dict[str, Row]:
    """What is measured, by name."""
    longest = lengths[-1]
    found: dict[str, Row] = {}
    for dtype in DTYPES:
        plain = {"what": "encode", "size": size, "dtype": dtype, "m": 1 / 16}
        found |= {f"encode/{dtype}/{n}": {**plain, "n": n} for n in lengths}
        found[f"encode/{dtype}/{longest}/held"] = {**plain, "n": longest, "m": HELD}
        for beams, new in GENERATED.items():
            of = {"beams": beams, "new": new, "n": longest}
            found[f"generate/{dtype}/{beams}"] = {**plain, "what": "generate", **of}
    return found


def measure(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row, measured in this process.

    Returns:
        ``extra`` and ``peak_rss``: bytes beside the weights, and of the whole process; ``seconds`` of the pass; for
        generation ``encoder_seconds`` and ``token_seconds``, the median over tokens after the first; ``estimate``.
    """
    torch.manual_seed(0)
    config = getattr(CoLT5Config, row["size"])(m=row["m"])
    dtype = getattr(torch, row["dtype"])
    model = CoLT5ForConditionalGeneration(config).to(dtype).eval()
    ids = torch.randint(2, config.vocab_size, (1, row["n"]))
    run = {"encode": _encode, "generate": _generate}[row["what"]]
    found: dict[str, Any] = {}

    def once(n: int) -> None:
        found.update(run(model, ids[:, :n], row))

    extra = peak_bytes(lambda: once(row["n"]), first=lambda: once(SHORT))
    told = estimate(config, n=row["n"], dtype=dtype, targets=row.get("new", 1))
    return {
        "extra": extra,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        **found,
        "estimate": told._asdict(),
    }


def _encode(model: CoLT5ForConditionalGeneration, ids: Tensor, row: Mapping[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    with torch.no_grad():
        y = model.get_encoder()(ids).last_hidden_state
    seconds = time.perf_counter() - began
    # a part of them, so that the check takes no memory to speak of
    _check(bool(y[:, -SHORT:].isfinite().all()), row)
    return {"seconds": seconds}


def _generate(model: CoLT5ForConditionalGeneration, ids: Tensor, row: Mapping[str, Any]) -> dict[str, Any]:
    marks: list[float] = []

    def encoded(*_: object) -> None:
        marks.append(time.perf_counter())

    def chosen(tokens: Tensor, *_: object, **__: object) -> Tensor:
        marks.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool)

    handle = model.get_encoder().register_forward_hook(encoded)
    began = time.perf_counter()
    # generation asks the criterion after each token whether to stop
    out = model.generate(
        ids,
        num_beams=row["beams"],
        max_new_tokens=row["new"],
        min_new_tokens=row["new"],
        do_sample=False,
        stopping_criteria=[chosen],
    )
    seconds = time.perf_counter() - began
    handle.remove()
    _check(out.shape == (1, row["new"] + 1), row)
    after_first = [later - earlier for earlier, later in pairwise(marks[1:])]
    return {"seconds": seconds, "encoder_seconds": marks[0] - began, "token_seconds": median(after_first)}


def _check(right: bool, row: Mapping[str, Any]) -> None:
    if not right:
        raise FloatingPointError(f"{row} gave numbers that are not finite, or other tokens than asked for")


def exponent(sizes: Mapping[int, float]) -> float:
    """The x of size ~ n^x by least squares of the logarithms."""
    return linear_regression([math.log(n) for n in sizes], [math.log(size) for size in sizes.values()]).slope


def octaves(sizes: Mapping[int, float]) -> list[float]:
    """The same between neighbours."""
    return [exponent(dict(pair)) for pair in pairwise(sorted(sizes.items()))]


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Element type -> exponents of extra memory and of time against length, where two lengths are there."""
    told = {}
    for dtype in DTYPES:
        grown = [c for c in cells if c["what"] == "encode" and c["dtype"] == dtype and not isinstance(c["m"], list)]
        if len(grown) > 1:
            extra, seconds = ({c["n"]: c[of] for c in grown} for of in ("extra", "seconds"))
            told[dtype] = {
                "extra": exponent(extra),
                "extra_octaves": octaves(extra),
                "seconds": exponent(seconds),
            }
    return told


def in_fresh_process(row: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`measure` gives."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": str(THREADS), **BOUND}
    command = [sys.executable, "-m", "benchmarks.colt5_long", "--child", json.dumps(row)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(stored: Mapping[str, Any]) -> str:
    """What was found, in tables."""
    cells, machine = stored["cells"], stored["machine"]
    missing = stored["planned"] - len(cells)
    weights = next(iter(cells))["estimate"]["weights"] if cells else 0
    lines = [
        "# CoLT5 on long inputs",
        "",
        "Generated by `make docs` from `benchmarks/colt5_long.json`.",
        "",
        f"`CoLT5ForConditionalGeneration` with random weights ({weights / GIB:.2f} GiB in {DTYPES[0]}), one text, no "
        "gradients, each row in a process of its own. Extra memory is the growth of the resident set above weights and input "
        "at its highest point; peak RSS is that of the whole process with Python and torch, from its start. Seconds are of "
        "one pass, after a short one. The estimate is `tevo.colt5.estimate`'s, made without allocating anything: bytes of "
        "the tensors alive, and FLOPs (with the paper's window) at the speed that "
        "a matrix product had at the end of the row's own process.",
        "",
        "## The encoder",
        "",
        "| dtype | tokens | m | extra memory, GiB | peak RSS, GiB | extra over estimate | seconds | TFLOP | seconds over "
        "estimate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        if c["what"] == "encode":
            told = c["estimate"]
            m = f"at most {c['m'][1]:,}" if isinstance(c["m"], list) else f"n/{round(1 / c['m'])}"
            lines.append(
                f"| {c['dtype']} | {c['n']:,} | {m} | {c['extra'] / GIB:.2f} | {c['peak_rss'] / GIB:.2f} | "
                f"{c['extra'] / told['peak']:.2f} | {c['seconds']:.1f} | {told['flops'] / 1e12:.2f} | "
                f"{c['seconds'] / told['seconds']:.2f} |"
            )
    for dtype, found in stored["summary"].items():
        each = ", ".join(f"{x:.2f}" for x in found["extra_octaves"])
        lines += [
            "",
            f"{dtype}: extra memory grows as n^{found['extra']:.2f} (from one length to the next {each}), seconds as "
            f"n^{found['seconds']:.2f}.",
        ]
    lines += [
        "",
        "## Generation",
        "",
        "Random weights, so that the tokens mean nothing; their number is fixed.",
        "",
        "| dtype | input tokens | search | new tokens | seconds of the encoder | seconds a token | seconds in all | extra "
        "memory, GiB | peak RSS, GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        if c["what"] == "generate":
            search = "greedy" if c["beams"] == 1 else f"{c['beams']} beams"
            lines.append(
                f"| {c['dtype']} | {c['n']:,} | {search} | {c['new']} | {c['encoder_seconds']:.1f} | "
                f"{c['token_seconds']:.3f} | {c['seconds']:.1f} | {c['extra'] / GIB:.2f} | {c['peak_rss'] / GIB:.2f} |"
            )
    lines += [
        "",
        f"{len(cells)} of {stored['planned']} rows are stored"
        + (
            f"; `{stored['command']}` goes on with the missing {missing}."
            if missing
            else f". Command: `{stored['command']}`."
        ),
        "",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, {machine['system']}, Python "
        f"{machine['python']}, torch {machine['torch']}, transformers {stored['transformers']}. {_load(cells)}",
    ]
    return "\n".join(lines) + "\n"


def _load(cells: Sequence[Mapping[str, Any]]) -> str:
    """How busy the machine was with other work."""
    loads = [c["load"] for c in cells]
    if not loads:
        return ""
    return f"Its load average before a row was {min(loads):.1f} to {max(loads):.1f}, which lengthens seconds, but not memory."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.colt5_long", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=TARGET, help="file to write")
    parser.add_argument("--rows", default="*", help="names or a shell pattern (default all)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    if given.child:
        return_pages()
        print(json.dumps(measure(json.loads(given.child))))
        return 0
    import transformers

    wanted = rows()
    known = json.loads(given.out.read_text(encoding="utf-8"))["cells"] if given.out.exists() else []
    found = {c["name"]: c for c in known if c["name"] in wanted}
    for name, row in wanted.items():
        if name in found or not fnmatch(name, given.rows):
            continue
        load = os.getloadavg()[0]
        found[name] = {"name": name, **row, "load": load, **in_fresh_process(row)}
        cells = [found[name] for name in wanted if name in found]
        store(
            given.out,
            cells,
            command="python -m benchmarks.colt5_long",
            planned=len(wanted),
            transformers=transformers.__version__,
            summary=summary(cells),
        )
        c = found[name]
        print(
            f"{name:<32} {c['extra'] / GIB:6.2f} GiB extra {c['peak_rss'] / GIB:6.2f} in all {c['seconds']:7.1f} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
