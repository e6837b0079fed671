"""Faults put into running code: the code objects of changed functions are exchanged, so that every importer sees them."""

from __future__ import annotations

import ast
import importlib
import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch

from tevo.catalogue.rows import PACKAGE, rows
from tevo.testing import Check, applicable
from tevo.testing.evidence import official
from tevo.testing.subject import Subject, subjects

# the groups of the fast tier, and what else is fast
TIER, BESIDE = "ABC", ("flops", "training_is_seeded")
# cheap checks that see most; the second formulation is written in loops
FIRST = ("shape_and_dtype", "causal", "prefix", "padding", "exact_state", "oracle")

# no check of an intact system takes a tenth of this
SECONDS = 60.0


class Hangs(Exception):
    """A check ran past its time."""


def module_of(path: Path) -> ModuleType:
    """The imported module of a source file of the package."""
    return importlib.import_module("tevo." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions and methods of a file by qualified name."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = inner
    return found


def live(module: ModuleType, name: str) -> FunctionType | None:
    """The function object that runs under a qualified name, None where a decorator keeps it out of reach."""
    owner, _, attribute = name.rpartition(".")
    value: Any = vars(module).get(owner) if owner else module
    value = vars(value).get(attribute) if value is not None else None
    if isinstance(value, property):
        value = value.fget
    while value is not None and not isinstance(value, FunctionType):
        inner = next((getattr(value, a) for a in ("__func__", "__wrapped__", "_init_fn") if hasattr(value, a)), None)
        value = inner
    if isinstance(value, FunctionType):
        value = inspect.unwrap(value)
    return value if isinstance(value, FunctionType) and value.__code__.co_qualname == name else None


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


@contextmanager
def planted(path: Path, original: ast.Module, changed: ast.Module) -> Iterator[None]:
    """Run with the functions of ``path`` in which two trees differ exchanged.

    Raises:
        ValueError: nothing differs, or a changed function cannot be reached.
    """
    module = module_of(path)
    before, after = functions(original), functions(changed)
    names = [n for n in after if n not in before or ast.dump(before[n]) != ast.dump(after[n])]
    if not names:
        raise ValueError(f"{path.name}: no function differs")
    codes = {code.co_qualname: code for code in _codes(compile(changed, str(path), "exec"))}
    swapped: list[tuple[FunctionType, CodeType]] = []
    try:
        for name in names:
            function = live(module, name)
            if function is None or len(function.__code__.co_freevars) != len(codes[name].co_freevars):
                raise ValueError(f"{path.name}: {name} is out of reach")
            swapped.append((function, function.__code__))
            function.__code__ = codes[name]
        _forget(module)
        yield
    finally:
        for function, code in swapped:
            function.__code__ = code
        _forget(module)


def _forget(module: ModuleType) -> None:
    """Clear the module's memoised results."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear") and getattr(value, "__module__", None) == module.__name__:
            value.cache_clear()


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`Hangs` in code that takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hangs(f"took more than {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


@cache
def cases(system: str) -> tuple[tuple[Check, Subject], ...]:
    """The fast checks of a system with all its examples, those that see most first."""
    found = []
    seen: set[str] = set()
    for subject in subjects(rows()[system]):
        for check in applicable(subject, first=subject.part not in seen):
            if check.name in BESIDE or check.group in TIER:
                found.append((check, smaller(subject) if check.name == "oracle" else subject))
        seen.add(subject.part)
    return tuple(sorted(found, key=lambda pair: FIRST.index(pair[0].name) if pair[0].name in FIRST else len(FIRST)))


def smaller(subject: Subject) -> Subject:
    """The same with lengths of at most 17, since second formulations are loops over pairs of tokens."""
    if not subject.any_length() or subject.seat != "tokens":
        return subject
    lengths = zip(sorted(subject.sizes()), (7, 13, 17), strict=False)
    return replace(subject, lengths=tuple(min(n, most) for n, most in lengths)[::-1])


@dataclass(frozen=True)
class Failure:
    """A check that failed with one example, or with the official numbers, and what it said."""

    system: str
    check: str
    case: int  # place in ``cases``; that of the official numbers is behind them
    why: str


def failing(
    system: str, wanted: Callable[[str], bool] = lambda name: True, skip: frozenset[int] = frozenset()
) -> Failure | None:
    """The first check that fails, None where all hold. The official numbers come last, as ``official``."""
    for number, (check, _) in enumerate(cases(system)):
        if wanted(check.name) and number not in skip and (why := outcome(system, number)) is not None:
            return Failure(system, check.name, number, why)
    number = len(cases(system))
    if wanted("official") and number not in skip and (why := outcome(system, number)) is not None:
        return Failure(system, "official", number, why)
    return None


def outcome(system: str, case: int) -> str | None:
    """What a case says when it fails, None where it holds."""
    state = torch.get_rng_state()
    try:
        with limited(SECONDS):
            if case == len(cases(system)):
                official(rows()[system])
            else:
                check, subject = cases(system)[case]
                check.run(subject)
    except (Exception, Hangs) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        torch.set_rng_state(state)
    return None


@cache
def holds(system: str, case: int) -> bool:
    """Whether a case holds for the intact system; one that does not can catch nothing."""
    return outcome(system, case) is None


def caught(
    system: str, path: Path, trees: tuple[ast.Module, ast.Module], wanted: Callable[[str], bool] = lambda name: True
) -> Failure | None:
    """The first check that fails with a change planted and holds without it."""
    skip: frozenset[int] = frozenset()
    while True:
        with planted(path, *trees):
            found = failing(system, wanted, skip)
        if found is None or holds(system, found.case):
            return found
        skip |= {found.case}
