"""The page of ``tevo demo colt5``: a trained model reads a long text and answers, and what it routes is seen.

Everything shown is computed when the page is made or read from a record that names the command it came from; what is missing
is said to be missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tevo import charts, pages
from tevo.colt5.answerer import Answerer
from tevo.colt5.inspection import TEMPLATES, choices, describe_run, heat_map, maps, sentences, survey
from tevo.colt5.reading import Reading, held_out, long_text, read
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.training import Curriculum, open_run

__all__ = ["SHIPPED", "Asked", "asked", "make_page", "read_record"]

# packed runs in learned/ and static/, and record.json: all runs that they were taken from
SHIPPED = Path(__file__).with_name("shipped")

_QUESTIONS = 5
_LONGEST = 64  # tokens of an answer


class Asked(NamedTuple):
    """A question and what became of it; ``right`` is None where nobody knows."""

    question: str
    right: str | None
    given: str
    seconds: float
    maps: list[dict[str, str]]  # as of tevo.colt5.inspection.maps; none where nothing is routed
    tokens: int


def asked(model: Answerer, reading: Reading) -> Asked:
    """The answer of a model in evaluation mode, and what was routed for it."""
    began = time.perf_counter()
    given = reading.say(model.answer(reading.tokens, most=_LONGEST)[0])
    seconds = time.perf_counter() - began
    drawn: list[dict[str, str]] = []
    if model.share is not None:
        drawn = maps(reading.pieces, choices(model, reading.tokens).weights[:, :, 0])
    return Asked(reading.question, reading.right, given, seconds, drawn, reading.tokens.shape[1])


def make_page(
    target: Path,
    *,
    learned: Path,
    static: Path | None,
    text: str | None,
    question: str | None,
    name: str,
    record: Mapping[str, Any] | None,
    cost: Mapping[str, Any] | None,
    began: float,
) -> list[str]:
    """Write the page.

    Args:
        target: the HTML file.
        learned: a run, packed or not.
        static: one with static routing, to switch to; None: there is none.
        text: the user's own, or None for a held-out one.
        question: about that text; None: the one that is known with the held-out text.
        name: of the text, where it is the user's.
        record: of all runs, as benchmarks/colt5_routing.py stores it, or None.
        cost: live measurements as :func:`tevo.colt5.cost.measure` gives them, or None.
        began: time.perf_counter() at the start, for the seconds that the page states.

    Returns:
        sentences on what was found and what is missing.
    """
    recipe, task, model, step = open_run(learned)
    if text is not None and question is None:
        raise ValueError(f"--text needs a --question about it, such as {long_text(task.last, 'test')[1]!r}")
    own_text, own_question, right = long_text(task.last, "test") if text is None else (text, "", None)
    reading = read(task.last, question or own_question, own_text)
    main = asked(model, reading if question else reading._replace(right=right))
    others = None if static is None else open_run(static)
    if others is not None and others[1].facts != task.facts:
        raise ValueError(f"{static} was trained on another task than {learned}; give two runs of one task")
    switch = _switch(model, task, None if others is None else others[2])
    found = None if model.share is None else survey(model, task, split="test", rows=32)
    said = [_answer_said(main)]
    if switch:
        said.append(_switch_said(switch))
    if found is not None:
        said += sentences(found)[:1]
    page = pages.render(
        "demo.html.j2",
        folder=TEMPLATES,
        facts=describe_run(recipe, step),
        run="the weights that tevo ships" if learned.parent == SHIPPED else str(learned),
        said=said,
        main=main,
        name=name if text is not None else "a held-out text of the task",
        share=model.share,
        switch=switch,
        found=found,
        cost=_cost(cost),
        record=_record(record, recipe),
        recipe=recipe.to_json(),
        seconds=time.perf_counter() - began,
        torch_version=torch.__version__,
        threads=torch.get_num_threads(),
    )
    target.write_text(page, encoding="utf-8")
    if others is None:
        said.append("not on the page: static routing, since there is no run of it; give one as --static-run")
    if record is None:
        said.append(
            "not on the page: exact match of every seed, since there is no record; python -m benchmarks.colt5_routing makes it"
        )
    return said


def _answer_said(main: Asked) -> str:
    known = "" if main.right is None else " (right)" if main.given == main.right else f" (right would be: {main.right})"
    return f"{main.tokens:,} tokens read and answered in {main.seconds:.1f} s: {main.question} {main.given}{known}"


def _switch(model: Answerer, task: Curriculum, other: Answerer | None) -> list[dict[str, Any]]:
    """Held-out questions, each answered by learned routing and by static."""
    if other is None:
        return []
    found = []
    for one in held_out(task, "test", _QUESTIONS):
        sides = []
        for name, side in (("learned", model), ("static", other)):
            given = one.say(side.answer(one.tokens, most=task.answer_length)[0])
            drawn: list[dict[str, str]] = []
            if side.share is not None:
                weights = choices(side, one.tokens).weights[:, :, 0].mean(1)  # l n
                drawn = [
                    {"name": f"layer {i + 1}", "html": heat_map(one.pieces, w, one.marked)}
                    for i, w in enumerate(weights)
                ]
            sides.append({"name": name, "given": given, "right": given == one.right, "maps": drawn})
        found.append({"question": one.question, "right": one.right, "sides": sides})
    return found


def _switch_said(switch: list[dict[str, Any]]) -> str:
    counts = {
        side["name"]: sum(one["sides"][i]["right"] for one in switch) for i, side in enumerate(switch[0]["sides"])
    }
    told = ", ".join(f"{name} routing {count}" for name, count in counts.items())
    return f"Of {len(switch)} held-out questions answered right, with equally many routed tokens: {told}."


def _cost(live: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Bars of time and memory, by their ratio to ours."""
    if live is None:
        return None
    panels = []
    for what, title, unit, scale in (
        ("forward_s", "time of a pass", "ms", 1e3),
        ("forward_bytes", "extra memory of a pass", "MiB", 2**-20),
    ):
        names = [name for name, numbers in live["forms"].items() if what in numbers]
        if not names:
            continue
        ours = live["forms"][names[0]][what]
        rows = [
            charts.Bar(
                name.split(" (")[0].split(",")[0],
                live["forms"][name][what] / ours,
                f"{charts.short(live['forms'][name][what] * scale)} {unit}, {live['forms'][name][what] / ours:.1f} x",
                name == names[0],
            )
            for name in names
        ]
        panels.append({"title": title, "chart": charts.bars(rows, title=title)})
    errors = [f"{name}: {numbers['error']}" for name, numbers in live["forms"].items() if "error" in numbers]
    return {"panels": panels, "live": live, "errors": [*errors, *live["skipped"]]}


def _record(record: Mapping[str, Any] | None, recipe: CoLT5Recipe) -> dict[str, Any] | None:
    """Every seed as a dot, and the mean curve of each routing."""
    if record is None:
        return None
    kept = [cell for cell in record["cells"] if "error" not in cell and cell["recipe"]["task"] == recipe.task]
    names = list(dict.fromkeys(cell["routing"] for cell in kept))
    if not names:
        return None
    groups = [
        charts.Group(
            f"{name} ({sum(cell['routing'] == name for cell in kept)} seeds)",
            [100 * cell["exact_match"] for cell in kept if cell["routing"] == name],
            name == "learned",
        )
        for name in names
    ]
    series = {}
    for name in names:
        each = [cell["curves"]["exact_match"] for cell in kept if cell["routing"] == name]
        steps = [step for step, _ in each[0]]
        series[name] = [(step, sum(curve[i][1] for curve in each) / len(each)) for i, step in enumerate(steps)]
    lines = {name: 100 * value for name, value in {"chance": kept[0]["chance"], **kept[0]["baselines"]}.items()}
    return {
        "rows": kept[0]["rows"],
        "questions": recipe.questions if recipe.task == "code" else None,
        "command": record["command"],
        "dots": charts.dots(groups, lines=lines, title="exact match in % of every seed"),
        "curves": charts.lines(series, label="step", title="exact match over training", ours="learned"),
    }


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record beside packed runs, if there is one."""
    path = folder / "record.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
