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


@contextmanager
def record() -> Iterator[Seen]:
    """Collect what is tapped inside: name -> tensors in order of appearance."""
    seen: Seen = {}
    _open.append(seen)
    try:
        yield seen
    finally:
        _close(seen)


def _close(seen: Seen) -> None:
    # by identity: two open records may hold equal dictionaries
    for i in range(len(_open) - 1, -1, -1):
        if _open[i] is seen:
            del _open[i]
            return
