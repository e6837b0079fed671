"""Questions and summaries from files: plain jsonl and CSV, and the zips of SCROLLS. Nothing is unpacked to disk.

A line or row is a record of text fields: ``input`` and ``output`` as in SCROLLS, or ``document``, ``question`` and ``answers``
(a list in jsonl). Rows of one id are the references of one input.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

__all__ = ["Record", "read_records"]

# a zip's member may unpack to this many bytes; the longest set of SCROLLS has 8 GB in all
_GREATEST = 16 << 30
_FIELDS = "expected input and output, or document, question and answers"


class Record(NamedTuple):
    """One input and what is right of it, in one way or several; none where a test set does not tell."""

    id: str
    input: str
    outputs: tuple[str, ...]


def read_records(path: Path | str, *, split: str | None = None) -> list[Record]:
    """The records of a .jsonl, .json (one object a line), .csv, .tsv or .zip file, in the order of their first rows.

    Args:
        path: the file.
        split: of a zip: "train", "validation" or "test", the name of the member without its ending.

    Raises:
        ValueError: not such a file, damaged or cut short, without the fields, or a zip with a member that leaves its folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a .jsonl, .csv, .tsv or .zip file")
    if path.suffix == ".zip":
        if split is None:
            raise ValueError(f"{path} is a zip of several splits; say which, split='train', 'validation' or 'test'")
        return _zipped(path, split)
    if split is not None:
        raise ValueError(f"{path} is one file, and has no split {split!r}; leave split out")
    if path.suffix not in (".jsonl", ".json", ".csv", ".tsv"):
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'!r}, expected .jsonl, .csv, .tsv or .zip")
    with path.open("rb") as file:
        return _joined(_rows(file, path.suffix, str(path)), str(path))


def _zipped(path: Path, split: str) -> list[Record]:
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
                    raise ValueError(f"{path} has the member {name!r}, which leads out of its folder; do not trust it")
            fitting = [info for info in archive.infolist() if Path(info.filename).name == f"{split}.jsonl"]
            if len(fitting) != 1:
                had = ", ".join(info.filename for info in archive.infolist()) or "nothing"
                raise ValueError(f"{path} has {len(fitting)} members {split}.jsonl, expected one; it has {had}")
            where = f"{path}:{fitting[0].filename}"
            if fitting[0].file_size > _GREATEST:
                raise ValueError(f"{where} unpacks to {fitting[0].file_size} bytes, expected at most {_GREATEST}")
            with archive.open(fitting[0]) as file:
                return _joined(_rows(file, ".jsonl", where), where)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again") from error


def _rows(file: IO[bytes], kind: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and fields of each row."""
    number = 0
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="" if kind in (".csv", ".tsv") else None) as text:
            if kind in (".csv", ".tsv"):
                csv.field_size_limit(1 << 30)
                table = csv.DictReader(text, delimiter="," if kind == ".csv" else "\t", strict=True)
                for row in table:
                    number = table.line_num
                    if None in row or None in row.values():
                        raise ValueError(f"{where}:{number}: a row of another number of fields than the first")
                    yield number, row
                return
            for number, line in enumerate(text, 1):
                if line.strip():
                    value = json.loads(line)
                    if not isinstance(value, dict):
                        raise ValueError(f"{where}:{number}: expected an object with its fields by name")
                    yield number, value
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 after line {number}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}:{number}: not JSON ({error.msg}); the file may be cut short") from error
    except csv.Error as error:
        raise ValueError(f"{where}:{number + 1}: not a table ({error})") from error


def _joined(rows: Iterator[tuple[int, Mapping[str, Any]]], where: str) -> list[Record]:
    found: dict[str, tuple[str, list[str]]] = {}
    for number, row in rows:
        name, text, outputs = _record(row, number, f"{where}:{number}")
        known = found.setdefault(name, (text, []))
        if known[0] != text:
            raise ValueError(f"{where}:{number}: id {name!r} has another input than before; rows of one id share it")
        known[1].extend(outputs)
    if not found:
        raise ValueError(f"{where} has no rows; {_FIELDS}")
    return [Record(name, text, tuple(outputs)) for name, (text, outputs) in found.items()]


def _record(row: Mapping[str, Any], number: int, where: str) -> tuple[str, str, list[str]]:
    if "input" in row:
        text, outputs = row["input"], row.get("output")
    elif "document" in row and "question" in row:
        # the question first, as the paper has it
        text, outputs = f"{row['question']}\n{row['document']}", row.get("answers", row.get("answer"))
    else:
        raise ValueError(f"{where}: the fields are {', '.join(map(str, row)) or 'none'}, {_FIELDS}")
    many = outputs if isinstance(outputs, list) else [] if outputs is None else [outputs]
    if not isinstance(text, str) or not all(isinstance(one, str) for one in many):
        raise ValueError(f"{where}: a field is no text; {_FIELDS}, all of them text")
    return str(row.get("id", number)), text, many
