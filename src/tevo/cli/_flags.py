"""Flags of a verb as a dataclass: parsed by tyro, refused in one sentence, and a help that fits a screen."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import Field, field, fields
from typing import Any, TypeVar

from tevo.catalogue.rows import suggest

T = TypeVar("T")

__all__ = ["describe", "option", "parse", "refuse_others", "split"]


def option(default: Any, help: str) -> Any:
    """A dataclass field with its line of help."""
    return field(default=default, metadata={"help": help})


def parse(cls: type[T], argv: Sequence[str], *, default: T | None = None, verb: str) -> T:
    """All of ``argv`` as an instance of ``cls``.

    Raises:
        ValueError: an unknown flag (with the nearest match), or a value that is not of the flag's type.
    """
    values, rest = split(cls, argv, default=default, verb=verb)
    if rest:
        known = [_flag(f) for f in fields(cls)]  # type: ignore[arg-type]
        raise ValueError(f"unknown option {rest[0]!r}{suggest(rest[0], known)}; see `tevo {verb} --help`")
    return values


def split(cls: type[T], argv: Sequence[str], *, default: T | None = None, verb: str) -> tuple[T, list[str]]:
    """What ``cls`` knows of ``argv`` as an instance of it, and the rest."""
    import tyro

    shown = io.StringIO()
    try:
        with redirect_stderr(shown), redirect_stdout(shown):
            start: Any = tyro.MISSING_NONPROP if default is None else default
            return tyro.cli(
                cls, args=list(argv), prog=f"tevo {verb}", return_unknown_args=True, add_help=False, default=start
            )
    except SystemExit as error:
        raise ValueError(_sentence(shown.getvalue())) from error


def describe(*classes: type[Any]) -> str:
    """One line for each flag: name, what it is, default."""
    lines = []
    for one in (f for cls in classes for f in fields(cls)):
        plain = one.default is None or one.default is False or one.default == ""
        default = "" if plain else f" [{_shown(one.default)}]"
        lines.append(f"  {_flag(one):<25}{one.metadata['help']}{default}")
    return "\n".join(lines)


def refuse_others(options: Any, kind: str, kinds: Iterable[str], *, folder: str) -> None:
    """Refuse flags that were given for another kind of run: a flag is for one if its help begins with its name.

    What is for colt5 is for colt5-finetune too.

    Raises:
        ValueError: naming the first.
    """
    for one in fields(options):
        of, colon, _ = one.metadata["help"].partition(": ")
        value = getattr(options, one.name)
        if colon and of in kinds and of not in (kind, kind.partition("-")[0]) and value != one.default:
            raise ValueError(f"{folder} is no run of {of}, and has no use for {one.name}={value!r}; leave it out")


def _flag(one: Field[Any]) -> str:
    return "--" + one.name.replace("_", "-")


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _sentence(shown: str) -> str:
    """The message from a title, a rule, the message, perhaps another rule and help."""
    paragraphs = re.split(r"^\s*-{3,}\s*$", shown, flags=re.MULTILINE)
    text = " ".join(paragraphs[min(1, len(paragraphs) - 1)].split())
    return re.sub(r"^Error parsing (--\S+|\S+)?: ", lambda m: f"{m[1]}: " if m[1].startswith("--") else "", text)
