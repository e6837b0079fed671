"""Time and peak memory of one block against length, each measurement in a process of its own.

A measurement is a job: a dictionary that :func:`measure_block` turns into numbers. Jobs go to a server, a process that
has imported what they need; it forks a fresh process for each job, so that no heap, cache or thread pool is inherited
from an earlier one. A job that fails, runs out of memory or out of time is a result too.

Time: median over repeats of one pass, after one to warm up. Memory: the growth of the resident set from before the pass
to its highest point during it (Linux: the kernel's high-water mark is reset first), freed pages going back at once.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

__all__ = [
    "BOUND",
    "Server",
    "alternate",
    "forked",
    "measure_block",
    "measure_lengths",
    "peak_bytes",
    "return_pages",
]

Job = dict[str, Any]
Numbers = dict[str, Any]

# one CPU for each thread: two on one CPU wait for each other by whole time slices, often for as long as a job lasts
BOUND = {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
# seconds after which a job is given up, and how long a pass is repeated for
PATIENCE = 20.0
REPEAT_FOR = 0.2
LEAST_REPEATS = 3
# tokens of a pass whose only purpose is that it has run
_SHORT = 16
# share of the free memory that a job may take, so that it fails in place of the machine
SHARE_OF_MEMORY = 0.6


def measure_block(job: Mapping[str, Any]) -> Numbers:
    """Forward and training time (seconds), or peak memory (bytes), of one causal block.

    Args:
        job: ``what`` ("time" or "memory"); ``build``: the arguments of :class:`tevo.models.encoder.Encoder`;
            ``length`` and ``batch``; ``threads``.
    """
    import torch

    torch.set_num_threads(job["threads"])
    if job["what"] == "memory":
        return_pages()
    _limit_memory()
    forward, train = _passes(job["build"], job["batch"], job["length"])
    if job["what"] == "time":
        return {"forward_s": _seconds(forward), "train_s": _seconds(train)}
    return {"forward_bytes": peak_bytes(forward), "train_bytes": peak_bytes(train)}


def _passes(build: Mapping[str, Any], batch: int, n: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A forward pass without gradients, and one with its backward pass."""
    import torch

    from tevo.models.encoder import Encoder

    torch.manual_seed(0)
    encoder = Encoder(**{"causal": True, "length": n, "depth": 1, **build})
    x = torch.randn(batch, n, build["dim"])

    def forward() -> None:
        encoder.eval()
        with torch.no_grad():
            encoder(x)

    def train() -> None:
        encoder.train()
        encoder.zero_grad(set_to_none=True)
        encoder(x).sum().backward()

    return forward, train


def measure_lengths(
    builds: Mapping[str, Mapping[str, Any]],
    lengths: Sequence[int],
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 2,
    known: Sequence[Numbers] = (),
    done: Callable[[Numbers], None] = lambda numbers: None,
) -> list[Numbers]:
    """Every part at every length; parts alternate, in reverse order in every second round.

    Args:
        builds: part -> what is built, as in :func:`measure_block`.
        lengths: tokens.
        batch: sequences.
        threads: CPU threads.
        rounds: of time; memory, which hardly varies, is measured in the first alone.
        known: measurements of an earlier call that need not be done again.
        done: is given each measurement when it is there.

    Returns:
        One dictionary for each measurement: part, length, round, what, and its numbers or ``error``.
    """
    results = list(known)
    have = {(r["part"], r["length"], r["round"], r["what"]) for r in known}
    # a part that failed or took too long at one length is not tried at longer ones
    given_up = {(r["part"], r["what"]): r["error"] for r in known if "error" in r}
    with Server() as server:
        for turn in range(rounds):
            for length in lengths:
                for part in alternate(list(builds), turn):
                    for what in ("time", "memory") if turn == 0 else ("time",):
                        if (part, length, turn, what) in have:
                            continue
                        entry: Numbers = {"part": part, "length": length, "round": turn, "what": what}
                        if (part, what) in given_up:
                            entry["error"] = f"not tried: {given_up[part, what].removeprefix('not tried: ')}"
                        else:
                            job = {"what": what, "build": dict(builds[part]), "length": length, "batch": batch}
                            entry |= server.run({**job, "threads": threads})
                        if "error" in entry:
                            given_up.setdefault((part, what), f"{entry['error']} at length {length:,}")
                        results.append(entry)
                        done(entry)
    return results


def alternate(parts: Sequence[str], turn: int) -> list[str]:
    """The parts in order, or in reverse order in odd turns: a drift of the machine's speed then hits all alike."""
    return list(parts) if turn % 2 == 0 else list(reversed(parts))


class Server:
    """Runs jobs in fresh processes, one at a time."""

    def __init__(self, *, patience: float = PATIENCE) -> None:
        self.patience = patience
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, job: Job) -> Numbers:
        """The job's numbers, or ``{"error": why}``."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tevo.bench.timing", str(self.patience)],
                env={**BOUND, **os.environ},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the measuring process ended with code {self._process.wait()}"}
        answer: Numbers = json.loads(line)
        return answer

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


def _attempt(job: Job) -> Numbers:
    try:
        return measure_block(job)
    except MemoryError:
        return {"error": "out of memory"}
    except (RuntimeError, ValueError, NotImplementedError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        return {"error": "out of memory" if "allocate memory" in text or "out of memory" in text else text}


def forked(run: Callable[[], Numbers], patience: float) -> Numbers:
    """What ``run`` gives in a fork within ``patience`` seconds, or ``error``: why it gave nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                out.write(json.dumps(run()))
        finally:
            os._exit(0)
    os.close(writing)
    text, late = "", False
    with os.fdopen(reading) as answer:
        if select.select([answer], [], [], patience)[0]:
            text = answer.read()
        else:
            late = True
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if late:
        return {"error": f"took longer than {patience:g} s"}
    if os.WIFSIGNALED(status):
        # what the kernel's out-of-memory killer sends
        killed = os.WTERMSIG(status) == signal.SIGKILL
        return {"error": "out of memory" if killed else f"ended by signal {os.WTERMSIG(status)}"}
    if not text:
        return {"error": "ended without an answer"}
    numbers: Numbers = json.loads(text)
    return numbers


def _import_for(build: Mapping[str, Any]) -> None:
    """Import what a part needs, also what it or torch imports when first used."""
    import torch

    # a pool of threads would not survive the fork; one thread needs none
    torch.set_num_threads(1)
    try:
        _passes(build, 1, _SHORT)[1]()
    except Exception:  # the job itself will say
        return


def _serve(patience: float) -> None:
    ready = set()
    for line in sys.stdin:
        job = json.loads(line)
        if sys.platform == "linux":
            if (key := json.dumps(job["build"])) not in ready:
                ready.add(key)
                _import_for(job["build"])
            answer = forked(partial(_attempt, job), patience)
        else:
            # forking a process that uses the system's linear algebra is not safe elsewhere
            code = "import json, sys; from tevo.bench.timing import _attempt; print(json.dumps(_attempt(json.load(sys.stdin))))"
            try:
                done = subprocess.run(
                    [sys.executable, "-c", code], input=line, capture_output=True, text=True, timeout=patience + 30
                )
                answer = json.loads(done.stdout) if done.returncode == 0 else {"error": f"ended: {done.returncode}"}
            except subprocess.TimeoutExpired:
                answer = {"error": f"took longer than {patience:g} s"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _seconds(run: Callable[[], None]) -> list[float]:
    """Times of single passes; the first pass is not among them."""
    run()
    times: list[float] = []
    while len(times) < LEAST_REPEATS or sum(times) < REPEAT_FOR:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    gc.collect()
    # the middle and the fastest say what a reader needs
    return [median(times), min(times)]


def peak_bytes(run: Callable[[], None], *, first: Callable[[], None] | None = None) -> int:
    """Growth of the resident set to its highest point during a pass, in bytes.

    Args:
        run: the pass.
        first: runs before it, for what a first pass takes more than others; by default ``run`` itself.
    """
    # thread pools, lazy tables, and pages of code, which a fork counts as its own when it first reads them
    (first or run)()
    gc.collect()
    if sys.platform != "linux":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    _trim()
    # 5 resets the high-water mark
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def return_pages() -> None:
    """Let glibc give freed blocks of 64 KiB and more back to the system at once; elsewhere nothing."""
    try:
        ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    except (AttributeError, OSError):
        return


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return


def _limit_memory() -> None:
    """Let an allocation fail before the machine does."""
    if sys.platform != "linux":
        return
    import resource

    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    limit = _status("VmSize") + int(SHARE_OF_MEMORY * free)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
