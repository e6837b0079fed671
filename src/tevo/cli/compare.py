"""``tevo compare``: train parts side by side and report which is better, at what cost, and from which length on."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tevo.bench.compare import Plan, Request

HELP = "train parts side by side, judge them, write a report"
EXAMPLES = (
    "tevo compare softmax linear_attention delta_net --task text,recall --budget 5m --report out.html",
    "tevo compare ./my_part.py:MyMixer softmax --data my_texts/ --budget 2m --report out.html",
)


def main(argv: list[str]) -> int:
    """Run a comparison: 0 well, 1 if a training failed, 130 if interrupted."""
    from tevo.cli._parser import Parser

    parser = Parser(
        "compare",
        "The same small language model with each part in turn; softmax attention is the baseline. Ctrl-C keeps what is "
        "finished, and the same command continues.",
        EXAMPLES,
    )
    parser.add_argument("parts", nargs="*", help="names as in `tevo list`, name(option=value), or file.py:Class")
    parser.add_argument(
        "--task", default="text", help="text, recall, selective_copy, induction ...; several: a,b [text]"
    )
    parser.add_argument("--budget", default="5m", help="time that the whole should take: 90s, 5m, 2h [5m]")
    parser.add_argument("--report", metavar="FILE", help="write one HTML file")
    parser.add_argument("--data", default="", metavar="PATH", help="text: your file or folder [the standard library]")
    parser.add_argument("--seeds", metavar="N[,M]", help="of softmax, and of the others [by budget, 5,3 at most]")
    parser.add_argument("--lengths", metavar="N,...", help="tokens at which time and memory are measured [by budget]")
    parser.add_argument("--position", default="rope", help="for parts that have a use for one; or none [rope]")
    parser.add_argument("--channel", help="channel mixer of all models [gelu]")
    parser.add_argument("--dim", type=int, metavar="N", help="width [by budget]")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="blocks [2]")
    parser.add_argument("--heads", type=int, default=4, metavar="N", help="heads [4]")
    parser.add_argument("--workers", metavar="local:N", help="processes that train at once [one for each core]")
    parser.add_argument("--folder", metavar="DIR", help="where results are kept [runs/compare-<named by the command>]")
    parser.add_argument("--from", dest="results", metavar="JSON", help="rebuild the report from stored results")
    parser.add_argument("--dry-run", action="store_true", help="show what would be run, and stop")
    parser.add_argument("--json", action="store_true", help="print results (or the plan) as JSON")
    options = parser.parse_args(argv)
    if options.report:
        _check_report(Path(options.report))
    if options.results:
        return _rebuild(Path(options.results), options.report, options.parts)
    from tevo.bench.compare import Request, folder_of

    request = Request(
        parts=tuple(options.parts),
        tasks=tuple(_words(options.task)),
        budget=seconds(options.budget),
        data=options.data,
        seeds=_seeds(options.seeds),
        lengths=None if options.lengths is None else tuple(_numbers("--lengths", options.lengths)),
        position=None if options.position == "none" else options.position,
        channel=options.channel,
        dim=options.dim,
        depth=options.depth,
        heads=options.heads,
        workers=_workers(options.workers),
    )
    folder = Path(options.folder) if options.folder else folder_of(request)
    return _compare(request, folder, argv, options.report, dry_run=options.dry_run, as_json=options.json)


def _compare(
    request: Request, folder: Path, argv: list[str], report: str | None, *, dry_run: bool, as_json: bool
) -> int:
    from tempfile import TemporaryDirectory

    from tevo.bench import compare
    from tevo.bench.cells import Grid
    from tevo.bench.live import Screen

    if dry_run:
        with TemporaryDirectory() as nowhere:
            plan = compare.make_plan(request, folder if folder.exists() else Path(nowhere), say=_say)
    else:
        plan = compare.make_plan(request, folder, say=_say)
    if dry_run and as_json:
        print(json.dumps(plan.facts(), indent=1))
        return 0
    for line in plan.describe():
        _say(line)
    for line in _models(plan):
        _say(line)
    if dry_run:
        return 0
    _say(f"results are kept in {folder}; the same command continues there")
    try:
        with Screen(plan) as screen:
            compare.run_cells(plan, folder, show=screen.show)
            cost = compare.measure_cost(plan, folder, done=screen.measured)
    except KeyboardInterrupt:
        _say(f"interrupted; finished cells are kept in {folder}, and the same command continues")
        return 130
    results = compare.collect(plan, folder, cost, command=f"tevo compare {shlex.join(argv)}")
    stored = folder / "results.json"
    stored.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(results, indent=1))
    else:
        _print_table(results)
    if report:
        _write_report(results, Path(report))
    _say(f"results: {stored}" + ("" if report else f"; a report: tevo compare --from {stored} --report report.html"))
    failed = [status for status in compare.statuses(plan, Grid(folder)) if status.word == "failed"]
    for status in failed:
        _say(
            f"failed: {status.task}, {status.part}, seed {status.seed}: {status.error}; delete {status.folder} to try again"
        )
    return 1 if failed else 0


def _rebuild(results: Path, report: str | None, parts: list[str]) -> int:
    if parts or not report:
        raise ValueError(
            "--from takes no parts, and needs --report: tevo compare --from results.json --report out.html"
        )
    _write_report(json.loads(results.read_text(encoding="utf-8")), Path(report))
    return 0


def _check_report(path: Path) -> None:
    """Say before the work, not after it, that no report could be written."""
    from tevo.bench.report import check

    check()
    if not path.parent.is_dir():
        raise ValueError(f"--report {path}: the folder {path.parent} does not exist")


def _write_report(results: dict[str, Any], path: Path) -> None:
    from tevo.bench.report import render

    path.write_text(render(results), encoding="utf-8")
    print(f"report: {path.absolute()}")


def _models(plan: Plan) -> list[str]:
    """The equal parameters, shown."""
    from tevo.bench.measure import parameters
    from tevo.bench.subjects import BASELINE, TOLERANCE

    lines = []
    for task, models in plan.models.items():
        goal = parameters(models[BASELINE].build())
        for part, model in models.items():
            count = parameters(model.build())
            width = "" if model.hidden_dim is None else f", hidden width {model.hidden_dim}"
            unequal = "" if abs(count / goal - 1) <= TOLERANCE else "  NOT EQUAL: its own parameters leave no choice"
            lines.append(f"{task}: {part}: {count:,} parameters ({count / goal - 1:+.1%}){width}{unequal}")
    return lines


def _print_table(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # a file or a pipe has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 110)
    for name, task in results["tasks"].items():
        direction = "higher" if task["higher_is_better"] else "lower"
        metric = task["metric"].replace("_", " ")
        table = Table(
            title=f"{name}: {metric}, {direction} is better, after {task['tokens']:,} tokens", title_justify="left"
        )
        for column in ("part", metric, "seeds", "minus softmax", "verdict", "faster from", "less memory from"):
            table.add_column(column, justify="left" if column in ("part", "verdict") else "right")
        for part in results["parts"]:
            row = part["tasks"][name]
            crossing = part["cost"]["crossing"] or {}
            width = "" if row["interval"] is None else f" ± {row['interval']:.3f}"
            table.add_row(
                part["name"],
                "failed" if row["mean"] is None else f"{row['mean']:.3f}{width}",
                str(sum("score" in seed for seed in row["seeds"])),
                "" if row["verdict"] is None else f"{row['difference']:+.3f}",
                _verdict(part, row, results),
                _length(crossing.get("train_s")),
                _length(crossing.get("train_bytes")),
            )
        for label, value in {**task["baselines"], "chance": task["chance"]}.items():
            table.add_row(label, f"{value:.3f}", *[""] * 5, style="dim")
        console.print(table)


def _verdict(part: dict[str, Any], row: dict[str, Any], results: dict[str, Any]) -> str:
    """One or two words; the title says the rest."""
    unequal = ", unequal" if abs(row["ratio"] - 1) > results["tolerance"] else ""
    if row["mean"] is None:
        return "failed"
    return (
        "baseline" if part["name"] == results["baseline"] else (row["verdict"] or "").partition(" at ")[0]
    ) + unequal


def _length(crossing: dict[str, Any] | None) -> str:
    if crossing is None:
        return ""
    if crossing["length"] is None:
        return "not reached"
    return "the start" if crossing["from_start"] else f"{crossing['length']:,.0f}"


def seconds(text: str) -> float:
    """``90s``, ``5m``, ``2h`` or a plain number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|)", text.strip())
    if not match:
        raise ValueError(f"--budget is {text!r}, expected a time such as 90s, 5m or 2h")
    return float(match[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[match[2]]


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError as error:
        raise ValueError(f"{name} is {text!r}, expected whole numbers with commas between") from error


def _seeds(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = _numbers("--seeds", text)
    if len(found) not in (1, 2):
        raise ValueError(f"--seeds is {text!r}, expected one number, or one for softmax and one for the others")
    return found[0], found[-1]


def _workers(text: str | None) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"local:(\d+)", text)
    if not match:
        raise ValueError(f"--workers is {text!r}, expected local:N")
    return int(match[1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
