"""The door to Slot Attention's kernels, their claims in the interpreter or on a GPU, and what they take of an sm_90."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tevo.kernels import slot_attention as door
from tevo.kernels.slot_attention import Plan, plain_passes
from tevo.slot_attention import JointSoftmax, SlotAttention

CLAIMS = Path(__file__).with_name("slot_attention_claims.py")
# bytes that a program of an sm_90 may have
SHARED = 227 * 1024


def triton() -> Any:
    return pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")


def run_claims(interpret: str, *chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(CLAIMS), *chosen]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CLAIMS.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    # neither an empty run nor a skipped one is a proof
    assert re.search(r"^\d+ passed", done.stdout, re.MULTILINE) and "skipped" not in done.stdout, done.stdout


def test_the_quickest_claims_hold_in_the_interpreter() -> None:
    triton()
    run_claims("1", "-k", "joint or bfloat16 or small")


@pytest.mark.slow
def test_every_claim_holds_in_the_interpreter() -> None:
    triton()
    run_claims("1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_every_claim_holds_on_a_gpu() -> None:
    triton()
    run_claims("0")


def seconds(work: Callable[[], object]) -> float:
    """The median of 21 timings on the device."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(24):
        # larger than the second cache
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pass_reads_at_sixty_percent_of_the_bandwidth_of_a_copy(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    triton()
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    x = torch.randn(16, 2**16, 64, device="cuda", dtype=dtype)
    q = torch.randn(16, 1, 7, 64, device="cuda")
    assert door.runs(x, 7)
    read = door.passes(x, Plan(heads=1, joint=False, norm_eps=1e-3, eps=1e-8), slots=7, tracked=0)
    one, copy = seconds(lambda: read(q, None)), seconds(lambda: x.clone())
    # a copy moves x twice
    share = 0.5 * copy / one
    record_property("share of copy bandwidth", share)
    assert share >= 0.6


def test_importing_the_door_does_not_import_triton() -> None:
    code = (
        "import sys, tevo, tevo.kernels.slot_attention; assert 'tevo.kernels.slot_attention_triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inputs_on_the_cpu_take_the_plain_form() -> None:
    assert not door.runs(torch.randn(2, 13, 12), 5)


@pytest.mark.parametrize(("heads", "joint"), [(1, False), (3, False), (3, True)])
def test_the_module_reads_by_passes_as_by_keys_and_values(
    heads: int, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    competition = JointSoftmax(temperature=0.7) if joint else None
    sizes = {"dim": 12, "input_dim": 10, "num_slots": 5, "heads": heads, "competition": competition}
    module = SlotAttention(**sizes).double()
    plain = SlotAttention(**sizes, form="plain").double()
    plain.load_state_dict(module.state_dict())
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 13, 10, generator=rng, dtype=torch.float64).requires_grad_()
    slots = torch.randn(2, 5, 12, generator=rng, dtype=torch.float64)
    mask = torch.arange(13) < torch.tensor([[13], [9]])
    wanted = plain(x, slots=slots, mask=mask, return_attention=True)
    seen = []
    monkeypatch.setattr(door, "runs", lambda x, competing: seen.append(competing) or True)
    monkeypatch.setattr(door, "passes", plain_passes)
    ours = module(x, slots=slots, mask=mask, return_attention=True)
    assert seen == [15 if joint else 5]
    torch.testing.assert_close(ours, wanted, rtol=0.0, atol=1e-12)
    grads = [
        torch.autograd.grad(out[0].square().sum(), [x, *m.parameters()], allow_unused=True)
        for out, m in ((ours, module), (wanted, plain))
    ]
    torch.testing.assert_close(*grads, rtol=0.0, atol=1e-10)


def test_the_self_test_refuses_passes_that_leave_out_a_token_or_a_gradient() -> None:
    def short(x: Tensor, plan: Plan, **rest: Any) -> Any:
        return plain_passes(torch.cat([x[:, :-1], x[:, :1]], 1), plan, **rest)

    def half(x: Tensor, plan: Plan, **rest: Any) -> Any:
        return plain_passes(0.5 * (x + x.detach()), plan, **rest)

    cpu = torch.device("cpu")
    state = torch.get_rng_state()
    assert door.agree(plain_passes, cpu)
    assert not door.agree(short, cpu)
    assert not door.agree(half, cpu)
    assert torch.equal(torch.get_rng_state(), state)


def test_kernels_that_fail_are_left_aside_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    triton()

    def broken(*_: object, **__: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr(door, "passes", broken)
    door._proved.cache_clear()
    with pytest.warns(RuntimeWarning, match="OSError: no compiler"):
        assert not door._proved(torch.device("cpu"))
    door._proved.cache_clear()


def compiled_for_sm_90(name: str, x: str, precision: str, sizes: dict[str, Any]) -> tuple[int, int, int]:
    """Registers of a thread, bytes spilled by it, and bytes of shared memory."""
    triton = pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tevo.kernels import slot_attention_triton as kernels

    kernel = getattr(kernels, name)
    launch = {option: sizes[option] for option in ("num_warps", "num_stages")}
    constants = {"EPS": 1e-8, "NORM_EPS": 1e-3, "PRECISION": precision, "mask": None, "slot_mask": None, **sizes}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    integers = ("n", "stretch", "groups", "blocks", "count", "splits")
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("scale", "mean_offset"):
            signature[argument] = "fp32"
        elif argument in integers:
            signature[argument] = "i32"
        else:
            signature[argument] = f"*{x}" if argument in ("x", "dx") else "*fp32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={**launch, "enable_fp_fusion": True})
    log = subprocess.run(
        [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", os.devnull, "-"],
        input=made.asm["ptx"],
        capture_output=True,
        text=True,
    )
    if log.returncode:
        raise RuntimeError(log.stderr)
    registers, spills = (
        re.search(r"Used (\d+) registers", log.stderr),
        re.search(r"(\d+) bytes spill stores", log.stderr),
    )
    assert registers and spills, log.stderr
    return int(registers[1]), int(spills[1]), made.metadata.shared


def tile(name: str, width: int, slots: int, precision: str = "tf32") -> dict[str, Any]:
    from tevo.kernels.slot_attention_triton import ALONE, ALONE_EXACT, STREAMED, tiling

    alone = ALONE_EXACT if precision == "tf32x3" else ALONE
    return {"D": width, "R": slots, **tiling(width, slots, alone if name == "dx_kernel" else STREAMED)}


def slot_sizes(width: int, starts: bool) -> dict[str, Any]:
    launch = {"ROWS": 16, "PART": 64, "num_warps": 4, "num_stages": 2}
    return {"K": 7, "D": width, "C": width, "E": width, "HIDDEN": 2 * width, "WIDTH": width, "STARTS": starts, **launch}


PASSES = ("pass_kernel", "query_gradient_kernel", "dx_kernel")


@pytest.mark.parametrize("name", PASSES)
def test_the_reference_sizes_spill_nothing_in_bfloat16(name: str) -> None:
    triton()
    sizes = tile(name, 64, 7)
    registers, spills, shared = compiled_for_sm_90(name, "bf16", "tf32", sizes)
    assert spills == 0
    # sixteen warps or more on a multiprocessor, of its 65536 registers
    programs = 16 // sizes["num_warps"]
    assert programs * sizes["num_warps"] * 32 * registers <= 65536
    assert programs * shared <= SHARED


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    ("x", "precision", "widths"),
    [("bf16", "tf32", (64, 256)), ("fp32", "tf32", (64, 256)), ("fp32", "tf32x3", (64, 128))],
)
def test_every_pass_fits_an_sm_90(name: str, x: str, precision: str, widths: tuple[int, int]) -> None:
    triton()
    for width in widths:
        _, spills, shared = compiled_for_sm_90(name, x, precision, tile(name, width, 11, precision))
        # up to eight registers, one in thirty, go to the first cache in the widest kernels
        assert spills <= (0 if width == 64 else 32)
        assert shared <= SHARED


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("starts", [True, False])
def test_the_update_fits_an_sm_90(width: int, precision: str, starts: bool) -> None:
    triton()
    _, spills, shared = compiled_for_sm_90("update_kernel", "fp32", precision, slot_sizes(width, starts))
    # two registers at most
    assert spills <= 8
    assert shared <= SHARED // 4
