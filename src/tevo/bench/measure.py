"""What a module costs, counted rather than timed: FLOPs, parameters, bytes kept for backward, decode state, growth.

A multiply-add is 2 FLOPs everywhere, a complex one 8. Counted are matrix products, convolutions, attention kernels,
Fourier transforms and scans; what is linear in the number of elements (activations, norms, softmax, sums, copies) is
not. Counts are made on meta tensors, where every attention kernel shows its matrix products and nothing is computed.

    FFT of n real or complex numbers      5 n log2 n, as is customary                                        (1)
    scan x_t = a_t x_{t-1} + b_t          2 for each element of x, 8 for a complex one                        (2)
    growth                                slope of log(value) over log(length), by least squares             (3)
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tevo.contracts import State, Stateful

__all__ = ["Crossing", "Flops", "crossing", "fit_exponent", "flops", "parameters", "saved_bytes", "state_bytes"]


class Flops(int):
    """A count of FLOPs that also says what it leaves out.

    Args:
        total: the count.
        uncounted: operators that are costlier than one pass over their elements and have no formula -> their calls.
    """

    uncounted: Mapping[str, int]

    def __new__(cls, total: int, uncounted: Mapping[str, int]) -> Flops:
        """A whole number with a note."""
        self = super().__new__(cls, total)
        self.uncounted = dict(uncounted)
        return self


def flops(module: nn.Module, *inputs: Tensor, backward: bool = False) -> Flops:
    """FLOPs of one forward pass of a copy of ``module`` on meta tensors shaped as ``inputs``.

    Args:
        module: on any device; it is not changed.
        inputs: the arguments of its forward; only their shapes and dtypes matter.
        backward: add those of the backward pass, from an output's sum to parameters and floating-point inputs.

    Raises:
        ValueError: the module looks at values, which meta tensors have not.
    """
    twin = copy.deepcopy(module).to("meta")
    fake = [
        torch.empty_like(x, device="meta", requires_grad=backward and x.is_floating_point())
        for x in (t.detach() for t in inputs)
    ]
    names, formulas = _Names(), _formulas()
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    try:
        with torch.set_grad_enabled(backward), counter, names:
            y = twin(*fake)
            if backward:
                y.sum().backward()
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"FLOPs of {type(module).__name__} cannot be counted on meta tensors: {str(error).splitlines()[0]}"
        ) from error
    return Flops(counter.get_total_flops(), names.uncounted(formulas))


def parameters(module: nn.Module) -> int:
    """Numbers that are trained, each once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Bytes that a forward pass keeps for backward: storages, each once, those of parameters and buffers excluded.

    Runs on the inputs' device, because kernels differ: on meta tensors softmax attention keeps its n^2 weights, on a
    CPU it does not.
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            # held, so that its address is not given to another one
            kept[storage._cdata] = storage
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(*inputs)
        # alive until counted: what y holds is what backward would need
        total = sum(storage.nbytes() for storage in kept.values())
        del y
    return total


@torch.no_grad()
def state_bytes(module: nn.Module, x: Tensor) -> int | None:
    """Bytes of the decoding state after ``x`` (b, n, d), or tokens (b, n), all of the batch; None without a state."""
    says = getattr(module, "stateful", None)
    if not (isinstance(module, Stateful) and (says is None or says())):
        return None
    training = module.training
    module.eval()
    try:
        _, state = module.step(x, module.init_state(x.shape[0]))
    finally:
        module.train(training)
    return sum(leaf.numel() * leaf.element_size() for leaf in _leaves(state))


def fit_exponent(lengths: Sequence[float], values: Sequence[float | None], *, octaves: float = 2.0) -> float | None:
    """The p of value ~ length^p over the last ``octaves`` doublings of the length (eq. 3); None with under 2 points."""
    points = [(n, v) for n, v in zip(lengths, values, strict=True) if v is not None and v > 0]
    if points:
        least = max(n for n, _ in points) / 2**octaves
        points = [(math.log(n), math.log(v)) for n, v in points if n >= least]
    if len({n for n, _ in points}) < 2:
        return None
    mean_n = sum(n for n, _ in points) / len(points)
    mean_v = sum(v for _, v in points) / len(points)
    return sum((n - mean_n) * (v - mean_v) for n, v in points) / sum((n - mean_n) ** 2 for n, _ in points)


class Crossing(NamedTuple):
    """From which length on one curve stays below another: ``None`` for never, within the lengths measured."""

    length: float | None
    from_start: bool

    def __str__(self) -> str:
        if self.length is None:
            return "not reached"
        return f"below {self.length:,.0f}, from the start" if self.from_start else f"{self.length:,.0f}"


# least amount that is told from nothing: of seconds a nanosecond
_LEAST = 1e-9


def crossing(lengths: Sequence[float], ours: Sequence[float | None], baseline: Sequence[float | None]) -> Crossing:
    """The length from which on ``ours`` is below ``baseline``, interpolated on the logarithms.

    A missing value counts as infinite (out of memory, or too slow to wait for); where both are missing, nothing is
    known and the length is passed over.
    """
    gaps = []
    for n, a, b in sorted(zip(lengths, ours, baseline, strict=True), key=lambda row: row[0]):
        if a is None and b is None:
            continue
        # memory too little to be seen is measured as nothing
        ratio = None if a is None or b is None else max(a, _LEAST) / max(b, _LEAST)
        gaps.append((n, math.inf if a is None else -math.inf if ratio is None else math.log(ratio)))
    above = [i for i, (_, gap) in enumerate(gaps) if gap >= 0]
    if not gaps or (above and above[-1] == len(gaps) - 1):
        return Crossing(None, False)
    if not above:
        return Crossing(gaps[0][0], True)
    (n0, g0), (n1, g1) = gaps[above[-1]], gaps[above[-1] + 1]
    if math.isinf(g0) or math.isinf(g1):
        return Crossing(n1, False)
    return Crossing(math.exp(math.log(n0) + (math.log(n1) - math.log(n0)) * g0 / (g0 - g1)), False)


def _leaves(state: State) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else [leaf for part in state for leaf in _leaves(part)]


class _Names(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))

    def uncounted(self, formulas: Mapping[Any, _Formula]) -> dict[str, int]:
        """Operators without a formula that are not known to be linear in their elements -> calls."""
        found: Counter[str] = Counter()
        for func, calls in self.calls.items():
            packet = getattr(func, "overloadpacket", func)
            if packet not in flop_registry and packet not in formulas and not _linear(func):
                found[str(packet)] += calls
        return dict(found)


# element-wise work, reductions and data movement that carry no tag saying so
_NAMES = """
    _fused_rms_norm _fused_rms_norm_backward _local_scalar_dense _log_softmax _log_softmax_backward_data
    _safe_softmax _softmax _softmax_backward_data _to_copy _unsafe_view all any arange as_strided_scatter
    avg_pool1d avg_pool2d avg_pool2d_backward bernoulli bincount bucketize cat col2im constant_pad_nd copy
    count_nonzero cummax cummin cumprod cumsum diag_embed diagonal_backward diagonal_copy diagonal_scatter
    embedding embedding_dense_backward empty empty_like empty_permuted empty_strided eye fill flip floor_divide full
    full_like gather glu glu_backward im2col index index_add index_copy index_fill index_put index_select
    lift_fresh_copy linspace logcumsumexp masked_fill masked_scatter masked_select max_pool1d native_dropout
    native_dropout_backward native_group_norm native_group_norm_backward native_layer_norm
    native_layer_norm_backward new_empty new_empty_strided new_full new_ones new_zeros nll_loss2d_backward
    nll_loss2d_forward nll_loss_backward nll_loss_forward nonzero norm one_hot ones ones_like polar promote_types rand rand_like
    randint randn randn_like randperm reflection_pad1d repeat repeat_interleave replication_pad1d rms_norm roll
    scalar_tensor scatter scatter_add scatter_reduce select_backward select_scatter slice_backward slice_scatter
    split_with_sizes_copy stack tril tril_indices triu triu_indices unbind_copy unfold_backward
    upsample_nearest1d var_mean view_as_complex_copy zero zeros zeros_like
"""
_LINEAR = frozenset(_NAMES.split())


def _linear(func: Any) -> bool:
    """Whether an operator is known to do no more than a few passes over its elements."""
    tags = getattr(func, "tags", ())
    if torch.Tag.pointwise in tags or torch.Tag.reduction in tags or getattr(func, "is_view", False):
        return True
    name = getattr(func, "_schema", None)
    namespace, _, op = (name.name if name else str(func)).partition("::")
    return namespace == "prim" or (namespace == "aten" and op.removesuffix("_") in _LINEAR)


_Formula = Callable[..., int]


def _raw(formula: _Formula) -> _Formula:
    """Mark a formula as one that sees tensors and not their shapes alone."""
    formula._get_raw = True  # type: ignore[attr-defined]
    return formula


def _with_complex(packet: Any) -> _Formula:
    """The formula of torch, times 4 where both factors are complex (times 2 where one is)."""
    shapes = flop_registry[packet]

    @_raw
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        factors = args[-2:] if packet in (torch.ops.aten.mm, torch.ops.aten.bmm) else args[1:3]
        return int(shapes(*args, out_val=out_val, **kwargs)) * math.prod(2 if f.is_complex() else 1 for f in factors)

    return formula


def _transforms(x: Tensor, dims: Sequence[int], points: int) -> int:
    """All transforms along ``dims`` (``points`` numbers each) of ``x`` (eq. 1)."""
    size = math.prod(x.shape[d] for d in dims)
    return round(x.numel() / max(size, 1) * 5 * points * math.log2(max(points, 1)))


@_raw
def _fft(x: Tensor, dim: Sequence[int], *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return _transforms(x, dim, math.prod(x.shape[d] for d in dim))


@_raw
def _fft_to_real(
    x: Tensor, dim: Sequence[int], normalization: int, last: int, *, out_val: Any = None, **kwargs: Any
) -> int:
    # the input holds half of the last dimension
    return _transforms(x, dim, math.prod(x.shape[d] for d in dim[:-1]) * last)


@_raw
def _scan(a: Tensor, b: Tensor, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return (8 if b.is_complex() else 2) * b.numel()


def _maxima(k: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # a subtraction and a comparison
    return 2 * math.prod(k)


def _matrix_scan(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(b) * int(a[-1])


def _solve_triangular(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # half of the matrix takes part, each entry in a multiply-add for every column
    return math.prod(b) * int(a[-1])


# operators of the house; a name is looked up when counting, since loading an operator is its own module's work
_HOUSE: dict[str, _Formula] = {
    "scan": _scan,
    "scan_adjoint": _scan,
    "matrix_scan": _matrix_scan,
    "matrix_scan_adjoint": _matrix_scan,
    "decayed_maximum": _maxima,
}


def _formulas() -> dict[Any, _Formula]:
    """Formulas that torch's counter lacks, or has for real numbers only."""
    aten = torch.ops.aten
    known = {packet: _with_complex(packet) for packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)}
    known |= {aten._fft_c2c: _fft, aten._fft_r2c: _fft, aten._fft_c2r: _fft_to_real}
    known[aten.linalg_solve_triangular] = _solve_triangular
    return known | {getattr(torch.ops.tevo, name): f for name, f in _HOUSE.items() if hasattr(torch.ops.tevo, name)}
