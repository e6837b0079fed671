"""``tevo show``: everything known about one system."""

from __future__ import annotations

import ast
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tevo.catalogue.rows import Row

HELP = "equation, shapes, cost, claims, evidence, departures and source of one system"
EXAMPLES = ("tevo show delta_net", "tevo show swiglu --json")


def main(argv: list[str]) -> int:
    """Print one system."""
    from tevo.card import CLAIMS
    from tevo.catalogue.rows import find, rows
    from tevo.cli._parser import Parser

    parser = Parser("show", "Show one system.", EXAMPLES)
    parser.add_argument("id", help="id of a row, or name of a part")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    row = rows()[options.id] if options.id in rows() else find(options.id)[0]
    card, evidence = row.card, row.evidence
    if options.json:
        known: dict[str, object] = {
            "id": row.id,
            "name": row.name,
            "role": row.role,
            "section": row.section,
            "status": row.status,
            "title": row.title,
            "year": row.year,
            "link": row.link,
        }
        if card:
            known |= {
                "summary": card.summary,
                "equations": list(card.equations),
                "parts": dict(card.exports),
                "cost": card.cost,
                "flops": card.flops,
                "state": card.state,
                "parameters": card.parameters,
                "memory": card.memory,
                "claims": list(row.claims()),
                "equals": list(card.equals),
                "reduces_to": list(card.reduces_to),
                "departures": list(card.departures),
                "notes": card.notes,
                "source": str(row.path),
                "evidence": evidence,
            }
        print(json.dumps(known, indent=1, ensure_ascii=False))
        return 0
    print(f"{row.name}  [{row.id}, {row.role}, {row.status}]")
    print(f"  {row.title}, {row.year}, {row.link}")
    if card is None or row.path is None:
        print("  not implemented yet" + (f": {row.note}" if row.note else ""))
        return 0
    print(f"\n{ast.get_docstring(ast.parse(row.path.read_text(encoding='utf-8')))}\n")
    section("parts", [f"{name} -> {cls}" for name, cls in card.exports.items()])
    cost = [f"grows with the length as {card.cost} (declared)"]
    if evidence and isinstance(evidence.get("cost"), dict):
        measured: Any = evidence["cost"]
        cost.append(
            f"fitted exponent of counted FLOPs {measured['exponent']} over n = {measured['lengths']} (measured)"
        )
    if card.flops:
        cost.append(f"FLOPs of one sequence, forward: {card.flops}")
    cost.append(f"numbers kept per sequence while decoding: {card.state}" if card.state else "no decoding state")
    if card.parameters:
        cost.append(f"numbers trained: {card.parameters}")
    if card.memory:
        cost.append(f"bytes kept for backward grow with the length as {card.memory}")
    section("cost", cost)
    section("claims, each with a shared check", [f"{word}: {CLAIMS[word]}" for word in row.claims()])
    section("equals", card.equals)
    section("reduces to", card.reduces_to)
    section("departures from paper or official code", card.departures)
    section("looser tolerances", [f"{name}: {rung}, {why}" for name, (rung, why) in card.tolerances.items()])
    section("notes", [card.notes] if card.notes else [])
    section(f"evidence ({row.status})", list(evidence_lines(evidence)))
    section("citation", [citation(row)])
    section("source", [str(row.path)])
    return 0


def citation(row: Row) -> str:
    """The paper, for BibTeX."""
    where = f"eprint={{{row.arxiv}}}, archivePrefix={{arXiv}}" if row.arxiv else f"url={{{row.url}}}"
    return f"@misc{{{row.id}, title={{{row.title}}}, year={{{row.year}}}, {where}}}"


def evidence_lines(evidence: dict[str, Any] | None) -> list[str]:
    """What was compared, in words."""
    if evidence is None:
        return ["none yet"]
    oracle = evidence["oracle"]
    lines = [f"second formulation: relative RMS {oracle['relative_rms']:.1e} at most (allowed {oracle['allowed']:.0e})"]
    official = evidence["official"]
    if official:
        # an allowed difference of zero is met exactly, or the comparison had failed
        worst = max(official, key=lambda c: c["largest_difference"] / (c["allowed"] or 1.0))
        lines.append(
            f"official code: {len(official)} comparisons, the closest to its tolerance is {worst['what']} with "
            f"{worst['largest_difference']:.1e} of {worst['allowed']:.1e}"
        )
    cases = sum(check["cases"] for check in evidence["checks"].values())
    lines.append(f"{len(evidence['checks'])} checks, {cases} cases: {', '.join(evidence['checks'])}")
    lines += [f"FAILED {failure}" for failure in evidence["failures"]]
    return lines


def section(title: str, lines: list[str] | tuple[str, ...]) -> None:
    """A titled list, or nothing."""
    if lines:
        print(f"{title}:")
        for line in lines:
            print(f"  {line}")
