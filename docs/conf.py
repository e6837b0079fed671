"""Sphinx's settings: ``make docs`` builds the site of docs/*.md into docs/_build. Nothing on it needs the network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from tevo import __version__

DOCS = Path(__file__).resolve().parent

project = "tevo"
version = release = __version__
copyright = "the tevo authors"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build"]
root_doc = "index"
html_theme = "furo"
html_title = f"tevo {__version__}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
# a fence without a language is text, most of them commands
highlight_language = "text"


def code_in_place(app: Any, docname: str, source: list[str]) -> None:
    """The site shows a system's code where the page only links to it, and names files that are not part of the site."""
    text = source[0]
    if docname.startswith("systems/"):
        text = re.sub(
            r"^- \[(src/[^]]+)\]\(\.\./\.\./src/[^)]+\)$",
            r"`\1`\n\n```{literalinclude} ../../\1\n:language: python\n```",
            text,
            flags=re.MULTILINE,
        )

    def inside(match: re.Match[str]) -> str:
        words, target = match.groups()
        path = (DOCS / docname).parent / target.partition("#")[0]
        if "://" in target or path.resolve().is_relative_to(DOCS):
            return match[0]
        return f"{words} (`{path.resolve().relative_to(DOCS.parent).as_posix()}`)"

    source[0] = re.sub(r"(?<!!)\[([^]]+)\]\(([^)#][^)]*)\)", inside, text)


def filters(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """The catalogue's table can be filtered."""
    if pagename == "catalogue":
        app.add_js_file("catalogue.js")


def formula(self: Any, node: Any) -> None:
    """Write a formula as MathML, which browsers set without a script."""
    put(self, convert(node.astext()))


def equation(self: Any, node: Any) -> None:
    """The same on a line of its own."""
    put(self, f'<div class="equation">{convert(node.astext(), display="block")}</div>')


def put(writer: Any, text: str) -> None:
    """Write a node whole."""
    # the tests read this file where Sphinx need not be
    from docutils.nodes import SkipNode

    writer.body.append(text)
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", inline_renderers=(formula, None), block_renderers=(equation, None))
    app.connect("source-read", code_in_place)
    app.connect("html-page-context", filters)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
