"""An argument parser whose help starts with examples and whose errors are one sentence with the nearest match."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from tevo.catalogue.rows import suggest


class Parser(argparse.ArgumentParser):
    """For the read commands."""

    def __init__(self, verb: str, what: str, examples: tuple[str, str]) -> None:
        super().__init__(
            prog=f"tevo {verb}",
            usage="\n  " + "\n  ".join(examples),
            description=what,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26, width=100),
        )

    def error(self, message: str) -> NoReturn:
        """Raise one sentence in place of printing the usage."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            options = [o for action in self._actions for o in action.option_strings]
            name = unknown[1].partition("=")[0]
            raise ValueError(f"{self.prog} has no option {name}{suggest(name, options)}; see `{self.prog} --help`")
        raise ValueError(f"{self.prog}: {message}; see `{self.prog} --help`")
