"""``tevo list``: the catalogue as a table."""

from __future__ import annotations

import json

HELP = "list systems by name, role, claims and status"
EXAMPLES = ("tevo list --where causal,linear", "tevo list 'rw*' --role block --json")


def main(argv: list[str]) -> int:
    """Print the rows that match."""
    from tevo.catalogue.rows import list_systems
    from tevo.cli._parser import Parser

    parser = Parser("list", "List the catalogue. Only verified systems are counted.", EXAMPLES)
    parser.add_argument("pattern", nargs="?", default="*", help="part of a name, or shell wildcards")
    parser.add_argument("--role", help="mixer, channel, position, residual, normaliser, heads, block, stack ...")
    parser.add_argument("--where", default="", help="claims that must all hold, e.g. causal,linear,exact_state")
    parser.add_argument("--todo", action="store_true", help="only what is not verified yet")
    parser.add_argument("--baselines", action="store_true", help="also the baselines outside the 144")
    parser.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(argv)
    where = [word for word in options.where.split(",") if word]
    # a search by name, role or claim is for a part to use, baselines are such parts too
    searching = options.pattern != "*" or options.role is not None or bool(where)
    found = list_systems(
        options.pattern,
        role=options.role,
        where=where,
        baselines=options.baselines or (searching and not options.json),
    )
    if options.todo:
        found = [row for row in found if row.status != "verified"]
    if options.json:
        rows = []
        for row in found:
            entry: dict[str, object] = {
                "id": row.id,
                "name": row.name,
                "role": row.role,
                "section": row.section,
                "status": row.status,
                "title": row.title,
                "year": row.year,
                "link": row.link,
                "baseline": row.baseline,
                "claims": list(row.claims()),
            }
            if row.card:
                entry["parts"] = list(row.card.exports)
                entry["cost"] = row.card.cost
            rows.append(entry)
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    if not found:
        print("nothing matches; try `tevo list`")
        return 0
    width = max(len(row.id) for row in found)
    for row in found:
        cost = row.card.cost if row.card else ""
        print(f"{row.id:<{width}}  {row.role:<10}  {row.status:<8}  {cost:<7}  {row.year}  {row.name}")
    counted = [row for row in found if not row.baseline]
    verified = sum(row.status == "verified" for row in counted)
    base = len(found) - len(counted)
    print(f"\n{verified} of {len(counted)} verified" + (f", and {base} baselines" if base else ""))
    return 0
