"""Observation without return flags.

``tap("attention", a)`` returns ``a``; inside ``with record() as seen:`` it is also collected under its name.
A module-global stack is used because torch.compile traces it without a graph break, which a ContextVar does not allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

Seen = dict[str, list[Tensor]]

_open: list[Seen] = []


def tap(name: str, value: Tensor) -> Tensor:
    """Return ``value`` unchanged, and show it to every open :func:`record`."""
    for seen in _open:
        seen.setdefault(name, []).append(value)
    return value


def watched() -> bool:
    """Whether anybody would see a tap: for values that are made only to be seen."""
    return bool(_open)


@contextmanager
def record() -> Iterator[Seen]:
    """Collect what is tapped inside: name -> tensors in order of appearance."""
    seen: Seen = {}
    _open.append(seen)
    try:
        yield seen
    finally:
        _close(seen)


@contextmanager
def sealed() -> Iterator[Seen]:
    """As :func:`record`, but what is tapped inside does not reach the records opened outside.

    For code that may run twice (activation checkpointing): return what was seen and tap it again outside.
    """
    outside = _open[:]
    _open.clear()
    try:
        with record() as seen:
            yield seen
    finally:
        _open[:] = outside


def _close(seen: Seen) -> None:
    # by identity: two open records may hold equal dictionaries
    for i in range(len(_open) - 1, -1, -1):
        if _open[i] is seen:
            del _open[i]
            return
