"""Automatic mutants of equation code: one small change in the syntax tree at a time.

What is left out: constructors and initial values, refusals (``if ...: raise``), assertions, docstrings and annotations.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.planting import functions, live, module_of

# what runs once when a part is built or shown is not its equation
NOT_EQUATIONS = {
    "__init__",
    "reset",
    "reset_parameters",
    "initialise",
    "extra_repr",
    "no_decay",
    "__repr__",
    "__post_init__",
}

ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
SWALLOWED = ("detach", "clamp", "clamp_min", "clamp_max", "contiguous", "masked_fill", "clone")


@dataclass(frozen=True)
class Mutant:
    """One change: where, and what it does."""

    system: str
    path: Path
    function: str
    line: int
    place: int  # of the node, in the order of ``ast.walk`` over the function: stable while the function is
    option: int
    what: str

    @property
    def name(self) -> str:
        """For lists."""
        return f"{self.path.stem}.{self.function} {self.place}: {self.what}"


def variants(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Every change of one node: (what it does, the node instead)."""
    if isinstance(node, ast.BinOp):
        if type(node.op) in ARITHMETIC:
            new = copy.deepcopy(node)
            new.op = ARITHMETIC[type(node.op)]()
            yield _said(node, new), new
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            yield _said(node, node.left), node.left
        if isinstance(node.op, ast.Add):
            yield _said(node, node.right), node.right
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new = copy.deepcopy(node)
        new.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield _said(node, new), new
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        for step in (1, -1):
            new = ast.Constant(node.value + step)
            yield _said(node, new), new
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant) and node.operand.value in (1, 2):
            # axes: the last and the one before it
            new = ast.UnaryOp(ast.USub(), ast.Constant(3 - node.operand.value))
            yield _said(node, new), new
        elif not isinstance(node.op, ast.UAdd):
            yield _said(node, node.operand), node.operand
    elif isinstance(node, ast.Call):
        if node.keywords:
            new = copy.deepcopy(node)
            new.keywords.pop()
            yield _said(node, new), new
        elif node.args:
            new = copy.deepcopy(node)
            new.args.pop()
            yield _said(node, new), new
        if isinstance(node.func, ast.Attribute) and node.func.attr in SWALLOWED:
            yield _said(node, node.func.value), node.func.value
    elif isinstance(node, (ast.IfExp, ast.If, ast.While)):
        new = copy.deepcopy(node)
        new.test = ast.UnaryOp(ast.Not(), node.test)
        yield f"if {ast.unparse(node.test)} -> if {ast.unparse(new.test)}", new
    elif isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield _said(node, new), new


def _said(old: ast.AST, new: ast.AST) -> str:
    return f"{ast.unparse(old)} -> {ast.unparse(new)}"


def _left_out(function: ast.FunctionDef) -> set[int]:
    """Identities of nodes that are not mutated."""
    out: set[int] = set()

    def leave(node: ast.AST | None) -> None:
        if node is not None:
            out.update(id(inner) for inner in ast.walk(node))

    leave(function.args)
    leave(function.returns)
    for decorator in function.decorator_list:
        leave(decorator)
    for node in ast.walk(function):
        if (
            isinstance(node, (ast.Raise, ast.Assert))
            or (isinstance(node, ast.If) and all(isinstance(s, ast.Raise) for s in node.body))
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        ):
            leave(node)
        elif isinstance(node, ast.AnnAssign):
            leave(node.annotation)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            # -1 is one constant, of which the sign is part
            out.add(id(node.operand))
    return out


def mutants(system: str, path: Path) -> list[Mutant]:
    """Every mutant of a system's file that can be planted."""
    found = []
    module = module_of(path)
    for name, function in functions(ast.parse(path.read_text(encoding="utf-8"))).items():
        # a decorated nested name, or "_", cannot be reached
        if name.rpartition(".")[2] in NOT_EQUATIONS or live(module, name) is None:
            continue
        out = _left_out(function)
        for place, node in enumerate(ast.walk(function)):
            if id(node) in out or node is function:
                continue
            for option, (what, _) in enumerate(variants(node)):
                line = getattr(node, "lineno", function.lineno)
                found.append(Mutant(system, path, name, line, place, option, what))
    return found


def apply(mutant: Mutant) -> tuple[ast.Module, ast.Module]:
    """The original and the changed tree."""
    text = mutant.path.read_text(encoding="utf-8")
    original, changed = ast.parse(text), ast.parse(text)
    function = functions(changed)[mutant.function]
    target = list(ast.walk(function))[mutant.place]
    new = list(variants(target))[mutant.option][1]
    for parent in ast.walk(function):
        for field, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, field, new)
            elif isinstance(value, list) and any(item is target for item in value):
                value[:] = [new if item is target else item for item in value]
    return original, ast.fix_missing_locations(changed)
