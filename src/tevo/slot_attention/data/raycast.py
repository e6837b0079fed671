"""CLEVR's scenes without its renderer: the published placement rules, a ray caster in torch, exact masks.

Placement. 3 to 10 objects; x, y in U(-3, 3); two objects are 0.25 apart between their circles and 0.4 apart along the
camera's right and forward directions on the ground; 50 tries each, then all objects are begun again; so they are if one
shows fewer than 200 pixels of the 240 x 320 frame. Sizes 0.7 and 0.35, cubes divided by sqrt 2, standing on the ground.

Camera. At (7.48113, -6.50764, 5.34367), moved by up to 0.5 along each axis, looking at the origin; a point at (r, u, z)
to the right, above and in front of it appears at column 160 + 350 r / z, row 120 - 350 u / z.

Picture. What a ray meets is decided in float64 (spheres, cylinders and boxes with rounded edges), so that "ids" and
factors are the same on every machine; colours are not, in their last digit. Three lamps with Phong's highlights, shadows
whose edges widen with the distance to what casts them (cast by spheres of like size), one mirror bounce on metal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tevo.bench.tasks.contract import Rows, below
from tevo.slot_attention.data.draws import Doubles, Indices, chosen, draws, uniform
from tevo.slot_attention.data.folders import CODES, OBJECTS
from tevo.slot_attention.data.layout import Images, Scene

__all__ = ["CENTRE_CROP", "WHOLE_FRAME", "clevr_lite"]

HEIGHT, WIDTH, FOCAL = 240, 320, 350.0
CENTRE_CROP, WHOLE_FRAME = (29, 221, 64, 256), (0, HEIGHT, 0, WIDTH)  # rows and columns of the frame
TRIES, LEAST_VISIBLE, APART, MARGIN, FIELD = 50, 200, 0.25, 0.4, 3.0
CAMERA = np.array([7.48113, -6.50764, 5.34367])
# key, fill, back: places and colours as a public remake of the scene states them; strengths, and the reflectances below,
# such that mean colours of ground, rubber and metal are near those of scenes rendered with the original assets
LAMPS = np.array([[6.44671, -2.90517, 4.2584], [-4.67112, -4.0136, 3.01122], [-1.1685, 2.64602, 5.81574]])
LIGHT = np.array([[1.0, 0.93, 0.82], [0.76, 0.82, 1.0], [1.0, 1.0, 1.0]]) * np.array([[14.0], [5.0], [10.0]])
AMBIENT, SKY, GROUND, PIGMENT = 0.2, 0.05, 0.46, 0.6
# radii of the edges of a cube of half side 1 and of a cylinder of radius 1: those whose masks overlap most with masks
# rendered with the original assets
CUBE_EDGE, CYLINDER_EDGE = 0.18, 0.06
CHUNK = 16  # scenes cast at once
# in the order of CODES
PAINT = np.array(
    [
        *([173, 35, 35], [41, 208, 208], [29, 105, 20], [42, 75, 215]),
        *([129, 74, 25], [87, 87, 87], [129, 38, 192], [255, 238, 51]),
    ],
    np.float64,
)
SPHERE, CYLINDER, CUBE = range(3)
DRAWS = 5 + 2 * TRIES


@dataclass(frozen=True, kw_only=True)
class _World:
    """Scenes ready to be cast, float64: objects (b k), places (b k 3), camera axes as rows (b 3 3)."""

    kind: Tensor
    half: Tensor
    centre: Tensor
    cos: Tensor
    sin: Tensor
    listed: Tensor
    camera: Tensor
    axes: Tensor


def clevr_lite(
    seed: int,
    indices: Indices,
    *,
    objects: tuple[int, int] = (3, 10),
    size: tuple[int, int] = (128, 128),
    crop: tuple[int, int, int, int] = CENTRE_CROP,
    samples: int = 2,
    device: torch.device | str = "cpu",
) -> Scene:
    """Scenes ``indices`` (b,) of the endless set of ``seed``.

    Args:
        seed: which set; any integer.
        indices: scene numbers, >= 0.
        objects: fewest and most, within 1..10.
        size: height and width of the picture, pixels.
        crop: first row, last row + 1, first column, last column + 1 of the 240 x 320 frame; ``CENTRE_CROP`` as the paper's
            object discovery, ``WHOLE_FRAME`` as its set prediction.
        samples: rays along each side of a pixel; masks are of the pixel's centre.
        device: where rays are cast.

    Returns:
        "image" (b, h, w, 3), "ids" (b, h, w), and the factors of the public file with masks: 11 entities, the
        background first, "x", "y", "z", "pixel_coords" (column, row, depth) in the frame, "rotation" in degrees, then
        "size", "material", "shape" and "color" coded as there, "visibility". An object may be outside the crop.

    Raises:
        ValueError: indices that are not integers >= 0, or an option that cannot be.
    """
    least, most = objects
    if not 1 <= least <= most <= OBJECTS:
        raise ValueError(f"clevr_lite: objects={objects}, expected 1 <= fewest <= most <= {OBJECTS}")
    top, bottom, left, right = crop
    if not (0 <= top < bottom <= HEIGHT and 0 <= left < right <= WIDTH):
        raise ValueError(f"clevr_lite: crop={crop}, expected rows and columns of the {HEIGHT} x {WIDTH} frame")
    if min(*size, samples) < 1:
        raise ValueError(f"clevr_lite: size={size} and samples={samples}, expected all >= 1")
    numbers = chosen("clevr_lite", indices)
    parts = [
        _scenes(seed, numbers[i : i + CHUNK], objects, size, crop, samples, torch.device(device))
        for i in range(0, max(len(numbers), 1), CHUNK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _scenes(
    seed: int,
    numbers: Rows,
    objects: tuple[int, int],
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
    samples: int,
    device: torch.device,
) -> Scene:
    b, (least, most) = len(numbers), objects
    raw = draws("clevr_lite", seed, numbers, 13)
    count = least + below(raw[:, 0], most - least + 1)
    camera = CAMERA + uniform(raw[:, 1:4]) - 0.5
    lamps = LAMPS + 2 * uniform(raw[:, 4:13]).reshape(b, 3, 3) - 1
    axes = _axes(camera)
    codes, values = np.zeros((b, OBJECTS, 4), np.int64), np.zeros((b, OBJECTS, 3))
    todo, attempt = np.arange(b), 0
    while len(todo):
        drawn = draws(f"clevr_lite {attempt}", seed, numbers[todo], DRAWS * OBJECTS).reshape(-1, OBJECTS, DRAWS)
        found, where, good = _place(drawn, count[todo], axes[todo])
        if good.any():
            here = todo[good]
            world = _world(found[good], where[good], count[here], camera[here], axes[here], device)
            _, owner = _trace(world, HEIGHT, WIDTH, WHOLE_FRAME)
            seen = F.one_hot(owner.flatten(1), 1 + OBJECTS).sum(1)[:, 1:]  # b k
            enough = ((seen >= LEAST_VISIBLE) | ~world.listed).all(1).cpu().numpy()
            codes[here[enough]], values[here[enough]] = found[good][enough], where[good][enough]
            good[good] = enough
        todo, attempt = todo[~good], attempt + 1
    world = _world(codes, values, count, camera, axes, device)
    ids = _trace(world, *size, crop)[1].to(torch.uint8).cpu().numpy()
    image = _picture(world, codes, lamps, size, crop, samples)
    return {"image": image, "ids": ids, **_factors(world, codes, values, count)}


def _axes(camera: Doubles) -> Doubles:
    """Right, up and forward (b 3 3) of cameras that look at the origin."""
    forward = -camera / np.sqrt((camera * camera).sum(-1, keepdims=True))
    right = np.stack([forward[:, 1], -forward[:, 0], np.zeros(len(camera))], -1)
    right = right / np.sqrt((right * right).sum(-1, keepdims=True))
    return np.stack([right, np.cross(right, forward), forward], 1)


def _place(raw: npt.NDArray[np.uint64], count: Rows, axes: Doubles) -> tuple[Rows, Doubles, npt.NDArray[np.bool_]]:
    """Codes (b k 4: size, material, shape, colour, from 0), x, y, angle (b k 3), and which scenes came about."""
    b = len(raw)
    codes = np.stack([below(raw[..., i], len(names)) for i, names in enumerate(CODES.values())], -1)
    radius = np.where(codes[..., 0] == 0, 0.7, 0.35)  # of cubes too, as the recipe has it
    tries = FIELD * (2 * uniform(raw[..., 5:]).reshape(b, OBJECTS, TRIES, 2) - 1)
    along = axes[:, [0, 2], :2] / np.sqrt((axes[:, [0, 2], :2] ** 2).sum(-1, keepdims=True))
    right, behind = along[:, 0, None, None, :], along[:, 1, None, None, :]
    place, good = np.zeros((b, OBJECTS, 2)), np.ones(b, bool)
    for k in range(OBJECTS):
        step = tries[:, k, :, None] - place[:, None, :k]  # b tries k 2
        # a recipe with spheres: the distance between circles
        free = np.sqrt((step * step).sum(-1)) - radius[:, k, None, None] - radius[:, None, :k] >= APART
        for direction in (right, behind):
            free &= abs((step * direction).sum(-1)) >= MARGIN
        free_ = free.all(-1)  # b tries
        good &= free_.any(1) | (k >= count)
        place[:, k] = np.take_along_axis(tries[:, k], free_.argmax(1)[:, None, None], 1)[:, 0]
    angle = 360 * uniform(raw[..., 4])
    return codes, np.concatenate([place, angle[..., None]], -1), good


def _world(codes: Rows, values: Doubles, count: Rows, camera: Doubles, axes: Doubles, device: torch.device) -> _World:
    half = np.where(codes[..., 0] == 0, 0.7, 0.35)
    half = np.where(codes[..., 2] == CUBE, half / np.sqrt(2), half)
    angle = np.deg2rad(values[..., 2])

    def on(array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return _World(
        kind=on(codes[..., 2]),
        half=on(half),
        centre=on(np.concatenate([values[..., :2], half[..., None]], -1)),
        cos=on(np.cos(angle)),
        sin=on(np.sin(angle)),
        listed=on(np.arange(OBJECTS) < count[:, None]),
        camera=on(camera),
        axes=on(axes),
    )


def _rays(world: _World, height: int, width: int, crop: tuple[int, int, int, int]) -> Tensor:
    """Unit directions (b h w 3) through the pixels' centres."""
    top, bottom, left, right = crop
    device = world.camera.device
    rows = top + (torch.arange(height, device=device, dtype=torch.float64) + 0.5) * (bottom - top) / height
    columns = left + (torch.arange(width, device=device, dtype=torch.float64) + 0.5) * (right - left) / width
    u = ((columns - WIDTH / 2) / FOCAL)[None, None, :, None]
    v = ((HEIGHT / 2 - rows) / FOCAL)[None, :, None, None]
    x, y, z = (world.axes[:, None, None, i] for i in range(3))
    return _unit(u * x + v * y + z)


def _trace(world: _World, height: int, width: int, crop: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """Distance (b h w) to what each ray meets, inf for the sky, and whose it is (b h w): 0 the ground's or the sky's."""
    rays = _rays(world, height, width, crop)
    b = len(rays)
    near = torch.where(rays[..., 2] < 0, -world.camera[:, None, None, 2] / rays[..., 2], torch.inf).flatten()
    owner = torch.full((b * height * width,), OBJECTS + 1, device=rays.device)
    scene, slot, pixel = _candidates(world, height, width, crop)
    t = _meet(world, scene, slot, world.camera[scene], rays.reshape(-1, 3)[pixel])
    near.scatter_reduce_(0, pixel, t, "amin")
    first = (t == near[pixel]) & t.isfinite()
    owner.scatter_reduce_(0, pixel[first], 1 + slot[first], "amin")
    owner[owner > OBJECTS] = 0
    return near.view(b, height, width), owner.view(b, height, width)


def _candidates(
    world: _World, height: int, width: int, crop: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scene, object and pixel (p,) of every ray that passes a square around an object's bounding sphere."""
    top, bottom, left, right = crop
    device = world.camera.device
    scene, slot = world.listed.nonzero(as_tuple=True)
    bound = world.half[scene, slot] * torch.tensor([1.0, 2.0**0.5, 3.0**0.5], device=device)[world.kind[scene, slot]]
    column, row, depth = _project(world)[scene, slot].unbind(-1)
    reach = FOCAL * bound / (depth - bound)
    # a sphere away from the axis looks longer than its radius over its depth
    reach = reach * (1 + ((column - WIDTH / 2) ** 2 + (row - HEIGHT / 2) ** 2) / FOCAL**2).sqrt()
    scale_x, scale_y = width / (right - left), height / (bottom - top)
    x0, x1 = ((column - left - reach) * scale_x).floor(), ((column - left + reach) * scale_x).ceil()
    y0, y1 = ((row - top - reach) * scale_y).floor(), ((row - top + reach) * scale_y).ceil()
    x0, x1, y0, y1 = (v.long().clamp(0, most) for v, most in ((x0, width), (x1, width), (y0, height), (y1, height)))
    across = x1 - x0
    counts = across * (y1 - y0)
    pair = torch.repeat_interleave(torch.arange(len(scene), device=device), counts)
    nth = torch.arange(len(pair), device=device) - (counts.cumsum(0) - counts)[pair]
    pixel = (scene[pair] * height + y0[pair] + nth // across[pair]) * width + x0[pair] + nth % across[pair]
    return scene[pair], slot[pair], pixel


def _project(world: _World) -> Tensor:
    """Column, row, depth (b k 3) of the objects' centres in the frame."""
    x, y, depth = (_dot(world.centre - world.camera[:, None], world.axes[:, None, i]) for i in range(3))
    return torch.stack([WIDTH / 2 + FOCAL * x / depth, HEIGHT / 2 - FOCAL * y / depth, depth], -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # term by term, because the order of a reduction's sum is not promised, and faster over three numbers
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _unit(a: Tensor) -> Tensor:
    return a / _dot(a, a).sqrt()[..., None]


def _local(world: _World, scene: Tensor, slot: Tensor, vector: Tensor) -> Tensor:
    """A vector (p 3) turned into the objects' own directions."""
    cos, sin = world.cos[scene, slot], world.sin[scene, slot]
    x, y, z = vector.unbind(-1)
    return torch.stack([cos * x + sin * y, cos * y - sin * x, z], -1)


def _meet(world: _World, scene: Tensor, slot: Tensor, origin: Tensor, ray: Tensor) -> Tensor:
    """Distance (p,) at which each ray (p 3) enters its object; inf where it does not."""
    half = world.half[scene, slot]
    o = _local(world, scene, slot, origin - world.centre[scene, slot]) / half[:, None]
    d = _local(world, scene, slot, ray)
    t = torch.full_like(half, torch.inf)
    for kind, meet in ((SPHERE, _sphere), (CYLINDER, _cylinder), (CUBE, _cube)):
        (rows,) = (world.kind[scene, slot] == kind).nonzero(as_tuple=True)
        t[rows] = meet(o[rows], d[rows])
    # a ray that starts on a surface does not meet it again
    return torch.where(t > 1e-6, t * half, torch.inf)


def _sphere(o: Tensor, d: Tensor) -> Tensor:
    along = _dot(o, d)
    inside = along * along - _dot(o, o) + 1
    return torch.where(inside > 0, -along - inside.clamp(min=0).sqrt(), torch.inf)


def _cylinder(o: Tensor, d: Tensor) -> Tensor:
    (ox, oy, oz), (dx, dy, dz) = o.unbind(-1), d.unbind(-1)
    a = dx * dx + dy * dy
    along = ox * dx + oy * dy
    inside = along * along - a * (ox * ox + oy * oy - 1)
    root = inside.clamp(min=0).sqrt()
    # a ray along the axis is inside the tube everywhere or nowhere
    straight = a < 1e-20
    inside = torch.where(straight, 1 - ox * ox - oy * oy, inside)
    enter = torch.where(straight, -torch.inf, (-along - root) / a)
    leave = torch.where(straight, torch.inf, (-along + root) / a)
    # between the planes of the caps as well
    low, high = (-1 - oz) / dz, (1 - oz) / dz
    enter, leave = torch.maximum(enter, torch.minimum(low, high)), torch.minimum(leave, torch.maximum(low, high))
    return _round(_rounded_cylinder, o, d, enter, torch.where(inside > 0, leave, -torch.inf))


def _cube(o: Tensor, d: Tensor) -> Tensor:
    low, high = (-1 - o) / d, (1 - o) / d
    enter = torch.minimum(low, high).amax(-1)
    leave = torch.maximum(low, high).amin(-1)
    return _round(_rounded_cube, o, d, enter, leave)


def _round(gap: Callable[[Tensor], Tensor], o: Tensor, d: Tensor, enter: Tensor, leave: Tensor) -> Tensor:
    """Where a ray that is in the sharp shape from ``enter`` to ``leave`` meets the rounded one."""
    t = enter
    # steps of the distance to it: never past it, and never far
    for _ in range(24):
        t = t + gap(o + t[:, None] * d)
    return torch.where((enter < leave) & (t < leave) & (gap(o + t[:, None] * d) < 1e-4), t, torch.inf)


def _rounded_cube(p: Tensor) -> Tensor:
    """Distance (p,) from points (p 3) to the cube of half side 1 with rounded edges; negative inside."""
    q = p.abs() - (1 - CUBE_EDGE)
    out = q.clamp(min=0)
    return _dot(out, out).sqrt() + q.amax(-1).clamp(max=0) - CUBE_EDGE


def _rounded_cylinder(p: Tensor) -> Tensor:
    """Distance (p,) from points (p 3) to the cylinder of radius and half height 1 with rounded edges."""
    x, y, z = p.unbind(-1)
    r, h = (x * x + y * y).sqrt() - (1 - CYLINDER_EDGE), z.abs() - (1 - CYLINDER_EDGE)
    out, up = r.clamp(min=0), h.clamp(min=0)
    return (out * out + up * up).sqrt() + torch.maximum(r, h).clamp(max=0) - CYLINDER_EDGE


def _normal(world: _World, scene: Tensor, slot: Tensor, point: Tensor) -> Tensor:
    """Outward unit normals (p 3) at points (p 3) of the objects' surfaces."""
    p = _local(world, scene, slot, point - world.centre[scene, slot]) / world.half[scene, slot, None]
    kind = world.kind[scene, slot][:, None]
    # the way from the core that the edges are rounded about
    radius = (p[:, :1] ** 2 + p[:, 1:2] ** 2).sqrt()
    tube = torch.cat([p[:, :2] / radius.clamp(min=1e-9), p[:, 2:].sign()], -1) * (
        torch.cat([radius, radius, p[:, 2:].abs()], -1) - (1 - CYLINDER_EDGE)
    ).clamp(min=0)
    box = (p.abs() - (1 - CUBE_EDGE)).clamp(min=0) * p.sign()
    n = _unit(torch.where(kind == SPHERE, p, torch.where(kind == CYLINDER, tube, box)))
    cos, sin = world.cos[scene, slot], world.sin[scene, slot]
    x, y, z = n.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], -1)


def _picture(
    world: _World,
    codes: Rows,
    lamps: Doubles,
    size: tuple[int, int],
    crop: tuple[int, int, int, int],
    samples: int,
) -> Images:
    h, w = size[0] * samples, size[1] * samples
    b, device = len(codes), world.camera.device
    near, owner = _trace(world, h, w, crop)
    ray = _rays(world, h, w, crop).reshape(-1, 3)
    scene = torch.arange(b, device=device).repeat_interleave(h * w)
    slot, flat = (owner.flatten() - 1).clamp(min=0), owner.flatten() == 0
    sky = near.flatten().isinf()
    point = world.camera[scene] + torch.where(sky, 1.0, near.flatten())[:, None] * ray
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=device)
    normal = torch.where(flat[:, None], up, _normal(world, scene, slot, point))
    paint = torch.from_numpy(PIGMENT * PAINT[codes[..., 3]] / 255).to(device)  # b k 3
    metal = torch.from_numpy(codes[..., 1] == 1).to(device)
    lamp = torch.from_numpy(lamps).to(device)
    base = torch.where(flat[:, None], GROUND, paint[scene, slot])
    shiny = metal[scene, slot] & ~flat
    diffuse, gloss = (
        part.flatten(0, 1)
        for part in _light(
            world,
            lamp,
            point.view(b, h * w, 3),
            normal.view(b, h * w, 3),
            ray.view(b, h * w, 3),
            owner.view(b, h * w),
            shiny.view(b, h * w),
        )
    )
    colour = base * diffuse + torch.where(flat[:, None], 0.0, gloss)
    (mirror,) = shiny.nonzero(as_tuple=True)
    if len(mirror):
        d, n = ray[mirror], normal[mirror]
        away = d - 2 * _dot(d, n)[:, None] * n
        seen = _reflected(world, lamp, paint, scene[mirror], point[mirror], away, owner.flatten()[mirror])
        colour[mirror] = base[mirror] * (0.1 * diffuse[mirror] + 1.6 * seen) + gloss[mirror]
    colour = torch.where(sky[:, None], SKY, colour).clamp(0, 1)
    # from light to the values of a screen
    screen = torch.where(colour <= 0.0031308, 12.92 * colour, 1.055 * colour.clamp(min=1e-6) ** (1 / 2.4) - 0.055)
    pooled = screen.view(b, size[0], samples, size[1], samples, 3).mean((2, 4))
    image: Images = (255 * pooled).round().to(torch.uint8).cpu().numpy()
    return image


def _light(
    world: _World, lamp: Tensor, point: Tensor, normal: Tensor, ray: Tensor, owner: Tensor, shiny: Tensor
) -> tuple[Tensor, Tensor]:
    """What falls on each point (b p 3), and its highlights (b p 3)."""
    # colours need no more than float32; three planes instead of triples, so that memory is read in a row
    (px, py, pz), (nx, ny, nz), (dx, dy, dz) = (v.float().movedim(-1, 0).contiguous() for v in (point, normal, ray))
    centre = world.centre.float()
    solid = world.half.float() * torch.tensor([1.0, 1.1, 1.2], device=px.device)[world.kind]
    diffuse, gloss = torch.full(point.shape, AMBIENT, device=px.device), torch.zeros(point.shape, device=px.device)
    back = 2 * (dx * nx + dy * ny + dz * nz)
    ax, ay, az = dx - back * nx, dy - back * ny, dz - back * nz
    power, amount = torch.where(shiny, 40.0, 12.0), torch.where(shiny, 0.9, 0.05)
    for i in range(lamp.shape[1]):
        tx, ty, tz = (lamp[:, i, j, None].float() - v for j, v in enumerate((px, py, pz)))
        square = tx * tx + ty * ty + tz * tz
        far = square.sqrt()
        tx, ty, tz = tx / far, ty / far, tz / far
        facing = (nx * tx + ny * ty + nz * tz).clamp(min=0)
        lit = torch.ones_like(far)
        for k in range(OBJECTS):
            (some,) = world.listed[:, k].nonzero(as_tuple=True)
            if not len(some):
                break
            cx, cy, cz = (centre[some, k, j, None] - v[some] for j, v in enumerate((px, py, pz)))
            along = cx * tx[some] + cy * ty[some] + cz * tz[some]
            miss = (cx * cx + cy * cy + cz * cz - along * along).clamp_(min=0).sqrt_() - solid[some, k, None]
            between = (along > 0) & (along < far[some]) & (owner[some] != k + 1)
            width = along.clamp_(min=0).mul_(0.16).add_(0.03)
            part = ((miss + width) / (2 * width)).clamp_(0, 1)
            lit[some] *= torch.where(between, part * part * (3 - 2 * part), 1.0)
        strength = (lit / square)[..., None] * torch.from_numpy(LIGHT[i]).to(diffuse)
        diffuse += facing[..., None] * strength
        bright = (ax * tx + ay * ty + az * tz).clamp(min=0) ** power * amount * (facing > 0)
        gloss += bright[..., None] * strength
    return diffuse.double(), gloss.double()


def _reflected(
    world: _World, lamp: Tensor, paint: Tensor, scene: Tensor, point: Tensor, ray: Tensor, owner: Tensor
) -> Tensor:
    """The colour (p 3) that a mirror sees at its points (p 3) along rays (p 3): what is there, without its shadows."""
    near = torch.where(ray[:, 2] < 0, -point[:, 2] / ray[:, 2], torch.inf)
    whose = torch.zeros_like(owner)
    for k in range(OBJECTS):
        (rows,) = (world.listed[scene, k] & (owner != k + 1)).nonzero(as_tuple=True)
        if not len(rows):
            continue
        t = _meet(world, scene[rows], torch.full_like(rows, k), point[rows], ray[rows])
        closer = t < near[rows]
        near[rows[closer]], whose[rows[closer]] = t[closer], k + 1
    sky = near.isinf() | (near > 40)
    met = point + torch.where(sky, 1.0, near)[:, None] * ray
    up = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device=ray.device)
    slot, flat = (whose - 1).clamp(min=0), (whose == 0)[:, None]
    normal = torch.where(flat, up, _normal(world, scene, slot, met))
    total = torch.full_like(met, AMBIENT)
    for i in range(lamp.shape[1]):
        step = lamp[scene, i] - met
        square = _dot(step, step)
        facing = _dot(normal, step).clamp(min=0) / square.sqrt()
        total += (facing / square)[:, None] * torch.from_numpy(LIGHT[i]).to(met)
    return torch.where(sky[:, None], SKY, torch.where(flat, GROUND, paint[scene, slot]) * total)


def _factors(world: _World, codes: Rows, values: Doubles, count: Rows) -> Scene:
    listed = np.arange(OBJECTS) < count[:, None]

    def factor(array: npt.NDArray[np.generic], kind: type[np.generic] = np.float32) -> npt.NDArray[np.generic]:
        shown = listed.reshape(*listed.shape, *[1] * (array.ndim - 2))
        wide = ((0, 0), (1, 0), *[(0, 0)] * (array.ndim - 2))
        return np.pad(np.where(shown, array, 0), wide).astype(kind)

    scene: Scene = {"x": factor(values[..., 0]), "y": factor(values[..., 1])}
    scene["z"] = factor(world.half.cpu().numpy())
    scene["pixel_coords"] = factor(_project(world).cpu().numpy())
    scene["rotation"] = factor(values[..., 2])
    for i, name in enumerate(CODES):
        scene[name] = factor(codes[..., i] + 1, np.uint8)
    scene["visibility"] = np.concatenate([np.ones((len(count), 1)), listed], 1).astype(np.float32)
    return scene
