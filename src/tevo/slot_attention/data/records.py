"""The public multi-object files, read without the library that wrote them.

A file is a sequence of records, the whole of it perhaps gzipped (told by its first two bytes, not its name):

    length, 8 bytes    masked CRC-32C of these 8, 4 bytes    payload    masked CRC-32C of the payload, 4 bytes
    masked(c) = (c >> 15 | c << 17) + 0xa282ead8  mod 2^32                             all little-endian

A payload is a protobuf message Example: a map from names to lists of bytes, floats or integers. In these files each byte
of an image or mask is a string of its own, so that a list is the pattern 0a 01 vv over and over: the pattern is checked,
and every third byte taken.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tevo.slot_attention.data.layout import Scene, ids_of

__all__ = ["LAYOUTS", "Layout", "RecordFile", "crc32c", "decode", "parse_example", "payloads"]

Values: TypeAlias = list[bytes] | npt.NDArray[Any]

GREATEST = 1 << 28  # bytes of one record; the largest public one has 3.2 million
POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one of the public sets lies in its records.

    Args:
        image: its shape.
        entities: masks, the background's included.
        last: the masks' entity axis is behind height and width.
        factors: their names in the official order, with the shape behind the entities.
        codes: which of them are bytes.
        backgrounds: the first masks that are no objects.
    """

    image: tuple[int, int, int]
    entities: int
    last: bool = False
    factors: Mapping[str, tuple[int, ...]]
    codes: frozenset[str] = frozenset()
    backgrounds: int = 1


def _sprites(entities: int, channels: int) -> Layout:
    factors = {"x": (), "y": (), "shape": (), "color": (channels,), "visibility": (), "orientation": (), "scale": ()}
    return Layout(image=(64, 64, channels), entities=entities, last=True, factors=factors)


def _room(entities: int) -> Layout:
    return Layout(image=(64, 64, 3), entities=entities, factors={}, backgrounds=4)


LAYOUTS = {
    "tetrominoes": Layout(
        image=(35, 35, 3),
        entities=4,
        factors={"x": (), "y": (), "shape": (), "color": (3,), "visibility": ()},
    ),
    "multi_dsprites_binarized": _sprites(4, 1),
    "multi_dsprites_colored_on_grayscale": _sprites(6, 3),
    "multi_dsprites_colored_on_colored": _sprites(5, 3),
    "objects_room_train": _room(7),
    "objects_room_six_objects": _room(10),
    "objects_room_empty_room": _room(4),
    "objects_room_identical_color": _room(10),
    "clevr_with_masks": Layout(
        image=(240, 320, 3),
        entities=11,
        factors={
            "x": (),
            "y": (),
            "z": (),
            "pixel_coords": (3,),
            "rotation": (),
            "size": (),
            "material": (),
            "shape": (),
            "color": (),
            "visibility": (),
        },
        codes=frozenset({"size", "material", "shape", "color"}),
    ),
}


class RecordFile:
    """Scenes of one of the public files, in its order.

    Iterating gives one :data:`Scene` per record. The file is read as a stream and never held in memory.

    Args:
        path: the file, gzipped or not.
        layout: a name of ``LAYOUTS``.
        start: scenes passed over at the beginning.
        stop: number of the scene to stop before; None for the end.
    """

    def __init__(self, path: str | os.PathLike[str], layout: str, *, start: int = 0, stop: int | None = None) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"RecordFile: layout={layout!r}, expected one of {', '.join(LAYOUTS)}")
        if start < 0 or (stop is not None and stop < start):
            raise ValueError(f"RecordFile: start={start} and stop={stop}, expected 0 <= start <= stop")
        if not os.path.isfile(path):
            raise ValueError(f"RecordFile: {str(path)!r} is not a file; give one of the public .tfrecords files")
        self.path, self.layout = path, LAYOUTS[layout]
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[Scene]:
        for number, payload in enumerate(payloads(self.path)):
            if self.stop is not None and number >= self.stop:
                return
            if number >= self.start:
                try:
                    scene = decode(payload, self.layout)
                except ValueError as error:
                    raise ValueError(f"{os.fspath(self.path)}, record {number}: {error}") from None
                yield scene


def payloads(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Each record's payload, both checksums checked.

    Raises:
        ValueError: the file ends inside a record or its gzip stream is broken, a checksum is wrong, or a record is
            longer than 256 MiB.
    """
    with open(path, "rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        with gzip.GzipFile(fileobj=plain) if zipped else plain as file:
            number = 0
            while head := _read(file, 12, path, number):
                length, check = struct.unpack("<QI", head)
                _check(head[:8], check, path, number, "length")
                if length > GREATEST:
                    raise ValueError(
                        f"{os.fspath(path)}, record {number}: {length} bytes long, expected at most {GREATEST}; "
                        f"this is not one of the public files"
                    )
                body = _read(file, length + 4, path, number)
                if not body:
                    raise _torn(path, number)
                _check(body[:-4], struct.unpack("<I", body[-4:])[0], path, number, "payload")
                yield body[:-4]
                number += 1


def _read(file: IO[bytes] | gzip.GzipFile, count: int, path: str | os.PathLike[str], number: int) -> bytes:
    try:
        got = file.read(count)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{os.fspath(path)}, record {number}: the gzip stream is broken ({error}); get the file again"
        ) from None
    if got and len(got) < count:
        raise _torn(path, number)
    return got


def _torn(path: str | os.PathLike[str], number: int) -> ValueError:
    return ValueError(f"{os.fspath(path)}, record {number}: the file ends inside the record; get the file again")


def _check(data: bytes, given: int, path: str | os.PathLike[str], number: int, part: str) -> None:
    crc = crc32c(data)
    if given != (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF):
        raise ValueError(
            f"{os.fspath(path)}, record {number}: wrong checksum of the {part}; the file is damaged or holds no "
            f"TFRecords, get it again"
        )


def decode(payload: bytes, layout: Layout) -> Scene:
    """One scene from a record.

    Raises:
        ValueError: the payload is no Example, or a feature is missing or of another size than the layout's.
    """
    features = parse_example(payload)
    h, w, _ = layout.image
    shape = (h, w, layout.entities, 1) if layout.last else (layout.entities, h, w, 1)
    mask = _bytes(features, "mask", shape)
    if layout.last:
        mask = mask.transpose(2, 0, 1, 3)
    if np.any(mask.astype(bool).sum(0) > 1):
        raise ValueError("feature 'mask': a pixel belongs to two entities, expected one")
    ids = ids_of(mask)
    scene: Scene = {"image": _bytes(features, "image", layout.image), "ids": ids}
    if layout.backgrounds > 1:
        # 0 for all that is no object, then 1, 2, ...
        scene["ids"] = np.maximum(ids, layout.backgrounds - 1) - np.uint8(layout.backgrounds - 1)
    for name, inner in layout.factors.items():
        read = _bytes if name in layout.codes else _floats
        scene[name] = read(features, name, (layout.entities, *inner))
    return scene


def _feature(features: Mapping[str, Values], name: str) -> Values:
    if name not in features:
        raise ValueError(f"feature {name!r} is missing, the record has {', '.join(sorted(features)) or 'none'}")
    return features[name]


def _bytes(features: Mapping[str, Values], name: str, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    values = _feature(features, name)
    if isinstance(values, list):
        # one string for all is as good as one string for each
        values = np.frombuffer(b"".join(values), np.uint8)
    if values.dtype != np.uint8 or values.size != int(np.prod(shape)):
        raise ValueError(
            f"feature {name!r} has {values.size} values of type {values.dtype}, expected bytes of shape {tuple(shape)}"
        )
    return values.reshape(shape).copy()


def _floats(features: Mapping[str, Values], name: str, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    values = _feature(features, name)
    if isinstance(values, list) or values.dtype != np.float32 or values.size != int(np.prod(shape)):
        kind = "bytes" if isinstance(values, list) else values.dtype
        raise ValueError(f"feature {name!r} has {len(values)} values of type {kind}, expected float32 {tuple(shape)}")
    return values.reshape(shape).copy()


def parse_example(payload: bytes) -> dict[str, Values]:
    """The features of an Example: a list of bytes, or uint8 (strings of one byte each), float32 or int64 arrays.

    Raises:
        ValueError: the bytes are no Example.
    """
    view = memoryview(payload)
    features: dict[str, Values] = {}
    for entries in _parts(view, 1):
        for entry in _parts(entries, 1):
            name, value = b"", memoryview(b"")
            for field, part in _fields(entry):
                if field == 1:
                    name = bytes(_message(part, "the name of a feature"))
                elif field == 2:
                    value = _message(part, "a feature")
            try:
                features[name.decode()] = _values(value)
            except UnicodeDecodeError:
                raise ValueError("the name of a feature is not UTF-8; the record is damaged") from None
    return features


def _values(view: memoryview) -> Values:
    for field, part in _fields(view):
        inner = _message(part, "a list of values")
        if field == 1:
            return _strings(inner)
        if field == 2:
            packed = [
                np.frombuffer(p, "<f4") if _whole(p) else np.zeros(0, "<f4")
                for f, p in _fields(inner)
                if f == 1 and isinstance(p, memoryview)
            ]
            return np.concatenate(packed).astype(np.float32) if packed else np.zeros(0, np.float32)
        if field == 3:
            return np.array(_integers(inner), np.uint64).astype(np.int64)
    return []


def _whole(view: memoryview) -> bool:
    if len(view) % 4:
        raise ValueError(f"a float list of {len(view)} bytes, expected a multiple of 4; the record is damaged")
    return True


def _strings(view: memoryview) -> Values:
    raw = np.frombuffer(view, np.uint8)
    if raw.size and raw.size % 3 == 0 and (raw[0::3] == 0x0A).all() and (raw[1::3] == 1).all():
        return raw[2::3]
    return [bytes(_message(part, "a string")) for field, part in _fields(view) if field == 1]


def _integers(view: memoryview) -> list[int]:
    found: list[int] = []
    for field, part in _fields(view):
        if field != 1:
            continue
        if isinstance(part, int):
            found.append(part)
            continue
        at = 0
        while at < len(part):
            value, at = _varint(part, at)
            found.append(value)
    return found


def _parts(view: memoryview, wanted: int) -> Iterator[memoryview]:
    for field, part in _fields(view):
        if field == wanted:
            yield _message(part, f"field {wanted}")


def _message(part: memoryview | int, what: str) -> memoryview:
    if isinstance(part, int):
        raise ValueError(f"{what} is a number, expected bytes; the record is damaged or no Example")
    return part


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    at = 0
    while at < len(view):
        key, at = _varint(view, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(view, at)
            yield field, value
            continue
        if kind == 2:
            size, at = _varint(view, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}, expected 0, 1, 2 or 5; the record is damaged or no Example")
        if size > len(view) - at:
            raise ValueError(f"a field of {size} bytes where {len(view) - at} are left; the record is damaged")
        yield field, view[at : at + size]
        at += size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise ValueError("the record ends inside a number; it is damaged or no Example")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise ValueError("a number of more than 64 bits; the record is damaged or no Example")


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli). Long data are cut into stretches whose remainders are found side by side.

    The remainder is linear: that of A followed by B is that of A, moved on by as many zero bytes as B has, xor that of
    B; zeros in front change nothing, and the initial ones are the first four bytes inverted.
    """
    if len(data) < 64:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = int(_bytewise()[(crc ^ byte) & 0xFF]) ^ crc >> 8
        return crc ^ 0xFFFFFFFF
    power = (len(data).bit_length() + 1) // 2  # stretches of about the square root
    count = -(-len(data) >> power)
    whole = np.zeros(count << power, np.uint8)
    whole[len(whole) - len(data) :] = np.frombuffer(data, np.uint8)
    whole[len(whole) - len(data) :][:4] ^= 0xFF
    words = whole.view("<u2").reshape(count, -1).T.astype(np.uint32)
    table, low, half = _words(), np.uint32(0xFFFF), np.uint32(16)
    state = np.zeros(count, np.uint32)
    for word in words:
        state = table[(state ^ word) & low] ^ (state >> half)
    while len(state) > 1:
        if len(state) % 2:
            state = np.concatenate([np.zeros(1, np.uint32), state])
        state = _moved(state[0::2], power) ^ state[1::2]
        power += 1
    return int(state[0]) ^ 0xFFFFFFFF


@cache
def _bytewise() -> npt.NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> np.uint32(1)) ^ (table & np.uint32(1)) * np.uint32(POLYNOMIAL)
    return table


@cache
def _words() -> npt.NDArray[np.uint32]:
    # the remainder of two bytes at once
    one = _bytewise()
    word = np.arange(1 << 16, dtype=np.uint32)
    first = one[word & 0xFF] ^ (word >> np.uint32(8))
    return one[first & 0xFF] ^ (first >> np.uint32(8))


def _moved(state: npt.NDArray[np.uint32], power: int) -> npt.NDArray[np.uint32]:
    # past 2^power zero bytes
    table = _zeros(power)
    parts = [table[i][(state >> np.uint32(8 * i)) & 0xFF] for i in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


@cache
def _zeros(power: int) -> npt.NDArray[np.uint32]:
    basis = np.arange(256, dtype=np.uint32) << np.uint32(8) * np.arange(4, dtype=np.uint32)[:, None]  # 4 256
    if power == 0:
        return _bytewise()[basis & 0xFF] ^ (basis >> np.uint32(8))
    return _moved(_moved(basis, power - 1), power - 1)
