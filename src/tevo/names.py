"""Names that were nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["suggest"]


def suggest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` or nothing: a name one edit away if there is one, else the most similar."""
    names = list(known)
    near = difflib.get_close_matches(name, [k for k in names if _one_edit(name, k)] or names, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _one_edit(a: str, b: str) -> bool:
    """Whether one letter added, left out or changed, or two neighbours exchanged, make ``b`` of ``a``."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])
