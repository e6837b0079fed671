"""Recipe: everything that decides what a training run computes, as one frozen dataclass.

Values come from, weakest first: defaults, a preset, a file (YAML or JSON), flags. What results is stored in the run and
named by a hash. No torch here, so that help and dry checks are instant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tevo.catalogue.rows import suggest
from tevo.colt5.recipes import PRESETS as COLT5_PRESETS
from tevo.colt5.recipes import CoLT5Recipe
from tevo.colt5.text_recipes import FINETUNE_PRESETS, PRETRAIN_PRESETS, FinetuneRecipe, PretrainRecipe
from tevo.slot_attention.recipes import PRESETS as SLOT_PRESETS
from tevo.slot_attention.recipes import SlotRecipe
from tevo.training.base import Recipe, circumstances, option

__all__ = [
    "PRESETS",
    "RECIPES",
    "CoLT5Recipe",
    "LanguageModelRecipe",
    "Recipe",
    "SlotRecipe",
    "differences",
    "of_run",
    "read",
    "resolve",
]

R = TypeVar("R", bound="Recipe")

_LARGEST_FILE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LanguageModelRecipe(Recipe):
    """A :class:`tevo.CausalLM` trained on next tokens; the vocabulary is the task's."""

    kind: ClassVar[str] = "lm"

    task: str = option("text", "what is learned: text, recall, selective_copy, induction")
    data: str = option("", "text task: your own file or folder; empty: Python's standard library")
    length: int = option(256, "tokens per sequence")
    mixer: tuple[str, ...] = option(("softmax",), "token mixer, or one for each layer")
    channel: str | None = option(None, "channel mixer; none: the host's own, gelu")
    position: str | None = option(None, "position part")
    residual: str | None = option(None, "wiring of a block; none: the host's own, pre_norm")
    norm: str | None = option(None, "the wiring's norm; none: the wiring's own")
    hidden_dim: int | None = option(None, "width inside channel mixers; none: their own")
    dim: int = option(128, "width")
    depth: int = option(4, "layers")
    heads: int = option(4, "heads")
    dropout: float = option(0.0, "share of activations dropped in training")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("length", "dim", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a share from 0 to below 1")
        if len(self.mixer) not in (1, self.depth):
            raise ValueError(
                f"mixer names {len(self.mixer)} systems for depth={self.depth} layers; name one, or one for each layer"
            )


RECIPES: dict[str, type[Recipe]] = {
    cls.kind: cls for cls in (LanguageModelRecipe, SlotRecipe, CoLT5Recipe, PretrainRecipe, FinetuneRecipe)
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "lm": {
        "tiny": {"dim": 64, "depth": 2, "heads": 2, "length": 128, "steps": 200, "batch": 8, "save_every": 50},
        "small": {"dim": 256, "depth": 6, "heads": 8, "length": 512, "steps": 5000, "batch": 32, "lr": 6e-4},
    },
    "slots": SLOT_PRESETS,
    "colt5": COLT5_PRESETS,
    "colt5-pretrain": PRETRAIN_PRESETS,
    "colt5-finetune": FINETUNE_PRESETS,
}


def resolve(cls: type[R], *, preset: str | None = None, file: Path | None = None, **flags: object) -> R:
    """Defaults < preset < file < flags.

    Raises:
        ValueError: an unknown preset, key or flag (with the nearest match and, in a file, its line), or a bad value.
    """
    values: dict[str, Any] = {}
    if preset is not None:
        known = PRESETS[cls.kind]
        if preset not in known:
            raise ValueError(f"unknown preset {preset!r}{suggest(preset, known)}; expected one of {', '.join(known)}")
        values |= known[preset]
    if file is not None:
        values |= _read_values(cls, file)
    for name, value in flags.items():
        values[name] = _fit(cls, name, value, "recipe")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}" if file is not None else str(error)) from error


def read(file: Path) -> Recipe:
    """The recipe stored in ``file``, of whichever kind it says it is."""
    entries = _entries(file)
    kind, line = entries.get("kind", ("lm", 1))
    if not isinstance(kind, str) or kind not in RECIPES:
        raise ValueError(f"{file}:{line}: unknown kind {kind!r}{suggest(str(kind), RECIPES)}")
    return resolve(RECIPES[kind], file=file)


def of_run(folder: Path, kind: type[R]) -> R:
    """The recipe of a run in ``folder``.

    Raises:
        ValueError: the folder is not a run, or one of another kind.
    """
    if not (folder / "recipe.json").is_file():
        raise ValueError(f"{folder} is not a run: it has no recipe.json; expected a folder that `tevo train` made")
    recipe = read(folder / "recipe.json")
    if not isinstance(recipe, kind):
        names = " or ".join(name for name, cls in RECIPES.items() if issubclass(cls, kind))
        raise ValueError(f"{folder} is a run of kind {recipe.kind!r}, expected one of {names}")
    return recipe


def differences(a: Recipe, b: Recipe) -> dict[str, tuple[object, object]]:
    """Fields in which two recipes differ, circumstances aside: name -> (value in a, value in b)."""
    left, right = a.content(), b.content()
    ignored = circumstances(type(a))
    names = [n for n in {**left, **right} if n not in ignored]
    return {n: (left.get(n), right.get(n)) for n in names if left.get(n) != right.get(n)}


def _read_values(cls: type[Recipe], file: Path) -> dict[str, Any]:
    values = {}
    for name, (value, line) in _entries(file).items():
        where = f"{file}:{line}"
        if name == "kind":
            if value != cls.kind:
                raise ValueError(f"{where}: kind is {value!r}, this program's recipes are of {cls.__name__}")
            continue
        values[name] = _fit(cls, name, value, where)
    return values


def _fit(cls: type[Recipe], name: str, value: object, where: str) -> object:
    known = [f.name for f in fields(cls)]
    if name not in known:
        raise ValueError(f"{where}: unknown key {name!r}{suggest(name, known)}; see `tevo train --help`")
    return _coerce(get_type_hints(cls)[name], value, f"{where}: {name}")


def _coerce(kind: Any, value: object, what: str) -> object:
    """``value`` as the type of its field; the only liberties are int for float, 1e-3 as YAML reads it, and lists."""
    if get_origin(kind) in (Union, UnionType):
        inner = next(k for k in get_args(kind) if k is not type(None))
        return None if value is None else _coerce(inner, value, what)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"{what} is {value!r}, expected one of {', '.join(get_args(kind))}")
    if get_origin(kind) is tuple:
        inner, *rest = get_args(kind)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if rest != [...] and len(items) != 1 + len(rest):
            raise ValueError(f"{what} has {len(items)} values, expected {1 + len(rest)}")
        return tuple(_coerce(inner, item, what) for item in items)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 takes 1e-3, without a point, for text
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text (put it in quotes)"}
    raise ValueError(f"{what} is {value!r}, expected {words[kind]}")


def _entries(file: Path) -> dict[str, tuple[Any, int]]:
    """Keys of a YAML or JSON file with value and line. Plain values and lists of them only; no tags, no duplicates."""
    import yaml

    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ValueError(f"recipe {file} cannot be read: {error.strerror}") from error
    if len(raw) > _LARGEST_FILE:
        raise ValueError(f"recipe {file} is {len(raw)} bytes long, expected at most {_LARGEST_FILE}")
    if file.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"recipe {file} is not a .yaml, .yml or .json file")
    try:
        text = raw.decode("utf-8-sig")
        # JSON is read as YAML, which gives lines; tabs, legal between JSON's tokens only, are the one difference met
        loader = yaml.SafeLoader(text.replace("\t", " ") if file.suffix == ".json" else text)
        try:
            root = loader.get_single_node()
            if root is None:
                return {}
            if not isinstance(root, yaml.MappingNode):
                raise ValueError(f"{file}:1: expected keys and values, such as 'lr: 0.001'")
            entries: dict[str, tuple[Any, int]] = {}
            for key_node, value_node in root.value:
                line = key_node.start_mark.line + 1
                key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
                if key in entries:
                    raise ValueError(f"{file}:{line}: key {key!r} was given on line {entries[key][1]} already")
                listed = isinstance(value_node, yaml.SequenceNode) and value_node.tag == _LIST_TAG
                items = value_node.value if listed else [value_node]
                for item in items:
                    if not isinstance(item, yaml.ScalarNode) or item.tag not in _PLAIN_TAGS:
                        raise ValueError(f"{file}:{line}: {key} holds a {item.tag}, expected a plain value or a list")
                values = [loader.construct_object(item) for item in items]
                entries[key] = (values if listed else values[0], line)
            return entries
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise ValueError(f"{file}:{line}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"recipe {file} is not valid: {str(error).splitlines()[0]}") from error


_LIST_TAG = "tag:yaml.org,2002:seq"
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str")}
