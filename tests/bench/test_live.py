from __future__ import annotations

import io

from rich.console import Console

from tevo.bench.compare import Status
from tevo.bench.live import Screen


def states(plan) -> list[Status]:
    names = plan.request.everyone()
    return [
        Status("recall", names[0], 0, "done", 1.0, 0.75),
        Status("recall", names[0], 1, "running", 0.4),
        Status("recall", names[1], 0, "failed", 1.0, None, "ValueError: no"),
    ]


def test_without_a_terminal_each_finished_cell_is_one_line_once(small_plan):
    out = io.StringIO()
    screen = Screen(small_plan)
    screen.console = Console(file=out, width=200)
    with screen:
        screen.show(states(small_plan))
        screen.show(states(small_plan))
        for count in range(9):
            screen.measured(count, 8)
    lines = out.getvalue().splitlines()
    assert lines[0] == "1/3 recall softmax seed 0: 0.7500"
    assert lines[1].endswith("seed 0: failed: ValueError: no")
    assert lines[-1] == "time and memory against length: 8 of 8 measurements"
    assert len(lines) == 2 + 5


def test_on_a_terminal_the_table_fills_row_by_row(small_plan):
    out = io.StringIO()
    screen = Screen(small_plan)
    screen.console = Console(file=out, width=120, force_terminal=True)
    with screen:
        screen.show(states(small_plan))
    shown = out.getvalue()
    for text in ("softmax", "0.750 1/2 seeds 40%", "failed", "chance"):
        assert text in shown, text
