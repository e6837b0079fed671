from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from tevo.slot_attention.data import LAYOUTS, set_targets
from tevo.slot_attention.data.draws import draws
from tevo.slot_attention.data.layout import Scene
from tevo.slot_attention.data.raycast import (
    CAMERA,
    CUBE,
    CUBE_EDGE,
    CYLINDER,
    CYLINDER_EDGE,
    HEIGHT,
    OBJECTS,
    SPHERE,
    WHOLE_FRAME,
    WIDTH,
    _axes,
    _cube,
    _cylinder,
    _meet,
    _normal,
    _place,
    _project,
    _rays,
    _rounded_cube,
    _rounded_cylinder,
    _sphere,
    _trace,
    _world,
)
from tevo.slot_attention.data.raycast import clevr_lite as make

GOLDEN = "798f40bca3200fb2"


@pytest.fixture(scope="module")
def scenes() -> Scene:
    return make(0, range(5), objects=(3, 6), size=(48, 64), crop=WHOLE_FRAME, samples=1)


def some_world(seed: int = 0, b: int = 3):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    camera = CAMERA + rng.random((b, 3)) - 0.5
    codes = np.stack([rng.integers(0, n, (b, OBJECTS)) for n in (2, 2, 3, 8)], -1)
    values = np.concatenate([rng.uniform(-3, 3, (b, OBJECTS, 2)), rng.uniform(0, 360, (b, OBJECTS, 1))], -1)
    return _world(codes, values, np.full(b, OBJECTS), camera, _axes(camera), torch.device("cpu"))


def test_factors_and_masks_are_the_same_on_every_machine_and_version(scenes: Scene) -> None:
    whole = hashlib.sha256()
    for name, values in scenes.items():
        if name != "image":  # colours may differ in their last digit
            whole.update(name.encode() + values.astype(values.dtype.newbyteorder("<")).tobytes())
    assert whole.hexdigest()[:16] == GOLDEN, "scenes changed: earlier results can no longer be compared with new ones"


def test_a_scene_does_not_depend_on_its_batch(scenes: Scene) -> None:
    some = make(0, [4, 1], objects=(3, 6), size=(48, 64), crop=WHOLE_FRAME, samples=1)
    for name, values in some.items():
        if name == "image":
            assert abs(values.astype(int) - scenes[name][[4, 1]]).max() <= 1  # the last digit of a power
        else:
            assert np.array_equal(values, scenes[name][[4, 1]])


def test_names_types_and_codes_are_those_of_the_file_with_masks(scenes: Scene) -> None:
    layout = LAYOUTS["clevr_with_masks"]
    assert list(scenes) == ["image", "ids", *layout.factors]
    assert scenes["image"].shape == (5, 48, 64, 3) and scenes["ids"].shape == (5, 48, 64)
    for name, inner in layout.factors.items():
        assert scenes[name].shape == (5, 11, *inner)
        assert scenes[name].dtype == (np.uint8 if name in layout.codes else np.float32)
        empty = scenes["visibility"] == 0
        assert not scenes[name][empty].any()
        if name in layout.codes:
            assert (scenes[name][:, 1:][scenes["visibility"][:, 1:] == 1] > 0).all()
    counts = scenes["visibility"].sum(1) - 1
    assert counts.min() >= 3 and counts.max() <= 6
    assert set_targets(scenes).shape == (5, 10, 19)
    assert len(make(0, np.zeros(0, np.int64))["ids"]) == 0


def test_the_camera_is_that_of_scenes_rendered_with_the_original_assets() -> None:
    # a camera recovered from rendered scenes to 3e-5 pixels: at 7.48113 -6.50764 5.34367 it looks at the origin with a
    # focal length of 350 pixels; a point straight below the centre, and one up along the vertical, in closed form
    camera = CAMERA[None]
    world = _world(
        np.zeros((1, OBJECTS, 4), int),
        np.zeros((1, OBJECTS, 3)),
        np.array([1]),
        camera,
        _axes(camera),
        torch.device("cpu"),
    )
    column, row, depth = _project(world)[0, 0].tolist()
    ground, far = float(np.hypot(*CAMERA[:2])), float(np.linalg.norm(CAMERA))
    up, forward = ground / far * 0.7, -CAMERA[2] / far * 0.7
    assert column == pytest.approx(160, abs=1e-9)
    assert depth == pytest.approx(far + forward, abs=1e-9)
    assert row == pytest.approx(120 - 350 * up / (far + forward), abs=1e-9)


def test_rays_pass_through_the_points_that_project_to_their_pixels() -> None:
    world = some_world()
    rays = _rays(world, HEIGHT, WIDTH, WHOLE_FRAME)
    for row, column, t in ((10, 300, 5.0), (200, 17, 11.0)):
        point = world.camera + t * rays[:, row, column]
        world.centre[:, 0] = point
        seen = _project(world)[:, 0]
        # float64 rounding of numbers of the size of 300
        assert seen[:, :2] == pytest.approx(torch.tensor([[column + 0.5, row + 0.5]] * 3).double(), abs=1e-10)


def test_placement_keeps_the_published_distances() -> None:
    camera = CAMERA + np.random.default_rng(0).random((200, 3)) - 0.5
    axes, count = _axes(camera), np.full(200, 5)
    raw = draws("test", 0, np.arange(200), 105 * OBJECTS).reshape(200, OBJECTS, 105)
    codes, values, good = _place(raw, count, axes)
    assert 0.2 < good.mean() <= 1
    radius = np.where(codes[..., 0] == 0, 0.7, 0.35)
    assert abs(values[good, :5, :2]).max() <= 3
    for b in np.flatnonzero(good):
        right = np.array([axes[b, 0, 0], axes[b, 0, 1]])
        behind = axes[b, 2, :2] / np.linalg.norm(axes[b, 2, :2])
        assert abs(right @ behind) < 1e-12
        for i in range(5):
            for j in range(i):
                step = values[b, i, :2] - values[b, j, :2]
                assert np.linalg.norm(step) - radius[b, i] - radius[b, j] >= 0.25
                assert abs(step @ right) >= 0.4 and abs(step @ behind) >= 0.4


def test_each_object_shows_at_least_200_pixels_of_the_frame() -> None:
    scene = make(3, range(4), objects=(4, 7), size=(HEIGHT, WIDTH), crop=WHOLE_FRAME, samples=1)
    for b in range(4):
        counts = np.bincount(scene["ids"][b].ravel(), minlength=11)[1:]
        listed = scene["visibility"][b, 1:] > 0
        assert (counts[listed] >= 200).all() and not counts[~listed].any()


@pytest.mark.parametrize(("meet", "inside"), [
    (_sphere, lambda p: (p * p).sum(-1) <= 1),
    (_cylinder, lambda p: _rounded_cylinder(p) <= 0),
    (_cube, lambda p: _rounded_cube(p) <= 0),
])  # fmt: skip
def test_a_ray_enters_where_marching_along_it_first_finds_the_inside(meet, inside) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(0)
    o = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    o = 5 * o / o.norm(dim=-1, keepdim=True)
    aim = 1.3 * torch.randn(400, 3, generator=generator, dtype=torch.float64)
    d = torch.nn.functional.normalize(aim - o, dim=-1)
    t = meet(o, d)
    steps = torch.arange(0, 10, 0.002, dtype=torch.float64)
    found = inside(o[:, None] + steps[:, None] * d[:, None])
    hit = found.any(1)
    first = steps[found.int().argmax(1)]
    assert 100 < hit.sum() < 350
    # marching misses what is thinner than its step: a ray through an edge, at most one in a hundred
    assert (hit != t.isfinite()).sum() <= 4
    both = hit & t.isfinite()
    assert ((first - t)[both] >= -2e-4).all()  # where a rounded edge begins is found to 1e-4
    assert ((first - t)[both] <= 0.0021).float().mean() > 0.97


def test_rounded_shapes_are_the_sharp_ones_but_at_their_edges() -> None:
    p = torch.tensor([[1, 0.3, -0.5], [0.2, -1, 0.8], [1, 1, 0], [1, 1, 1], [2, 0, 0]], dtype=torch.float64)
    gap = CUBE_EDGE * torch.tensor([0, 0, 2**0.5 - 1, 3**0.5 - 1, 0], dtype=torch.float64)
    gap[4] = 1
    assert _rounded_cube(p) == pytest.approx(gap, abs=1e-12)
    p = torch.tensor([[0.6, 0.8, -0.5], [0.2, 0.1, -1], [0.8, 0.6, 1], [0, 2, 0], [0, 0, -3]], dtype=torch.float64)
    gap = torch.tensor([0, 0, CYLINDER_EDGE * (2**0.5 - 1), 1, 2], dtype=torch.float64)
    assert _rounded_cylinder(p) == pytest.approx(gap, abs=1e-12)


def test_normals_are_of_unit_length_and_point_away_from_the_surface() -> None:
    world = some_world()
    near, owner = _trace(world, 60, 80, WHOLE_FRAME)
    b, y, x = (owner > 0).nonzero(as_tuple=True)
    slot = owner[b, y, x] - 1
    ray = _rays(world, 60, 80, WHOLE_FRAME)[b, y, x]
    point = world.camera[b] + near[b, y, x, None] * ray
    normal = _normal(world, b, slot, point)
    assert set(world.kind[b, slot].tolist()) == {SPHERE, CYLINDER, CUBE}
    assert normal.norm(dim=-1) == pytest.approx(torch.ones(len(b)).double(), abs=1e-12)
    assert ((normal * ray).sum(-1) < 1e-3).all()  # rounded edges are met within 1e-4
    # from a point a little outside, looking back, the surface is there; away from it, it is not
    outside = point + 0.01 * normal
    assert _meet(world, b, slot, outside, -normal) == pytest.approx(torch.full((len(b),), 0.01).double(), abs=2e-4)
    assert _meet(world, b, slot, outside, normal).isinf().all()


def test_the_nearest_object_owns_the_pixel_whatever_rays_were_left_out() -> None:
    world = some_world(1)
    near, owner = _trace(world, 30, 40, WHOLE_FRAME)
    rays = _rays(world, 30, 40, WHOLE_FRAME)
    every = torch.full((3, 30, 40, OBJECTS), torch.inf, dtype=torch.float64)
    for b in range(3):
        for k in range(OBJECTS):
            flat = torch.full((1200,), b)
            t = _meet(world, flat, torch.full((1200,), k), world.camera[flat], rays[b].reshape(-1, 3))
            every[b, ..., k] = t.view(30, 40)
    ground = torch.where(rays[..., 2] < 0, -world.camera[:, None, None, 2] / rays[..., 2], torch.inf)
    best, slot = every.min(-1)
    assert torch.equal(owner, torch.where(best < ground, slot + 1, 0))
    assert torch.equal(near, torch.minimum(best, ground))


def test_the_crop_is_a_part_of_the_frame() -> None:
    whole = make(1, [0], objects=(3, 6), size=(HEIGHT, WIDTH), crop=WHOLE_FRAME, samples=1)
    part = make(1, [0], objects=(3, 6), size=(192, 192), samples=1)
    assert np.array_equal(part["ids"][0], whole["ids"][0, 29:221, 64:256])
    assert abs(part["image"][0].astype(int) - whole["image"][0, 29:221, 64:256]).max() <= 1


def test_objects_are_seen_against_the_ground_in_their_colours() -> None:
    scene = make(0, range(4), objects=(3, 5), samples=1)
    from tevo.slot_attention.data.raycast import PAINT

    checked = 0
    for b in range(4):
        for i in np.flatnonzero(scene["visibility"][b])[1:]:
            pixels = scene["image"][b][scene["ids"][b] == i].astype(float)
            if len(pixels) < 40 or scene["material"][b, i] == 2:
                continue
            paint = PAINT[scene["color"][b, i] - 1]
            if np.ptp(paint) > 40:  # gray has no hue
                assert np.median(pixels, 0).argmax() == paint.argmax()
                checked += 1
    assert checked >= 3
    ground = scene["image"][scene["ids"] == 0].astype(float)
    assert 60 < ground.mean() < 190 and np.ptp(ground.mean(0)) < 20


@pytest.mark.gpu
def test_a_gpu_gives_the_same_masks_and_factors(scenes: Scene) -> None:
    there = make(0, range(5), objects=(3, 6), size=(48, 64), crop=WHOLE_FRAME, samples=1, device="cuda")
    for name, values in there.items():
        if name == "image":
            assert abs(values.astype(int) - scenes[name]).max() <= 1  # the last digit of a power
        else:
            assert np.array_equal(values, scenes[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": (0, 3)}, r"objects=\(0, 3\), expected 1 <= fewest <= most <= 10"),
        ({"objects": (3, 11)}, r"objects=\(3, 11\)"),
        ({"crop": (0, 241, 0, 10)}, r"crop=\(0, 241, 0, 10\), expected rows and columns of the 240 x 320 frame"),
        ({"size": (0, 8)}, r"size=\(0, 8\) and samples=2"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(0, [0], **options)  # type: ignore[arg-type]
