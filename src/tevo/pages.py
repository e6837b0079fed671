"""Pages of the products: one HTML file each, which needs no network and no script."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["render"]

_SHARED = Path(__file__).with_name("templates")


def render(
    template: str, *, folder: Path, filters: Mapping[str, Callable[..., object]] | None = None, **values: Any
) -> str:
    """A page from a product's own ``folder`` of templates, which may extend the house's ``page.html.j2``.

    Raises:
        ValueError: jinja2 is missing.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ValueError("a page needs the package jinja2; pip install 'tevo[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template).render(**values)
