"""The module against the outputs of published codes, kept in tests/golden/slot_attention (its README names them)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tevo import record
from tevo.slot_attention import JointSoftmax, Mesh, Sinkhorn, SlotAttention, WeightedMean

GOLDEN = Path(__file__).parents[1] / "golden" / "slot_attention"
FORMS = [("plain", "stored"), ("absorbed", "stored"), ("auto", "lean")]


def load(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {
            key: torch.from_numpy(np.array(arrays[key])).double()
            for key in arrays.files
            if arrays[key].dtype.kind in "fi"
        }


def under(prefix: str, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """From the names that the golden files use to ours."""
    old = {"project_": "", "mlp_slot_marginals": "slot_marginals", "mlp_input_marginals": "input_marginals"}
    if "mlp.1.weight" in state:
        old["mlp.1."] = "mlp.2."
    for before, after in old.items():
        state = {key.replace(before, after): value for key, value in state.items()}
    return state


def keras_gates(kernel: Tensor) -> Tensor:
    """Gates z, r, h along the last axis to r, z, n along the first."""
    z, r, n = kernel.chunk(3, -1)
    return torch.cat([r, z, n], -1).movedim(-1, 0)


def from_keras(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {name: arrays[name] for name in ("slots_mu", "slots_log_sigma")}
    for name in ("norm_inputs", "norm_slots", "norm_mlp"):
        out |= {f"{name}.weight": arrays[f"{name}.gamma"], f"{name}.bias": arrays[f"{name}.beta"]}
    for name in "qkv":
        out[f"{name}.weight"] = arrays[f"project_{name}.kernel"].T
    for theirs, ours in ((0, 0), (1, 2)):
        out[f"mlp.{ours}.weight"] = arrays[f"mlp.{theirs}.kernel"].T
        out[f"mlp.{ours}.bias"] = arrays[f"mlp.{theirs}.bias"]
    out["gru.weight_ih"] = keras_gates(arrays["gru.kernel"])
    out["gru.weight_hh"] = keras_gates(arrays["gru.recurrent_kernel"])
    out["gru.bias_ih"], out["gru.bias_hh"] = (keras_gates(row) for row in arrays["gru.bias"])
    return out


def close(mine: Tensor, theirs: Tensor, atol: float) -> None:
    torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=0.0, atol=atol)


@pytest.mark.parametrize(("form", "memory"), FORMS)
def test_equals_the_reference_with_all_gradients(form: str, memory: str) -> None:
    g = load("sa_module_a")
    b, _, d_in, k, d, hidden, t = g["cfg/B_N_Din_K_D_H_T"].int().tolist()
    module = SlotAttention(
        dim=d, num_slots=k, input_dim=d_in, iterations=t, hidden_dim=hidden, form=form, memory=memory
    ).double()
    module.load_state_dict(from_keras(under("keras/", g)))
    torch.testing.assert_close(renamed(under("torch/", g)), dict(module.state_dict()), rtol=0.0, atol=0.0)
    inputs, noise = g["in/inputs"].requires_grad_(), g["in/noise"].requires_grad_()
    slots = module.initial_slots(b, noise=noise)
    close(slots, g["out/slots_init_f64"], 1e-12)
    with record() as seen:
        out, attention = module(inputs, slots=slots, return_attention=True)
    close(torch.stack(seen["slots"]), g["out/slots_per_iter_f64"], 1e-9)
    close(torch.stack(seen["attention"]).squeeze(2).mT, g["out/attn_f64"], 1e-9)
    close(attention.mT, g["out/attn_f64"][-1], 1e-9)
    loss = (out * g["in/cotangent"]).sum()
    close(loss, g["out/loss_f64"], 1e-9)
    loss.backward()
    close(inputs.grad, g["grad/inputs"], 1e-9)
    close(noise.grad, g["grad/noise"], 1e-9)
    for name, gradient in from_keras(under("grad/keras/", g)).items():
        close(module.get_parameter(name).grad, gradient, 1e-9)
    with torch.no_grad():
        more = module.initial_slots(b, noise=g["in/noise_Kplus2"])
        close(module(inputs, slots=more), g["out/slots_Kplus2_f64"], 1e-9)
        # the last digits grow with the iterations
        close(module(inputs, slots=slots, iterations=t + 4), g["out/slots_Tplus4_f64"], 1e-9)


def test_equals_the_reference_in_float32() -> None:
    g = load("sa_module_a")
    module = SlotAttention(dim=24, num_slots=5, input_dim=16, hidden_dim=32)
    module.load_state_dict(from_keras(under("keras/", g)))
    slots = module.initial_slots(2, noise=g["in/noise"].float())
    close(module(g["in/inputs"].float(), slots=slots), g["out/slots"], 2e-5)


def from_flax(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    norms = {"norm_slots": "LayerNorm_0", "norm_inputs": "LayerNorm_1", "norm_mlp": "MLP_0/LayerNorm_0"}
    out = {}
    for ours, theirs in norms.items():
        out |= {f"{ours}.weight": arrays[f"{theirs}/scale"], f"{ours}.bias": arrays[f"{theirs}/bias"]}
    for name in "qkv":
        out[f"{name}.weight"] = arrays[f"general_dense_{name}_0/kernel"].flatten(1).T
    for theirs, ours in ((0, 0), (1, 2)):
        out[f"mlp.{ours}.weight"] = arrays[f"MLP_0/dense_mlp_{theirs}/kernel"].T
        out[f"mlp.{ours}.bias"] = arrays[f"MLP_0/dense_mlp_{theirs}/bias"]
    gru = under("GRU_0/GRUCell_0/", arrays)
    out["gru.weight_ih"] = torch.cat([gru[f"i{gate}/kernel"] for gate in "rzn"], 1).T
    out["gru.weight_hh"] = torch.cat([gru[f"h{gate}/kernel"] for gate in "rzn"], 1).T
    out["gru.bias_ih"] = torch.cat([gru[f"i{gate}/bias"] for gate in "rzn"])
    nothing = torch.zeros_like(gru["hn/bias"])
    out["gru.bias_hh"] = torch.cat([nothing, nothing, gru["hn/bias"]])
    if "InvertedDotProductAttention_0/DenseGeneral_0/kernel" in arrays:
        out["merge.weight"] = arrays["InvertedDotProductAttention_0/DenseGeneral_0/kernel"].flatten(0, 1).T
        out["merge.bias"] = arrays["InvertedDotProductAttention_0/DenseGeneral_0/bias"]
    return out


@pytest.mark.parametrize(("form", "memory"), FORMS)
@pytest.mark.parametrize("heads", [1, 4])
def test_equals_the_video_reference(heads: int, form: str, memory: str) -> None:
    g = load("savi_jax_a")
    _, _, d_in, k, d, hidden, t = g["cfg/B_N_Din_K_D_H_T"].int().tolist()
    module = SlotAttention(
        dim=d,
        num_slots=k,
        input_dim=d_in,
        iterations=t,
        hidden_dim=hidden,
        heads=heads,
        merge_dim=None if heads == 1 else d // heads,
        norm_eps=1e-6,
        aggregation=WeightedMean(eps=0.0, offset=1e-8),
        form=form,
        memory=memory,
    ).double()
    state = from_flax(under(f"h{heads}/flax/", g))
    module.load_state_dict({**module.state_dict(), **state})
    inputs, slots = g["in/inputs"].requires_grad_(), g["in/slots_init"].requires_grad_()
    with record() as seen:
        out = module(inputs, slots=slots)
    # the reference computed in float32
    close(out, g[f"h{heads}/out/slots"], 2e-5)
    close(torch.stack(seen["attention"]), g[f"h{heads}/out/attn_per_iter"], 2e-5)
    (out * g["in/cotangent"]).sum().backward()
    gradients = from_flax(under(f"h{heads}/grad/flax/", g))
    mine = {name: module.get_parameter(name).grad for name in gradients}
    # the reference has no recurrent biases of the gates, so that theirs, zeros here, is no gradient
    mine["gru.bias_hh"] = mine["gru.bias_hh"].masked_fill(torch.arange(3 * d) < 2 * d, 0.0)
    mine |= {"inputs": inputs.grad, "slots": slots.grad}
    gradients |= {"inputs": g[f"h{heads}/grad/inputs"], "slots": g[f"h{heads}/grad/slots_init"]}
    for name, gradient in gradients.items():
        # float32 sums in the reference: 1e-5 of the largest entry
        close(mine[name], gradient, 1e-5 * max(1.0, float(gradient.abs().max())))


class FixedNoise(Mesh):
    value: Tensor

    def draw(self, inputs: Tensor, k: int) -> Tensor:
        return FixedNoise.value


@pytest.mark.parametrize("variant", ["original_slot_attention", "sinkhorn", "mesh"])
def test_equals_the_transport_reference(variant: str) -> None:
    g = load("mesh_a")
    _, _, d_in, k, d, hidden, t = g["cfg/B_N_Din_K_D_H_T"].int().tolist()
    FixedNoise.value = g["in/mesh_noise"].mT
    competition = {"original_slot_attention": None, "sinkhorn": Sinkhorn(rounds=5), "mesh": FixedNoise(rate=8.0)}
    module = SlotAttention(
        dim=d,
        num_slots=k,
        input_dim=d_in,
        iterations=t,
        hidden_dim=hidden,
        norm_eps=1e-5,
        competition=competition[variant],
    ).double()
    module.load_state_dict(renamed(under(f"{variant}/torch/", g)))
    with record() as seen:
        out = module(g["in/inputs"], slots=g["in/slots_init"])
    plans = torch.stack(seen["attention"]).squeeze(2)
    if variant == "original_slot_attention":
        plans = (plans + 1e-8) / (plans + 1e-8).sum(-1, keepdim=True)
    close(plans, g[f"{variant}/out/plan_transposed_per_iter"], 1e-9)
    close(out, g[f"{variant}/out/slots_f64"], 1e-9)


@pytest.mark.parametrize(("form", "memory"), FORMS)
@pytest.mark.parametrize("heads", [1, 4])
def test_equals_the_joint_softmax_reference(heads: int, form: str, memory: str) -> None:
    g = load("slate_jointhead_a")
    _, _, d_in, k, d, hidden, t = g["cfg/B_N_Din_K_D_H_T"].int().tolist()
    module = SlotAttention(
        dim=d,
        num_slots=k,
        input_dim=d_in,
        iterations=t,
        hidden_dim=hidden,
        heads=heads,
        norm_eps=1e-5,
        competition=JointSoftmax(),
        form=form,
        memory=memory,
    ).double()
    start = {name: getattr(module, name) for name in ("slots_mu", "slots_log_sigma")}
    module.load_state_dict({**start, **renamed(under(f"h{heads}/torch/", g))})
    out, attention = module(g["in/inputs"], slots=g["in/slots_init"], return_attention=True)
    close(out, g[f"h{heads}/out/slots_f64"], 1e-9)
    close(attention.mT, g[f"h{heads}/out/attn_summed_over_heads"], 1e-9)
