"""The report of a comparison: one HTML file with inline pictures, no script, nothing fetched.

It is made from the stored results alone, so that it can be made again.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tevo.bench.verdicts import BETTER, UNDECIDED, WORSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SCHEMA", "check", "headline", "render"]

Results = Mapping[str, Any]
SCHEMA = 1

# Okabe and Ito's colours, told apart by colour-blind readers too, with wine and olive in place of the yellow that fades
# on white; the baseline is black
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
_LINES = ("-", "--", "-.", ":")


def check() -> None:
    """Refuse in time where the packages for reports are missing.

    Raises:
        ValueError: which is missing and how to get it.
    """
    try:
        import jinja2  # noqa: F401
        import latex2mathml.converter  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"a report needs the package {error.name}; pip install 'tevo[report]'") from error


def render(results: Results) -> str:
    """The report as HTML.

    Raises:
        ValueError: packages are missing, or the results are of another version.
    """
    check()
    import jinja2
    from markupsafe import Markup

    if results.get("schema") != SCHEMA:
        raise ValueError(
            f"these results have schema version {results.get('schema')!r}, this version of tevo reads {SCHEMA}; "
            "run the comparison again"
        )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "number": _number,
        "power": _power,
        "size": _size,
        "crossing": _crossing,
        "words": lambda text: text.replace("_", " "),
    }
    styles = _styles(results)
    drawings = {
        "quality": (_draw_quality, 1.6 + 0.34 * len(results["parts"])),
        "loss": (_draw_loss, 3.6),
        "trade": (_draw_trade, 3.6),
    }
    pictures = {
        task: {
            name: Markup(_svg(partial(draw, results=results, task=task, styles=styles), f"{task} {name}", 7.6, height))
            for name, (draw, height) in drawings.items()
        }
        for task in results["tasks"]
    }
    template = environment.from_string(Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        **results,
        headline=headline(results),
        pictures=pictures,
        cost_picture=Markup(_svg(partial(_draw_cost, results=results, styles=styles), "cost", 9.6, 4.0)),
        equations={
            part["name"]: [Markup(_mathml(text)) for text in part["card"]["equations"]]
            for part in results["parts"]
            if part["card"]
        },
        recipes_text={name: json.dumps(recipe, indent=1) for name, recipe in results["recipes"].items()},
        facts_text={name: json.dumps(task["facts"], indent=1) for name, task in results["tasks"].items()},
        longest=results["lengths"][-1],
    )


def headline(results: Results) -> list[str]:
    """Which is better, at what cost: one sentence for each task, one for cost."""
    baseline = results["baseline"]
    found = []
    for name, task in results["tasks"].items():
        metric = task["metric"].replace("_", " ")
        rows = {part["name"]: part["tasks"][name] for part in results["parts"]}
        base = rows[baseline]["mean"]
        if base is None:
            found.append(f"{name}: {baseline} gave no score, so that nothing can be judged.")
            continue
        sets = {
            word: [(part, row["mean"]) for part, row in rows.items() if row["verdict"] == word]
            for word in (BETTER, WORSE, UNDECIDED)
        }
        said = []
        for word, text in ((BETTER, "better than"), (WORSE, "worse than"), (UNDECIDED, "not told apart from")):
            if sets[word]:
                ordered = sorted(sets[word], key=lambda row: row[1], reverse=task["higher_is_better"])
                names = _and([f"{part} ({_score(mean)})" for part, mean in ordered])
                said.append(f"{names} {'is' if len(ordered) == 1 else 'are'} {text} {baseline}")
        failed = [part for part, row in rows.items() if row["mean"] is None]
        if failed:
            said.append(f"{_and(failed)} gave no score")
        found.append(
            f"{name}, {metric} after {task['tokens']:,} tokens: {baseline} reaches {_score(base)}; "
            f"{'; '.join(said) or 'nothing else was compared'}."
        )
    found.append(_cost_sentence(results))
    return [text for text in found if text]


def _cost_sentence(results: Results) -> str:
    """What the longest length costs, against the baseline."""
    longest = results["lengths"][-1]
    base = next(part for part in results["parts"] if part["name"] == results["baseline"])
    theirs = base["cost"]["curves"]["train_s"][-1]
    gains = []
    for part in results["parts"]:
        ours = part["cost"]["curves"]["train_s"][-1]
        # less than 5 % is no gain to speak of
        if part is not base and ours and theirs and 1.05 * ours < theirs:
            crossing = part["cost"]["crossing"]["train_s"]
            where = (
                "ahead at every length measured"
                if crossing["from_start"]
                else f"ahead from {crossing['length']:,.0f} tokens on"
            )
            gains.append((theirs / ours, f"{part['name']} ({theirs / ours:.1f} times, {where})"))
    if not theirs:
        return ""
    if not gains:
        return f"Cost: at {longest:,} tokens no part trains faster than {base['name']} by 5 % or more."
    listed = _and([text for _, text in sorted(gains, reverse=True)])
    return f"Cost: at {longest:,} tokens these train faster than {base['name']}: {listed}."


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _score(value: float) -> str:
    return f"{value:.3f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _power(value: float | None) -> str:
    return "–" if value is None else f"n^{value:.2f}"


def _size(value: float | None) -> str:
    """Bytes for a person."""
    if value is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return ""


def _crossing(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    if value["length"] is None:
        return "not reached"
    return f"{'≤ ' if value['from_start'] else ''}{value['length']:,.0f}"


def _mathml(latex: str) -> str:
    """MathML, or the LaTeX itself where it cannot be converted."""
    from html import escape

    from latex2mathml.converter import convert

    try:
        converted: str = convert(latex, display="block")
    except Exception:  # the converter raises many kinds; the source is still readable
        return f"<code>{escape(latex)}</code>"
    return converted


Style = dict[str, Any]


def _styles(results: Results) -> dict[str, Style]:
    """Part -> colour, marker and line; the baseline black and drawn on top."""
    found: dict[str, Style] = {}
    others = 0
    for part in results["parts"]:
        if part["name"] == results["baseline"]:
            found[part["name"]] = {"color": "#000000", "marker": "o", "linestyle": "-", "linewidth": 2.2, "zorder": 5}
            continue
        found[part["name"]] = {
            "color": _COLOURS[others % len(_COLOURS)],
            "marker": _MARKERS[others % len(_MARKERS)],
            "linestyle": _LINES[others // len(_COLOURS) % len(_LINES)],
            "linewidth": 1.5,
            "zorder": 3,
        }
        others += 1
    return found


def _svg(draw: Callable[[Figure], None], name: str, width: float, height: float) -> str:
    """A drawing as an SVG element to be put into a page."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        # names of clip paths must differ between the pictures of one page, and be the same in every run
        "svg.hashsalt": name,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # the page gives the width
    opening, rest = text.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", opening) + ">" + rest


def _draw_quality(figure: Figure, results: Results, task: str, styles: Mapping[str, Style]) -> None:
    """Mean scores with their intervals, single seeds, and the lines of trivial models."""
    facts = results["tasks"][task]
    axes: Axes = figure.subplots()
    rows = [(part["name"], part["tasks"][task]) for part in results["parts"]]
    rows = [row for row in rows if row[1]["mean"] is not None]
    rows.sort(key=lambda row: row[1]["mean"], reverse=facts["higher_is_better"])
    for y, (name, row) in enumerate(rows):
        seeds = [seed["score"] for seed in row["seeds"] if "score" in seed]
        colour = styles[name]["color"]
        axes.plot(seeds, [y] * len(seeds), "|", color=colour, markersize=8, alpha=0.6)
        axes.errorbar(
            row["mean"], y, xerr=row["interval"] or 0, fmt=styles[name]["marker"], color=colour, capsize=3, markersize=5
        )
    base = next((row for name, row in rows if name == results["baseline"]), None)
    if base is not None and base["interval"]:
        axes.axvspan(base["mean"] - base["interval"], base["mean"] + base["interval"], color="#000000", alpha=0.08)
    shown = [row["mean"] for _, row in rows]
    reach = 1.5 * (max(shown) - min(shown)) if len(shown) > 1 else 1.0
    for label, value in {**facts["baselines"], "chance": facts["chance"]}.items():
        # a line far off would squeeze everything else; the table has it in any case
        if shown and not min(shown) - reach <= value <= max(shown) + reach:
            continue
        axes.axvline(value, color="#777777", linestyle=":", linewidth=1.2)
        axes.text(
            value,
            1.01,
            f"{label} {value:.2f}",
            color="#555555",
            fontsize=8,
            rotation=20,
            transform=axes.get_xaxis_transform(),
        )
    if facts["metric"] == "accuracy":
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -0.02), min(high, 1.02))
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    better = "higher" if facts["higher_is_better"] else "lower"
    axes.set_xlabel(f"{facts['metric'].replace('_', ' ')} on held-out data ({better} is better)")
    axes.grid(axis="y", visible=False)


def _draw_loss(figure: Figure, results: Results, task: str, styles: Mapping[str, Style]) -> None:
    """Training loss against tokens: the mean of the seeds, their range as a band."""
    axes: Axes = figure.subplots()
    facts = results["tasks"][task]
    per_step = facts["tokens"] / facts["training"]["steps"]
    ends: list[float] = []
    starts: list[float] = []
    for part in results["parts"]:
        curves = [seed["curve"] for seed in part["tasks"][task]["seeds"] if seed.get("curve")]
        if not curves:
            continue
        least = min(len(curve) for curve in curves)
        at = [point[0] * per_step for point in curves[0][:least]]
        columns = [[curve[i][1] for curve in curves] for i in range(least)]
        style = styles[part["name"]]
        line = {k: v for k, v in style.items() if k != "marker"}
        axes.plot(at, [sum(c) / len(c) for c in columns], label=part["name"], **line)
        if len(curves) > 1:
            axes.fill_between(
                at, [min(c) for c in columns], [max(c) for c in columns], color=style["color"], alpha=0.15
            )
        ends.append(min(min(c) for c in columns))
        starts.append(max(columns[min(2, least - 1)]))
    if ends:
        # the first steps fall from far above; what differs is below
        margin = 0.05 * (max(starts) - min(ends) or 1)
        axes.set_ylim(min(ends) - margin, max(starts) + margin)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("training loss (bits per scored token)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _legend(figure)


def _draw_trade(figure: Figure, results: Results, task: str, styles: Mapping[str, Style]) -> None:
    """Score against the training time of one token, measured at the length nearest to the trained one."""
    axes: Axes = figure.subplots()
    facts = results["tasks"][task]
    length = facts["facts"].get("length", results["lengths"][0])
    index = min(range(len(results["lengths"])), key=lambda i: abs(results["lengths"][i] - length))
    at = results["lengths"][index]
    for part in results["parts"]:
        row, seconds = part["tasks"][task], part["cost"]["curves"]["train_s"][index]
        if row["mean"] is None or seconds is None:
            continue
        style = styles[part["name"]]
        axes.errorbar(
            seconds / at * 1e6,
            row["mean"],
            yerr=row["interval"] or 0,
            fmt=style["marker"],
            color=style["color"],
            capsize=3,
            label=part["name"],
        )
    axes.set_xscale("log")
    _plain_logarithm(axes, "x")
    axes.set_xlabel(f"training time of one block, µs per token at {at:,} tokens (left is cheaper)")
    better = "up" if facts["higher_is_better"] else "down"
    axes.set_ylabel(f"{facts['metric'].replace('_', ' ')} ({better} is better)")
    if facts["metric"] == "accuracy":
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
    _legend(figure)


def _draw_cost(figure: Figure, results: Results, styles: Mapping[str, Style]) -> None:
    """Training tokens per second, and peak memory, against length."""
    left, right = figure.subplots(1, 2)
    lengths = results["lengths"]
    for part in results["parts"]:
        curves, growth = part["cost"]["curves"], part["cost"]["growth"]
        style = styles[part["name"]]
        speed = [(n, n / s) for n, s in zip(lengths, curves["train_s"], strict=True) if s]
        memory = [(n, b / 2**20) for n, b in zip(lengths, curves["train_bytes"], strict=True) if b]
        if speed:
            label = part["name"] + (f"  time ~ n^{growth['train_s']:.2f}" if growth["train_s"] is not None else "")
            left.plot(*zip(*speed, strict=True), label=label, markersize=4, **style)
        if memory:
            right.plot(*zip(*memory, strict=True), markersize=4, **style)
    for axes, label in ((left, "training tokens per second"), (right, "peak memory of a training pass (MiB)")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.set_xlabel("sequence length (tokens)")
        axes.set_ylabel(label)
        _plain_logarithm(axes, "y")
    _legend(figure)


def _plain_logarithm(axes: Axes, which: str) -> None:
    """Plain numbers, at 1, 2 and 5, on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if low > 0 else 1
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
