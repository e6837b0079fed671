"""Which parameters of a trained model are trained further, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn


def owned(model: nn.Module, patterns: Sequence[str]) -> list[tuple[nn.Module, str]]:
    """Owner and own name of every parameter whose full name matches one of the shell patterns.

    Raises:
        ValueError: none matches, or one that does belongs to several modules.
    """
    owners: dict[int, int] = {}
    found = []
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
            full = f"{prefix}.{name}" if prefix else name
            if any(fnmatch.fnmatchcase(full, pattern) for pattern in patterns):
                found.append((module, name, full))
    if not found:
        raise ValueError(
            f"no parameter of {type(model).__name__} is named like {', '.join(patterns)}; see model.named_parameters()"
        )
    for module, name, full in found:
        if owners[id(getattr(module, name))] > 1:
            raise ValueError(f"{full} belongs to several modules (tied weights) and cannot be adapted in one of them")
    return [(module, name) for module, name, _ in found]


def freeze(model: nn.Module, also: Sequence[str] = ()) -> None:
    """Nothing of ``model`` is trained, but parameters named like one of the shell patterns ``also``.

    Raises:
        ValueError: a pattern that matches nothing.
    """
    names = dict(model.named_parameters())
    for pattern in also:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"no parameter of {type(model).__name__} is named like {pattern}; see model.named_parameters()"
            )
    for name, parameter in names.items():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in also))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What requires a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
