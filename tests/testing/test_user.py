from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tevo.contracts import Normaliser, TokenMixer
from tevo.functional.attention import softmax_weights
from tevo.testing import (
    check_channel,
    check_mixer,
    check_normaliser,
    parametrised,
    user_subject,
)


class RunningMean(nn.Module):
    """Causal: the mean of what came so far, through a gate."""

    def __init__(self, d_model: int, num_heads: int = 2, leak: float = 0.0) -> None:
        super().__init__()
        self.value, self.gate, self.leak = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model), leak

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        y = torch.sigmoid(self.gate(x)) * self.value(x).cumsum(1) / counts
        return y + self.leak * x.mean(1, keepdim=True)


class MaskedMean(TokenMixer):
    """The mean of the real tokens; a forgetful one divides by the number of all tokens."""

    def __init__(self, *, dim: int, forgetful: bool = False) -> None:
        super().__init__()
        self.out, self.forgetful = nn.Linear(dim, dim), forgetful

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        y = x if context is None else context
        mask = torch.ones_like(y[..., 0], dtype=torch.bool) if mask is None else mask
        counted = torch.ones_like(mask) if self.forgetful else mask
        total = y.masked_fill(~mask[..., None], 0.0).sum(1, keepdim=True)
        return self.out(x) + total / counted.sum(1).clamp(min=1)[:, None, None]


def test_a_correct_causal_mixer_passes_as_class_factory_and_module() -> None:
    for part in (RunningMean, lambda: RunningMean(6), RunningMean(10)):
        report = check_mixer(part, claims=["causal"])
        assert {"causal", "prefix", "batch_consistency"} <= set(report.results)
        assert all(r.cases and r.inputs for r in report.results.values())


def test_a_leak_of_a_thousandth_through_a_mean_is_found_on_two_tokens() -> None:
    with pytest.raises(AssertionError, match=r"(?s)causal .*smallest input: x of shape \(1, 2, 1\)"):
        check_mixer(RunningMean, claims=["causal"], options={"leak": 1e-3})


def test_claims_raise_their_checks_and_nothing_else() -> None:
    plain = check_mixer(MaskedMean)
    full = check_mixer(MaskedMean, claims=["padding", "cross", "equivariant"])
    assert {"padding", "cross", "equivariant"} & set(plain.results) == set()
    assert {"padding", "all_padding", "cross", "equivariant"} <= set(full.results)
    assert not {"oracle", "refuses_a_mask", "refuses_other_forms"} & set(full.results)


def test_a_mask_that_is_honoured_by_half_is_found() -> None:
    with pytest.raises(AssertionError, match="padding"):
        check_mixer(MaskedMean, claims=["padding"], options={"forgetful": True})


def test_finer_seats_and_channels_have_their_own() -> None:
    class Sharp(Normaliser):
        def forward(self, scores: Tensor, allowed: Tensor | None = None) -> Tensor:
            return softmax_weights(2 * scores, allowed)

    check_normaliser(Sharp, claims=["causal", "padding", "equivariant"])
    check_channel(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)), claims=["token_wise"])


@pytest.mark.parametrize(
    ("part", "arguments", "sentence"),
    [
        (MaskedMean, {"role": "mixr"}, "role 'mixr' of MaskedMean is unknown (did you mean 'mixer'?)"),
        (MaskedMean, {"claims": ["casual"]}, "unknown claim 'casual' (did you mean 'causal'?)"),
        (
            RunningMean,
            {"claims": ["padding"]},
            "its forward has no argument 'mask', got (x); name it mask (True = real",
        ),
        (RunningMean, {"claims": ["cross"]}, "its forward has no argument 'context', got (x)"),
        (RunningMean, {"claims": ["exact_state"]}, "has no init_state(batch) and step(x, state)"),
        (RunningMean, {"options": {"leek": 1.0}}, "RunningMean has no argument 'leek' (did you mean 'leak'?)"),
        (nn.Bilinear, {}, "its argument 'in1_features' has no default and is none of dim, heads and causal"),
        (lambda: nn.Bilinear(3, 4, 5), {}, "the width of the tokens that <lambda> takes cannot be found out"),
        (lambda: 3, {}, "<lambda> gave a int, expected a torch.nn.Module"),
        (lambda: 1 / 0, {}, "<lambda> cannot be built with no arguments: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_checked_is_said_in_a_sentence(
    part: object, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError) as refusal:
        user_subject(part, **arguments)  # type: ignore[arg-type]
    assert sentence in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_was_found_out_is_said() -> None:
    said = user_subject(RunningMean, claims=["causal"]).inferred
    assert said == ("taken for a mixer", "built with dim=12, heads=3", "called as forward(x)")
    assert "tokens of width 6" in user_subject(lambda: RunningMean(6)).inferred
    assert user_subject(MaskedMean).inferred[0] == "taken for a mixer, as it extends TokenMixer"


@pytest.mark.parametrize(**parametrised([user_subject(RunningMean, claims=["causal"])], groups="AB"))  # type: ignore[arg-type]
def test_a_part_of_the_users_conforms_in_pytest(subject: object, check: object) -> None:
    check.run(subject)  # type: ignore[attr-defined]
