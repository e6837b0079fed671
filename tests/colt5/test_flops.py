from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from tevo.bench.measure import flops
from tevo.colt5.config import CoLT5Config
from tevo.colt5.flops import computed_window, encoder_flops, longt5_flops, model_flops, t5_flops
from tevo.colt5.modeling import CoLT5EncoderModel, CoLT5ForConditionalGeneration

# multiply-adds of an encoder layer in 10^9, T5, LongT5 and CoLT5, as the study of the paper's sizes has them
TABLE = [
    ("base", 4096, {}, 54.8, 32.5, 19.0),
    ("base", 16384, {}, 528.3, 149.4, 77.6),
    ("base", 65536, {}, 7061, 906.7, 336.2),
    ("base", 65536, {"m": 2048}, 7061, 906.7, 266.9),
    ("large", 16384, {}, 760.2, 255.5, 133.7),
    ("large", 65536, {"m": 2048}, 9638, 1434, 454.4),
    ("xl", 16384, {}, 1890, 884.7, 485.4),
]


class _Encoder(torch.nn.Module):
    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        self.model = CoLT5EncoderModel(config).eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).last_hidden_state


class _Both(torch.nn.Module):
    def __init__(self, config: CoLT5Config) -> None:
        super().__init__()
        self.model = CoLT5ForConditionalGeneration(config).eval()

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.model(ids, decoder_input_ids=targets, use_cache=False).logits


def _small(**changes: object) -> CoLT5Config:
    sizes = {"vocab_size": 61, "dim": 12, "layers": 2, "decoder_layers": 3, "light_heads": 1, "heavy_heads": 2}
    widths = {"heads": 3, "head_dim": 5, "light_dim": 7, "heavy_dim": 33, "hidden_dim": 11, "radius": 7}
    return CoLT5Config(**{**sizes, **widths, **changes})


@pytest.mark.parametrize(("size", "n", "changes", "dense", "longt5", "colt5"), TABLE)
def test_formulas_give_the_studys_table(
    size: str, n: int, changes: dict[str, int], dense: float, longt5: float, colt5: float
) -> None:
    config = getattr(CoLT5Config, size)(**changes)
    for found, printed in (
        (t5_flops(config, n), dense),
        (longt5_flops(config, n), longt5),
        (sum(encoder_flops(config, n).values()), colt5),
    ):
        # half of the last digit that is printed
        assert found / 2e9 == pytest.approx(printed, abs=0.0501 if printed < 1000 else 0.51)


@pytest.mark.parametrize("n", [13, 300])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"m": 5, "v": 1.0},
        {"m": 0.4},
        {"one_router": True},
        {"light_heads": 4, "light_kv_heads": 2, "heavy_kv_heads": 1},
    ],
)
def test_the_encoders_formula_is_what_is_counted(n: int, changes: dict[str, float]) -> None:
    config = _small(**changes)
    expected = model_flops(config, n, window=computed_window(n, config.radius))
    assert flops(_Encoder(config), torch.zeros(1, n, dtype=torch.long)) == expected


def test_the_models_formula_is_what_is_counted() -> None:
    config, n, targets = _small(cross_kv_heads=1), 300, 9
    ids = torch.zeros(1, n, dtype=torch.long), torch.zeros(1, targets, dtype=torch.long)
    assert flops(_Both(config), *ids) == model_flops(config, n, targets, window=computed_window(n, config.radius))


def test_the_computed_window_is_all_of_a_short_text() -> None:
    assert computed_window(20, 7) == 20
    assert computed_window(4096, 127) > 255


def test_the_notes_attention_is_not_counted() -> None:
    with pytest.raises(ValueError, match="global_tokens=1"):
        encoder_flops(CoLT5Config.note(), 100)
