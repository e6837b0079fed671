"""What a comparison shows while it runs: a table that fills row by row, or plain lines where there is no terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tevo.bench.compare import Plan, Status
from tevo.bench.subjects import BASELINE
from tevo.bench.training import make_task
from tevo.training.progress import duration

__all__ = ["Screen"]


class Screen:
    """Use as a context manager around the run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.console = Console(file=sys.stderr)
        self._live: Live | None = None
        self._told: set[tuple[str, str, int]] = set()
        self._began = time.perf_counter()
        self._measured = ""

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, now: Sequence[Status]) -> None:
        """The cells' state of this moment."""
        if self._live is not None:
            self._live.update(self._table(now), refresh=True)
            return
        ended = [s for s in now if s.word in ("done", "failed")]
        for status in ended:
            key = (status.task, status.part, status.seed)
            if key not in self._told:
                self._told.add(key)
                said = f"{status.score:.4f}" if status.score is not None else f"failed: {status.error}"
                self.console.print(
                    f"{len(self._told)}/{len(now)} {status.task} {status.part} seed {status.seed}: {said}",
                    highlight=False,
                )

    def measured(self, count: int, expected: int) -> None:
        """How many measurements of cost are there."""
        text = f"time and memory against length: {count} of {expected} measurements"
        if self._live is not None:
            self._live.update(text, refresh=True)
        elif count == expected or count % max(1, expected // 4) == 0:
            self.console.print(text, highlight=False)

    def _table(self, now: Sequence[Status]) -> Table:
        done = sum(s.share for s in now)
        spent = duration(time.perf_counter() - self._began)
        table = Table(title=f"{done:.1f} of {len(now)} trainings after {spent}; Ctrl-C keeps what is finished")
        table.add_column("part")
        tasks = {name: make_task(json.dumps(options, sort_keys=True)) for name, options in self.plan.tasks.items()}
        for task, made in tasks.items():
            arrow = "higher" if made.higher_is_better else "lower"
            table.add_column(f"{task}: {made.metric.replace('_', ' ')} ({arrow} is better)", justify="right")
        for part in self.plan.request.everyone():
            cells = []
            for task in tasks:
                own = [s for s in now if s.part == part and s.task == task]
                scores = [s.score for s in own if s.score is not None]
                mean = f"{sum(scores) / len(scores):.3f}" if scores else "-"
                running = [s for s in own if s.word == "running"]
                note = f" {len(scores)}/{len(own)} seeds"
                note += "".join(f" {s.share:.0%}" for s in running)
                note += " failed" * any(s.word == "failed" for s in own)
                cells.append(mean + note)
            table.add_row(part, *cells, style="bold" if part == BASELINE else None)
        trivial = {task: {**made.baselines, "chance": made.chance} for task, made in tasks.items()}
        for name in dict.fromkeys(name for row in trivial.values() for name in row):
            values = [row.get(name) for row in trivial.values()]
            table.add_row(name, *("" if v is None else f"{v:.3f}" for v in values), style="dim")
        return table
