"""Cost certified without a device: FLOPs counted on meta tensors against what the card declares."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tevo.bench.measure import fit_exponent, flops, saved_bytes
from tevo.contracts import Inference
from tevo.models.causal_lm import CausalLM
from tevo.testing.subject import VOCAB, Subject, token_ids

# lengths at which the declared growth must show; long, so that the terms linear in n have faded
LENGTHS = (4096, 8192, 16384, 32768)

# lengths of contexts that a model is run on
READ = (256, 512, 1024, 2048)

# lengths at which the bytes kept for backward are counted
KEPT = (512, 1024, 2048)

# declared growth -> exponent of the term itself over the last octave
EXPONENTS = {"1": 0.0, "n": 1.0, "n log n": 1.1, "n sqrt n": 1.5, "n^2": 2.0}


class Called(nn.Module):
    """A seated part as a module of its tokens alone."""

    def __init__(self, subject: Subject, module: nn.Module) -> None:
        super().__init__()
        self.subject, self.module = subject, module

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, d) through the part."""
        return self.subject.call(self.module, x)


def at_length(subject: Subject, n: int) -> Subject:
    """The same part, built for n tokens where it is built for a length or a grid."""
    example = dict(subject.example)
    if "length" in example:
        example["length"] = n
    grid = example.get("grid")
    if isinstance(grid, tuple) and grid[0] * grid[1] != n:
        rows = 2 ** (int(math.log2(n)) // 2)
        example["grid"] = (rows, n // rows)
    return replace(subject, example=example)


def count(subject: Subject, n: int) -> int:
    """Counted FLOPs of one forward pass of one sequence of n tokens."""
    built = at_length(subject, n)
    module = Called(built, built.make(dtype=torch.float32, disturbed=False))
    return int(flops(module, torch.empty(1, n, subject.dim)))


def count_reading(subject: Subject, n: int) -> int:
    """Counted FLOPs of an inference part that reads one context of n tokens with a small model.

    The model is run, because how far a state is filled is data.
    """
    model = CausalLM(vocab=VOCAB, dim=4, depth=1, heads=1, position="rope").eval()
    part = subject.cls(model=model, **subject.example)
    assert isinstance(part, Inference)
    # of the fused kernels of a CPU nothing is counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        part.start([token_ids(1, n)])
    return int(counter.get_total_flops())


def growth(subject: Subject) -> dict[str, object]:
    """The fitted exponent of counted FLOPs; ``exponent`` is None where nothing is counted."""
    reads = subject.seat == "inference"
    lengths = READ if reads else LENGTHS
    counts = [(count_reading if reads else count)(subject, n) for n in lengths]
    exponent = fit_exponent(lengths, counts, octaves=3.0)
    return {
        "lengths": list(lengths),
        "flops": counts,
        "exponent": None if exponent is None else round(exponent, 3),
        "declared": subject.card.cost,
    }


def last_octave(found: dict[str, object]) -> float | None:
    """The exponent between the two longest lengths of :func:`growth`, where terms of lower order have faded most."""
    counts = found["flops"]
    assert isinstance(counts, list)
    return math.log2(counts[-1] / counts[-2]) if counts[-2] else None


def kept(subject: Subject, n: int) -> int:
    """Bytes that one forward pass of one sequence of n tokens keeps for backward, in float32 on a CPU."""
    built = at_length(subject, n)
    x = torch.randn(1, n, built.dim, generator=torch.Generator().manual_seed(1))
    return saved_bytes(Called(built, built.make(dtype=torch.float32, disturbed=False)), x.requires_grad_())


def growth_kept(subject: Subject) -> float:
    """The exponent of the bytes kept for backward over the last octave of ``KEPT``; 0 where none are kept.

    Where n^2 is declared, what is linear in n is taken off first, f(2n) - 2 f(n), because it fades slowly; of a part
    that keeps no more than that nothing is left, and its own exponent is given.
    """
    counts = [kept(subject, n) for n in KEPT]
    if (subject.card.memory or subject.card.cost) == "n^2":
        rest = [more - 2 * less for less, more in pairwise(counts)]
        counts = rest if min(rest) > 0.1 * counts[1] else counts
    return math.log2(counts[-1] / counts[-2]) if counts[-2] else 0.0


def declared_flops(subject: Subject, n: int) -> float:
    """The card's FLOPs of one sequence of n tokens."""
    return formula(subject, subject.card.flops, n)


def formula(subject: Subject, text: str, n: int) -> float:
    """One of the card's formulas at n tokens.

    Raises:
        ValueError: the formula uses a name that is neither n, d, h nor an argument of the constructor.
    """
    names: dict[str, object] = {
        name: parameter.default
        for name, parameter in inspect.signature(subject.cls).parameters.items()
        if parameter.default is not parameter.empty
    }
    names |= dict(subject.example)
    names |= {
        "n": n,
        "m": n,
        "d": subject.dim,
        "h": subject.heads,
        "log2": math.log2,
        "ceil": math.ceil,
        "min": min,
        "max": max,
        "sum": sum,
        "len": len,
        "round": round,
        "isinstance": isinstance,
        "int": int,
    }
    try:
        # as globals, so that a lambda in the formula sees them too
        return float(eval(text, {"__builtins__": {}, **names}))
    except NameError as error:
        raise ValueError(f"card {subject.card.id}: formula {text!r}: {error}") from error
