"""``tevo demo``: the one-minute demonstration, and the training of its model."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tevo.cli._flags import describe, option, parse

if TYPE_CHECKING:
    from tevo.slot_attention.recipes import SlotRecipe

HELP = "see Slot Attention or CoLT5 at work within a minute, or train the model of slots"
EXAMPLES = ("tevo demo slots --train --seed 1", 'tevo demo colt5 --text module.py --question "signature of main?"')


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of ``tevo demo slots``."""

    out: str = option("slots.html", "the page")
    run: str | None = option(None, "a run of yours; default: the one that tevo ships")
    train: bool = option(False, "train the demonstration's model, in --run, and end with its FG-ARI")
    seed: int = option(0, "of --train")
    no_cost: bool = option(False, "do not measure time and memory")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Flags of ``tevo demo colt5``."""

    out: str = option("colt5.html", "the page")
    text: str | None = option(None, "a file of yours; default: a held-out text, about 16 KB")
    question: str | None = option(None, "about the text, in the words of the model's task")
    run: str | None = option(None, "a run of yours; default: the one that tevo ships")
    static_run: str | None = option(None, "a run with static routing, to switch to; default: the shipped one")
    no_cost: bool = option(False, "do not measure time and memory")


def main(argv: list[str]) -> int:
    """Run the verb."""
    if not argv or "-h" in argv or "--help" in argv:
        programs = ["slots:", describe(Options), "", "colt5:", describe(ReadingOptions)]
        print("\n".join([*EXAMPLES, "", *programs]))
        return 0
    program, *flags = argv
    if program == "colt5":
        return _read(parse(ReadingOptions, flags, verb="demo"))
    if program != "slots":
        raise ValueError(
            f"tevo demo has nothing to show of {program!r}; expected slots or colt5, as in `{EXAMPLES[0]}`"
        )
    options = parse(Options, flags, verb="demo")
    _check_out(options.out)
    return _train(options) if options.train else _show(options)


def _check_out(out: str) -> None:
    """Say before the work, not after it, that no page could be written."""
    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"--out {out}: the folder {Path(out).absolute().parent} does not exist")


def _read(options: ReadingOptions) -> int:
    began = time.perf_counter()
    _check_out(options.out)
    import torch

    from tevo.colt5 import cost, demo

    learned = Path(options.run) if options.run else demo.SHIPPED / "learned"
    if not (learned / "recipe.json").is_file():
        where = f"{learned} is not a run" if options.run else "this copy of tevo ships no weights of CoLT5"
        raise ValueError(
            f"{where}: it has no recipe.json; train a model with `tevo train colt5 --preset demo`, then give --run RUN"
        )
    static: Path | None = None
    if options.static_run:
        static = Path(options.static_run)
    elif not options.run and (demo.SHIPPED / "static" / "recipe.json").is_file():
        static = demo.SHIPPED / "static"
    text = None if options.text is None else Path(options.text).read_bytes().decode("utf-8", errors="replace")
    threads = min(2, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    live = None if options.no_cost else cost.measure(threads=threads, say=_say)
    sentences = demo.make_page(
        Path(options.out),
        learned=learned,
        static=static,
        text=text,
        question=options.question,
        name=options.text or "",
        record=demo.read_record(demo.SHIPPED),
        cost=live,
        began=began,
    )
    for sentence in sentences:
        print(sentence)
    print(f"page: {Path(options.out).absolute()}")
    return 0


def demo_recipe(seed: int) -> SlotRecipe:
    """The recipe of the demonstration's model."""
    from tevo.slot_attention.recipes import SlotRecipe
    from tevo.training.recipe import resolve

    return resolve(SlotRecipe, preset="demo", seed=seed)


def _show(options: Options) -> int:
    began = time.perf_counter()
    import torch

    from tevo.slot_attention import cost, demo

    folder = Path(options.run) if options.run else demo.SHIPPED
    if not (folder / "recipe.json").is_file():
        where = f"{folder} is not a run" if options.run else "this copy of tevo ships no weights"
        raise ValueError(
            f"{where}: it has no recipe.json; train a model with `tevo demo slots --train`, then give --run RUN"
        )
    threads = min(2, os.cpu_count() or 1)
    torch.set_num_threads(threads)
    live = None if options.no_cost else cost.measure(threads=threads, say=_say)
    scenes, sentences = demo.make_page(
        folder, Path(options.out), records=demo.SHIPPED, cost=live, began=began, terminal=_terminal()
    )
    print(scenes)
    for sentence in sentences:
        print(sentence)
    print(f"page: {Path(options.out).absolute()}")
    print(f"next: {EXAMPLES[0]}")
    return 0


def _train(options: Options) -> int:
    import signal

    from tevo.cli.train import run_name
    from tevo.cli.view import Options as ViewOptions
    from tevo.cli.view import show
    from tevo.slot_attention import training
    from tevo.training.progress import Console

    recipe = demo_recipe(options.seed)
    folder = Path(options.run) if options.run else Path("runs") / run_name(recipe)
    result = training.run(recipe, folder=folder, watch=Console())
    if not result.finished:
        return 130 if result.signal == signal.SIGINT else 0
    task = training.build_task(recipe)
    score = show(folder, ViewOptions())
    print(f"next: tevo demo slots --run {folder}")
    for name, value in {"chance": task.chance, **task.baselines}.items():
        print(f"{name}, on valid: {100 * value:.1f} %")
    print(f"FG-ARI {100 * score:.1f} %")
    return 0


def _terminal() -> tuple[bool, int]:
    from tevo.slot_attention.pixels import wants_colour

    return wants_colour(sys.stdout), min(shutil.get_terminal_size().columns, 120)


def _say(text: str) -> None:
    # on a terminal's one line; a log needs no progress of seconds
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\r", file=sys.stderr, flush=True)
