"""What a run shows while it runs: a bar with time left on a terminal, one line every ten seconds otherwise."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

__all__ = ["Console", "Silent", "Watch", "duration"]

_SECONDS_PER_LINE = 10.0


class Watch(Protocol):
    """Told by the loop what happens; ``numbers`` are the metrics of the step just done."""

    def say(self, text: str) -> None:
        """One sentence worth a line of its own."""

    def advance(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        """Step ``step`` of ``steps`` is done."""

    def close(self) -> None:
        """Nothing more will come."""


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def advance(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Console:
    """A rich progress bar where standard output is a terminal (NO_COLOR is honoured), plain lines elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = RichConsole(highlight=False, soft_wrap=True)
        self._bar = None
        if self._console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TextColumn("time left"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("starting", total=None)
        self._first: tuple[int, float] | None = None
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """Above the bar."""
        self._console.print(text, markup=False)

    def advance(self, step: int, steps: int, numbers: Mapping[str, float]) -> None:
        """Move the bar, or print a line if the last one is ten seconds old."""
        now = time.monotonic()
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._first is None:
            self._first = (step, now)
        if self._bar is not None:
            if not self._bar.live.is_started:
                self._bar.start()
            self._bar.update(self._task, completed=step, total=steps, description=text)
        elif now - self._last_line >= _SECONDS_PER_LINE:
            self._last_line = now
            done = step - self._first[0]
            left = f"  time left {duration((now - self._first[1]) / done * (steps - step))}" if done else ""
            self._console.print(f"step {step}/{steps}  {text}{left}", markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None and self._bar.live.is_started:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Seconds in words: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
