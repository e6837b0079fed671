"""Slot Attention: k slots compete for n inputs, again and again, until each explains a part of them.

    y = LN(x),  s ~ N(mu, exp(log_sigma)^2)                                                               (1)
    repeat T times: a = softmax over slots of (LN(s) Wq) (y Wk)^T / sqrt(e),  w = a + eps                  (2)
                    u = sum_n w_n (y_n Wv) / sum_n w_n                                                     (3)
                    s <- GRU(input u, state s),  s <- s + MLP(LN(s))                                       (4)

Cost O(T k n d), linear in the inputs; no order among inputs or slots.

Source: 2006.15055, section 2 and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tevo import taps
from tevo.functional import slot_attention as core
from tevo.functional.masks import blank, check_mask
from tevo.functional.precision import island
from tevo.kernels import slot_attention as kernels
from tevo.slot_attention.aggregation import Aggregation, Sum, WeightedMean
from tevo.slot_attention.competition import Competition, Scene, SlotSoftmax
from tevo.slot_attention.gradient import Gradient, Unrolled
from tevo.slot_attention.init import Init, SharedGaussian

FORMS = {"auto": None, "plain": False, "absorbed": True}
MEMORY = {"stored": False, "lean": True}
# parts that :meth:`SlotAttention._usual_step` does without calling them
USUAL = {
    **dict.fromkeys(("norm_inputs", "norm_slots", "norm_mlp"), nn.LayerNorm),
    **dict.fromkeys(("q", "k", "v"), nn.Linear),
    "gru": nn.GRUCell,
    "mlp": nn.Sequential,
}
USUAL_MLP = {"0": nn.Linear, "1": nn.ReLU, "2": nn.Linear}


class Reading(NamedTuple):
    """One pass over the inputs: total (b, h, k, e), mass (b, h, k), and the weights (b, h, k, n) for who wants them."""

    total: Tensor
    mass: Tensor
    weights: Callable[[], Tensor]


# of normalised slots (b, k, d)
Reader = Callable[[Tensor], Reading]


class SlotAttention(nn.Module):
    """Slot Attention, by default exactly the reference's, initial weights included.

    ``gru`` may be replaced by any module of (update (r, u), state (r, d)) that returns the next state (r, d).

    Args:
        dim: width d of a slot.
        num_slots: slots k, unless a call asks for another number.
        input_dim: width of an input; by default dim.
        iterations: T, unless a call asks for another number.
        hidden_dim: width inside the MLP; None: no MLP.
        heads: heads h.
        inner_dim: width h e of queries, keys and values; by default dim.
        merge_dim: width to which the concatenated heads are projected, with a bias; None: they are not.
        norm_eps: eps of the three layer norms; None: no norms.
        init: where slots start.
        competition: how slots compete for inputs.
        aggregation: how inputs become updates; by default what belongs to the competition.
        gradient: through which iterations it flows.
        form: "plain" makes keys and values, "absorbed" never does; "auto" takes the one with fewer FLOPs, few inputs apart.
        memory: "lean" saves a number of each input and makes the rest again for the gradient; implies "absorbed". Gradients
            are of the first order only, as those of many inputs in the absorbed form are anyway.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_slots: int = 7,
        input_dim: int | None = None,
        iterations: int = 3,
        hidden_dim: int | None = 128,
        heads: int = 1,
        inner_dim: int | None = None,
        merge_dim: int | None = None,
        norm_eps: float | None = 1e-3,
        init: Init | None = None,
        competition: Competition | None = None,
        aggregation: Aggregation | None = None,
        gradient: Gradient | None = None,
        form: str = "auto",
        memory: str = "stored",
    ) -> None:
        super().__init__()
        input_dim = dim if input_dim is None else input_dim
        inner_dim = dim if inner_dim is None else inner_dim
        self.dim, self.input_dim, self.heads = dim, input_dim, heads
        self.num_slots, self.iterations, self.norm_eps = num_slots, iterations, norm_eps
        self.init: Init = SharedGaussian() if init is None else init
        self.competition: Competition = SlotSoftmax() if competition is None else competition
        self.aggregation: Aggregation = self.competition.aggregation() if aggregation is None else aggregation
        self.gradient: Gradient = Unrolled() if gradient is None else gradient
        for name, value in (("num_slots", num_slots), ("iterations", iterations)):
            _check_count(name, value)
        if heads < 1 or inner_dim % heads:
            raise ValueError(f"SlotAttention got inner_dim={inner_dim} for heads={heads}; heads must divide it")
        self._absorbed, self._lean = _choose("form", form, FORMS), bool(_choose("memory", memory, MEMORY))
        if (self._lean or self._absorbed) and (not self.competition.local or (self._lean and form == "plain")):
            raise ValueError(
                f"SlotAttention got form={form!r}, memory={memory!r} for {self.competition!r}, which needs keys and values; "
                "use form='auto' and memory='stored'"
            )

        def norm(width: int) -> nn.Module:
            return nn.Identity() if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)

        self.norm_inputs, self.norm_slots = norm(input_dim), norm(dim)
        self.q = nn.Linear(dim, inner_dim, bias=False)
        self.k = nn.Linear(input_dim, inner_dim, bias=False)
        self.v = nn.Linear(input_dim, inner_dim, bias=False)
        self.merge = None if merge_dim is None else nn.Linear(inner_dim, merge_dim)
        self.gru: nn.Module = nn.GRUCell(inner_dim if merge_dim is None else merge_dim, dim)
        self.norm_mlp, self.mlp = None, None
        if hidden_dim is not None:
            self.norm_mlp = norm(dim)
            self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, dim))
        self.init.build(self, dim, num_slots)
        self.competition.build(self, dim, input_dim, heads, dim if hidden_dim is None else hidden_dim)
        self.aggregation.build(self, inner_dim)
        self.reset_parameters()

    @classmethod
    def note(
        cls,
        *,
        dim: int,
        num_slots: int = 7,
        input_dim: int | None = None,
        inner_dim: int | None = None,
        iterations: int = 3,
    ) -> SlotAttention:
        """The bare recursion: q = s Wq, a = softmax over slots of q (x Wk)^T, u = a (x Wv), s <- GRU(input u, state s).

        No norms, no scale, no division by the sum over inputs, no MLP.
        """
        inner_dim = dim if inner_dim is None else inner_dim
        return cls(
            dim=dim,
            num_slots=num_slots,
            input_dim=input_dim,
            iterations=iterations,
            hidden_dim=None,
            inner_dim=inner_dim,
            norm_eps=None,
            # undoes the division by sqrt(e)
            competition=SlotSoftmax(temperature=inner_dim**-0.5),
            aggregation=Sum(),
        )

    def reset_parameters(self) -> None:
        """The reference's: Glorot uniform, recurrent matrices orthogonal, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GRUCell):
                nn.init.xavier_uniform_(module.weight_ih)
                nn.init.orthogonal_(module.weight_hh)
                nn.init.zeros_(module.bias_ih)
                nn.init.zeros_(module.bias_hh)
        self.init.reset(self)

    def no_decay(self) -> set[str]:
        """Where slots start is no weight."""
        return {name for name, _ in self.named_parameters() if name.startswith("slots_")}

    def initial_slots(self, batch: int, num_slots: int | None = None, *, noise: Tensor | None = None) -> Tensor:
        """Initial slots (b, k, d), drawn, or from standard normal ``noise`` (b, k, d)."""
        if noise is None:
            k = self.num_slots if num_slots is None else num_slots
            like = self.q.weight
            noise = torch.randn(batch, k, self.dim, dtype=like.dtype, device=like.device)
        return self.init.draw(self, noise)

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
    ) -> Tensor | tuple[Tensor, Tensor]:
        """``inputs`` (b, n, d_in) give slots (b, k, d).

        Each iteration taps "attention" (b, h, k, n), before eps and division, and "slots" (b, k, d).

        Args:
            inputs: (b, n, d_in), a set.
            slots: (b, k, d) to start from; by default they are drawn.
            num_slots: k of this call.
            iterations: T of this call.
            mask: (b, n) bool, True = real input.
            slot_mask: (b, k) bool, True = real slot; the others come out as zeros.
            return_attention: return the last iteration's attention as well: (b, k, n), the mean of its heads, or their sum
                if heads compete.
        """
        slots, iterations = self._check(inputs, slots, num_slots, iterations, mask, slot_mask)
        if mask is None and slot_mask is None and not return_attention and self._usual(inputs, slots, iterations):
            return self.gradient(self._usual_step(inputs), slots, iterations)
        slots = blank(slots, slot_mask)
        with _island(inputs):
            read = self._reader(inputs, slots, iterations, Scene(mask, slot_mask))
        count = _count(inputs, mask)
        last: list[Reading] = []

        def step(s: Tensor) -> Tensor:
            reading, s = self._step(s, read, count)
            last[:] = [reading]
            if taps.watched():
                taps.tap("attention", reading.weights())
                taps.tap("slots", s)
            return s

        slots = blank(self.gradient(step, slots, iterations), slot_mask)
        if not return_attention:
            return slots
        a = last[0].weights()
        return slots, a.sum(1) if self.competition.joint else a.mean(1)

    def _usual(self, x: Tensor, slots: Tensor, iterations: int) -> bool:
        """Whether :meth:`_usual_step` is this module's iteration and the fastest form of it, and nobody looks inside."""
        graphed, mean = torch.is_grad_enabled(), self.aggregation
        return (
            # first: a size that is asked for is a limit of what is exported
            not torch.compiler.is_compiling()
            and x.numel() < (core.MANY if graphed else core.MORE)
            # frozen inputs need a norm without a gradient
            and (x.requires_grad or not graphed)
            and self._absorbed is None
            and not self._lean
            and self.heads == 1
            and type(self.competition) is SlotSoftmax
            and (type(mean) is WeightedMean and mean.eps > 0.0 and mean.offset == 0.0)
            and _bare(self, USUAL)
            and _bare(self._modules["mlp"], USUAL_MLP)
            and x.dtype == slots.dtype == self.q.weight.dtype
            and x.dtype in (torch.float32, torch.float64)
            and not taps.watched()
            and not kernels.runs(x, slots.shape[1])
            and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
            and core.absorption_pays(
                # few take the time of the calls, not of the products
                tokens=max(x.shape[1], core.FEW),
                width=self.input_dim,
                inner=self.k.out_features,
                slots=slots.shape[1],
                iterations=iterations,
            )
        )

    def _usual_step(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Equations (2) to (4) as most use them, absorbed, in the fewest calls: few inputs take their time for nothing else.

        Matrices that follow each other, Wq and Wk^T, Wv and the GRU's first, are multiplied once for all iterations.
        """
        norm, norm_slots, norm_mlp = (cast(nn.LayerNorm, n) for n in (self.norm_inputs, self.norm_slots, self.norm_mlp))
        gru, (first, _, second) = cast(nn.GRUCell, self.gru), cast(Any, self.mlp)
        # an attribute of a module takes as long as a small product
        slots_norm = norm_slots.normalized_shape, norm_slots.weight, norm_slots.bias, norm_slots.eps
        mlp_norm = norm_mlp.normalized_shape, norm_mlp.weight, norm_mlp.bias, norm_mlp.eps
        recurrent = gru.weight_hh, gru.bias_ih, gru.bias_hh
        (widen, widen_bias), (narrow, narrow_bias) = ((part.weight.t(), part.bias) for part in (first, second))
        y = torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        key = torch.mm(self.q.weight.t(), self.k.weight) * self.competition.scale(self.k.out_features)  # d d_in
        value = torch.mm(gru.weight_ih, self.v.weight)  # 3d d_in
        columns, eps = y.mT, self.aggregation.eps

        def step(s: Tensor) -> Tensor:
            b, k, d = s.shape
            s = s.reshape(b * k, d)
            q = torch.mm(torch.layer_norm(s, *slots_norm), key).view(b, k, -1)
            a = torch.bmm(q, columns).softmax(1)
            w = a + eps if torch.is_grad_enabled() else a.add_(eps)
            u = torch.bmm(w, y) / w.sum(2, True)
            s = torch.gru_cell(u.view(b * k, -1), s, value, *recurrent)
            hidden = torch.addmm(widen_bias, torch.layer_norm(s, *mlp_norm), widen).relu_()
            return torch.addmm(narrow_bias, hidden, narrow).add_(s).view(b, k, d)

        return step

    def _step(self, s: Tensor, read: Reader, count: Tensor) -> tuple[Reading, Tensor]:
        """Equations (2) to (4)."""
        with _island(s):
            reading = read(self.norm_slots(s))
            u = self.aggregation(self, reading.total, reading.mass, count)  # (eq. 3)
        u = _as(u, s.dtype)
        u = u.squeeze(1) if self.heads == 1 else u.transpose(1, 2).flatten(2)  # b k he
        if self.merge is not None:
            u = self.merge(u)
        # autocast may return less than the state's precision
        s = _as(self.gru(_as(u.flatten(0, 1), s.dtype), s.flatten(0, 1)), s.dtype).view_as(s)
        if self.mlp is not None and self.norm_mlp is not None:
            s = s + _as(self.mlp(self.norm_mlp(s)), s.dtype)
        return reading, s

    def _reader(self, x: Tensor, slots: Tensor, iterations: int, scene: Scene) -> Reader:
        """Equation (2) in the cheapest of its forms; products over the inputs are in float32 at least."""
        k = slots.shape[1]
        if self.competition.local and self._absorbed is not False:
            competing = k * self.heads if self.competition.joint else k
            if kernels.runs(x, competing):
                return self._kernel_reader(x, k, self.gradient.tracked(iterations), scene)
        absorbed = True if self._lean else self._absorbed
        if absorbed is None:
            enough = self.competition.local and x.shape[0] * x.shape[1] >= core.FEW
            absorbed = enough and core.absorption_pays(
                tokens=x.shape[1],
                width=self.input_dim,
                inner=self.k.out_features,
                slots=k,
                iterations=iterations,
                heads=self.heads,
                frozen=torch.is_grad_enabled() and not x.requires_grad,
            )
        if not absorbed:
            return self._plain_reader(x, slots, scene)
        # a compiler fuses better than pieces do, and need not know their number
        few = x.numel() < (core.MANY if torch.is_grad_enabled() else core.MORE)
        if torch.compiler.is_compiling() and not self._lean:
            return self._traced_reader(x, scene)
        if few and not self._lean:
            return self._absorbed_reader(x, scene)
        return self._folded_reader(x, k, self.gradient.tracked(iterations), scene)

    def _queries(self, normed: Tensor, dtype: torch.dtype) -> Tensor:
        """Scaled queries (b, h, k, e) of normalised slots (b, k, d)."""
        q = _by_heads(F.linear(normed, self.q.weight), self.heads)
        return _as(q, dtype) * self.competition.scale(q.shape[-1])

    def _plain_reader(self, x: Tensor, slots: Tensor, scene: Scene) -> Reader:
        wide = _wide(x)
        gain, bias = self._affine(wide)
        y = core.normalised(_as(blank(x, scene.mask), wide), self.norm_eps, gain, bias)
        # not the bias either
        y = blank(y, scene.mask)
        keys, values = (_by_heads(F.linear(y, _as(part.weight, wide)), self.heads) for part in (self.k, self.v))
        scene = self.competition.prepare(self, y, slots, scene)

        def read(normed: Tensor) -> Reading:
            a = self.competition.weights(self, self._queries(normed, wide), keys, normed, scene)
            return Reading(*core.read(a, values, eps=self.aggregation.eps, mask=scene.mask), lambda: a)

        return read

    def _absorbed_reader(self, x: Tensor, scene: Scene) -> Reader:
        wide = _wide(x)
        # padded tokens are zeros before the norm, hence after it
        xh = core.normalised(blank(x, scene.mask).to(wide), self.norm_eps)
        gain, bias = self._affine(wide)
        key, value = self.k.weight.to(wide), self.v.weight.to(wide)

        def read(normed: Tensor) -> Reading:
            qk, offset = core.absorb(self._queries(normed, wide), key, gain, bias)
            a = self._map(qk, offset, xh, scene)
            total, mass = core.read(a.flatten(1, 2)[:, None], xh[:, None], eps=self.aggregation.eps, mask=scene.mask)
            total, mass = total.view_as(qk), mass.view(qk.shape[:3])
            return Reading(core.unabsorb(total, mass, value, gain, bias), mass, lambda: a)

        return read

    def _traced_reader(self, x: Tensor, scene: Scene) -> Reader:
        """The folded form whole, for a compiler: it fuses what is not a product, and xh is never written."""
        if self.norm_eps is None:
            return self._absorbed_reader(x, scene)
        x = blank(x, scene.mask).to(_wide(x))
        gain, bias = self._affine(x.dtype)
        key, value = self.k.weight.to(x.dtype), self.v.weight.to(x.dtype)
        variance, _ = torch.var_mean(x, -1, correction=0)
        rstd = (variance + self.norm_eps).rsqrt()[:, None]  # b 1 n

        def read(normed: Tensor) -> Reading:
            qk, offset = core.absorb(self._queries(normed, x.dtype), key, gain, bias)
            rows = core.centred(qk.flatten(1, 2))  # b hk d
            logits = core.logits(rows, None, x) * rstd
            if offset is not None:
                logits = logits + offset.flatten(1, 2)[..., None]
            a = core.compete(
                logits.unflatten(1, qk.shape[1:3]),
                joint=self.competition.joint,
                mask=scene.mask,
                slot_mask=scene.slot_mask,
            )
            w = a.flatten(1, 2) + self.aggregation.eps
            if scene.mask is not None:
                w = w.masked_fill(~scene.mask[:, None], 0.0)
            total, mass = core.centred((w * rstd) @ x).view_as(qk), w.sum(-1).view(qk.shape[:3])
            return Reading(core.unabsorb(total, mass, value, gain, bias), mass, lambda: a)

        return read

    def _folded_reader(self, x: Tensor, k: int, tracked: int, scene: Scene) -> Reader:
        wide, b = _wide(x), x.shape[0]
        # a long row is several short ones, which the threads share
        pieces = core.stretches(*x.shape[1:])
        x = x.reshape(b * pieces, -1, x.shape[2])
        mask = None if scene.mask is None else scene.mask.reshape(b * pieces, -1)
        slots = None if scene.slot_mask is None else scene.slot_mask.repeat_interleave(pieces, 0)
        masks = {"mask": mask, "slot_mask": slots}
        graphed = torch.is_grad_enabled()
        chunk = max(core.LEAN if self._lean else core.CHUNK, core.STRETCH * x.shape[-1])
        shared = core.Folded(
            self.heads, self.competition.joint, self.aggregation.eps, keep=graphed and not self._lean, chunk=chunk
        )
        # without a graph the first pass finds it
        rstd = core.reciprocal_deviation(x, self.norm_eps, mask) if graphed else None
        trained = x.requires_grad and graphed
        messages = core.messages(x, rstd, tracked if trained else 0, self.heads * k, shared, **masks)

        def read(normed: Tensor) -> Reading:
            nonlocal rstd
            gain, bias = self._affine(wide)
            qk, offset = core.absorb(self._queries(normed, wide), self.k.weight.to(wide), gain, bias)
            qk = qk.repeat_interleave(pieces, 0)
            offset = None if offset is None else offset.repeat_interleave(pieces, 0)
            plan, message = shared, None
            if not torch.is_grad_enabled():
                plan = shared._replace(keep=False)
            elif trained:
                message = next(messages)
            eps = self.norm_eps if rstd is None else None
            total, mass, a, rstd = core.folded_read(qk, offset, x, rstd, plan, message=message, norm_eps=eps, **masks)
            total, mass = (t.unflatten(0, (b, pieces)).sum(1) for t in (total, mass))

            def weights() -> Tensor:
                if a is not None:
                    return a.unflatten(0, (b, pieces)).movedim(1, 3).flatten(3)
                with island(x):
                    xh = core.normalised(blank(x, mask).to(wide), self.norm_eps)
                    a_ = self._map(qk, offset, xh, Scene(mask, slots))
                return a_.unflatten(0, (b, pieces)).movedim(1, 3).flatten(3)

            return Reading(core.unabsorb(total, mass, self.v.weight.to(wide), gain, bias), mass, weights)

        return read

    def _kernel_reader(self, x: Tensor, k: int, tracked: int, scene: Scene) -> Reader:
        wide = _wide(x)
        plan = kernels.Plan(self.heads, self.competition.joint, self.norm_eps, self.aggregation.eps)
        one_pass = kernels.passes(x, plan, slots=k, tracked=tracked, mask=scene.mask, slot_mask=scene.slot_mask)

        def read(normed: Tensor) -> Reading:
            gain, bias = self._affine(wide)
            qk, offset = core.absorb(self._queries(normed, wide), self.k.weight.to(wide), gain, bias)
            total, mass = one_pass(qk, offset)

            def weights() -> Tensor:
                with island(x):
                    xh = core.normalised(blank(x, scene.mask).to(wide), self.norm_eps)
                    return self._map(qk, offset, xh, scene)

            return Reading(core.unabsorb(total, mass, self.v.weight.to(wide), gain, bias), mass, weights)

        return read

    def _map(self, qk: Tensor, offset: Tensor | None, xh: Tensor, scene: Scene) -> Tensor:
        """Weights (b, h, k, n) of absorbed queries."""
        logits = core.logits(qk.flatten(1, 2), None if offset is None else offset.flatten(1, 2), xh)
        logits = logits.unflatten(1, qk.shape[1:3])
        return core.compete(logits, joint=self.competition.joint, mask=scene.mask, slot_mask=scene.slot_mask)

    def _affine(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        norm = self.norm_inputs
        return (norm.weight.to(dtype), norm.bias.to(dtype)) if isinstance(norm, nn.LayerNorm) else (None, None)

    def _check(
        self,
        inputs: Tensor,
        slots: Tensor | None,
        num_slots: int | None,
        iterations: int | None,
        mask: Tensor | None,
        slot_mask: Tensor | None,
    ) -> tuple[Tensor, int]:
        """Refuse what cannot be read; the slots to start from, and T."""
        if inputs.ndim != 3 or inputs.shape[-1] != self.input_dim or inputs.shape[1] == 0:
            raise ValueError(
                f"SlotAttention got inputs of shape {tuple(inputs.shape)}, expected (batch, inputs, {self.input_dim}); "
                "flatten grids to a set, and give the width as input_dim"
            )
        check_mask("SlotAttention", mask, *inputs.shape[:2])
        # a value cannot be looked at while a graph is traced; an empty row then gives the update of no inputs, zeros
        if mask is not None and not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
            empty = int((~mask.any(1)).sum())
            raise ValueError(
                f"SlotAttention got a mask with {empty} of {len(mask)} rows without a real input, expected one at least in "
                "each; leave those rows out"
            )
        iterations = self.iterations if iterations is None else iterations
        _check_count("iterations", iterations)
        if num_slots is not None:
            _check_count("num_slots", num_slots)
        # not by len(), which would fix the size in an exported graph
        b = inputs.shape[0]
        if slots is None:
            slots = self.initial_slots(b, num_slots)
        elif (
            slots.ndim != 3
            or slots.shape[0] != b
            or slots.shape[2] != self.dim
            or (num_slots is not None and slots.shape[1] != num_slots)
        ):
            wanted = "any number of" if num_slots is None else f"num_slots={num_slots}"
            raise ValueError(
                f"SlotAttention got slots of shape {tuple(slots.shape)}, expected ({b}, slots, {self.dim}) with "
                f"{wanted} slots"
            )
        check_mask("SlotAttention slot", slot_mask, *slots.shape[:2])
        return slots, iterations


def _bare(module: nn.Module | None, kinds: Mapping[str, type[nn.Module]]) -> bool:
    """Whether all parts of ``module`` are of these kinds themselves, and nobody hears when they are called."""
    parts = {} if module is None else module._modules
    if parts.keys() != kinds.keys():
        return False
    for name, kind in kinds.items():
        part = parts[name]
        if part is None or type(part) is not kind or part._forward_hooks or part._forward_pre_hooks:
            return False
        if part._backward_hooks or part._backward_pre_hooks:
            return False
    return True


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, h e) to (b, h, n, e)."""
    if heads == 1:
        return x[:, None]
    b, n, _ = x.shape
    return x.view(b, n, heads, -1).transpose(1, 2)


def _island(x: Tensor) -> AbstractContextManager[object]:
    # entering one takes as long as a product of few slots
    return island(x) if not x.is_meta and torch.is_autocast_enabled(x.device.type) else nullcontext()


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    # a cast to the same takes as long as a view
    return x if x.dtype == dtype else x.to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _count(x: Tensor, mask: Tensor | None) -> Tensor:
    """Real inputs of each row, (#b, 1, 1)."""
    if mask is None:
        return torch.full((1, 1, 1), x.shape[1], dtype=_wide(x), device=x.device)
    return mask.sum(-1)[:, None, None].to(_wide(x))


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"SlotAttention got {name}={value}, expected at least 1")


def _choose(name: str, value: str, choices: Mapping[str, bool | None]) -> bool | None:
    if value not in choices:
        raise ValueError(f"SlotAttention got {name}={value!r}, expected one of {', '.join(choices)}")
    return choices[value]
