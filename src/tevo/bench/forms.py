"""Time and extra memory of several forms of one computation, live on the machine at hand, in a few seconds.

One process imports what the forms need and runs each on a short input. Then it forks a process for each form, in which memory
is measured: what a pass adds to the resident set at its peak. Last it takes times itself, the forms in turn.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from tevo.bench import timing

__all__ = ["measure"]

Passes = Mapping[str, Callable[[], None]]
Numbers = dict[str, Any]

# seconds until all is given up, and until the memory of one form is
_PATIENCE, _PATIENCE_MEMORY = 180.0, 60.0


def measure(
    module: str,
    names: Sequence[str],
    *,
    shape: Mapping[str, int],
    short: Mapping[str, int],
    threads: int,
    seconds: float,
    rounds: int,
) -> Numbers:
    """Seconds and bytes of every pass of every form.

    Args:
        module: one that can be imported, with ``passes(name, shape) -> what -> run``: the passes of a form, such as "forward".
        names: of the forms.
        shape: for ``passes``.
        short: a shape for passes that only have to have run.
        threads: of torch.
        seconds: after which no further round of timing is begun.
        rounds: at least.

    Returns:
        "forms": name -> ``{what}_s``, the median, and ``{what}_bytes``, or "error": why not; "rounds" of the timing.
    """
    job = {"module": module, "names": list(names), "shape": dict(shape), "short": dict(short), "threads": threads}
    found = _child({**job, "seconds": seconds, "rounds": rounds}, _PATIENCE)
    if "forms" not in found:
        return {"forms": {name: {"error": found["error"]} for name in names}, "rounds": 0}
    return found


def _child(job: Mapping[str, Any], patience: float) -> Numbers:
    """What this module, run with a job, prints; or ``error``: why not. Each thread has a CPU of its own."""
    environment = {**os.environ, **timing.BOUND, "OMP_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, "-m", "tevo.bench.forms", json.dumps(job)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {patience:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]}
    answer: Numbers = json.loads(done.stdout)
    return answer


def _passes(job: Mapping[str, Any], name: str, shape: str) -> Passes:
    made: Passes = importlib.import_module(job["module"]).passes(name, job[shape])
    return made


def _run_short(job: Mapping[str, Any], name: str) -> None:
    """What a first pass takes more than others, it takes on a short input too."""
    for run in _passes(job, name, "short").values():
        run()


def _measure(job: Mapping[str, Any]) -> Numbers:
    import torch

    # a pool of threads would not survive the fork; one thread needs none
    torch.set_num_threads(1)
    forms: dict[str, Numbers] = {}
    for name in job["names"]:
        try:
            _run_short(job, name)
        except Exception as error:
            forms[name] = {"error": f"{type(error).__name__}: {error}"}
        else:
            forms[name] = _memory_apart(job, name)
    torch.set_num_threads(job["threads"])
    able = [name for name in job["names"] if "error" not in forms[name]]
    times, rounds = _times({name: _passes(job, name, "shape") for name in able}, job["seconds"], job["rounds"])
    for name in able:
        forms[name] |= times[name]
    return {"forms": forms, "rounds": rounds}


def _memory_apart(job: Mapping[str, Any], name: str) -> Numbers:
    if sys.platform != "linux":
        # forking a process that uses the system's linear algebra is not safe elsewhere
        return _child({**job, "names": [name], "only": "memory"}, _PATIENCE_MEMORY)
    return timing.forked(lambda: _memory(job, name), _PATIENCE_MEMORY)


def _memory(job: Mapping[str, Any], name: str) -> Numbers:
    import torch

    timing.return_pages()
    found: Numbers = {}
    try:
        torch.set_num_threads(job["threads"])
        for what, run in _passes(job, name, "shape").items():
            found[f"{what}_bytes"] = timing.peak_bytes(run, first=lambda: _run_short(job, name))
    except (MemoryError, RuntimeError) as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no memory'}"}
    return found


def _times(forms: Mapping[str, Passes], seconds: float, least: int) -> tuple[dict[str, Numbers], int]:
    taken: dict[str, dict[str, list[float]]] = {name: {what: [] for what in runs} for name, runs in forms.items()}
    gc.disable()
    began, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - began < seconds:
        for name, runs in forms.items():
            for what, run in runs.items():
                start = time.perf_counter()
                run()
                taken[name][what].append(time.perf_counter() - start)
        rounds += 1
    return {name: {f"{what}_s": median(each) for what, each in of.items()} for name, of in taken.items()}, rounds


def _answer(job: Mapping[str, Any]) -> Numbers:
    return _memory(job, job["names"][0]) if "only" in job else _measure(job)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(json.loads(sys.argv[1]))))
