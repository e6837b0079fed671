"""``tevo view``: pictures of what a run's slots or routers choose."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tevo.cli._flags import describe, option, parse

HELP = "pictures of what a trained model sees (slots), or which tokens it routes (colt5)"
EXAMPLES = (
    "tevo view slots runs/scenes --num-slots 9 --iterations 7",
    "tevo view colt5 runs/lookup --out routing.html",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the verb."""

    out: str | None = option(None, "slots: folder [RUN/pictures]; colt5: page [RUN/routing.html]")
    split: Literal["valid", "test"] = option("test", "held-out split: valid or test")
    scenes: int = option(6, "slots: scenes shown, and as many of the worst; colt5: texts shown")
    num_slots: int | None = option(None, "slots: how many; default: as trained")
    iterations: int | None = option(None, "slots: rounds; default: as trained")


def main(argv: list[str]) -> int:
    """Run the verb."""
    if not argv or "-h" in argv or "--help" in argv:
        print("\n".join([*EXAMPLES, "", "  RUN                      folder that `tevo train` made", describe(Options)]))
        return 0
    program, *rest = argv
    if program not in ("slots", "colt5"):
        raise ValueError(f"tevo view has no pictures of {program!r}; expected slots or colt5, as in `{EXAMPLES[0]}`")
    if not rest or rest[0].startswith("-"):
        raise ValueError(f"tevo view {program} needs the folder of a run, as in `{EXAMPLES[program == 'colt5']}`")
    folder, *flags = rest
    options = parse(Options, flags, verb="view")
    if options.scenes < 1:
        raise ValueError(f"--scenes is {options.scenes}, expected at least 1")
    if program == "colt5":
        return _routing(Path(folder), options)
    score = show(Path(folder), options)
    print(f"FG-ARI {100 * score:.1f} % on {options.split}")
    return 0


def _routing(folder: Path, options: Options) -> int:
    for name in ("num_slots", "iterations"):
        if getattr(options, name) is not None:
            raise ValueError(f"tevo view colt5 has no use for {name}={getattr(options, name)}; leave it out")
    from tevo.colt5.inspection import make_page, sentences

    page = Path(options.out) if options.out else folder / "routing.html"
    found = make_page(folder, page, split=options.split, texts=options.scenes)
    for sentence in sentences(found):
        print(sentence)
    print(f"page: {page.absolute()}")
    return 0


def show(folder: Path, options: Options) -> float:
    """Write the pictures of a run, tell where they are, and return FG-ARI."""
    from tevo.slot_attention.demo import describe_run, open_run
    from tevo.slot_attention.pictures import view
    from tevo.slot_attention.pixels import wants_colour

    recipe, task, model, step = open_run(folder)
    found = view(
        model,
        task,
        Path(options.out) if options.out else folder / "pictures",
        title=f"Slots of {folder.name}",
        facts=describe_run(recipe, step),
        split=options.split,
        batch=recipe.batch,
        scenes=options.scenes,
        num_slots=options.num_slots,
        iterations=options.iterations,
        terminal=(wants_colour(sys.stdout), min(shutil.get_terminal_size().columns, 120)),
    )
    print(found.scenes)
    for finding in found.findings:
        print(finding)
    print(f"pictures: {found.page.absolute()}, and {len(found.files)} PNG files beside it")
    return found.fg_ari
