"""Files of questions: read alike from each format; whatever is wrong with one is a sentence."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from tevo.colt5.readers import Record, read_records

ROWS = [
    {"id": "q1", "pid": "q1_0", "input": 'What?\n\nA long\ntext, with "quotes".', "output": "this"},
    {"id": "q2", "pid": "q2_0", "input": "Where? Ünder", "output": "there"},
    {"id": "q1", "pid": "q1_1", "input": 'What?\n\nA long\ntext, with "quotes".', "output": "that"},
]
READ = [Record("q1", ROWS[0]["input"], ("this", "that")), Record("q2", ROWS[1]["input"], ("there",))]


def _lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _zip(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return path


def test_rows_of_one_id_are_joined_whatever_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(_lines(ROWS) + "\n")
    assert read_records(tmp_path / "a.jsonl") == READ
    table = "\ufeffid,pid,input,output\n" + "".join(
        ",".join('"' + row[name].replace('"', '""') + '"' for name in ("id", "pid", "input", "output")) + "\n"
        for row in ROWS
    )
    (tmp_path / "a.csv").write_text(table, encoding="utf-8")
    assert read_records(tmp_path / "a.csv") == READ
    path = _zip(
        tmp_path / "qasper.zip", {"qasper/validation.jsonl": _lines(ROWS), "qasper/test.jsonl": _lines(ROWS[1:2])}
    )
    assert read_records(path, split="validation") == READ
    assert read_records(str(path), split="test") == READ[1:]


def test_documents_and_questions_are_put_together_question_first(tmp_path: Path) -> None:
    rows = [{"document": "D", "question": "Q?", "answers": ["a", "b"]}, {"document": "E", "question": "R?"}]
    (tmp_path / "a.jsonl").write_text(_lines(rows))
    assert read_records(tmp_path / "a.jsonl") == [Record("1", "Q?\nD", ("a", "b")), Record("2", "R?\nE", ())]
    (tmp_path / "a.tsv").write_text("document\tquestion\tanswer\nD\tQ?\ta\n")
    assert read_records(tmp_path / "a.tsv") == [Record("2", "Q?\nD", ("a",))]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.jsonl", _lines(ROWS)[:-9], r"a\.jsonl:3: not JSON .*; the file may be cut short"),
        ("a.jsonl", '["x"]\n', r"a\.jsonl:1: expected an object"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl:1: the fields are text, expected input and output, or document"),
        ("a.jsonl", '{"input": 3, "output": "x"}\n', r"a\.jsonl:1: a field is no text"),
        ("a.jsonl", '{"input": "x", "output": [1]}\n', "a field is no text"),
        ("a.jsonl", "", r"a\.jsonl has no rows"),
        (
            "a.jsonl",
            _lines([ROWS[0], {**ROWS[2], "input": "other"}]),
            r"a\.jsonl:2: id 'q1' has another input than before",
        ),
        ("a.csv", "input,output\nx\n", r"a\.csv:2: a row of another number of fields"),
        ("a.csv", "input,output\nx,y,z\n", r"a\.csv:2: a row of another number of fields"),
        ("a.csv", 'input,output\n"x,y\n', r"a\.csv:\d: not a table"),
        ("a.txt", "x", "ends in '.txt', expected"),
    ],
)
def test_a_wrong_file_gets_one_sentence(name: str, text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_records(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_get_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_lines(ROWS).encode() + b"\xff\xfe\n")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_records(tmp_path / "a.jsonl")


def test_a_zip_that_is_cut_short_anywhere_or_has_a_flipped_byte_gets_one_sentence(tmp_path: Path) -> None:
    whole = _zip(tmp_path / "whole.zip", {"set/train.jsonl": _lines(ROWS * 40)}).read_bytes()
    cut = tmp_path / "cut.zip"
    for end in range(0, len(whole), 7):
        cut.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"is cut short or damaged"):
            read_records(cut, split="train")
    # a byte of the packed text: the text itself, the packing or the checksum tells
    start = whole.index(b"set/train.jsonl") + len("set/train.jsonl")
    for place in range(start, start + 60, 5):
        cut.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match=r"cut short or damaged|not JSON|not UTF-8|another input|fields are|expected an"
        ):
            read_records(cut, split="train")


@pytest.mark.parametrize("name", ["../train.jsonl", "/etc/train.jsonl", "a/../../train.jsonl", "C:/train.jsonl"])
def test_a_zip_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", {"set/train.jsonl": _lines(ROWS), name: "x"})
    with pytest.raises(ValueError, match="which leads out of its folder"):
        read_records(path, split="train")


def test_a_split_is_named_for_a_zip_and_only_for_one(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", {"set/train.jsonl": _lines(ROWS)})
    with pytest.raises(ValueError, match="is a zip of several splits; say which"):
        read_records(path)
    with pytest.raises(ValueError, match=r"has 0 members test\.jsonl, expected one; it has set/train\.jsonl"):
        read_records(path, split="test")
    (tmp_path / "a.jsonl").write_text(_lines(ROWS))
    with pytest.raises(ValueError, match="is one file, and has no split 'test'"):
        read_records(tmp_path / "a.jsonl", split="test")
    with pytest.raises(ValueError, match="does not exist"):
        read_records(tmp_path / "b.jsonl")
