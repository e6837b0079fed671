"""Invariant Slot Attention: each slot sees the inputs from a reference frame of its own, which its attention measures.

    k_n = y_n Wk,  v_n = y_n Wv,  y = LN(x)                                                                (1)
    k_jn = MLP(LN(k_n + W r_jn)),  v_jn = MLP(LN(v_n + W r_jn)),  r_jn = input n's place as slot j sees it   (2)
    a = softmax over slots of (LN(s_j) Wq) k_jn^T / sqrt(d),  w_jn = a_jn / (eps + sum_m a_jm)              (3)
    s_j <- GRU(input sum_n w_jn v_jn, state s_j),  s_j <- s_j + MLP(LN(s_j))                                (4)
    p_j = sum_n w_jn g_n,  c_j = sqrt(sum_n (w_jn + eps) (g_n - p_j)^2)                                    (5)

for inputs n at places g_n = (row, column), in [-1, 1] on a grid. Slots hold what does not depend on where an object is, nor,
with the frame for it, on its size and direction; p, c and the angle hold the rest. T rounds of equations (2) to (5) are
followed by one of (2), (3) and (5), so that the frames are those of the last slots. A decoder sees places as slots do.

Cost O(T k n d (d + hidden)), of memory too where a gradient is needed: every slot has keys and values of its own.

Source: 2302.04973; google-research ``invariant_slot_attention``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo import taps
from tevo.functional import slot_attention as core
from tevo.functional.masks import blank, check_mask
from tevo.functional.precision import island
from tevo.slot_attention.gradient import Gradient, Unrolled
from tevo.slot_attention.init import Init, LearnedQueries
from tevo.slot_attention.mixture import _check_counts, _mlp, _reset
from tevo.slot_attention.models import SlotAutoencoder, _glorot, convolve_same, deconvolve_same

__all__ = [
    "Frame",
    "InvariantDecoder",
    "InvariantEncoder",
    "InvariantSlotAttention",
    "Translation",
    "TranslationScale",
    "TranslationScaleRotation",
    "Upsampling",
    "each_place",
    "invariant_autoencoder",
    "places_of",
]

# a covariance below this is of a shape along the axes, or of none
LEAST_COVARIANCE = 1e-6


class Frame(Protocol):
    """What a slot's reference frame consists of: ``width`` numbers, after the features of its slot."""

    @property
    def width(self) -> int:
        """How many."""
        ...

    def draw(self, noise: Tensor) -> Tensor:
        """Where frames start, (b, k, width), from standard normal ``noise`` of that shape."""
        ...

    def relative(self, places: Tensor, frame: Tensor) -> Tensor:
        """Places (#b, n, 2) as frames (b, k, width) see them, (b, k, n, 2)."""
        ...

    def measure(self, w: Tensor, raised: Tensor, places: Tensor) -> Tensor:
        """Frames (b, k, width) of weights w and w + eps (b, k, n) of inputs at ``places`` (#b, n, 2)."""
        ...


@dataclass(frozen=True)
class Translation:
    """r = g - p: slots know no place. Frames are [p], and start uniform in [-1, 1]^2."""

    @property
    def width(self) -> int:
        """Row and column."""
        return 2

    def draw(self, noise: Tensor) -> Tensor:
        """Uniform."""
        return _uniform(noise)

    def relative(self, places: Tensor, frame: Tensor) -> Tensor:
        """The difference."""
        return places[:, None] - frame[:, :, None]

    def measure(self, w: Tensor, raised: Tensor, places: Tensor) -> Tensor:
        """The centers of mass."""
        return w @ places


@dataclass(frozen=True)
class TranslationScale:
    """r = (g - p) / (factor c): slots know neither place nor size. Frames are [p, c]; c starts as N(0.1, 0.1^2).

    Args:
        factor: of c, since it is small beside what there is to see.
        least: c is not below.
        most: c is not above.
    """

    factor: float = 5.0
    least: float = 0.001
    most: float = 2.0

    @property
    def width(self) -> int:
        """Place and scale, each of rows and columns."""
        return 4

    def draw(self, noise: Tensor) -> Tensor:
        """Uniform places, normal scales."""
        p, c = noise.split(2, -1)
        return torch.cat([_uniform(p), self._within(0.1 + 0.1 * c)], -1)

    def relative(self, places: Tensor, frame: Tensor) -> Tensor:
        """The difference in units of the scale."""
        p, c = frame.split(2, -1)
        return self.scaled(places[:, None] - p[:, :, None], c)

    def measure(self, w: Tensor, raised: Tensor, places: Tensor) -> Tensor:
        """The centers of mass and the deviations from them (eq. 5)."""
        p = w @ places
        return torch.cat([p, self.deviation(raised, places[:, None] - p[:, :, None])], -1)

    def scaled(self, r: Tensor, c: Tensor) -> Tensor:
        """Differences r (b, k, n, 2) in units of c (b, k, 2)."""
        return r / (self.factor * self._within(c)[:, :, None])

    def deviation(self, raised: Tensor, r: Tensor) -> Tensor:
        """C (b, k, 2) of differences r (b, k, n, 2)."""
        variance = torch.einsum("bkn,bkni->bki", raised, r.square())
        # before the root, whose slope at 0 is infinite
        return variance.clamp(self.least**2, self.most**2).sqrt()

    def _within(self, c: Tensor) -> Tensor:
        return c.clamp(self.least, self.most)


@dataclass(frozen=True)
class TranslationScaleRotation:
    """r = R(-t) (g - p) / (factor c): slots know no direction either. Frames are [p, c, t], t in radians.

    t in (-pi/4, pi/4) turns the columns' axis to the nearest of the principal axes of w: an upright thing stays upright. It
    starts uniform; with a covariance of rows and columns below 1e-6 it is 0. c is measured along the turned axes. Of weights
    with hardly a direction its slope is up to 5e5, which float16 cannot hold.

    Departure: frames hold t, where the authors' hold the four numbers of R(t).

    Args:
        scale: how place and scale are seen and measured.
    """

    scale: TranslationScale = field(default_factory=TranslationScale)

    @property
    def width(self) -> int:
        """Place and scale, each of rows and columns, and an angle."""
        return 5

    def draw(self, noise: Tensor) -> Tensor:
        """Uniform places and angles, normal scales."""
        return torch.cat([self.scale.draw(noise[..., :4]), math.pi / 4 * _uniform(noise[..., 4:])], -1)

    def relative(self, places: Tensor, frame: Tensor) -> Tensor:
        """The difference, turned back, in units of the scale."""
        p, c, t = frame.split([2, 2, 1], -1)
        return self.scale.scaled(_turned_back(places[:, None] - p[:, :, None], t), c)

    def measure(self, w: Tensor, raised: Tensor, places: Tensor) -> Tensor:
        """The centers of mass, the angle of the principal axes, and the deviations along them."""
        p = w @ places
        r = places[:, None] - p[:, :, None]
        rows, columns = r.unbind(-1)
        both = (w * rows * columns).sum(-1)
        gap = (w * (columns.square() - rows.square())).sum(-1)
        tilted = both.abs() >= LEAST_COVARIANCE
        # atan2 has no slope at 0, 0
        t = 0.5 * torch.atan2(2 * both.where(tilted, 0.0) * gap.sign(), gap.abs().where(tilted, 1.0))[..., None]
        return torch.cat([p, self.scale.deviation(raised, _turned_back(r, t)), t], -1)


class InvariantSlotAttention(nn.Module):
    """Invariant Slot Attention, the authors' third version, in which keys and values are relative.

    Put in the place of :class:`tevo.slot_attention.SlotAttention` it has the same call; slots are [s, frame], so that they
    are ``frame.width`` wider than ``dim``. Each of the T + 1 rounds taps "attention" (b, 1, k, n) and "slots", [s, frame].

    Departure from the authors' code: p of given slots is not clipped to [-1, 1], which would tie slots to the picture.

    Args:
        dim: width d of s, of queries, keys and values.
        grid: (rows, columns) of the inputs, in row-major order, where a call gives no places.
        num_slots: slots k, unless a call asks for another number.
        input_dim: width of an input, without its place; by default dim.
        iterations: T, unless a call asks for another number.
        hidden_dim: width inside both MLPs.
        frame: what a reference frame consists of.
        norm_eps: eps of the layer norms.
        eps: of equations (3) and (5); above 0 it draws a slot that wins next to nothing to the middle.
        init: where s starts.
        gradient: through which iterations it flows; it always flows through the last measurement.
    """

    def __init__(
        self,
        *,
        dim: int,
        grid: tuple[int, int],
        num_slots: int = 7,
        input_dim: int | None = None,
        iterations: int = 3,
        hidden_dim: int = 128,
        frame: Frame | None = None,
        norm_eps: float = 1e-6,
        eps: float = 1e-8,
        init: Init | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.input_dim = dim, dim if input_dim is None else input_dim
        self.grid, self.num_slots, self.iterations, self.eps = (grid[0], grid[1]), num_slots, iterations, eps
        self.frame: Frame = Translation() if frame is None else frame
        self.init: Init = LearnedQueries() if init is None else init
        self.gradient: Gradient = Unrolled() if gradient is None else gradient
        _check_counts(
            "InvariantSlotAttention", num_slots=num_slots, iterations=iterations, rows=grid[0], columns=grid[1]
        )
        self.norm_inputs, self.norm_slots = nn.LayerNorm(self.input_dim, norm_eps), nn.LayerNorm(dim, norm_eps)
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(self.input_dim, dim, bias=False)
        self.v = nn.Linear(self.input_dim, dim, bias=False)
        self.place = nn.Linear(2, dim)
        self.norm_places, self.mlp_places = nn.LayerNorm(dim, norm_eps), _mlp(dim, hidden_dim, dim)
        self.gru = nn.GRUCell(dim, dim)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim, norm_eps), _mlp(dim, hidden_dim, dim)
        self.init.build(self, dim, num_slots)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in :class:`tevo.slot_attention.SlotAttention`."""
        _reset(self)
        self.init.reset(self)

    def no_decay(self) -> set[str]:
        """Where slots start is no weight."""
        return {name for name, _ in self.named_parameters() if name.startswith("slots_")}

    def initial_slots(self, batch: int, num_slots: int | None = None, *, noise: Tensor | None = None) -> Tensor:
        """Initial [s, frame] (b, k, d + width), drawn, or from standard normal ``noise`` of that shape."""
        if noise is None:
            k = self.num_slots if num_slots is None else num_slots
            like = self.q.weight
            noise = torch.randn(batch, k, self.dim + self.frame.width, dtype=like.dtype, device=like.device)
        return torch.cat([self.init.draw(self, noise[..., : self.dim]), self.frame.draw(noise[..., self.dim :])], -1)

    def forward(
        self,
        inputs: Tensor,
        *,
        slots: Tensor | None = None,
        num_slots: int | None = None,
        iterations: int | None = None,
        mask: Tensor | None = None,
        slot_mask: Tensor | None = None,
        return_attention: bool = False,
        places: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``inputs`` (b, n, d_in) give [s, frame] (b, k, d + width).

        Args:
            inputs: (b, n, d_in), a set but for their places.
            slots: [s, frame] (b, k, d + width) to start from; by default they are drawn.
            num_slots: k of this call.
            iterations: T of this call.
            mask: (b, n) bool, True = real input.
            slot_mask: (b, k) bool, True = real slot; the others come out as zeros.
            return_attention: return the a (b, k, n) of the last round as well.
            places: (#b, n, 2) row and column of each input; by default those of the grid.
        """
        iterations = self.iterations if iterations is None else iterations
        slots, places = self._check(inputs, slots, num_slots, iterations, mask, slot_mask, places)
        held, wide = self.q.weight.dtype, places.dtype
        y = self.norm_inputs(blank(inputs, mask))
        k, v = self.k(y)[:, None], self.v(y)[:, None]  # b 1 n d
        last: list[Tensor] = []

        def look(state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Weights w (b, k, n), embedded places (b, k, n, d), and frames (b, k, width)."""
            s, frame = state.split([self.dim, self.frame.width], -1)
            embedded = self.place(self.frame.relative(places, frame).to(held))
            q, keys = self.q(self.norm_slots(s.to(held))), self._encode(k + embedded)
            with island(inputs):
                logits = torch.einsum("bkd,bknd->bkn", q.to(wide), keys.to(wide)) * self.dim**-0.5
                a = core.compete(logits[:, None], mask=mask, slot_mask=slot_mask)
                w = a[:, 0] / (a[:, 0].sum(-1, keepdim=True) + self.eps)  # (eq. 3)
                raised = w + self.eps
                # padding has no place
                raised = raised if mask is None else raised.masked_fill(~mask[:, None], 0.0)
                frame = self.frame.measure(w, raised, places)  # (eq. 5)
            last[:] = [taps.tap("attention", a)]
            return w, embedded, frame

        def step(state: Tensor) -> Tensor:
            w, embedded, frame = look(state)
            values = self._encode(v + embedded)
            with island(inputs):
                u = torch.einsum("bkn,bknd->bkd", w, values.to(wide))
            s = state[..., : self.dim]
            s = self.gru(u.flatten(0, 1).to(held), s.flatten(0, 1).to(held)).view_as(s)
            s = s + self.mlp(self.norm_mlp(s))  # (eq. 4)
            return taps.tap("slots", torch.cat([s.to(wide), frame], -1))

        state = self.gradient(step, blank(slots, slot_mask).to(wide), iterations)
        # where the slots are that the last round has made
        frame = look(state)[2]
        found = taps.tap("slots", torch.cat([state[..., : self.dim], frame], -1))
        found = blank(found.to(held), slot_mask)
        return (found, last[0][:, 0]) if return_attention else found

    def _encode(self, x: Tensor) -> Tensor:
        """Equation (2)."""
        encoded: Tensor = self.mlp_places(self.norm_places(x))
        return encoded

    def _check(
        self,
        inputs: Tensor,
        slots: Tensor | None,
        num_slots: int | None,
        iterations: int,
        mask: Tensor | None,
        slot_mask: Tensor | None,
        places: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Refuse what cannot be read; the slots to start from, and places in float32 at least."""
        name, width = type(self).__name__, self.dim + self.frame.width
        if inputs.ndim != 3 or inputs.shape[-1] != self.input_dim or inputs.shape[1] == 0:
            raise ValueError(
                f"{name} got inputs of shape {tuple(inputs.shape)}, expected (batch, inputs, {self.input_dim}); flatten "
                "grids to a set, and give the width as input_dim"
            )
        b, n = inputs.shape[:2]
        if places is None:
            if n != self.grid[0] * self.grid[1]:
                raise ValueError(
                    f"{name} got {n} inputs for its grid of {self.grid[0]} x {self.grid[1]}; rebuild it with theirs, or give "
                    "their places"
                )
            places = places_of(self.grid, inputs)[None]
        elif places.shape not in ((b, n, 2), (1, n, 2)):
            raise ValueError(f"{name} got places of shape {tuple(places.shape)}, expected ({b} or 1, {n}, 2)")
        check_mask(name, mask, b, n)
        # a value cannot be looked at while a graph is traced
        if mask is not None and not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
            raise ValueError(
                f"{name} got a mask with rows without a real input, expected one at least in each; leave those rows out"
            )
        _check_counts(name, num_slots=1 if num_slots is None else num_slots, iterations=iterations)
        if slots is None:
            slots = self.initial_slots(b, num_slots)
        elif (
            slots.ndim != 3 or slots.shape[0] != b or slots.shape[2] != width or num_slots not in (None, slots.shape[1])
        ):
            wanted = "any number of" if num_slots is None else f"num_slots={num_slots}"
            raise ValueError(
                f"{name} got slots of shape {tuple(slots.shape)}, expected [s, frame] of shape ({b}, slots, {width}) with "
                f"{wanted} slots"
            )
        check_mask(f"{name} slot", slot_mask, *slots.shape[:2])
        return slots, places.to(torch.promote_types(inputs.dtype, torch.float32))


class InvariantEncoder(nn.Module):
    """Convolutions alone, the last without ReLU: an image as tokens in row-major order that know no place.

    Args:
        image_size: (rows, columns) in pixels.
        channels: width of the convolutions and the tokens.
        strides: stride of each 5 x 5 convolution.
    """

    def __init__(self, *, image_size: tuple[int, int], channels: int, strides: Sequence[int] = (1, 1, 1, 1)) -> None:
        super().__init__()
        self.image_size = (image_size[0], image_size[1])
        rows, columns = self.image_size
        for stride in strides:
            rows, columns = -(-rows // stride), -(-columns // stride)
        self.grid = (rows, columns)
        widths = [3, *(channels for _ in strides)]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(*pair, 5, stride) for pair, stride in zip(pairwise(widths), strides, strict=True)
        )
        _glorot(self)

    def forward(self, images: Tensor) -> Tensor:
        """``images`` (b, 3, rows, columns) give tokens (b, n, channels)."""
        if images.ndim != 4 or images.shape[1:] != (3, *self.image_size):
            raise ValueError(
                f"InvariantEncoder was built for images (batch, 3, {self.image_size[0]}, {self.image_size[1]}), got a tensor "
                f"of shape {tuple(images.shape)}; resize the images or rebuild with their size"
            )
        x = images
        for i, layer in enumerate(self.convolutions):
            x = convolve_same(F.relu(x) if i else x, layer)
        return x.flatten(2).transpose(1, 2)


class InvariantDecoder(nn.Module):
    """Spatial broadcast of [s, frame]: each slot tiled on a grid, whose places it sees from its frame.

    x_jn = s_j + W r_jn,   c_j, l_j = body(x_j),   m = softmax_j(l)

    Args:
        dim: width of s.
        grid: (rows, columns) on which a slot is tiled.
        frame: that of the slots.
        body: (r, d, rows, columns) to (r, 4, rows', columns'): colours and the logits of a mask.
    """

    def __init__(self, *, dim: int, grid: tuple[int, int], frame: Frame, body: nn.Module) -> None:
        super().__init__()
        self.dim, self.grid, self.frame = dim, (grid[0], grid[1]), frame
        self.place = nn.Linear(2, dim)
        self.body = body
        _glorot(self)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """``slots`` (b, k, d + width) give colours (b, k, 3, rows', columns') and masks (b, k, rows', columns')."""
        width = self.dim + self.frame.width
        if slots.ndim != 3 or slots.shape[2] != width:
            raise ValueError(
                f"InvariantDecoder got slots of shape {tuple(slots.shape)}, expected [s, frame] of shape (batch, slots, "
                f"{width}); use it behind InvariantSlotAttention with the same dim and frame"
            )
        s, frame = slots.split([self.dim, self.frame.width], -1)
        places = places_of(self.grid, slots)
        # places and frames are subtracted in more digits than half precision has
        r = self.frame.relative(places[None], frame.to(places)).to(slots)
        x = s[:, :, None] + self.place(r)  # b k n d
        x = x.flatten(0, 1).transpose(1, 2).unflatten(2, self.grid)  # bk d rows columns
        y = self.body(x).unflatten(0, slots.shape[:2])
        return y[:, :, :3], y[:, :, 3].softmax(1)


def each_place(*, dim: int, channels: int = 256, layers: int = 7) -> nn.Sequential:
    """A decoder's body: an MLP of each place on its own, the same for all.

    Args:
        dim: width of the slots.
        channels: width of the MLP.
        layers: of the MLP, the last included.
    """
    widths = [dim, *(channels for _ in range(layers - 1))]
    hidden = [m for pair in pairwise(widths) for m in (nn.Conv2d(*pair, 1), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Conv2d(widths[-1], 4, 1))


class Upsampling(nn.Module):
    """A decoder's body: transposed 5 x 5 convolutions and a linear map of each pixel.

    Args:
        dim: width of the slots.
        channels: width of the convolutions.
        strides: stride of each.
    """

    def __init__(self, *, dim: int, channels: int, strides: Sequence[int] = (2, 2, 2, 1, 1)) -> None:
        super().__init__()
        if any(not 1 <= stride <= 5 for stride in strides):
            raise ValueError(
                f"Upsampling got strides {tuple(strides)}, expected 1 to 5: a 5 x 5 kernel leaves holes beyond"
            )
        widths = [dim, *(channels for _ in strides)]
        self.convolutions = nn.ModuleList(
            nn.ConvTranspose2d(*pair, 5, stride) for pair, stride in zip(pairwise(widths), strides, strict=True)
        )
        self.last = nn.Conv2d(widths[-1], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (r, d, rows, columns) gives (r, 4, rows', columns')."""
        for layer in self.convolutions:
            x = F.relu(deconvolve_same(x, layer))
        y: Tensor = self.last(x)
        return y


def invariant_autoencoder(
    *,
    image_size: tuple[int, int],
    frame: Frame,
    num_slots: int,
    dim: int = 64,
    hidden_dim: int = 128,
    iterations: int = 3,
    channels: int = 64,
    encoder_strides: Sequence[int] = (1, 1, 1, 1),
    decoder_grid: tuple[int, int] | None = None,
    decoder_strides: Sequence[int] = (),
    gradient: Gradient | None = None,
) -> SlotAutoencoder:
    """A :class:`SlotAutoencoder` of invariant parts.

    Args:
        image_size: (rows, columns) in pixels: ``decoder_grid`` times the product of ``decoder_strides``.
        frame: what slots do not know.
        num_slots: slots k of a call that does not ask for another number.
        dim: width of the slots without their frames.
        hidden_dim: width inside the slot module's MLPs.
        iterations: rounds T of the slot module.
        channels: width of the convolutions.
        encoder_strides: stride of each layer of the encoder.
        decoder_grid: (rows, columns) on which a slot is tiled; by default each pixel.
        decoder_strides: of transposed convolutions; none: an MLP of each place, four times as wide as a slot.
        gradient: of the slot module.
    """
    grid = image_size if decoder_grid is None else decoder_grid
    scale = math.prod(decoder_strides)
    if (grid[0] * scale, grid[1] * scale) != tuple(image_size):
        raise ValueError(
            f"invariant_autoencoder's decoder makes {grid[0] * scale} x {grid[1] * scale} pixels of decoder_grid={grid}, got "
            f"image_size={image_size}; with strides {tuple(decoder_strides)} each side of the image must be {scale} times "
            "that of the grid"
        )
    # its parts are exchanged
    model = SlotAutoencoder(image_size=image_size, dim=1, decoder_grid=image_size, decoder_strides=())
    encoder = InvariantEncoder(image_size=image_size, channels=channels, strides=encoder_strides)
    attention = InvariantSlotAttention(
        dim=dim,
        grid=encoder.grid,
        num_slots=num_slots,
        input_dim=channels,
        iterations=iterations,
        hidden_dim=hidden_dim,
        frame=frame,
        gradient=gradient,
    )
    body = (
        Upsampling(dim=dim, channels=channels, strides=decoder_strides)
        if decoder_strides
        else each_place(dim=dim, channels=4 * dim)
    )
    model.add_module("encoder", encoder)
    model.add_module("slot_attention", attention)
    model.add_module("decoder", InvariantDecoder(dim=dim, grid=grid, frame=frame, body=body))
    return model


def places_of(grid: tuple[int, int], like: Tensor) -> Tensor:
    """Row and column of each place of a grid, (n, 2), in [-1, 1] with the ends, in float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = (torch.linspace(-1, 1, size, dtype=dtype, device=like.device) for size in grid)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


def _uniform(noise: Tensor) -> Tensor:
    """Standard normal numbers as ones that are uniform in [-1, 1]."""
    return torch.erf(noise * 0.5**0.5)


def _turned_back(r: Tensor, t: Tensor) -> Tensor:
    """Differences (b, k, n, 2) of rows and columns along axes that are turned by t (b, k, 1)."""
    rows, columns = r.unbind(-1)
    return torch.stack([rows * t.cos() - columns * t.sin(), columns * t.cos() + rows * t.sin()], -1)
