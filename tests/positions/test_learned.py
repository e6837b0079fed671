"""Learned positions: the end of the table."""

from __future__ import annotations

import pytest
import torch

from tevo.positions.learned import Learned


def test_refuses_a_sequence_and_a_single_token_beyond_the_table() -> None:
    position = Learned(dim=4, length=7)
    position.embed(torch.randn(2, 7, 4), torch.arange(7)[None])
    with pytest.raises(ValueError, match="length=7 tokens, got 9; rebuild with length>=9"):
        position.embed(torch.randn(2, 9, 4), torch.arange(9)[None])
    with pytest.raises(ValueError, match="length=7 tokens, got 8; rebuild with length>=8"):
        position.embed(torch.randn(2, 1, 4), torch.tensor([[7]]))
