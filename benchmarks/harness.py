"""How two forms of one computation are timed against each other.

Absolute times depend on the machine and its load, so only ratios are kept: of times taken in the same round, one
variant after the other, which share whatever the machine was doing at that moment.
"""

from __future__ import annotations

import gc
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import iter_modules

import torch
from torch import Tensor

WARM_UPS = 2
ROUNDS = 11
NOISY = 1.5
# seconds; below it a variant's time hangs on what ran before it: after a long one half a millisecond doubles
SHORT = 0.02


@dataclass(frozen=True, kw_only=True)
class Case:
    """Several ways to compute the same thing.

    Args:
        variants: name -> function without arguments, which returns what it computed (tensors, or a sequence of them).
        baseline: the variant that the others are divided by.
        check: raises if a variant is wrong; None compares what each returns with what the baseline returns.
        tolerance: greatest relative RMS difference that the comparison allows where ``check`` is None.
        note: what a reader must know to judge the ratios.
    """

    variants: dict[str, Callable[[], object]]
    baseline: str
    check: Callable[[], None] | None = None
    tolerance: float = 1e-5
    note: str = ""

    def __post_init__(self) -> None:
        if self.baseline not in self.variants:
            raise ValueError(f"Case: baseline is {self.baseline!r}, expected one of {', '.join(self.variants)}")


def measure(case: Case, seconds: float) -> dict[str, object]:
    """Check the variants, then time them in turn: A, B, C, A, B, C ..., each short one run once more just before.

    Args:
        case: what to time.
        seconds: upper limit of the timing; at least three rounds are run, ``ROUNDS`` if they fit, and a case of
            short variants goes on for a tenth of the limit.

    Returns:
        ``rounds``; for every variant ``ratio`` (median over rounds of its time over the baseline's in that round),
        ``ratio_of_minima`` and ``spread`` (median over minimum of its own times); ``noisy``, the variants whose spread
        is above ``NOISY``; ``warmed``, the short ones.

    Raises:
        ValueError: if a variant computes something else than the baseline.
    """
    (case.check or (lambda: same_results(case)))()
    warmed = []
    for name, run in case.variants.items():
        for _ in range(WARM_UPS):
            begin = time.perf_counter()
            run()
            last = time.perf_counter() - begin
        if last < SHORT:
            warmed.append(name)
    gc.collect()
    gc.disable()
    try:
        rounds = _rounds(case, seconds, warmed)
    finally:
        gc.enable()
    times = {name: [r[name] for r in rounds] for name in case.variants}
    best = {name: min(t) for name, t in times.items()}
    spread = {name: statistics.median(t) / best[name] for name, t in times.items()}
    return {
        "rounds": len(rounds),
        "variants": {
            name: {
                "ratio": _digits(statistics.median(r[name] / r[case.baseline] for r in rounds)),
                "ratio_of_minima": _digits(best[name] / best[case.baseline]),
                "spread": _digits(spread[name]),
            }
            for name in case.variants
        },
        "noisy": [name for name in case.variants if spread[name] > NOISY],
        "warmed": warmed,
    }


def _rounds(case: Case, seconds: float, warmed: Collection[str]) -> list[dict[str, float]]:
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while True:
        times = {}
        for name, run in case.variants.items():
            if name in warmed:
                run()
            begin = time.perf_counter()
            result = run()
            times[name] = time.perf_counter() - begin
            del result  # returned memory belongs to no variant's time
        rounds.append(times)
        spent = time.perf_counter() - start
        if len(rounds) >= 3 and (spent >= seconds or (len(rounds) >= ROUNDS and spent >= seconds / 10)):
            return rounds


def same_results(case: Case) -> None:
    """Refuse a case whose variants return something else than the baseline, beyond its tolerance.

    Raises:
        ValueError: naming the variant and the difference.
    """
    wanted = _tensors(case.baseline, case.variants[case.baseline]())
    for name, run in case.variants.items():
        got = _tensors(name, run())
        if [t.shape for t in got] != [t.shape for t in wanted]:
            raise ValueError(
                f"variant {name!r} returns shapes {[tuple(t.shape) for t in got]}, the baseline {case.baseline!r} "
                f"{[tuple(t.shape) for t in wanted]}; they must compute the same thing"
            )
        for g, w in zip(got, wanted, strict=True):
            difference = relative_rms(g, w)
            if not difference <= case.tolerance:  # a NaN is refused too
                raise ValueError(
                    f"variant {name!r} differs from the baseline {case.baseline!r} by {difference:.1e} (relative RMS), "
                    f"allowed {case.tolerance:.0e}; it is not timed"
                )


def relative_rms(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b``; the norm of the difference itself where ``b`` is zero."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / (b.norm() or 1.0))


def _tensors(name: str, result: object) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Sequence) and result and all(isinstance(t, Tensor) for t in result):
        return list(result)
    raise ValueError(f"variant {name!r} returns {type(result).__name__}, expected tensors to compare; or give a check")


def _digits(ratio: float) -> float:
    # three digits are more than any of these repeats to
    return float(f"{ratio:.3g}")


def training(f: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A variant that runs ``f(*inputs)`` forward and backward: the output and the gradient of every input.

    The cotangent is fixed, signed and drawn once, from the shape of the output.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.no_grad():
        rng = torch.Generator().manual_seed(1)
        like = f(*leaves)
        dy = torch.randn(like.shape, generator=rng, dtype=like.dtype)

    def run() -> tuple[Tensor, ...]:
        y = f(*leaves)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return run


def inference(f: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Tensor]:
    """A variant that runs ``f(*inputs)`` without a graph."""

    def run() -> Tensor:
        with torch.no_grad():
            return f(*inputs)

    return run


def discover() -> dict[str, Callable[[], Case]]:
    """Every case of every module in ``benchmarks/cases``.

    Raises:
        ValueError: if two modules export the same name.
    """
    found: dict[str, Callable[[], Case]] = {}
    for module in iter_modules([str(Path(__file__).parent / "cases")]):
        for name, make in importlib.import_module(f"benchmarks.cases.{module.name}").CASES.items():
            if name in found:
                raise ValueError(f"two cases are called {name!r}; one of them is in benchmarks/cases/{module.name}.py")
            found[name] = make
    return found


def machine() -> dict[str, object]:
    """What the ratios may depend on."""
    return {
        "cpu": _cpu_model(),
        # not those of this thread's affinity: a measuring thread is bound to one
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}".strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
