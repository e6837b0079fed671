"""``tevo check``: ask a part, ours or yours, whatever its claims raise."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tevo.catalogue.rows import Row
    from tevo.testing import Report

HELP = "run the shared checks on parts of the catalogue, or on one of yours"
EXAMPLES = ("tevo check ./my_part.py:MyMixer --causal", "tevo check delta_net 'rw*' --full --json")

# option -> claim word
CLAIMED = {
    "causal": "causal",
    "cross": "cross",
    "padding": "padding",
    "permutation": "equivariant",
    "exact-state": "exact_state",
    "token-wise": "token_wise",
    "shift-invariant": "shift_invariant",
    "nan-contained": "nan_contained",
}


def main(argv: list[str]) -> int:
    """Check: 0 all hold, 1 one does not, 2 a mistake."""
    from tevo.card import CLAIMS
    from tevo.cli._parser import Parser

    parser = Parser(
        "check",
        "Ask parts whatever their claims raise, in groups: A interface, B mathematics, C numerics, D systems, E declared "
        "cost, F trainability. A part of the catalogue claims what its card says; one of yours what you say here. Naming a "
        "file runs it. Exit code 1 if a check fails.",
        EXAMPLES,
    )
    parser.add_argument("parts", nargs="*", help="ids, patterns, or file.py:Class or file.py:Class(option=value)")
    parser.add_argument("--group", default="", metavar="LETTERS", help="of the checks, e.g. B or AC [ABC]")
    parser.add_argument("--full", action="store_true", help="all groups")
    parser.add_argument("--explain", action="store_true", help="what each check asks and why, and stop")
    parser.add_argument("--fresh", action="store_true", help="ours: again, even if this very source was checked before")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="ours: systems checked at a time [1]")
    parser.add_argument("--json", action="store_true", help="as JSON")
    for option, word in CLAIMED.items():
        parser.add_argument(f"--{option}", action="store_true", help=f"yours {CLAIMS[word].split(';')[0]}")
    parser.add_argument("--role", help="yours: mixer, channel, block, stack ... [found out]")
    parser.add_argument("--dim", type=int, metavar="N", help="yours: width of the tokens [found out]")
    parser.add_argument("--heads", type=int, metavar="N", help="yours: number of heads [found out]")
    options = parser.parse_args(argv)
    groups = _groups(options.group, full=options.full or (options.explain and not options.group))
    if options.explain:
        return _explain(groups)
    if not options.parts:
        raise ValueError("tevo check needs a part: an id, a pattern, or file.py:Class; see `tevo check --help`")
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}, expected at least 1")
    start = time.perf_counter()
    found = [report for part in options.parts for report in _reports(part, groups, options)]
    return _show(found, time.perf_counter() - start, as_json=options.json)


def _groups(letters: str, *, full: bool) -> str:
    from tevo.testing.checks import FAST, GROUPS

    wanted = letters.upper().replace(",", "").replace(" ", "")
    for letter in wanted:
        if letter not in GROUPS:
            raise ValueError(f"unknown group {letter!r}; groups are {', '.join(f'{k} {v}' for k, v in GROUPS.items())}")
    return "".join(GROUPS) if full else wanted or FAST


def _explain(groups: str) -> int:
    from tevo.testing import CHECKS, GROUPS

    for letter in groups:
        print(f"{letter}  {GROUPS[letter]}")
        for check in (c for c in CHECKS if c.group == letter):
            print(f"   {check.name}: {check.asks}\n      {check.why}")
    return 0


def _reports(part: str, groups: str, options: Namespace) -> list[Report]:
    """One for a part of the user's, one for each system that a name or pattern means."""
    claims = [word for option, word in CLAIMED.items() if getattr(options, option.replace("-", "_"))]
    if ".py:" in part:
        return [_of_user(part, groups, claims, options)]
    told = [f"--{option}" for option, word in CLAIMED.items() if word in claims]
    told += [f"--{name}" for name in ("role", "dim", "heads") if getattr(options, name) is not None]
    if told:
        raise ValueError(f"{told[0]} says something of a part of yours, but {part} is of the catalogue and has a card")
    rows = _rows(part)
    if options.workers == 1 or len(rows) == 1:
        return [_of_house(row, groups, options) for row in rows]
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # not forked: torch's threads do not survive that
    with ProcessPoolExecutor(options.workers, get_context("spawn"), initializer=_one_thread) as pool:
        return list(pool.map(_by_id, [row.id for row in rows], [groups] * len(rows), [options] * len(rows)))


def _one_thread() -> None:
    """Workers share the cores; two threads each would fight for them."""
    import torch

    torch.set_num_threads(1)


def _by_id(name: str, groups: str, options: Namespace) -> Report:
    from tevo.catalogue.rows import rows

    return _of_house(rows()[name], groups, options)


def _of_user(part: str, groups: str, claims: list[str], options: Namespace) -> Report:
    import inspect

    from torch import nn

    from tevo.catalogue.create import resolve
    from tevo.testing import examine, user_subject

    try:
        found = resolve(part)
    except (ValueError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{part.split('.py:')[0]}.py cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found.cls, nn.Module) or inspect.isclass(found.cls) or callable(found.cls)):
        raise ValueError(f"{part} is a {type(found.cls).__name__}, expected a class, a factory or a module")
    name = part.rpartition(":")[2].partition("(")[0]
    subject = user_subject(
        found.cls,
        role=options.role,
        name=name,
        dim=options.dim,
        heads=options.heads,
        options=found.options,
        claims=claims,
    )
    report = examine(part, [subject], groups=groups)
    report.inferred = (f"claims {', '.join(subject.card.claims)}", *subject.inferred)
    return report


def _rows(name: str) -> list[Row]:
    """The present systems that a name or pattern means."""
    from tevo.catalogue.rows import find, list_systems, rows

    if not any(c in name for c in "*?["):
        row = rows()[name] if name in rows() and rows()[name].card else find(name)[0]
        return [row]
    found = [row for row in list_systems(name, baselines=True) if row.card]
    if not found:
        raise ValueError(f"no present system matches {name!r}; see `tevo list`")
    return found


def _of_house(row: Row, groups: str, options: Namespace) -> Report:
    from tevo.testing.report import examine, recall, remember
    from tevo.testing.subject import subjects

    known = None if options.fresh else recall(row, groups)
    if known is not None:
        return known
    if not options.json:
        print(f"checking {row.id} ...", file=sys.stderr)
    report = examine(row.id, subjects(row), groups=groups)
    remember(row, groups, report)
    return report


def _show(found: list[Report], seconds: float, *, as_json: bool) -> int:
    results = [r for report in found for r in report.results.values()]
    failed = sum(bool(report.failed) for report in found)
    total = {
        "parts": len(found),
        "failed": failed,
        "cases": sum(r.cases for r in results),
        "inputs": sum(r.inputs for r in results),
        "seconds": round(seconds, 1),
    }
    if as_json:
        print(json.dumps({"total": total, "parts": [report.as_json() for report in found]}, indent=1))
        return 1 if failed else 0
    for report in found:
        again = ", as seen before of this very source" if report.stored else ""
        print(f"{report.part}: {len(report.results) - len(report.failed)} of {len(report.results)} checks hold{again}")
        for sentence in report.inferred:
            print(f"  {sentence}")
        if len(found) == 1 or report.failed:
            print(report.table())
    print(
        f"{total['parts'] - failed} of {total['parts']} parts hold: {total['cases']} cases, {total['inputs']} inputs, "
        f"{total['seconds']} s"
    )
    return 1 if failed else 0
