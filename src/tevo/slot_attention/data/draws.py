"""Random numbers of a scene as a function of (name, seed, index) alone, on every machine and in batches of any size.

Scene ``index`` is made from raw 64-bit outputs of numpy's Philox, whose key is a hash of (name, seed) and whose counter
starts at index times the counts that a scene takes; integers and permutations are made from them by :mod:`tevo.bench`.
"""

from __future__ import annotations

import hashlib
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tevo.bench.tasks.contract import Draws, Rows

__all__ = ["Doubles", "Indices", "among", "chosen", "draws", "uniform"]

Indices: TypeAlias = npt.ArrayLike
Doubles: TypeAlias = npt.NDArray[np.float64]


def chosen(name: str, indices: Indices) -> Rows:
    """Scene numbers (b,) as int64.

    Raises:
        ValueError: not a list of integers >= 0.
    """
    given = np.asarray(indices)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or (given.size and int(given.min()) < 0):
        raise ValueError(
            f"{name}: indices of shape {given.shape} and type {given.dtype}, expected a list of integers >= 0 "
            f"such as range(64)"
        )
    return given.astype(np.int64)


def draws(name: str, seed: int, indices: Rows, count: int) -> Draws:
    """Raw numbers (b, count), row i those of scene ``indices[i]``."""
    text = f"{name} {int(seed)}"
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    # each count of Philox gives four numbers; a scene starts on a count of its own
    counts = -(-count // 4)
    # one generator for each run of consecutive scenes
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    parts = [
        np.random.Philox(key=key, counter=int(r[0]) * counts).random_raw(len(r) * counts * 4) for r in runs if len(r)
    ]
    raw = np.concatenate([np.asarray(p) for p in parts]) if parts else np.zeros(0, np.uint64)
    return raw.reshape(len(indices), counts * 4)[:, :count]


def uniform(raw: Draws) -> Doubles:
    """Numbers in (0, 1) from raw ones: the upper 53 bits, half a step up."""
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def among(raw: Draws, bounds: Rows) -> Rows:
    """Integers 0..bounds-1, each with a bound of its own, >= 1 and < 2^32."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    wide = bounds.astype(np.uint64)
    return (((raw >> half) * wide + ((raw & low) * wide >> half)) >> half).astype(np.int64)
