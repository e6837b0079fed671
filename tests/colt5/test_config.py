from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import AutoConfig

from tevo.colt5.config import CoLT5Config
from tevo.colt5.routers import Budget, SoftmaxTopK, SoftTopK


def test_the_default_routes_a_sixteenth_and_twice_as_many_keys() -> None:
    assert CoLT5Config().budgets() == (Budget(1 / 16), Budget(1 / 16), Budget(1 / 8))


@pytest.mark.parametrize(
    ("m", "q", "v", "tokens"),
    [
        (1 / 16, None, None, (63, 63, 125)),
        (100, None, None, (100, 100, 200)),
        ([1 / 4, 200], None, None, (200, 200, 400)),
        (1 / 4, 10, 1.0, (250, 10, 1000)),
        (0.75, None, None, (750, 750, 1000)),
        (1 / 16, 1 / 8, None, (63, 125, 125)),
    ],
)
def test_shares_are_fractions_numbers_or_both(m: object, q: object, v: object, tokens: tuple[int, ...]) -> None:
    config = CoLT5Config(m=m, q=q, v=v)  # type: ignore[arg-type]
    assert tuple(budget.tokens(1000) for budget in config.budgets()) == tokens


def test_a_config_survives_a_folder(tmp_path: Path) -> None:
    config = CoLT5Config.tiny(m=[1 / 8, 64], q=0.25, eps=0.3, decoder_layers=1)
    config.save_pretrained(tmp_path)
    again = CoLT5Config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.budgets() == config.budgets()


def test_the_auto_class_knows_it_once_the_models_are_imported(tmp_path: Path) -> None:
    import tevo.colt5.modeling  # noqa: F401

    CoLT5Config.tiny().save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CoLT5Config)


def test_hugging_faces_names_are_ours() -> None:
    config = CoLT5Config.large(decoder_layers=3)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 24, 16)
    assert config.get_text_config(decoder=True).num_hidden_layers == 3
    assert (config.decoder_start_token_id, config.eos_token_id, config.is_encoder_decoder) == (0, 1, True)


def test_eps_is_the_soft_topks() -> None:
    routing = CoLT5Config(eps=0.3, routing="soft_topk_iterations").new_routing()
    assert isinstance(routing, SoftTopK)
    assert routing.eps == pytest.approx(0.3)
    assert routing.solver == "iterations"


def test_with_one_router_the_keys_are_as_many_as_the_queries() -> None:
    m, q, v = CoLT5Config(m=1 / 8, q=1 / 4, one_router=True).budgets()
    assert (m.tokens(64), q.tokens(64), v.tokens(64)) == (8, 16, 16)


def test_the_notes_form_has_its_router_and_global_tokens() -> None:
    config = CoLT5Config.note(global_tokens=2)
    assert isinstance(config.new_routing(), SoftmaxTopK)
    assert (config.global_tokens, config.slack) == (2, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim=0, expected a whole number of at least 1"),
        ({"dim": 16.5}, "dim=16.5, expected a whole number"),
        ({"m": 0}, "m=0, expected a fraction of the length from 1e-6 to 1, a number of tokens"),
        ({"m": 1.5}, "m=1.5, expected a fraction"),
        ({"q": True}, "q=True, expected a fraction"),
        ({"v": "half"}, "v='half', expected a fraction"),
        ({"v": [0.5]}, "v=\\[0.5\\], expected a fraction"),
        ({"m": [0.5, 0]}, "m=\\[0.5, 0\\], expected a fraction"),
        ({"eps": 0.0}, "eps=0.0, expected a number above 0"),
        ({"slack": 0.5}, "slack=0.5, expected at least 1"),
        ({"total": 0.0}, "total=0.0, expected a number above 0"),
        ({"norm_eps": -1.0}, "norm_eps=-1.0, expected at least 0"),
        ({"heads": 12, "cross_kv_heads": 5}, "expected a divisor of heads=12"),
        ({"routing": "topk"}, "expected one of soft_topk"),
        ({"routing": "static", "eps": 0.1}, "does not have; leave it out"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"global_tokens": -1}, "global_tokens=-1"),
        ({"light_kv_heads": 3}, "light_kv_heads=3, expected a divisor of light_heads=4"),
        ({"rotary": 0.0}, "rotary=0.0 and head_dim=64, expected a base above 0"),
        ({"rotary": 100.0, "head_dim": 5}, "an even head_dim"),
        ({"global_tokens": 1, "qk_norm": True}, "has no rotary, qk_norm or kv_heads; leave these out"),
        ({"one_router": True, "v": 0.25}, "one_router=True with v=0.25 and global_tokens=None, expected neither"),
        ({"one_router": True, "global_tokens": 1}, "and global_tokens=1, expected neither"),
        ({"lyers": 3}, "did you mean 'layers'"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CoLT5Config(**arguments)  # type: ignore[arg-type]
