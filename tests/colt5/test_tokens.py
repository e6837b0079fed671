"""Tokens: bytes as ByT5's, SentencePiece models as SentencePiece reads them, and what is no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

import tokenizers

from tevo.colt5.tokens import ByteTokens, FileTokens, encode, tokens_from

GOLDEN = Path(__file__).parents[1] / "golden" / "colt5"
MODEL = GOLDEN / "spiece_a.model"


def test_bytes_are_moved_up_by_three() -> None:
    tokens = tokens_from("")
    assert isinstance(tokens, ByteTokens) and tokens.size == 259
    assert encode(tokens, "aé").tolist() == [100, 198, 172]
    assert tokens.text([1, 100, 0, 198, 172, 300]) == "aé"


def test_a_sentencepiece_model_gives_the_tokens_that_sentencepiece_gives() -> None:
    tokens = FileTokens(MODEL)
    assert (tokens.size, tokens.offset) == (600, 0)
    for line, ids in json.loads((GOLDEN / "spiece_a.json").read_text())["lines"]:
        assert tokens.tokenizer.encode(line, add_special_tokens=False).ids == ids, line


def test_a_long_text_is_its_lines_one_by_one() -> None:
    tokens = FileTokens(MODEL)
    text = "".join(f"line {i}  of some\ttext\n" for i in range(5000))
    whole = tokens.stored(np.frombuffer(text.encode(), dtype=np.uint8))
    assert whole.dtype == np.uint16
    lines = [encode(tokens, line) for line in text.splitlines(keepends=True)]
    assert np.array_equal(whole, np.concatenate(lines))
    assert tokens.text(torch.from_numpy(lines[12])) == "line 12 of some text"
    assert len(tokens.stored(np.zeros(0, dtype=np.uint8))) == 0


def test_text_that_looks_like_a_control_piece_is_no_control_piece() -> None:
    found = encode(FileTokens(MODEL), "a </s> b <pad>")
    assert not {0, 1} & set(found.tolist())


def test_ids_of_a_file_without_padding_and_end_in_their_places_are_moved_up(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "def": 1, "(": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(2)
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = tokens_from(str(tmp_path / "tokenizer.json"))
    assert (tokens.size, tokens.offset) == (5, 2)
    assert encode(tokens, "( def x (").tolist() == [4, 3, 2, 4]
    assert tokens.text([4, 3, 1, 0, 7]) == "( def"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.model", None, "none.model does not exist; give a tokenizer.json or a spiece.model"),
        ("a.model", b"", "is no SentencePiece model of kind unigram"),
        ("b.model", MODEL.read_bytes()[:-1], "is no SentencePiece model, or is cut short; fetch it again"),
        ("c.model", b"PK\x03\x04 something else", "is no SentencePiece model, or is cut short"),
        ("tokenizer.json", b"{}", "is no tokenizer.json"),
        ("tokenizer.json", b"\xff", "is no tokenizer.json"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_a_sentence(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as caught:
        FileTokens(tmp_path / name)
    assert "\n" not in str(caught.value)
