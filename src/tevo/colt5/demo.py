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
from torch import Tensor

from tevo import pages
from tevo.colt5.inspection import TEMPLATES, choices, describe_run, heat_map, maps, pieces_of, sentences, survey
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.tasks import Modules
from tevo.colt5.training import Answerer, Curriculum, open_run, question_tokens
from tevo.slot_attention import charts

__all__ = ["SHIPPED", "Asked", "asked", "default_question", "make_page", "read_record"]

# packed runs in learned/ and static/, and record.json: all runs that they were taken from
SHIPPED = Path(__file__).with_name("shipped")

# bytes of the text that is shown where none is given, about
_TEXT = 16384
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


def default_question(task: Curriculum) -> tuple[str, str, str]:
    """A held-out text, about 16 KB of it where it is a module, a question about it, and the right answer."""
    last = task.last
    if not isinstance(last, Modules):
        rows = last.batch("test", 0, 0, 1)
        asks = last.oracle(rows["inputs"], rows["targets"]).question[0].nonzero()[-1, 0] + 1
        inputs = rows["inputs"][0]
        return last.text(inputs[int(asks) :]), last.text(inputs[: int(asks)]), last.text(rows["targets"][0])
    items = last.items("test")
    # the module whose length is nearest, and of its questions one from the middle of the text
    source = min((source for source, _ in items), key=lambda source: abs(len(source) - _TEXT))
    own = sorted((item for other, item in items if other is source), key=lambda item: item.begin)
    item = own[len(own) // 2]
    shown = source if item.put is None else source[: item.begin] + item.put + source[item.end :]
    return shown.decode("utf-8", errors="replace"), item.question.decode(), item.answer.decode()


def asked(model: Answerer, task: Curriculum, *, question: str, text: str, right: str | None) -> Asked:
    """The answer to a question about a text, and what was routed for it.

    Args:
        model: in evaluation mode.
        task: says how text becomes tokens.
        question: in the words of the task.
        text: as long as memory allows.
        right: the right answer, if it is known.
    """
    tokens = question_tokens(task.last, question, text)
    began = time.perf_counter()
    given = task.last.text(model.answer(tokens, most=_LONGEST)[0])
    seconds = time.perf_counter() - began
    drawn: list[dict[str, str]] = []
    if model.share is not None:
        drawn = maps(pieces_of(task.last, tokens[0]), choices(model, tokens).weights[:, :, 0])
    return Asked(question, right, given, seconds, drawn, tokens.shape[1])


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
    own_text, own_question, right = default_question(task)
    if text is not None and question is None:
        raise ValueError(f"--text needs a --question about it, such as {own_question!r}")
    main = asked(
        model,
        task,
        question=question or own_question,
        text=own_text if text is None else text,
        right=right if text is None and question is None else None,
    )
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
    rows = task.batch("test", 0, 0, _QUESTIONS)
    oracle = task.last.oracle(rows["inputs"], rows["targets"])
    both = {}
    for name, one in (("learned", model), ("static", other)):
        answers = one.answer(rows["inputs"], most=task.answer_length)
        weights = None if one.share is None else choices(one, rows["inputs"]).weights
        both[name] = (answers, weights)
    found = []
    for i, inputs in enumerate(rows["inputs"]):
        pieces = pieces_of(task.last, inputs)
        marked = oracle.answer[i] if bool(oracle.answer[i].any()) else oracle.evidence[i]
        right = task.last.text(rows["targets"][i])
        sides = []
        for name, (answers, weights) in both.items():
            given = task.last.text(answers[i])
            side_maps = [] if weights is None else _layers(pieces, weights[:, :, i].mean(1), marked)
            sides.append({"name": name, "given": given, "right": given == right, "maps": side_maps})
        asks = zip(pieces, oracle.question[i].tolist(), strict=True)
        found.append({"question": "".join(piece for piece, asks_it in asks if asks_it), "right": right, "sides": sides})
    return found


def _layers(pieces: list[str], weights: Tensor, marked: Tensor) -> list[dict[str, str]]:
    return [{"name": f"layer {i + 1}", "html": heat_map(pieces, w, marked)} for i, w in enumerate(weights)]


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
                f"{live['forms'][name][what] * scale:,.3g} {unit}, {live['forms'][name][what] / ours:.1f} x",
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
        each = [cell["curves"]["valid_exact_match"] for cell in kept if cell["routing"] == name]
        steps = [step for step, _ in each[0]]
        series[name] = [(step, sum(curve[i][1] for curve in each) / len(each)) for i, step in enumerate(steps)]
    lines = {name: 100 * value for name, value in {"chance": kept[0]["chance"], **kept[0]["baselines"]}.items()}
    return {
        "rows": kept[0]["rows"],
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
