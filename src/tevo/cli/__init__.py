"""The command line: one file a verb. Each has ``HELP`` (one line), ``EXAMPLES`` (two) and ``main(argv) -> int``."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path


def verbs() -> list[str]:
    """The verbs: the files of this folder."""
    return sorted(p.stem for p in Path(__file__).resolve().parent.glob("[a-z]*.py"))


def _help() -> str:
    lines = [
        "tevo: the Transformer, taken apart.",
        "",
        "  tevo list --where causal,linear",
        "  tevo compare softmax linear_attention delta_net --report out.html",
        "",
        "verbs:",
    ]
    for verb in verbs():
        lines.append(f"  {verb:<10} {importlib.import_module(f'tevo.cli.{verb}').HELP}")
    lines += ["", "`tevo VERB --help` tells more. `--debug` shows a traceback in place of an error's one sentence."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a verb; 0 well, 1 a check or comparison failed, 2 a user's mistake, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
            return 0
        if argv[0] in ("-V", "--version"):
            from tevo import __version__

            print(f"tevo {__version__}")
            return 0
        if argv[0] not in verbs():
            from tevo.catalogue.rows import suggest

            raise ValueError(f"unknown verb {argv[0]!r}{suggest(argv[0], verbs())}; see `tevo --help`")
        code: int = importlib.import_module(f"tevo.cli.{argv[0]}").main(argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader (head, a pager) has seen enough; keep Python from complaining when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
