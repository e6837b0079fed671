from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tevo.pages import render


def test_a_page_extends_the_house_s_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "own.html.j2").write_text(
        '{% extends "page.html.j2" %}{% block body %}{{ text }} {{ text | twice | safe }}{% endblock %}'
    )
    text = render("own.html.j2", folder=tmp_path, filters={"twice": lambda s: 2 * s}, text="<b>")
    assert "&lt;b&gt; <b><b>" in text
    assert text.startswith("<!DOCTYPE html>") and "http" not in text and "<script" not in text


def test_a_value_that_is_missing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "own.html.j2").write_text("{{ nothing }}")
    with pytest.raises(Exception, match="'nothing' is undefined"):
        render("own.html.j2", folder=tmp_path)


def test_without_jinja_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"pip install 'tevo\[report\]'"):
        render("own.html.j2", folder=tmp_path)
