"""Readers against files written here, in the official layouts, by a writer that shares nothing with them."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tevo.slot_attention.data import (
    LAYOUTS,
    ArrayFile,
    ClevrFolder,
    ImageFolder,
    RecordFile,
    convert,
    ids_of,
    masks,
    multi_dsprites_like,
    set_targets,
    tetrominoes_like,
)
from tevo.slot_attention.data.folders import CODES, factors_of
from tevo.slot_attention.data.layout import Scene
from tevo.slot_attention.data.records import Layout, crc32c, decode, parse_example, payloads

SMALL = Layout(image=(4, 3, 3), entities=3, factors={"x": (), "color": (3,), "kind": ()}, codes=frozenset({"kind"}))


def plain_crc(data: bytes) -> int:
    """CRC-32C bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: Mapping[str, np.ndarray | list[bytes]]) -> bytes:
    """An Example: floats packed, integers packed, each byte of a uint8 array a string of its own."""
    entries = b""
    for name, values in features.items():
        if isinstance(values, list):
            value = field(1, b"".join(field(1, text) for text in values))
        elif values.dtype == np.uint8:
            value = field(1, b"".join(b"\x0a\x01" + bytes([v]) for v in values.ravel().tolist()))
        elif values.dtype == np.float32:
            value = field(2, field(1, values.astype("<f4").tobytes()))
        else:
            value = field(3, field(1, b"".join(varint(v) for v in values.ravel().tolist())))
        entries += field(1, field(1, name.encode()) + field(2, value))
    return field(1, entries)


def framed(payload: bytes, crc: Callable[[bytes], int] = crc32c) -> bytes:
    def masked(data: bytes) -> bytes:
        c = crc(data)
        return struct.pack("<I", ((c >> 15 | c << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    head = struct.pack("<Q", len(payload))
    return head + masked(head) + payload + masked(payload)


def official(scene: Scene, number: int, layout: Layout) -> bytes:
    mask = masks(scene["ids"][number], layout.entities)
    features = {name: values[number] for name, values in scene.items() if name != "ids"}
    return example({**features, "mask": mask.transpose(1, 2, 0, 3).copy() if layout.last else mask})


def small(seed: int) -> tuple[dict[str, Any], bytes]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 3, (4, 3)).astype(np.uint8)
    features = {
        "image": rng.integers(0, 256, (4, 3, 3)).astype(np.uint8),
        "mask": masks(ids, 3),
        "x": rng.standard_normal(3).astype(np.float32),
        "color": rng.standard_normal((3, 3)).astype(np.float32),
        "kind": rng.integers(0, 4, 3).astype(np.uint8),
    }
    return {**features, "ids": ids}, example(features)


def test_crc_equals_the_published_value_and_the_bitwise_form() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    rng = np.random.default_rng(0)
    for length in (*range(70), 255, 256, 257, 1000, 4095, 4097, 10_001):
        data = rng.bytes(length)
        assert crc32c(data) == plain_crc(data)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["tetrominoes", "multi_dsprites_binarized", "multi_dsprites_colored_on_grayscale"])
def test_a_file_in_the_official_layout_is_read_exactly(name: str, zipped: bool, tmp_path: Path) -> None:
    if name == "tetrominoes":
        scene = tetrominoes_like(0, range(5))
    else:
        scene = multi_dsprites_like(0, range(5), variant=name.removeprefix("multi_dsprites_"))
    whole = b"".join(framed(official(scene, i, LAYOUTS[name])) for i in range(5))
    # neither name says whether it is zipped
    path = tmp_path / "scenes.tfrecords"
    path.write_bytes(gzip.compress(whole) if zipped else whole)
    read = list(RecordFile(path, name))
    assert len(read) == 5
    for i, got in enumerate(read):
        assert list(got) == ["image", "ids", *LAYOUTS[name].factors]
        for key, values in got.items():
            assert values.dtype == scene[key].dtype
            assert np.array_equal(values, scene[key][i])
    assert [s["x"].tolist() for s in RecordFile(path, name, start=1, stop=3)] == scene["x"][1:3].tolist()


def test_clevr_codes_and_floats_are_read_and_checked_against_an_independent_crc(tmp_path: Path) -> None:
    layout, rng = LAYOUTS["clevr_with_masks"], np.random.default_rng(0)
    ids = np.repeat(np.arange(240) // 24, 320).reshape(240, 320).astype(np.uint8)
    features: dict[str, Any] = {
        name: rng.integers(0, 9, 11).astype(np.uint8)
        if name in layout.codes
        else rng.standard_normal((11, *inner)).astype(np.float32)
        for name, inner in layout.factors.items()
    }
    features["image"] = rng.integers(0, 256, (240, 320, 3)).astype(np.uint8)
    (tmp_path / "clevr").write_bytes(framed(example({**features, "mask": masks(ids, 11)})))
    (scene,) = RecordFile(tmp_path / "clevr", "clevr_with_masks")
    for name, values in {**features, "ids": ids}.items():
        assert np.array_equal(scene[name], values)
    _, payload = small(0)
    (tmp_path / "small").write_bytes(framed(payload, plain_crc))
    assert list(payloads(tmp_path / "small")) == [payload]


def test_objects_room_has_four_masks_that_are_no_objects() -> None:
    ids = np.random.default_rng(0).integers(0, 7, (64, 64)).astype(np.uint8)
    image = np.zeros((64, 64, 3), np.uint8)
    scene = decode(example({"image": image, "mask": masks(ids, 7)}), LAYOUTS["objects_room_train"])
    assert np.array_equal(scene["ids"], np.where(ids < 4, 0, ids.astype(int) - 3))


def test_examples_of_every_kind_are_parsed() -> None:
    features = {
        "words": [b"", b"abc", b"\x0a\x01"],
        "pixels": np.arange(7, dtype=np.uint8),
        "floats": np.array([1.5, -2.0], np.float32),
        "integers": np.array([0, 1, 300, 2**40]),
        "nothing": [],
    }
    got = parse_example(example(features))
    assert got["words"] == features["words"] and len(got["nothing"]) == 0
    for name in ("pixels", "floats", "integers"):
        assert np.array_equal(got[name], features[name])
    # one by one instead of packed, negative integers, and a field nobody knows
    odd = field(3, varint(1 << 3) + varint(2**64 - 5)) + field(9, b"?")
    single = field(2, varint(1 << 3 | 5) + struct.pack("<f", 2.5) + varint(1 << 3 | 5) + struct.pack("<f", -1))
    entry = field(1, field(1, b"n") + field(2, odd)) + field(1, field(1, b"f") + field(2, single))
    got = parse_example(field(1, entry))
    assert got["n"].tolist() == [-5] and got["f"].tolist() == [2.5, -1]  # type: ignore[union-attr]


def broken(change: Callable[[bytearray], None]) -> bytes:
    whole = bytearray(framed(small(1)[1]) + framed(small(2)[1]))
    change(whole)
    return bytes(whole)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (broken(lambda w: w.__setitem__(3, 7)), "record 0: wrong checksum of the length"),
        (broken(lambda w: w.__setitem__(30, w[30] ^ 1)), "record 0: wrong checksum of the payload"),
        (broken(lambda w: w.__delitem__(slice(-1, None))), "record 1: the file ends inside the record"),
        (broken(lambda w: w.__delitem__(slice(-9, None))), "record 1: the file ends inside the record"),
        (framed(small(1)[1])[:12], "record 0: the file ends inside the record"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "record 0: wrong checksum of the length"),
        (gzip.compress(framed(small(1)[1]))[:-20], "the gzip stream is broken"),
        (b"\x1f\x8b" + bytes(30), "the gzip stream is broken"),
        (struct.pack("<Q", 2**40) + framed(b"")[8:12], "wrong checksum of the length"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list(payloads(tmp_path / "file"))
    assert "\n" not in str(caught.value)


def test_a_record_of_great_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    head = struct.pack("<Q", 2**40)
    crc = plain_crc(head)
    check = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    (tmp_path / "file").write_bytes(head + struct.pack("<I", check))
    with pytest.raises(ValueError, match="1099511627776 bytes long, expected at most"):
        list(payloads(tmp_path / "file"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "feature 'image' is missing, the record has color"),
        ({"image": np.zeros((4, 3), np.uint8)}, r"'image' has 12 values of type uint8, expected bytes of shape \(4, 3"),
        ({"x": np.zeros(4, np.float32)}, r"'x' has 4 values of type float32, expected float32 \(3,\)"),
        ({"x": np.zeros(3, np.uint8)}, "'x' has 3 values of type uint8"),
        ({"x": np.zeros(3, np.int64)}, "'x' has 3 values of type int64"),
        ({"kind": np.zeros(3, np.float32)}, "'kind' has 3 values of type float32, expected bytes"),
        ({"mask": np.full((3, 4, 3, 1), 255, np.uint8)}, "'mask': a pixel belongs to two entities"),
    ],
)
def test_a_record_of_another_layout_is_refused(change: dict[str, Any], message: str) -> None:
    features = {k: v for k, v in {**small(0)[0], **change}.items() if v is not None and k != "ids"}
    with pytest.raises(ValueError, match=message):
        decode(example(features), SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "tetris"}, "layout='tetris', expected one of tetrominoes"),
        ({"layout": "tetrominoes", "start": 3, "stop": 2}, "start=3 and stop=2"),
        ({"layout": "tetrominoes", "start": -1}, "start=-1"),
        ({"layout": "tetrominoes"}, "is not a file"),
    ],
)
def test_a_record_file_that_cannot_be_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        RecordFile(tmp_path / "none", **arguments)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at, kind = int(rng.integers(0, len(out) + 1)), int(rng.integers(0, 5))
        if kind == 0 and at < len(out):
            out[at] = int(rng.integers(0, 256))
        elif kind == 1:
            del out[at : at + int(rng.integers(1, 9))]
        elif kind == 2:
            out[at:at] = rng.bytes(int(rng.integers(1, 9)))
        elif kind == 3 and at < len(out):
            out[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 4:
            del out[at:]
        if not out:
            break
    return bytes(out)


def fuzz_records(cases: int, tmp_path: Path, seed: int) -> None:
    rng, path = np.random.default_rng(seed), tmp_path / "file"
    good = [small(i)[1] for i in range(3)]
    refused = 0
    for case in range(cases):
        payload = good[case % 3]
        match case % 4:
            case 0:  # behind right checksums, so that the parser sees it
                content = framed(mutate(payload, rng))
            case 1:
                content = mutate(framed(payload) * 2, rng)
            case 2:
                content = mutate(gzip.compress(framed(payload) * 2, 1), rng)
            case _:
                content = framed(rng.bytes(int(rng.integers(0, 60))))
        path.write_bytes(content)
        try:
            for body in payloads(path):
                scene = decode(body, SMALL)
                assert scene["image"].shape == (4, 3, 3) and scene["ids"].max() < 3
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 2000
    assert refused > cases // 2


def test_fuzzed_records_are_read_or_refused(tmp_path: Path) -> None:
    fuzz_records(2000, tmp_path, 0)


@pytest.mark.slow
def test_ten_thousand_fuzzed_records_are_read_or_refused(tmp_path: Path) -> None:
    fuzz_records(10_000, tmp_path, 1)


OBJECTS = [
    {
        "shape": "cube",
        "size": "small",
        "material": "metal",
        "color": "gray",
        "rotation": 30.5,
        "coords_3d": [-1.5, 3.0, 0.35],
        "pixel_coords": [100.0, 50.0, 11.5],
        "visible_pixels": 300,
    },
    {
        "shape": "sphere",
        "size": "large",
        "material": "rubber",
        "color": "yellow",
        "rotation": 0.0,
        "coords_3d": [0.0, -3.0, 0.7],
        "pixel_coords": [1.0, 2.0, 9.0],
        "visible_pixels": 900,
    },
]


def png(array: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def folder(base: Path, *, listed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 6, 5, 3)).astype(np.uint8)
    ids = rng.integers(0, 3, (3, 6, 5)).astype(np.uint8)
    (base / "images").mkdir(parents=True)
    (base / "masks").mkdir()
    scenes = []
    for i in range(3):
        (base / f"images/{i:05d}.png").write_bytes(png(image[i]))
        (base / f"masks/{i:05d}.png").write_bytes(png(ids[i]))
        scenes.append(
            {"index": i, "objects": OBJECTS[: i + 1], "image": f"images/{i:05d}.png", "mask": f"masks/{i:05d}.png"}
        )
    if listed:
        (base / "scenes.json").write_text(json.dumps(scenes))
    return image, ids


def zipped(base: Path, out: Path) -> Path:
    with zipfile.ZipFile(out, "w") as archive:
        for path in sorted(base.rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(base).as_posix())
    return out


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("as_zip", [True, False])
def test_images_beside_id_images_are_read(as_zip: bool, listed: bool, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    image, ids = folder(tmp_path / "data", listed=listed)
    path = zipped(tmp_path / "data", tmp_path / "data.zip") if as_zip else tmp_path / "data"
    data = ImageFolder(path)
    assert len(data) == 3
    for i, scene in enumerate(data):
        assert np.array_equal(scene["image"], image[i]) and np.array_equal(scene["ids"], ids[i])
        assert ("visibility" in scene) == listed
    if listed:
        assert [data[i]["visibility"].sum() for i in range(3)] == [2, 3, 3]


def test_published_clevr_is_read(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    (tmp_path / "images/val").mkdir(parents=True)
    (tmp_path / "scenes").mkdir()
    scenes = []
    for i in range(2):
        name = f"CLEVR_val_{i:06d}.png"
        rgba = np.concatenate([image[i], np.full((4, 6, 1), 255, np.uint8)], -1)  # as published
        (tmp_path / "images/val" / name).write_bytes(png(rgba))
        objects = [{**{k: v for k, v in o.items() if k != "coords_3d"}, "3d_coords": o["coords_3d"]} for o in OBJECTS]
        scenes.append({"split": "val", "image_index": i, "image_filename": name, "objects": objects[i:]})
    (tmp_path / "scenes/CLEVR_val_scenes.json").write_text(json.dumps({"info": {}, "scenes": scenes}))
    data = ClevrFolder(tmp_path, split="val")
    assert len(data) == 2
    for i, scene in enumerate(data):
        assert np.array_equal(scene["image"], image[i])
    assert data[0]["y"][:3].tolist() == [0, 3, -3]
    with pytest.raises(ValueError, match=r"no scenes/CLEVR_train_scenes.json; split is 'train' or 'val'"):
        ClevrFolder(tmp_path)


def test_factors_have_the_names_order_and_codes_of_the_file_with_masks() -> None:
    scene, layout = factors_of(OBJECTS), LAYOUTS["clevr_with_masks"]
    assert list(scene) == list(layout.factors)
    for name, inner in layout.factors.items():
        assert scene[name].shape == (11, *inner)
        assert scene[name].dtype == (np.uint8 if name in layout.codes else np.float32)
    assert {name: scene[name][:4].tolist() for name in layout.codes} == {
        "size": [0, 2, 1, 0],
        "material": [0, 2, 1, 0],
        "shape": [0, 3, 1, 0],
        "color": [0, 6, 8, 0],
    }
    assert scene["visibility"].tolist() == [1, 1, 1] + [0] * 8


def test_set_targets_are_scaled_coordinates_then_one_hot_classes() -> None:
    targets = set_targets(factors_of(OBJECTS))
    assert targets.shape == (10, 19) and targets.dtype == np.float32
    gray, cube, small_, metal = 0, 0, 1, 1
    expected = np.zeros(19)
    expected[:3] = np.array([1.5, 6, 3.35]) / 6
    for at in (3 + small_, 5 + metal, 7 + cube, 10 + gray, 18):
        expected[at] = 1
    assert targets[0] == pytest.approx(expected, abs=1e-6)
    assert np.flatnonzero(targets[1, 3:]).tolist() == [0, 2, 5, 14, 15]  # large rubber sphere yellow real
    assert not targets[2:].any()
    both = {name: np.stack([values, values]) for name, values in factors_of(OBJECTS).items()}
    assert np.array_equal(set_targets(both), np.stack([targets, targets]))


def test_every_class_has_a_target_of_its_own() -> None:
    from tevo.slot_attention.data.folders import TARGETS

    assert {name: set(classes) for name, classes in TARGETS.items()} == {n: set(c) for n, c in CODES.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda base: (base / "scenes.json").write_text("{"), "scenes.json is no readable JSON"),
        (lambda base: (base / "scenes.json").write_text("{}"), "scenes.json is no list of scenes"),
        (lambda base: (base / "scenes.json").write_text("[]"), r"no scenes.json and no images/\*.png"),
        (lambda base: (base / "scenes.json").write_text('[{"image": 3}]'), "the name of an image is 3"),
        (lambda base: (base / "scenes.json").write_text('[{"image": "../a.png"}]'), "lies outside the folder"),
        (lambda base: (base / "scenes.json").write_text('[{"image": "/etc/a.png"}]'), "lies outside the folder"),
        (lambda base: (base / "images/00000.png").unlink(), "scene 0: images/00000.png cannot be read"),
        (lambda base: (base / "images/00000.png").write_bytes(b"GIF89a"), "scene 0: images/00000.png cannot be read"),
        (
            lambda base: (base / "images/00000.png").write_bytes((base / "images/00000.png").read_bytes()[:60]),
            "scene 0: images/00000.png cannot be read",
        ),
        (
            lambda base: (base / "masks/00000.png").write_bytes((base / "images/00000.png").read_bytes()),
            "mode RGB, expected 8 bits of ids",
        ),
        (
            lambda base: (base / "masks/00000.png").write_bytes(png(np.zeros((2, 2), np.uint8))),
            r"the mask is \(2, 2\), the image \(6, 5\)",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    pytest.importorskip("PIL")
    folder(tmp_path / "data")
    change(tmp_path / "data")
    with pytest.raises(ValueError, match=message) as caught:
        list(ImageFolder(tmp_path / "data"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (None, "'objects' is None, expected a list of at most 10"),
        ([{}] * 11, "'objects' is 11 of them, expected a list of at most 10"),
        ([{}], "object 1 is not as published"),
        ([3], "object 1 is not as published"),
        ([OBJECTS[0], {**OBJECTS[1], "color": "pink"}], "object 2 is not as published"),
        ([{**OBJECTS[0], "coords_3d": [1, 2]}], "object 1 is not as published"),
        ([{**OBJECTS[0], "rotation": "much"}], "object 1 is not as published"),
        ([{**OBJECTS[0], "rotation": 1e300}], "object 1 is not as published"),
    ],
)
def test_objects_that_are_not_as_published_are_refused(objects: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factors_of(objects)


def test_fuzzed_images_and_listings_are_read_or_refused(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    folder(tmp_path / "data")
    rng = np.random.default_rng(0)
    names = ("images/00001.png", "masks/00001.png", "scenes.json")
    whole = {name: (tmp_path / "data" / name).read_bytes() for name in names}
    archive = zipped(tmp_path / "data", tmp_path / "data.zip").read_bytes()
    for case in range(600):
        path = tmp_path / "data"
        if case % 4 == 3:
            path = tmp_path / "fuzzed.zip"
            path.write_bytes(mutate(archive, rng))
        else:
            (path / names[case % 4]).write_bytes(mutate(whole[names[case % 4]], rng))
        try:
            for scene in ImageFolder(path):
                assert scene["ids"].shape == scene["image"].shape[:2]
        except ValueError as error:
            assert "\n" not in str(error)
        for name, content in whole.items():
            (tmp_path / "data" / name).write_bytes(content)


def test_arrays_are_read_from_npz_and_nothing_is_unpickled(tmp_path: Path) -> None:
    scene = tetrominoes_like(0, range(6))
    np.savez_compressed(tmp_path / "a.npz", **scene)
    data = ArrayFile(tmp_path / "a.npz")
    assert len(data) == 6
    assert all(np.array_equal(data.batch([4, 1])[name], values[[4, 1]]) for name, values in scene.items())
    assert np.array_equal(data[2]["ids"], scene["ids"][2])
    np.savez(tmp_path / "b.npz", image=np.array([{}, {}], dtype=object))
    with pytest.raises(ValueError, match=r"b.npz: no readable .npz file or folder"):
        ArrayFile(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.zeros((2, 3, 3), np.uint8)}, "'image' is none, expected uint8"),
        ({"image": np.zeros((2, 3, 3, 3), np.float32)}, "'image' is float32 of shape"),
        ({"image": np.zeros((2, 3, 3, 3), np.uint8), "x": np.zeros(3)}, r"'x' has shape \(3,\), expected 2 rows"),
        ({"image": np.zeros((2, 3, 3, 3), np.uint8), "x": np.zeros(())}, r"'x' has shape \(\), expected 2 rows"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(
    arrays: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        ArrayFile(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 nothing", b"no zip at all"])
def test_a_damaged_npz_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.npz: no readable .npz file"):
        ArrayFile(tmp_path / "a.npz")


def test_a_header_that_is_no_python_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.zeros((2, 3, 3, 3), np.uint8))
    content = (tmp_path / "image.npy").read_bytes()
    (tmp_path / "image.npy").write_bytes(content.replace(b"}", b"("))
    with pytest.raises(ValueError, match=r"no readable .npz file or folder of .npy files"):
        ArrayFile(tmp_path)


def test_a_conversion_may_keep_some_scenes(tmp_path: Path) -> None:
    scene = multi_dsprites_like(0, range(30))
    np.savez(tmp_path / "a.npz", **scene)
    data = convert((s for s in ArrayFile(tmp_path / "a.npz") if s["visibility"].sum() <= 4), tmp_path / "out")
    kept = scene["visibility"].sum(1) <= 4
    assert 5 < kept.sum() < 30
    assert np.array_equal(data.arrays["ids"], scene["ids"][kept])


def test_converted_scenes_equal_the_source_and_are_memory_mapped(tmp_path: Path) -> None:
    scene = multi_dsprites_like(0, range(11))
    layout = LAYOUTS["multi_dsprites_colored_on_grayscale"]
    path = tmp_path / "file.tfrecords"
    path.write_bytes(gzip.compress(b"".join(framed(official(scene, i, layout)) for i in range(11))))
    calls: list[tuple[int, int | None]] = []
    data = convert(
        RecordFile(path, "multi_dsprites_colored_on_grayscale", stop=11),
        tmp_path / "out",
        lambda done, total: calls.append((done, total)),
    )
    assert calls == [(i, None) for i in range(1, 12)]
    assert list(data.arrays) == list(scene)
    for name, values in data.arrays.items():
        assert isinstance(values, np.memmap)
        assert values.dtype == scene[name].dtype and np.array_equal(values, scene[name])
    again = convert(data, tmp_path / "again", lambda done, total: calls.append((done, total)))
    assert calls[-1] == (11, 11)
    assert np.array_equal(again.arrays["ids"], scene["ids"])


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    scene = tetrominoes_like(0, range(3))
    one = {name: values[0] for name, values in scene.items()}

    def fails() -> Any:
        yield one
        raise ValueError("record 1: wrong checksum")

    with pytest.raises(ValueError, match="record 1: wrong checksum"):
        convert(fails(), tmp_path / "out")
    for other, message in (
        ({**one, "x": one["x"][:2]}, r"'x' of scene 1 is float32 \(2,\), of the first it was float32 \(4,\)"),
        ({**one, "x": one["x"].astype(float)}, "'x' of scene 1 is float64"),
        ({"image": one["image"]}, r"scene 1 has \['image'\], the first had"),
    ):
        with pytest.raises(ValueError, match=message):
            convert([one, other], tmp_path / "out")
    with pytest.raises(ValueError, match="no scenes"):
        convert([], tmp_path / "out")
    with pytest.raises(ValueError, match=r"the name '../image', expected letters, digits and underscores"):
        convert([{"../image": one["image"]}], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    convert([one], tmp_path / "out")
    with pytest.raises(ValueError, match="exists; give a new folder"):
        convert([one], tmp_path / "out")


def test_ids_of_gives_the_background_where_no_mask_is() -> None:
    mask = np.zeros((3, 2, 2, 1), np.uint8)
    mask[2, 0, 1] = 255
    assert ids_of(mask).tolist() == [[0, 2], [0, 0]]
