from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tevo import create
from tevo.bench.measure import crossing, fit_exponent, flops, parameters, saved_bytes, state_bytes
from tevo.functional.scan import scan
from tevo.models.causal_lm import CausalLM


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_linear_map_costs_two_flops_a_weight_and_token_and_twice_that_backward():
    linear = nn.Linear(5, 7)
    x = drawn(3, 13, 5)
    assert flops(linear, x) == 2 * 3 * 13 * 5 * 7
    assert flops(linear, x, backward=True) == 3 * flops(linear, x)


def test_fused_attention_is_counted_in_full():
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = drawn(2, 3, 13, 4), drawn(2, 3, 13, 4), drawn(2, 3, 13, 4)
    assert flops(Apply(attend), q, k, v) == 4 * 2 * 3 * 13 * 13 * 4
    assert flops(Apply(attend), q, k, v, backward=True) == 3 * 4 * 2 * 3 * 13 * 13 * 4


@pytest.mark.parametrize("n", [7, 129])
def test_softmax_attention_costs_what_its_card_says(n):
    mixer = create("softmax", dim=12, heads=3, causal=True)
    assert flops(mixer, drawn(1, n, 12)) == 8 * n * 12 * 12 + 4 * n * n * 12


def test_fourier_transforms_cost_5_n_log_n_each_forward_and_back():
    def there_and_back(x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x, n=16), n=16)

    x = drawn(3, 8)
    assert flops(Apply(there_and_back), x) == 2 * 3 * 5 * 16 * math.log2(16)
    assert flops(Apply(there_and_back), x, backward=True) == 4 * 3 * 5 * 16 * math.log2(16)


def test_a_two_dimensional_transform_counts_its_whole_grid():
    x = drawn(3, 4, 8).to(torch.complex64)
    assert flops(Apply(torch.fft.fft2), x) == 3 * 5 * 32 * 5


def test_a_scan_costs_two_flops_an_element():
    x = drawn(2, 13, 5)
    assert flops(Apply(lambda a, b: scan(a, b)[0]), x, x) == 2 * x.numel()


def test_complex_products_cost_four_times_as_much():
    a, b = drawn(5, 7), drawn(7, 3)
    assert flops(Apply(torch.mm), a.to(torch.complex64), b.to(torch.complex64)) == 4 * flops(Apply(torch.mm), a, b)


def test_a_triangular_solve_costs_half_a_product():
    a, b = drawn(3, 5, 5), drawn(3, 5, 7)
    solve = Apply(lambda a, b: torch.linalg.solve_triangular(a, b, upper=True))
    assert flops(solve, a, b) == flops(Apply(torch.bmm), a, b) / 2


def test_costly_operators_without_a_formula_are_named():
    counted = flops(Apply(lambda x: torch.sort(x)[0] @ torch.linalg.inv(x)), drawn(5, 5))
    assert counted == 2 * 5**3
    assert {"aten.sort", "aten.linalg_inv_ex"} <= set(counted.uncounted)
    assert flops(create("softmax", dim=12, heads=3), drawn(1, 7, 12), backward=True).uncounted == {}


def test_counting_leaves_the_module_alone():
    mixer = create("softmax", dim=12, heads=3)
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    flops(mixer, drawn(1, 7, 12), backward=True)
    for name, p in mixer.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])


def test_a_module_that_looks_at_values_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="FLOPs of Apply cannot be counted on meta tensors"):
        flops(Apply(lambda x: x * x.sum().item()), drawn(3))


def test_parameters_are_counted_once_and_only_where_trained():
    tied = CausalLM(vocab=11, dim=12, depth=1, heads=3, tied=True)
    free = CausalLM(vocab=11, dim=12, depth=1, heads=3)
    assert parameters(free) - parameters(tied) == 11 * 12
    free.embedding.weight.requires_grad_(False)
    assert parameters(free) == parameters(tied)


def test_saved_bytes_are_the_tensors_that_backward_needs():
    x = drawn(3, 13)
    assert saved_bytes(Apply(lambda x: x.exp()), x.requires_grad_()) == 3 * 13 * 4  # its own output
    # y = W x keeps x and W; W is a parameter
    assert saved_bytes(nn.Linear(13, 5), drawn(3, 13)) == 3 * 13 * 4
    # two uses of one tensor are one storage
    assert saved_bytes(Apply(lambda x: x.sin() + x.cos()), drawn(3, 13).requires_grad_()) == 3 * 13 * 4


def test_saved_bytes_tell_fused_attention_from_the_plain_form():
    lengths = [256, 512]

    def plain(q: Tensor) -> Tensor:
        return (q @ q.mT).softmax(-1) @ q

    def fused(q: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)

    def growth(f) -> float | None:
        return fit_exponent(lengths, [saved_bytes(Apply(f), drawn(1, 1, n, 8).requires_grad_()) for n in lengths])

    assert growth(plain) == pytest.approx(2, abs=0.1)
    assert growth(fused) == pytest.approx(1, abs=0.1)


def test_state_bytes_of_softmax_are_its_keys_and_values_and_positions():
    mixer = create("softmax", dim=12, heads=3, causal=True)
    small, large = (state_bytes(mixer, drawn(2, n, 12)) for n in (10, 110))
    # float32 keys and values, int64 positions, bool mask
    assert large - small == 2 * 100 * (2 * 12 * 4 + 8 + 1)
    assert state_bytes(nn.Linear(3, 3), drawn(2, 5, 3)) is None
    assert state_bytes(CausalLM(vocab=11, dim=12, depth=2, heads=3), torch.zeros(1, 9, dtype=torch.long)) > 0


def test_the_exponent_is_that_of_the_longest_lengths():
    lengths = [64, 128, 256, 512, 1024]
    assert fit_exponent(lengths, [3.0 * n**1.5 for n in lengths]) == pytest.approx(1.5)
    # linear at first, quadratic later: only the last two octaves count
    assert fit_exponent(lengths, [n if n < 256 else n * n / 256 for n in lengths]) == pytest.approx(2)
    assert fit_exponent(lengths, [None, None, None, None, 3.0]) is None
    assert fit_exponent([], []) is None


def test_flops_of_softmax_grow_quadratically():
    mixer = create("softmax", dim=12, heads=3, causal=True)
    lengths = [4096, 16384, 65536]
    assert fit_exponent(lengths, [flops(mixer, torch.empty(1, n, 12, device="meta")) for n in lengths], octaves=4) == (
        pytest.approx(2, abs=0.01)
    )


def test_the_crossing_is_interpolated_on_logarithms():
    lengths = [64, 128, 256, 512]
    # 100 n against n^2: equal at 100
    found = crossing(lengths, [100.0 * n for n in lengths], [1.0 * n * n for n in lengths])
    assert found.length == pytest.approx(100) and not found.from_start
    assert str(found) == "100"


def test_the_crossing_says_never_and_from_the_start():
    lengths = [64, 128]
    assert crossing(lengths, [3.0, 3.0], [1.0, 2.0]) == (None, False)
    assert crossing(lengths, [1.0, 1.0], [2.0, 3.0]) == (64, True)
    assert str(crossing(lengths, [3.0, 3.0], [1.0, 2.0])) == "not reached"
    assert str(crossing(lengths, [1.0, 1.0], [2.0, 3.0])) == "below 64, from the start"
    # below, above again, below: only the last counts
    assert crossing([1, 2, 4, 8], [1.0, 4.0, 4.0, 1.0], [2.0, 2.0, 2.0, 2.0]).length == pytest.approx(4 * 2**0.5)


def test_what_ran_out_of_memory_counts_as_infinite():
    assert crossing([64, 128], [3.0, 3.0], [1.0, None]) == (128, False)
    assert crossing([64, 128], [1.0, None], [2.0, 3.0]) == (None, False)
    assert crossing([64, 128], [None, 1.0], [None, 2.0]) == (128, True)


def test_memory_that_cannot_be_seen_crosses_without_an_error() -> None:
    assert crossing((16, 32), [0.0, 77824.0], [8192.0, 77824.0]) == crossing(
        (16, 32), [1e-9, 77824.0], [8192.0, 77824.0]
    )
    crossing((16, 32), [0.0, 0.0], [0.0, 8192.0])
