"""Invariant Slot Attention: loops over the equations, what shifts, scales and turns do, and the models around it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tevo import record
from tevo.slot_attention import Implicit, SharedGaussian, SlotAutoencoder
from tevo.slot_attention.invariant import (
    Frame,
    InvariantDecoder,
    InvariantEncoder,
    InvariantSlotAttention,
    Translation,
    TranslationScale,
    TranslationScaleRotation,
    Upsampling,
    each_place,
    invariant_autoencoder,
    places_of,
)

GRID = (3, 5)
B, N, D_IN, D, K = 2, GRID[0] * GRID[1], 7, 6, 4
FRAMES: dict[str, Frame] = {"t": Translation(), "ts": TranslationScale(), "tsr": TranslationScaleRotation()}
every_frame = pytest.mark.parametrize("frame", FRAMES)


def build(frame: str, **options: object) -> InvariantSlotAttention:
    """A module no parameter of which is trivial."""
    torch.manual_seed(0)
    sizes = {"dim": D, "input_dim": D_IN, "num_slots": K, "grid": GRID, "hidden_dim": 9}
    module = InvariantSlotAttention(**{**sizes, "frame": FRAMES[frame], **options}).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(module: InvariantSlotAttention, seed: int = 2) -> Tensor:
    return module.initial_slots(B, noise=draw(B, K, D + module.frame.width, seed=seed)).detach()


def wide_places() -> Tensor:
    """Spread along the columns, so that no principal axis comes near to 45 degrees."""
    return draw(B, N, 2, seed=4) * torch.tensor([0.2, 0.9], dtype=torch.float64)


def same(a: object, b: object, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0.0, atol=atol)


def axes(cxx: Tensor, cyy: Tensor, cxy: Tensor) -> Tensor:
    """Columns v1, v2 in (x, y): eigenvectors of a covariance, each with y > 0, exchanged if the first stands, x of v1 > 0."""
    root = (4 * cxy**2 + (cxx - cyy) ** 2).sqrt()
    first, second = (
        F.normalize(torch.stack([((cxx + cyy + sign * root) / 2 - cyy) / cxy, torch.ones_like(cxy)]), dim=0)
        for sign in (1, -1)
    )
    if abs(first[0]) < math.sqrt(0.5):
        first, second = second, first
    return torch.stack([first if first[0] > 0 else -first, second], 1)


def loops(module: InvariantSlotAttention, x: Tensor, slots: Tensor, places: Tensor, rounds: int) -> Tensor:
    """The recursion for one row, slot by slot and input by input, with matrices where the library has angles."""
    kind, count = module.frame, len(slots)
    s, p = list(slots[:, :D]), list(slots[:, D : D + 2])
    c = list(slots[:, D + 2 : D + 4]) if not isinstance(kind, Translation) else [None] * count
    angles = slots[:, D + 4] if isinstance(kind, TranslationScaleRotation) else torch.zeros(count).double()
    turns = [torch.stack([torch.stack([t.cos(), -t.sin()]), torch.stack([t.sin(), t.cos()])]) for t in angles]

    def relative(j: int, n: int) -> Tensor:
        r = ((places[n] - p[j]).flip(0) @ turns[j]).flip(0)
        return r if c[j] is None else r / 5.0 / c[j]

    def encode(value: Tensor) -> Tensor:
        first, _, last = module.mlp_places
        hidden = F.layer_norm(value, (D,), module.norm_places.weight, module.norm_places.bias, 1e-6)
        return last.weight @ (first.weight @ hidden + first.bias).relu() + last.bias

    for t in range(rounds + 1):
        logits, values = [], []
        for j in range(count):
            q = module.q.weight @ F.layer_norm(s[j], (D,), module.norm_slots.weight, module.norm_slots.bias, 1e-6)
            row, own = [], []
            for n in range(len(x)):
                y = F.layer_norm(x[n], (D_IN,), module.norm_inputs.weight, module.norm_inputs.bias, 1e-6)
                embedded = module.place.weight @ relative(j, n) + module.place.bias
                row.append(q @ encode(module.k.weight @ y + embedded) / math.sqrt(D))
                own.append(encode(module.v.weight @ y + embedded))
            logits.append(torch.stack(row))
            values.append(own)
        a = torch.stack(logits).exp()
        a = a / a.sum(0)
        for j in range(count):
            w = a[j] / (a[j].sum() + module.eps)
            p[j] = sum(w[n] * places[n] for n in range(len(x)))
            away = [(places[n] - p[j]).flip(0) for n in range(len(x))]
            if isinstance(kind, TranslationScaleRotation):
                covariance = sum(w[n] * away[n][:, None] * away[n] for n in range(len(x)))
                turns[j] = axes(covariance[0, 0], covariance[1, 1], covariance[0, 1])
            if c[j] is not None:
                spread = [((away[n] @ turns[j]) ** 2).flip(0) for n in range(len(x))]
                c[j] = sum((w[n] + module.eps) * spread[n] for n in range(len(x))).sqrt().clamp(0.001, 2.0)
            if t < rounds:
                u = sum(w[n] * values[j][n] for n in range(len(x)))
                s[j] = module.gru(u[None], s[j][None])[0]
                s[j] = s[j] + module.mlp(module.norm_mlp(s[j]))
    parts = [torch.stack(s), torch.stack(p)]
    if c[0] is not None:
        parts.append(torch.stack(c))
    if isinstance(kind, TranslationScaleRotation):
        parts.append(torch.stack([torch.atan2(turn[1, 0], turn[0, 0])[None] for turn in turns]))
    return torch.cat(parts, 1)


@every_frame
def test_it_equals_loops_over_the_equations(frame: str) -> None:
    module, x = build(frame), draw(B, N, D_IN).requires_grad_()
    slots = start(module).requires_grad_()
    out = module(x, slots=slots, iterations=2)
    expected = torch.stack([loops(module, x[b], slots[b], places_of(GRID, x), 2) for b in range(B)])
    same(out, expected)
    inputs = [x, slots, *(p for name, p in module.named_parameters() if not name.startswith("slots_"))]
    weights = draw(*out.shape, seed=3)
    same(
        torch.autograd.grad((out * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        atol=1e-8,  # hundreds of additions in another order
    )


@every_frame
def test_shifting_all_places_shifts_the_frames_and_changes_no_slot(frame: str) -> None:
    # an eps of the weights' sum draws to the middle
    module, x, places = build(frame, eps=1e-30), draw(B, N, D_IN), wide_places()
    slots, shift = start(module), torch.tensor([0.7, -3.0], dtype=torch.float64)
    moved = slots.clone()
    moved[..., D : D + 2] += shift
    out, again = module(x, slots=slots, places=places), module(x, slots=moved, places=places + shift)
    out[..., D : D + 2] += shift
    same(again, out)


@every_frame
def test_with_the_authors_eps_a_shift_is_felt_by_a_hundred_millionth(frame: str) -> None:
    module, x, places = build(frame), draw(B, N, D_IN), wide_places()
    slots = start(module)
    moved = slots.clone()
    moved[..., D : D + 2] += 0.5
    out, again = module(x, slots=slots, places=places), module(x, slots=moved, places=places + 0.5)
    out[..., D : D + 2] += 0.5
    # 1e-8 of the mass of the smallest slot, in each round
    same(again, out, atol=1e-6)
    assert not torch.equal(again, out)


@every_frame
def test_what_moves_by_a_cell_of_the_grid_moves_its_frames_by_a_cell(frame: str) -> None:
    rows, columns = 6, 7
    module = build(frame, grid=(rows, columns), eps=1e-30)
    thing = draw(B, 3, 4, D_IN)
    slots = start(module)

    def seen_at(row: int, column: int, slots: Tensor) -> Tensor:
        image, real = torch.full((B, rows, columns, D_IN), torch.nan).double(), torch.zeros(B, rows, columns).bool()
        image[:, row : row + 3, column : column + 4] = thing
        real[:, row : row + 3, column : column + 4] = True
        return module(image.flatten(1, 2), slots=slots, mask=real.flatten(1))

    # rows are 2/5 apart, columns 2/6
    shift, moved = torch.tensor([2 * 2 / 5, -2 / 6], dtype=torch.float64), slots.clone()
    moved[..., D : D + 2] += shift
    out, again = seen_at(1, 2, slots), seen_at(3, 1, moved)
    out[..., D : D + 2] += shift
    same(again, out)


@pytest.mark.parametrize("frame", ["ts", "tsr"])
def test_scaling_all_places_scales_the_frames_and_changes_no_slot(frame: str) -> None:
    # bounds of the scale are in units of the picture
    scale = TranslationScale(least=1e-12, most=1e12)
    kind = scale if frame == "ts" else TranslationScaleRotation(scale=scale)
    module, x, places = build(frame, eps=1e-30), draw(B, N, D_IN), wide_places()
    module.frame, slots = kind, start(module)
    slots[..., D + 2 : D + 4] = slots[..., D + 2 : D + 4].abs() + 0.05
    larger = slots.clone()
    larger[..., D : D + 4] *= 3.0
    out, again = module(x, slots=slots, places=places), module(x, slots=larger, places=3.0 * places)
    out[..., D : D + 4] *= 3.0
    same(again, out)


def test_turning_all_places_turns_the_frames_and_changes_no_slot() -> None:
    module, x, places = build("tsr", eps=1e-30), draw(B, N, D_IN), wide_places()
    slots, angle = start(module), 0.15

    def turned(r: Tensor) -> Tensor:
        row, column = r.unbind(-1)
        sin, cos = math.sin(angle), math.cos(angle)
        return torch.stack([column * sin + row * cos, column * cos - row * sin], -1)

    def turned_frames(slots: Tensor) -> Tensor:
        return torch.cat(
            [slots[..., :D], turned(slots[..., D : D + 2]), slots[..., D + 2 : -1], slots[..., -1:] + angle], -1
        )

    out, again = module(x, slots=slots, places=places), module(x, slots=turned_frames(slots), places=turned(places))
    assert out[..., -1].abs().max() < math.pi / 4 - angle
    assert out[..., -1].abs().min() > 1e-3
    same(again, turned_frames(out))


def test_places_matter_where_slots_stay() -> None:
    module, x = build("t"), draw(B, N, D_IN)
    slots, places = start(module), wide_places()
    gap = module(x, slots=slots, places=places) - module(x, slots=slots, places=places + 0.5)
    assert gap[..., :D].abs().max() > 1e-3


def test_a_shape_along_the_axes_or_of_no_extent_is_not_turned() -> None:
    frame = TranslationScaleRotation()
    places = places_of(GRID, draw(1)).requires_grad_()
    weights = torch.stack([torch.full((N,), 1 / N), F.one_hot(torch.tensor(3), N), torch.zeros(N)])[None].double()
    found = frame.measure(weights, weights, places[None])
    assert (found[..., 4] == 0).all()
    # nothing is no wider than the least scale
    same(found[0, 1:, 2:4], torch.full((2, 2), 0.001).double())
    (gradient,) = torch.autograd.grad(found.sum(), places)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("angle", [-0.7, -0.3, 0.2, 0.78])
@pytest.mark.parametrize("upright", [False, True])
def test_the_angle_is_that_of_a_bar(angle: float, upright: bool) -> None:
    along = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64)
    x, y = (
        (along * math.cos(angle), along * math.sin(angle))
        if not upright
        else (-along * math.sin(angle), along * math.cos(angle))
    )
    w = torch.full((1, 1, 11), 1 / 11, dtype=torch.float64)
    found = TranslationScaleRotation().measure(w, w, torch.stack([y, x], -1)[None])[0, 0]
    deviation = along.square().mean().sqrt()
    c = torch.tensor([deviation, 0.001] if upright else [0.001, deviation], dtype=torch.float64)
    same(found, torch.cat([torch.zeros(2).double(), c, torch.tensor([angle], dtype=torch.float64)]))


@every_frame
def test_permuting_slots_permutes_and_permuting_inputs_with_their_places_does_not_matter(frame: str) -> None:
    module, x, places = build(frame), draw(B, N, D_IN), wide_places()
    slots = start(module)
    order, shuffled = torch.tensor([3, 0, 1, 2]), torch.randperm(N, generator=torch.Generator().manual_seed(3))
    out, a = module(x, slots=slots, places=places, return_attention=True)
    moved = module(x[:, shuffled], slots=slots[:, order], places=places[:, shuffled], return_attention=True)
    same(moved, (out[:, order], a[:, order][..., shuffled]))


@every_frame
def test_padding_and_masked_slots_are_as_if_they_were_not_there(frame: str) -> None:
    module, places = build(frame), wide_places()
    slots = start(module)
    x = draw(B, N, D_IN).requires_grad_()
    mask, slot_mask = torch.arange(N) < 9, torch.tensor([True, False, True, True])
    weights = [p for name, p in module.named_parameters() if not name.startswith("slots_")]
    out, a = module(x[:, mask], slots=slots[:, slot_mask], places=places[:, mask], return_attention=True)
    expected = torch.autograd.grad(out.square().sum(), [x, *weights])
    filled = torch.where(mask[:, None], x.detach(), torch.nan).requires_grad_()
    slots[:, 1] = torch.nan
    masks = {"mask": mask.expand(B, N), "slot_mask": slot_mask.expand(B, K)}
    padded, wide = module(filled, slots=slots, places=places, return_attention=True, **masks)
    same((padded[:, slot_mask], wide[:, slot_mask][..., :9]), (out, a))
    assert (padded[:, ~slot_mask] == 0).all()
    assert (wide[..., 9:] == 0).all()
    same(torch.autograd.grad(padded.square().sum(), [filled, *weights]), expected, atol=1e-8)


@every_frame
def test_rows_of_a_batch_do_not_see_each_other(frame: str) -> None:
    module, x = build(frame), draw(B, N, D_IN)
    slots = start(module)
    same(torch.cat([module(x[i : i + 1], slots=slots[i : i + 1]) for i in range(B)]), module(x, slots=slots))


@every_frame
def test_gradients_are_those_of_differences(frame: str) -> None:
    module, x, slots = build(frame), draw(B, N, D_IN).requires_grad_(), start(build(frame))
    # at the least scale there is no slope
    slots[..., D + 2 : D + 4] = slots[..., D + 2 : D + 4].abs() + 0.01 * (module.frame.width > 2)
    slots.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: module(x, slots=s, iterations=2), (x, slots), fast_mode=True)


@every_frame
def test_every_round_is_seen(frame: str) -> None:
    module, x = build(frame), draw(B, N, D_IN)
    with record() as seen:
        out, a = module(x, iterations=3, return_attention=True)
    assert len(seen["slots"]) == len(seen["attention"]) == 4
    same((seen["slots"][-1], seen["attention"][-1][:, 0]), (out, a))
    same(seen["slots"][-1][..., :D], seen["slots"][-2][..., :D])
    for each in seen["attention"]:
        same(each.sum(2), torch.ones(B, 1, N).double())


def test_the_implicit_gradient_leaves_the_first_rounds_out() -> None:
    module, x = build("ts", gradient=Implicit()), draw(B, N, D_IN)
    slots = start(module).requires_grad_()
    out = module(x, slots=slots, iterations=2)
    assert torch.autograd.grad(out.sum(), slots, allow_unused=True) == (None,)
    module.gradient = build("ts").gradient
    same(module(x, slots=slots, iterations=3), out)


def test_frames_start_uniform_normal_and_at_any_angle() -> None:
    module = build("tsr", init=SharedGaussian())
    torch.manual_seed(0)
    frames = module.initial_slots(5000, 4)[..., D:].detach().flatten(0, 1)
    p, c, t = frames.split([2, 2, 1], -1)
    # of 20,000 draws; five standard errors of a mean, and of a mean square
    for values, half in ((p, 1.0), (t, math.pi / 4)):
        assert values.abs().max() <= half
        same(values.mean(0) / half, torch.zeros(values.shape[1]).double(), atol=5 * 0.58 / 20_000**0.5)
        same(
            values.square().mean(0) / half**2,
            torch.full((values.shape[1],), 1 / 3).double(),
            atol=5 * 0.3 / 20_000**0.5,
        )
    assert float(c.min()) == 0.001
    same(c.quantile(0.5, 0), torch.full((2,), 0.1).double(), atol=5 * 0.1 * 1.25 / 20_000**0.5)
    assert not torch.equal(module.initial_slots(1), module.initial_slots(1))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_frame
def test_half_precision_is_close_and_a_slot_that_wins_nothing_no_nan(
    frame: str, dtype: torch.dtype, autocast: bool
) -> None:
    module, x = build(frame).float(), draw(B, N, D_IN).float()
    slots = start(module.double()).float()
    slots[..., D + 2 : D + 4] = slots[..., D + 2 : D + 4].clamp(min=0.1)
    module = module.float()
    with torch.no_grad():
        expected = module(x, slots=slots)
        module.q.weight.mul_(100)
    with torch.autocast("cpu", dtype, enabled=autocast), record() as seen:
        held = module if autocast else module.to(dtype)
        x = x.to(x if autocast else dtype).requires_grad_()
        out = held(x, slots=slots.to(x))
        out.float().square().mean().backward()
    assert min(float(a.detach().sum(-1).min()) for a in seen["attention"]) < 1e-6
    assert out.isfinite().all()
    # the slope of an angle where there is hardly a direction is more than half precision's largest number
    if (frame, dtype) != ("tsr", torch.float16):
        assert x.grad is not None and x.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        module.q.weight.div_(100)
        out = module(x.detach(), slots=slots.to(x))
    # relative to the largest entry, after three rounds of layer norms; angles of nearly round shapes have no direction
    kept = slice(None) if frame != "tsr" else slice(0, -1)
    assert float((out.float() - expected)[..., kept].abs().max() / expected.abs().max()) < 0.05


def test_a_decoder_paints_elsewhere_what_has_moved() -> None:
    torch.manual_seed(0)
    grid, frame = (6, 9), Translation()
    decoder = InvariantDecoder(dim=D, grid=grid, frame=frame, body=each_place(dim=D, channels=8)).double()
    slots = draw(B, K, D + 2)
    colours, masks = decoder(slots)
    assert (colours.shape, masks.shape) == ((B, K, 3, *grid), (B, K, *grid))
    same(masks.sum(1), torch.ones(B, *grid).double())
    slots[..., D:] += torch.tensor([2 * 2 / 5, 2 / 8], dtype=torch.float64)
    moved, shares = decoder(slots)
    same(moved[..., 2:, 1:], colours[..., :-2, :-1])
    same(shares[..., 2:, 1:], masks[..., :-2, :-1])


@every_frame
def test_the_decoder_is_its_equation_place_by_place(frame: str) -> None:
    torch.manual_seed(0)
    grid, kind = (3, 4), FRAMES[frame]
    decoder = InvariantDecoder(dim=D, grid=grid, frame=kind, body=each_place(dim=D, channels=8, layers=3)).double()
    slots = torch.cat([draw(B, K, D), kind.draw(draw(B, K, kind.width, seed=2))], -1)
    colours, masks = decoder(slots)
    first, _, second, _, last = decoder.body
    logits = torch.empty(B, K, *grid).double()
    for b, j, row, column in ((b, j, r, c) for b in range(B) for j in range(K) for r in range(3) for c in range(4)):
        g = torch.tensor([row - 1, (column - 1.5) / 1.5], dtype=torch.float64)
        r = kind.relative(g[None, None], slots[b, j, D:][None, None])[0, 0, 0]
        x = slots[b, j, :D] + decoder.place.weight @ r + decoder.place.bias
        for layer in (first, second):
            x = (layer.weight[:, :, 0, 0] @ x + layer.bias).relu()
        y = last.weight[:, :, 0, 0] @ x + last.bias
        same(colours[b, j, :, row, column], y[:3])
        logits[b, j, row, column] = y[3]
    same(masks, logits.softmax(1))


def test_the_encoder_knows_no_place_but_the_border() -> None:
    torch.manual_seed(0)
    encoder = InvariantEncoder(image_size=(24, 25), channels=6, strides=(2, 1)).double()
    image = draw(B, 3, 24, 25)
    tokens = encoder(image).unflatten(1, encoder.grid)
    moved = encoder(image.roll((4, 2), (2, 3))).unflatten(1, encoder.grid)
    # two layers see 2 places to each side, the first by steps of two pixels
    same(moved[:, 2 + 4 : -4, 1 + 4 : -4], tokens[:, 4 : -4 - 2, 4 : -4 - 1])
    assert tokens.min() < 0


@every_frame
@pytest.mark.parametrize("strides", [(), (2, 1)])
def test_the_models_parts_fit_and_every_parameter_gets_a_gradient(frame: str, strides: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = invariant_autoencoder(
        image_size=(10, 12),
        frame=FRAMES[frame],
        num_slots=3,
        dim=8,
        hidden_dim=9,
        channels=5,
        encoder_strides=(2, 1),
        decoder_grid=(5, 6) if strides else None,
        decoder_strides=strides,
    )
    assert isinstance(model, SlotAutoencoder)
    images = torch.rand(2, 3, 10, 12) * 2 - 1
    out = model(images)
    assert out.masks.shape == (2, 3, 10, 12)
    assert out.slots.shape == (2, 3, 8 + FRAMES[frame].width)
    (out.reconstruction - images).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def squares(count: int, seed: int) -> Tensor:
    """Images of 12 x 12 pixels in [0, 1] with one square of red, green or blue."""
    generator = torch.Generator().manual_seed(seed)
    images, places = torch.zeros(count, 3, 12, 12), torch.randint(1, 8, (count, 2), generator=generator)
    colours = torch.randint(0, 3, (count,), generator=generator)
    for image, (row, column), colour in zip(images, places.tolist(), colours.tolist(), strict=True):
        image[colour, row : row + 3, column : column + 3] = 1.0
    return images


@pytest.mark.slow
def test_a_small_model_learns_to_paint_a_square_wherever_it_is() -> None:
    torch.manual_seed(1)
    model = invariant_autoencoder(
        image_size=(12, 12),
        frame=Translation(),
        num_slots=2,
        dim=16,
        hidden_dim=32,
        channels=16,
        encoder_strides=(1, 1),
    )
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(200):
        images = squares(16, 1000 + step)
        loss = F.mse_loss(model(images).reconstruction, images)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50)
        optimiser.step()
    images = squares(128, 1)
    with torch.no_grad():
        rest = F.mse_loss(model(images).reconstruction, images) / images.var(correction=0)
    # all black leaves more than the variance
    assert rest < 0.2


def test_bad_input_is_refused_in_a_sentence() -> None:
    module, x = build("t"), draw(B, N, D_IN)
    refused = {
        r"inputs of shape \(2, 15, 6\), expected \(batch, inputs, 7\)": lambda: module(draw(B, N, D)),
        "got 14 inputs for its grid of 3 x 5": lambda: module(x[:, :14]),
        r"places of shape \(3, 15, 2\), expected \(2 or 1, 15, 2\)": lambda: module(x, places=draw(3, N, 2)),
        r"\[s, frame\] of shape \(2, slots, 8\)": lambda: module(x, slots=draw(B, K, D)),
        "num_slots=3 slots": lambda: module(x, slots=draw(B, K, D + 2), num_slots=3),
        r"expected torch.bool of shape \(2, 15\)": lambda: module(x, mask=torch.ones(B, N)),
        "without a real input": lambda: module(x, mask=torch.zeros(B, N, dtype=torch.bool)),
        "iterations=0": lambda: module(x, iterations=0),
        "has queries for 4 slots, got num_slots=5": lambda: module(x, num_slots=5),
        "got rows=0": lambda: build("t", grid=(0, 3)),
        "expected 1 to 5": lambda: Upsampling(dim=3, channels=4, strides=(6,)),
        r"batch, 3, 4, 6\)": lambda: InvariantEncoder(image_size=(4, 6), channels=4)(draw(B, 3, 4, 5)),
        "use it behind InvariantSlotAttention": lambda: InvariantDecoder(
            dim=D, grid=GRID, frame=Translation(), body=each_place(dim=D)
        )(draw(B, K, D)),
        "makes 6 x 8 pixels of decoder_grid=": lambda: invariant_autoencoder(
            image_size=(6, 9), frame=Translation(), num_slots=3, decoder_grid=(3, 4), decoder_strides=(2,)
        ),
    }
    for words, call in refused.items():
        with pytest.raises(ValueError, match=words):
            call()
