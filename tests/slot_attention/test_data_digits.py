from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tevo.slot_attention.data import digits_on_textures
from tevo.slot_attention.data.layout import Images, Scene

pytest.importorskip("sklearn")
GOLDEN = "4bf732b730b2345e"


def textures() -> list[Images]:
    y, x = np.mgrid[0:70, 0:300]
    return [np.stack([(a * x + b * y) % 251 for a, b in ((1, 2), (3, 5), (7, 11))], -1).astype(np.uint8)]


def make(indices: object, **options: object) -> Scene:
    return digits_on_textures(2, indices, **{"textures": textures(), **options})  # type: ignore[arg-type]


def test_scenes_are_the_same_on_every_machine_and_version() -> None:
    whole = hashlib.sha256()
    for split in ("train", "test"):
        for name, values in make([0, 1, 10**12], split=split).items():
            whole.update(name.encode() + values.astype(values.dtype.newbyteorder("<")).tobytes())
    assert whole.hexdigest()[:16] == GOLDEN, "scenes changed: earlier results can no longer be compared with new ones"


def test_a_scene_does_not_depend_on_its_batch() -> None:
    whole, some = make(range(20)), make([19, 3])
    for name, values in some.items():
        assert np.array_equal(values, whole[name][[19, 3]])
    assert all(len(values) == 0 for values in make(np.zeros(0, np.int64)).values())


def test_factors_list_what_is_in_the_image() -> None:
    scene = make(range(100), digits=(1, 5))
    assert list(scene) == ["image", "ids", "x", "y", "shape", "color", "visibility"]
    assert set(scene["visibility"].sum(1)) == {2, 3, 4, 5, 6}
    for b in range(100):
        for i in range(1, 6):
            covered = scene["ids"][b] == i
            if not scene["visibility"][b, i]:
                assert not covered.any() and not scene["color"][b, i].any()
                continue
            assert 1 <= scene["shape"][b, i] <= 10
            top, left = int(scene["y"][b, i]), int(scene["x"][b, i])
            assert covered.sum() == covered[top : top + 24, left : left + 24].sum()
            ink = 255 * scene["color"][b, i].astype(float)
            assert ink.max() >= 127 and abs(scene["image"][b][covered] - ink).max(initial=0) <= 0.51


def test_what_no_digit_covers_is_a_cut_of_the_texture() -> None:
    (photo,) = textures()
    for split, first, last in (("train", 0, 225), ("test", 225, 300)):
        scene = make(range(3), split=split)
        windows = np.lib.stride_tricks.sliding_window_view(photo[:, first:last], (64, 64), axis=(0, 1))  # y x c 64 64
        for image, ids in zip(scene["image"], scene["ids"], strict=True):
            same = (windows == image.transpose(2, 0, 1)) | (ids > 0)
            assert same.all((2, 3, 4)).any()


def test_train_and_test_share_no_glyph() -> None:
    found = {}
    for split in ("train", "test"):
        scene = make(range(400), digits=(1, 1), split=split)
        cuts = [
            ids[int(y) : int(y) + 24, int(x) : int(x) + 24].tobytes()
            for ids, x, y in zip(scene["ids"], scene["x"][:, 1], scene["y"][:, 1], strict=True)
        ]
        found[split] = set(cuts)
    assert len(found["train"]) > 300 and len(found["test"]) > 200
    assert not found["train"] & found["test"]


def test_a_glyph_is_the_digit_enlarged_by_interpolation() -> None:
    torch = pytest.importorskip("torch")
    from tevo.slot_attention.data.digits import _glyphs

    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    padded = torch.nn.functional.pad(torch.from_numpy(data.images)[:, None], (1, 1, 1, 1))
    large = torch.nn.functional.interpolate(padded, scale_factor=3, mode="bilinear", align_corners=False)
    large = large[:, 0, 3:-3, 3:-3].numpy()
    sure = abs(large - 8) > 1e-9  # exact halves are rounded either way in floating point
    glyphs, labels = _glyphs()
    assert np.array_equal(glyphs[sure], large[sure] > 8) and glyphs[~sure].all()
    assert np.array_equal(labels, data.target)


def test_photographs_are_the_default() -> None:
    pytest.importorskip("PIL")
    scene = digits_on_textures(0, range(8))
    assert scene["image"].shape == (8, 64, 64, 3)
    assert not np.array_equal(scene["image"], digits_on_textures(0, range(8), split="test")["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digits": (0, 2)}, r"digits=\(0, 2\), expected 1 <= fewest <= most <= 6"),
        ({"digits": (3, 7)}, r"digits=\(3, 7\)"),
        ({"split": "valid"}, "split='valid', expected 'train' or 'test'"),
        ({"textures": []}, "textures is empty"),
        ({"textures": [np.zeros((64, 255, 3), np.uint8)]}, r"a texture is uint8 \(64, 255, 3\)"),
        ({"textures": [np.zeros((64, 256, 3))]}, "a texture is float64"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([0], **options)
