"""Text as tokens: bytes in ByT5's scheme, or a user's ``tokenizer.json`` or ``spiece.model``. No file needs the network.

Padding is 0 and the end 1, as in T5. The ids of a file that has them there are its own; those of any other file are moved up
by two. Sentinels are not the tokenizer's: a model has them behind its ids.

A ``spiece.model`` is read here, as its format (protocol buffers) and unigram models are simple: pieces with their scores, and
a table of characters that are put in place of others. Control pieces are never found in a text. What is in a line is one
text: a file's lines are encoded one by one, and their ends belong to them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tevo.bench.tasks.contract import Rows
from tevo.colt5.tasks.contract import END, PAD
from tevo.colt5.tasks.modules import OFFSET, bytes_of
from tevo.data.text import Bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["ByteTokens", "FileTokens", "Tokens", "encode", "tokens_from"]

# lines that are encoded at once, by as many threads as the library takes
_LINES = 4096


class Tokens(Protocol):
    """What turns text into tokens and back. Ids are below ``size``; what :meth:`stored` keeps is ``offset`` below them."""

    size: int
    offset: int
    facts: dict[str, Any]

    def stored(self, text: Bytes) -> npt.NDArray[Any]:
        """A long text in few bytes a token."""

    def text(self, tokens: Sequence[int] | Tensor) -> str:
        """What tokens say; padding, end and sentinels say nothing."""


def encode(tokens: Tokens, text: str) -> Rows:
    """The ids of a text."""
    raw = np.frombuffer(text.encode("utf-8", errors="surrogateescape"), dtype=np.uint8)
    return tokens.stored(raw).astype(np.int64) + tokens.offset


class ByteTokens:
    """ByT5's scheme: byte + 3, after padding, end and an unused sign."""

    size = 256 + OFFSET
    offset = OFFSET

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"tokens": "bytes"}

    def stored(self, text: Bytes) -> npt.NDArray[Any]:
        """The bytes themselves."""
        return text

    def text(self, tokens: Sequence[int] | Tensor) -> str:
        """As UTF-8."""
        return bytes_of(tokens).decode("utf-8", errors="replace")


class FileTokens:
    """The tokens of a file.

    Args:
        path: a ``tokenizer.json`` as of the package tokenizers, or a SentencePiece model of T5's kind.

    Raises:
        ValueError: not such a file, or the package tokenizers is missing.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"tokens: {path} does not exist; give a tokenizer.json or a spiece.model, or leave it out")
        self.tokenizer, first = _spiece(path) if path.suffix == ".model" else _json(path)
        self.offset = 0 if first == ["<pad>", "</s>"] else END + 1
        self.size = self.tokenizer.get_vocab_size() + self.offset
        self.facts: dict[str, Any] = {"tokens": hashlib.sha256(path.read_bytes()).hexdigest(), "size": self.size}

    def stored(self, text: Bytes) -> npt.NDArray[Any]:
        """16 or 32 bits a token."""
        lines = bytes(text).decode("utf-8", errors="replace").splitlines(keepends=True)
        kind = np.uint16 if self.size <= 1 << 16 else np.uint32
        found = [np.zeros(0, dtype=kind)]
        for first in range(0, len(lines), _LINES):
            for one in self.tokenizer.encode_batch(lines[first : first + _LINES], add_special_tokens=False):
                found.append(np.array(one.ids, dtype=kind))
        return np.concatenate(found)

    def text(self, tokens: Sequence[int] | Tensor) -> str:
        """As the file's own decoder puts it."""
        ids = [int(token) - self.offset for token in tokens if int(token) not in (PAD, END)]
        return self.tokenizer.decode([i for i in ids if 0 <= i < self.size - self.offset])


def tokens_from(path: str) -> Tokens:
    """Those of a file; bytes where there is none."""
    return FileTokens(path) if path else ByteTokens()


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError("tokens of a file need the package tokenizers; pip install 'tevo[hf]'") from error
    return tokenizers


def _json(path: Path) -> tuple[Tokenizer, list[str | None]]:
    """And the names of its first two tokens."""
    library = _library()
    try:
        made = library.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    # the library raises Exception itself
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"tokens: {path} is no tokenizer.json ({reason}); give one, or a spiece.model") from error
    made.no_truncation()
    made.no_padding()
    return made, [made.id_to_token(PAD), made.id_to_token(END)]


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)
_UNIGRAM = 1


def _spiece(path: Path) -> tuple[Tokenizer, list[str | None]]:
    """A SentencePiece model, of fields 1 pieces, 2 how it was trained, 3 how text is normalised; and its first two pieces."""
    library = _library()
    pieces: list[_Piece] = []
    trained: dict[int, Any] = {}
    normal: dict[int, Any] = {}
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                inner = dict(_fields(value))
                score = struct.unpack("<f", inner.get(2, b"\0\0\0\0"))[0]
                pieces.append(_Piece(inner[1].decode(), score, inner.get(3, _NORMAL)))
            elif field == 2:
                trained = dict(_fields(value))
            elif field == 3:
                normal = dict(_fields(value))
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"tokens: {path} is no SentencePiece model, or is cut short; fetch it again") from error
    unknown = [i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN]
    if trained.get(3, _UNIGRAM) != _UNIGRAM or len(unknown) != 1:
        raise ValueError(f"tokens: {path} is no SentencePiece model of kind unigram, as T5's; give a tokenizer.json")
    hidden = {_CONTROL, _UNKNOWN, _UNUSED}
    # a name that no text has
    names = [piece.text if piece.kind not in hidden else f"\0{piece.text}" for piece in pieces]
    table = zip(names, (piece.score for piece in pieces), strict=True)
    fallback = any(piece.kind == _BYTE for piece in pieces)
    made = library.Tokenizer(library.models.Unigram(list(table), unk_id=unknown[0], byte_fallback=fallback))
    steps: list[Any] = [library.normalizers.Precompiled(normal[2])] if normal.get(2) else []
    # both are on unless the file says no
    if normal.get(4, 1):
        steps += [library.normalizers.Strip(), library.normalizers.Replace(library.Regex(" {2,}"), " ")]
    if steps:
        made.normalizer = library.normalizers.Sequence(steps)
    scheme = "always" if normal.get(3, 1) else "never"
    made.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    made.decoder = library.decoders.Metaspace(prepend_scheme=scheme)
    return made, [piece.text for piece in pieces[: END + 1]]


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: whole numbers, or bytes."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise ValueError("no such kind of field")
            size, at = _varint(raw, at)
        if at + size > len(raw):
            raise ValueError("cut short")
        yield key >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
