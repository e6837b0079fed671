"""From a part's name to an instance; the only place that reads constructors' signatures."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tevo.card import Card
from tevo.catalogue.rows import PACKAGE, Row, find, list_systems, rows, suggest

if TYPE_CHECKING:
    from torch import nn

# a part as users write it: a name ("aft", "aft(window=32)", "file.py:Class"), a class or factory, or a built module
Spec: TypeAlias = "str | Callable[..., nn.Module] | nn.Module"

ABSENT = object()


@dataclass(frozen=True)
class Part:
    """A part that is known but not built: its class, the options written with it, and its catalogue row if any."""

    name: str
    cls: Callable[..., nn.Module]
    options: Mapping[str, object] = field(default_factory=dict)
    row: Row | None = None

    @property
    def card(self) -> Card | None:
        """The card, where the part is one of the catalogue's."""
        return self.row.card.of(self.name) if self.row and self.row.card else None

    @property
    def role(self) -> str | None:
        """The role that the card states, None for a part of the user's."""
        return self.card.role if self.card else None

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The constructor's arguments."""
        return inspect.signature(self.cls).parameters

    def accepts(self, argument: str) -> bool:
        """Whether the constructor names the argument."""
        return argument in self.parameters()


_CALL = re.compile(r"^(?P<name>[^()]+)\((?P<options>.*)\)$", re.DOTALL)


def parse_part(text: str) -> tuple[str, dict[str, object]]:
    """``"aft(window=32)"`` gives ``("aft", {"window": 32})``. Options are Python literals, or bare words.

    Raises:
        ValueError: the text cannot be read.
    """
    match = _CALL.match(text.strip())
    if not match:
        return text.strip(), {}
    name = match["name"].strip()
    try:
        call = ast.parse(f"f({match['options']})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args:
            raise ValueError("options need names")
        options: dict[str, object] = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError("** is not allowed")
            # a bare word is a string, so that shells need no second quotes: t5(kind=local)
            options[keyword.arg] = (
                keyword.value.id if isinstance(keyword.value, ast.Name) else ast.literal_eval(keyword.value)
            )
    except (SyntaxError, ValueError) as error:
        raise ValueError(
            f"cannot read the part {text!r}: {error}; write it as name or name(option=value, ...)"
        ) from error
    return name, options


def load(name: str) -> Callable[..., nn.Module]:
    """The class behind a part's name, or behind ``path.py:Class``."""
    return resolve(name).cls


def resolve(spec: Spec | Part) -> Part:
    """A :class:`Part` from whatever a user may write.

    Raises:
        ValueError: unknown name, missing file or class.
    """
    if isinstance(spec, Part):
        return spec
    if not isinstance(spec, str):
        return Part(name=getattr(spec, "__name__", type(spec).__name__), cls=spec, row=_row_of(spec))
    name, options = parse_part(spec)
    if ".py:" in name:
        return Part(name=name, cls=_from_file(name), options=options)
    row, cls = find(name)
    assert row.path is not None
    module = importlib.import_module("tevo." + ".".join(row.path.relative_to(PACKAGE).with_suffix("").parts))
    return Part(name=name, cls=getattr(module, cls), options=options, row=row)


def _row_of(cls: object) -> Row | None:
    """The catalogue row of a class of ours."""
    module = getattr(cls, "__module__", "")
    row = rows().get(module.rpartition(".")[2]) if module.startswith("tevo.") else None
    return row if row and row.card and getattr(cls, "__name__", "") in row.card.exports.values() else None


def _from_file(name: str) -> Callable[..., nn.Module]:
    file, _, attribute = name.rpartition(":")
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"no file {file!r} for the part {name!r}; give it as path/to/file.py:Class")
    # one import per file and content, so that an edited file is read anew within one process
    key = "tevo_user_" + hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    found = getattr(sys.modules[key], attribute, None)
    if found is None:
        public = [n for n, v in vars(sys.modules[key]).items() if inspect.isclass(v) and v.__module__ == key]
        raise ValueError(f"{file} has no class {attribute!r}{suggest(attribute, public)}; it has {', '.join(public)}")
    return found


def create(
    spec: Spec | Part,
    /,
    *,
    facts: Mapping[str, object] | None = None,
    demands: Mapping[str, object] | None = None,
    **options: object,
) -> nn.Module:
    """Build a part.

    Args:
        spec: a name (``"aft"``, ``"aft(window=32)"``, ``"my_part.py:MyMixer"``), a class or a factory.
        facts: what the host knows (dim, heads, length, grid, depth, index ...); those that the constructor does not
            name are dropped.
        demands: what the host needs (causal=True, a position system); one that the constructor does not name raises.
        options: constructor arguments; an unknown one raises with the nearest match.

    Returns:
        The module. Parts are ``nn.Module``s with plain constructors; calling those directly is equally good.

    Raises:
        ValueError: in one sentence, with alternatives.
    """
    part = resolve(spec)
    accepted = part.parameters()
    given: dict[str, Any] = {}
    for name, value in {**part.options, **options}.items():
        if name not in accepted:
            raise ValueError(
                f"{part.name} has no option {name!r}{suggest(name, accepted)}; its options are {', '.join(accepted)}"
            )
        given[name] = value
    for name, value in (demands or {}).items():
        if name not in accepted:
            raise ValueError(_cannot(part, name, value))
        given.setdefault(name, value)
    for name, value in (facts or {}).items():
        if name in accepted and value is not None:
            given.setdefault(name, value)
    missing = [n for n, p in accepted.items() if p.default is p.empty and n not in given and p.kind is p.KEYWORD_ONLY]
    if missing:
        raise ValueError(f"{part.name} needs {', '.join(m + '=' for m in missing)}; give what is missing")
    return part.cls(**given)


def _cannot(part: Part, name: str, value: object) -> str:
    """Why a demand is refused, with alternatives of the same role."""
    word = {"causal": "causal", "position": "position", "grid": "grid", "length": "fixed_length"}.get(name, name)
    reason = {
        "causal": "has no causal form",
        "position": f"has no use for the position system {_name(value)}",
        "norm": f"has no norm to choose, got norm={_name(value)}",
    }.get(name, f"does not take {name}={_name(value)}")
    return f"{part.name} {reason}{alternatives(part.role, word)}"


def _name(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


def alternatives(role: str | None, word: str, *, without: str = "") -> str:
    """``; choose among ...`` with the present parts of a role that make one claim and not another, or nothing."""
    from tevo.card import CLAIMS

    if role is None or word not in CLAIMS:
        return ""
    rows = list_systems(role=role, where=[word], baselines=True)
    found = [row.id for row in rows if without not in row.claims()]
    return f"; {role}s that do: {', '.join(found)}" if found else ""
