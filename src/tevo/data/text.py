"""Real text as bytes: the running CPython's standard library, or the user's own files, split so that nothing leaks.

A token is a byte, so every file is a sequence over a vocabulary of 256 and no tokeniser stands between two results.
The trivial models every result is set against are here too:

    p1(b)     = (N(b) + 1) / (N + 256)                                          add-one unigram            (1)
    p2(b | a) = (N(a, b) + T(a) p1(b)) / (N(a) + T(a))                          Witten-Bell bigram         (2)

with N counts over the train split, N(a) = sum_b N(a, b), and T(a) the number of different bytes seen after a; p1 where
a was never seen. Bits per byte: the mean of -log2 p over the held-out bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import platform
import stat
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["SPLITS", "Bytes", "Corpus", "bigram_bits", "files_corpus", "stdlib_corpus", "unigram_bits"]

Bytes: TypeAlias = npt.NDArray[np.uint8]
SPLITS = ("train", "valid", "test")

# whole packages are held out, about 6 % of the bytes each; every one exists under the same name in Python 3.11 to 3.14
VALID_PACKAGES = frozenset({"argparse", "http", "json", "pathlib", "statistics", "tarfile", "threading"})
TEST_PACKAGES = frozenset({"inspect", "logging", "subprocess", "urllib", "zipfile"})
# what distributors leave out, ship apart or generate at build time, so that one CPython release gives the same bytes
OUTSIDE = frozenset(
    {"distutils", "ensurepip", "idlelib", "lib-dynload", "lib2to3", "tkinter", "turtledemo"}
    | {"dist-packages", "site-packages", "sitecustomize.py", "usercustomize.py", "_distutils_system_mod.py"}
)
TESTS = frozenset({"test", "tests", "idle_test"})

BINARY_PROBE = 8192  # bytes looked at for a NUL, the sign of a binary file; as version control systems do
GREATEST = 1 << 32  # bytes: a corpus is held in memory, and windows are drawn with 32-bit arithmetic
HELD_OUT = 20  # one part in 20 (5 %) for valid, as much for test


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Bytes in three splits, and what is needed to know them again.

    Args:
        name: "stdlib", or the path as the user gave it.
        splits: split name -> its bytes, read-only and in memory.
        files: split name -> the files (or the files' parts) in the order of the bytes, paths relative to the root.
        sha256: split name -> hash of its bytes.
        source: where the bytes are from, with the Python release for the standard library.
        notes: one sentence for each thing done to the input (what was skipped, what was cut) that a reader should know.
    """

    name: str
    splits: Mapping[str, Bytes]
    files: Mapping[str, tuple[str, ...]]
    sha256: Mapping[str, str]
    source: str
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, object]:
        """What a run records of its data, ready for JSON."""
        return {
            "name": self.name,
            "source": self.source,
            "bytes": {split: len(self.splits[split]) for split in SPLITS},
            "files": {split: len(self.files[split]) for split in SPLITS},
            "sha256": dict(self.sha256),
            "notes": list(self.notes),
        }


def stdlib_corpus() -> Corpus:
    """The Python files of the running CPython's standard library, whole packages held out.

    Tests, installed packages and what distributors ship apart (``OUTSIDE``) are left out. Files follow each other in
    the order of their package's name, then of their path, with nothing between them.

    Raises:
        ValueError: the standard library is not there as source files (frozen or zipped interpreters).
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[tuple[str, str, bytes]]] = {split: [] for split in SPLITS}
    for folder, names, files in os.walk(root):
        inside = Path(folder).relative_to(root)
        # pruned in place, so that os.walk does not enter
        names[:] = [n for n in names if n not in TESTS and n != "__pycache__" and (inside.parts or _belongs(n))]
        for file in files:
            path = inside / file
            if path.suffix != ".py" or not _belongs(path.parts[0]) or (root / path).is_symlink():
                continue
            package = path.parts[0].removesuffix(".py")
            split = "valid" if package in VALID_PACKAGES else "test" if package in TEST_PACKAGES else "train"
            found[split].append((package, path.as_posix(), _read(root / path)))
    if not all(found.values()):
        raise ValueError(
            f"the standard library's source is not in {root}, where this Python says it is; give text of your own"
        )
    parts = {split: [(path, text) for _, path, text in sorted(rows)] for split, rows in found.items()}
    return _corpus("stdlib", parts, f"standard library of {platform.python_implementation()} {sys.version.split()[0]}")


def files_corpus(path: str | os.PathLike[str]) -> Corpus:
    """A text file, or all text files below a folder, whatever their suffix.

    Taken as they are: bytes that are not UTF-8, NUL bytes after the first 8192, any line ending. Taken off: a UTF-8
    byte-order mark. Left out, each with a note: empty files, files that look binary (a NUL among the first 8192 bytes,
    UTF-16 included), byte-identical copies, symbolic links, whatever is not a regular file. Names that begin with a
    dot are not looked at.

    Held out are whole files where there are ten or more: in the order of the hash of their path, none of more than a
    fifth of all bytes, until 5 % are reached for valid and again for test. Where there are fewer, or where such files
    do not reach 5 %, the last 10 % of each file: half for valid, half for test.

    Raises:
        ValueError: nothing is there, no text is in it, or it is too short or too long to be split.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"data: {str(path)!r} does not exist; give a text file or a folder of text files")
    if not (root.is_dir() or root.is_file()):
        raise ValueError(
            f"data: {str(path)!r} is neither a file nor a folder; give a text file or a folder of text files"
        )
    names, passed = _listing(root) if root.is_dir() else ([root.name], {})
    base = root if root.is_dir() else root.parent
    texts, notes = _texts(base, names, passed)
    total = sum(len(text) for _, text in texts)
    if not texts:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise ValueError(f"data: {str(path)!r} holds no text{why}; give a text file or a folder of text files")
    if total < 2 * HELD_OUT:
        raise ValueError(f"data: {str(path)!r} holds {total} bytes of text, too few to hold some out; give at least 40")
    parts = _whole_files(texts, total)
    if parts is None:
        notes.append(f"the last 10 % of each of {len(texts)} file{'s' * (len(texts) != 1)} held out")
        parts = _tails(texts)
    return _corpus(str(path), parts, str(path), tuple(notes))


def unigram_bits(corpus: Corpus, split: str = "valid") -> float:
    """Bits per byte of the add-one unigram (eq. 1), over all bytes of a split but the first, as the bigram's."""
    held = corpus.splits[split]
    return unigram_bits_of(corpus.splits["train"], held[1:])


def bigram_bits(corpus: Corpus, split: str = "valid") -> float:
    """Bits per byte of the bigram (eq. 2), over all bytes of a split but the first, which nothing precedes."""
    held = corpus.splits[split]
    return bigram_bits_of(corpus.splits["train"], held[:-1], held[1:])


def unigram_bits_of(train: Bytes, targets: Bytes) -> float:
    """Bits per byte of eq. 1 over ``targets`` (any shape)."""
    return float(-np.log2(_unigram(train))[targets].mean())


def bigram_bits_of(train: Bytes, before: Bytes, targets: Bytes) -> float:
    """Bits per byte of eq. 2 over ``targets`` (any shape), each after its byte in ``before`` (same shape)."""
    pairs = np.bincount(train[:-1].astype(np.uint16) * np.uint16(256) + train[1:], minlength=65536)
    counts = pairs.reshape(256, 256).astype(np.float64)  # N(a, b)
    seen = counts.sum(1, keepdims=True)
    kinds = (counts > 0).sum(1, keepdims=True)
    p1 = _unigram(train)
    # a row without counts has no kinds either: dividing by 1 leaves zeros, and p1 takes their place
    p2 = np.where(seen > 0, (counts + kinds * p1) / np.maximum(seen + kinds, 1), p1)
    return float(-np.log2(p2)[before, targets].mean())


def _unigram(train: Bytes) -> npt.NDArray[np.float64]:
    return (np.bincount(train, minlength=256) + 1) / (len(train) + 256)


def _belongs(top: str) -> bool:
    """Whether a top-level name of the standard library's folder is part of the corpus."""
    return not (top in OUTSIDE or top in TESTS or top.startswith(("_sysconfigdata", "config-", ".")))


def _listing(root: Path) -> tuple[list[str], dict[str, int]]:
    """Relative paths of the regular files below a folder, sorted, and how many entries were passed over, and why."""
    names: list[str] = []
    passed = {"symbolic links": 0, "special files": 0}

    def refuse(error: OSError) -> None:
        raise ValueError(f"data: cannot read folder {error.filename!r} ({error.strerror}); leave it out, or allow it")

    for folder, folders, files in os.walk(root, onerror=refuse):
        # os.walk lists a link to a folder among the folders, and does not enter it
        passed["symbolic links"] += sum(os.path.islink(os.path.join(folder, n)) for n in folders if n[0] != ".")
        folders[:] = [n for n in folders if n[0] != "."]
        for file in files:
            if file[0] == ".":
                continue
            full = os.path.join(folder, file)
            mode = os.lstat(full).st_mode
            if stat.S_ISREG(mode):
                names.append(Path(full).relative_to(root).as_posix())
            else:
                passed["symbolic links" if stat.S_ISLNK(mode) else "special files"] += 1
    return sorted(names), passed


def _texts(base: Path, names: list[str], passed: dict[str, int]) -> tuple[list[tuple[str, bytes]], list[str]]:
    """The files that are text, each once, and a note for each kind of file that was passed over or changed."""
    texts: list[tuple[str, bytes]] = []
    counts = {"empty files": 0, "files that look binary": 0, "byte-identical copies": 0} | passed
    marks = foreign = total = 0
    known: set[bytes] = set()
    for name in names:
        total += (base / name).stat().st_size
        if total > GREATEST:
            raise ValueError(f"data: {str(base)!r} holds more than {GREATEST >> 30} GiB, the limit; give a part of it")
        text = _read(base / name)
        if b"\0" in text[:BINARY_PROBE]:
            counts["files that look binary"] += 1
            continue
        marks += text.startswith(codecs.BOM_UTF8)
        text = text.removeprefix(codecs.BOM_UTF8)
        digest = hashlib.sha256(text).digest()
        if not text:
            counts["empty files"] += 1
        elif digest in known:
            # a copy could put a held-out file into train
            counts["byte-identical copies"] += 1
        else:
            known.add(digest)
            foreign += not _is_utf8(text)
            texts.append((name, text))
    notes = [f"left out: {count} {kind}" for kind, count in counts.items() if count]
    if marks:
        notes.append(f"byte-order marks taken off: {marks}")
    if foreign:
        notes.append(f"not valid UTF-8, bytes kept as they are: {foreign} of {len(texts)} files")
    return texts, notes


def _whole_files(texts: list[tuple[str, bytes]], total: int) -> dict[str, list[tuple[str, bytes]]] | None:
    """Whole files held out, or None where that cannot be done well."""
    if len(texts) < 10:
        return None
    parts: dict[str, list[tuple[str, bytes]]] = {split: [] for split in SPLITS}
    size = dict.fromkeys(SPLITS, 0)
    for name, text in sorted(texts, key=lambda row: hashlib.sha256(os.fsencode(row[0])).digest()):
        split = next((s for s in ("valid", "test") if size[s] * HELD_OUT < total), "train")
        if len(text) * 5 > total:
            split = "train"
        parts[split].append((name, text))
        size[split] += len(text)
    if any(size[s] * HELD_OUT < total for s in SPLITS):
        return None
    return {split: sorted(rows) for split, rows in parts.items()}


def _tails(texts: list[tuple[str, bytes]]) -> dict[str, list[tuple[str, bytes]]]:
    """The last 10 % of each file held out: the first half of it for valid, the second for test."""
    parts: dict[str, list[tuple[str, bytes]]] = {split: [] for split in SPLITS}
    for name, text in texts:
        # rounded up, so that a short file gives something to each
        held = -(-len(text) // HELD_OUT)
        for split, part in zip(SPLITS, (text[: -2 * held], text[-2 * held : -held], text[-held:]), strict=True):
            parts[split].append((name, part))
    return parts


def _corpus(
    name: str, parts: Mapping[str, list[tuple[str, bytes]]], source: str, notes: tuple[str, ...] = ()
) -> Corpus:
    joined = {split: b"".join(text for _, text in parts[split]) for split in SPLITS}
    return Corpus(
        name=name,
        # frombuffer over bytes is read-only
        splits={split: np.frombuffer(text, dtype=np.uint8) for split, text in joined.items()},
        files={split: tuple(path for path, _ in parts[split]) for split in SPLITS},
        sha256={split: hashlib.sha256(text).hexdigest() for split, text in joined.items()},
        source=source,
        notes=notes,
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"data: cannot read {str(path)!r} ({error.strerror}); leave it out, or allow it") from error


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
