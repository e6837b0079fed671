from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tevo.data.text import SPLITS, Corpus, bigram_bits, files_corpus, stdlib_corpus, unigram_bits


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return stdlib_corpus()


def write(folder: Path, **files: bytes) -> Path:
    for name, text in files.items():
        (folder / f"{name}.txt").write_bytes(text)
    return folder


def whole(corpus: Corpus) -> bytes:
    return b"".join(corpus.splits[split].tobytes() for split in SPLITS)


def test_stdlib_reads_the_same_twice(stdlib: Corpus) -> None:
    again = stdlib_corpus()
    assert again.sha256 == stdlib.sha256
    assert again.files == stdlib.files


def test_stdlib_is_large_enough_to_compare_on(stdlib: Corpus) -> None:
    sizes = {split: len(stdlib.splits[split]) for split in SPLITS}
    assert sizes["train"] > 6_000_000
    # about one part in twenty each
    total = sum(sizes.values())
    assert all(0.03 < sizes[split] / total < 0.1 for split in ("valid", "test"))


def test_stdlib_holds_out_whole_packages(stdlib: Corpus) -> None:
    packages = {split: {f.split("/")[0].removesuffix(".py") for f in stdlib.files[split]} for split in SPLITS}
    assert not packages["train"] & packages["valid"]
    assert not packages["train"] & packages["test"]
    assert not packages["valid"] & packages["test"]
    assert "json" in packages["valid"] and "logging" in packages["test"] and "ast" in packages["train"]


def test_stdlib_leaves_out_tests_and_installed_packages(stdlib: Corpus) -> None:
    outside = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "lib2to3", "tkinter"}
    for split in SPLITS:
        for file in stdlib.files[split]:
            assert not outside & set(file.split("/")), file
            assert not file.startswith("_sysconfigdata")


def test_facts_tell_the_release_and_the_hashes(stdlib: Corpus) -> None:
    import platform

    facts = stdlib.facts()
    assert platform.python_version() in str(facts["source"])
    assert facts["sha256"] == stdlib.sha256


def test_splits_cannot_be_written_to(stdlib: Corpus) -> None:
    with pytest.raises(ValueError, match="read-only"):
        stdlib.splits["train"][0] = 0


def test_a_single_file_is_cut_into_its_beginning_and_its_last_tenth(tmp_path: Path) -> None:
    text = bytes(range(33, 133)) * 2
    (tmp_path / "a.md").write_bytes(text)
    corpus = files_corpus(tmp_path / "a.md")
    assert whole(corpus) == text
    assert [len(corpus.splits[split]) for split in SPLITS] == [180, 10, 10]


def test_few_files_each_give_their_last_tenth(tmp_path: Path) -> None:
    corpus = files_corpus(write(tmp_path, a=b"a" * 100, b=b"b" * 40, c=b"c" * 60))
    for split, part in zip(SPLITS, (18, 1, 1), strict=True):
        assert Counter(corpus.splits[split].tobytes()) == {97: 5 * part, 98: 2 * part, 99: 3 * part}


def test_ten_files_are_held_out_whole(tmp_path: Path) -> None:
    files = {f"f{i}": bytes([65 + i]) * 50 for i in range(12)}
    corpus = files_corpus(write(tmp_path, **files))
    for split in SPLITS:
        assert all(count == 50 for count in Counter(corpus.splits[split].tobytes()).values())
    assert [len(corpus.files[split]) for split in SPLITS] == [10, 1, 1]
    assert Counter(whole(corpus)) == Counter(b"".join(files.values()))


def test_files_are_held_out_in_the_order_of_the_hash_of_their_path(tmp_path: Path) -> None:
    corpus = files_corpus(write(tmp_path, **{f"f{i}": bytes([65 + i]) * 50 for i in range(12)}))
    order = sorted((f"f{i}.txt" for i in range(12)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert (corpus.files["valid"], corpus.files["test"]) == ((order[0],), (order[1],))


@pytest.mark.parametrize("big", range(11))
def test_a_file_of_more_than_a_fifth_is_never_held_out_whole(tmp_path: Path, big: int) -> None:
    corpus = files_corpus(write(tmp_path, **{f"f{i}": bytes([65 + i]) * (400 if i == big else 100) for i in range(11)}))
    assert f"f{big}.txt" in corpus.files["train"]
    assert all(len(corpus.files[split]) == 1 for split in ("valid", "test"))


def test_ten_files_of_which_one_is_nearly_all_give_their_last_tenth(tmp_path: Path) -> None:
    corpus = files_corpus(write(tmp_path, big=b"z" * 10_000, **{f"f{i}": bytes([65 + i]) * 4 for i in range(12)}))
    assert len(corpus.files["valid"]) == 13
    assert any("10 %" in note for note in corpus.notes)


def test_bytes_that_are_not_utf8_and_late_nul_bytes_are_kept(tmp_path: Path) -> None:
    text = b"\xff\xfe not text \x80" + b"a" * 9000 + b"\0" + b"b" * 50
    (tmp_path / "a").write_bytes(text)
    corpus = files_corpus(tmp_path / "a")
    assert whole(corpus) == text
    assert any("not valid UTF-8" in note for note in corpus.notes)


def test_a_byte_order_mark_is_taken_off(tmp_path: Path) -> None:
    corpus = files_corpus(write(tmp_path, a=b"\xef\xbb\xbf" + b"hello " * 20))
    assert whole(corpus) == b"hello " * 20
    assert any("byte-order marks" in note for note in corpus.notes)


def test_binary_empty_hidden_linked_and_repeated_files_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.txt").write_bytes(b"secret" * 50)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.txt").write_bytes(b"outside" * 50)
    write(folder, a=b"text " * 20, copy=b"text " * 20, empty=b"", only_mark=b"\xef\xbb\xbf")
    (folder / "image.png").write_bytes(b"\x89PNG\0" + b"x" * 100)
    (folder / "wide.txt").write_bytes("wide".encode("utf-16") * 20)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"hidden" * 50)
    (folder / ".hidden").write_bytes(b"hidden" * 50)
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    corpus = files_corpus(folder)
    assert whole(corpus) == b"text " * 20
    notes = "; ".join(corpus.notes)
    for count in (
        "2 empty files",
        "2 files that look binary",
        "1 byte-identical copies",
        "3 symbolic links",
        "1 special files",
    ):
        assert f"left out: {count}" in notes


def test_nothing_is_said_of_clean_input(tmp_path: Path) -> None:
    corpus = files_corpus(write(tmp_path, **{f"f{i}": bytes([65 + i]) * 50 for i in range(12)}))
    assert corpus.notes == ()


def test_files_corpus_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    files = {f"f{i}": bytes([65 + i]) * (50 + i) for i in range(12)}
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        hashes.append(files_corpus(write(tmp_path / name, **files)).sha256)
    assert hashes[0] == hashes[1]


def test_a_file_too_long_to_be_held_in_memory_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "huge", "wb") as file:
        file.truncate((1 << 32) + 1)  # sparse: takes no room
    with pytest.raises(ValueError, match="more than 4 GiB"):
        files_corpus(tmp_path / "huge")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no text; give"),
        ({"a": b""}, r"holds no text \(left out: 1 empty files\)"),
        ({"a": b"\0" * 100}, r"holds no text \(left out: 1 files that look binary\)"),
        ({"a": b"short"}, "holds 5 bytes of text, too few"),
    ],
)
def test_folders_without_enough_text_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files_corpus(write(tmp_path, **files))


def test_a_path_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give"):
        files_corpus(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        files_corpus(tmp_path / "pipe")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a=b"text " * 20)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt' \(Permission denied\)"):
        files_corpus(tmp_path)


def slow_bigram(train: bytes, held: bytes) -> float:
    """Equation 2 byte by byte, with dictionaries."""
    after: dict[int, Counter[int]] = {}
    for a, b in pairwise(train):
        after.setdefault(a, Counter())[b] += 1
    ones = Counter(train)
    bits = 0.0
    for a, b in pairwise(held):
        p = (ones[b] + 1) / (len(train) + 256)
        if a in after:
            followers = after[a]
            p = (followers[b] + len(followers) * p) / (sum(followers.values()) + len(followers))
        bits -= math.log2(p)
    return bits / (len(held) - 1)


def test_bigram_equals_counting_byte_by_byte(tmp_path: Path) -> None:
    generator = np.random.Generator(np.random.Philox(7))
    text = generator.integers(90, 110, 900, dtype=np.uint8).tobytes()
    # bytes that the train split never shows: never seen after anything, and never before anything
    (tmp_path / "a").write_bytes(text + b"new" + text[:100] + b"\xfe")
    corpus = files_corpus(tmp_path / "a")
    for split in SPLITS:
        expected = slow_bigram(corpus.splits["train"].tobytes(), corpus.splits[split].tobytes())
        assert bigram_bits(corpus, split) == pytest.approx(expected, rel=1e-12)  # sums of 1000 logarithms


def test_unigram_equals_counting_byte_by_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(65, 91)) * 11 + b"unseen~")
    corpus = files_corpus(tmp_path / "a")
    train, held = corpus.splits["train"].tobytes(), corpus.splits["test"].tobytes()
    ones = Counter(train)
    expected = -sum(math.log2((ones[b] + 1) / (len(train) + 256)) for b in held[1:]) / (len(held) - 1)
    assert unigram_bits(corpus, "test") == pytest.approx(expected, rel=1e-12)


def test_bigram_probabilities_sum_to_one() -> None:
    from tevo.data.text import bigram_bits_of

    train = np.frombuffer(b"abracadabra" * 3, dtype=np.uint8)
    for before in b"abz":
        each = [2 ** -bigram_bits_of(train, np.array([before], np.uint8), np.array([b], np.uint8)) for b in range(256)]
        assert sum(each) == pytest.approx(1, rel=1e-12)


def test_bigram_knows_more_than_unigram_and_unigram_more_than_nothing(stdlib: Corpus) -> None:
    assert bigram_bits(stdlib) < unigram_bits(stdlib) - 0.5 < 7.5
