"""Tasks: token sequences whose score says what a mixer can do.

``task("recall", length=64)`` makes one by name. A task is immutable, and its batches are a pure function of
(split, seed, index, size), so that a run resumes from its step alone and every rank can make any rows of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from tevo.bench.tasks.contract import HELD_OUT, IGNORED, Task
from tevo.bench.tasks.induction import Induction, RepeatedBigram
from tevo.bench.tasks.recall import Recall
from tevo.bench.tasks.selective_copy import SelectiveCopy
from tevo.bench.tasks.text import Text
from tevo.names import suggest

__all__ = [
    "HELD_OUT",
    "IGNORED",
    "TASKS",
    "Induction",
    "Recall",
    "RepeatedBigram",
    "SelectiveCopy",
    "Task",
    "Text",
    "task",
]

TASKS: dict[str, Callable[..., Task]] = {
    kind.name: kind for kind in (Text, Recall, SelectiveCopy, Induction, RepeatedBigram)
}


def task(name: str, **options: object) -> Task:
    """The task of that name, built with the options of its class.

    Raises:
        ValueError: no such task or option, or an option's value that cannot be.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{suggest(name, TASKS)}; the tasks are {', '.join(TASKS)}")
    known = inspect.signature(TASKS[name]).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"task {name!r} has no option {option!r}{suggest(option, known)}; its options are {', '.join(known)}"
            )
    return TASKS[name](**options)
