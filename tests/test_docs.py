from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs import conf
from docs.generate import pages
from latex2mathml.converter import convert

from tevo.catalogue.rows import Row, rows

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def test_generated_pages_are_up_to_date() -> None:
    stale = [path.name for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    assert not stale, f"run `make docs`: {stale}"


def blocks(file: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL)
    assert found
    return found


def test_the_readme_python_runs() -> None:
    for block in blocks("README.md"):
        exec(compile(ast.parse(block), "README.md", "exec"), {})


def test_the_first_steps_run_one_after_the_other() -> None:
    names: dict[str, object] = {}
    for block in blocks("docs/first_steps.md"):
        exec(compile(ast.parse(block), "first_steps.md", "exec"), names)
    assert [tuple(names[name].shape) for name in ("y", "last", "logits")] == [(2, 100, 64), (2, 1, 64), (2, 50, 256)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "docs/design.md", "docs/first_steps.md", "docs/index.md"]
)
def test_links_lead_somewhere(file: str) -> None:
    path = ROOT / file
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{file} links to {target}"


def test_every_page_stands_in_the_table_of_contents_once() -> None:
    listed = re.findall(r"```{toctree}\n(.*?)```", (DOCS / "index.md").read_text(), flags=re.DOTALL)
    names = [line for block in listed for line in block.splitlines() if line and not line.startswith(":")]
    pages = [path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(names) == sorted(page for page in pages if page != "index" and not page.startswith("_build"))


@pytest.mark.parametrize("row", [row for row in rows().values() if row.card], ids=lambda row: row.id)
def test_a_system_s_page_has_equation_cost_evidence_citation_and_the_site_its_code(row: Row) -> None:
    assert row.card is not None and row.path is not None
    source = [(DOCS / "systems" / f"{row.id}.md").read_text()]
    for title in ("Cost", "Evidence", "Citation"):
        assert f"\n## {title}\n" in source[0]
    assert "\n$$\n" in source[0]
    for latex in row.card.equations:
        assert convert(latex, display="block").startswith("<math")
    conf.code_in_place(None, f"systems/{row.id}", source)
    (shown,) = re.findall(r"```{literalinclude} (\S+)\n", source[0])
    assert (DOCS / "systems" / shown).resolve() == row.path


def test_links_that_lead_out_of_the_site_become_names() -> None:
    source = ["[a](../benchmarks/README.md), [b](catalogue.md), [c](https://arxiv.org/abs/1706.03762)"]
    conf.code_in_place(None, "benchmarks", source)
    assert source[0] == "a (`benchmarks/README.md`), [b](catalogue.md), [c](https://arxiv.org/abs/1706.03762)"


def test_the_filters_find_the_columns_of_the_catalogue_s_table() -> None:
    script, table = (DOCS / "_static" / "catalogue.js").read_text(), (DOCS / "catalogue.md").read_text()
    heads = next(line for line in table.splitlines() if line.startswith("| id")).strip("| ").split(" | ")
    for head in ("role", "status", "cost", "claims"):
        assert head in heads and f'"{head}"' in script
    assert "http" not in script


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the extra docs is not installed")
    argv = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("*.html"):
        assert not re.search(r"<(script|link|img)[^>]+(src|href)=.https?://", path.read_text()), path.name
    page = (tmp_path / "systems" / "delta_net.html").read_text()
    assert "<math" in page and "class</span>" in page
    assert "catalogue.js" in (tmp_path / "catalogue.html").read_text() and "catalogue.js" not in page
