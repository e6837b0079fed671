"""Islands of full precision inside autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def island(x: Tensor) -> AbstractContextManager[object]:
    """Products inside keep the dtypes of their factors, on the device of ``x``, whatever autocast asks for."""
    # meta tensors know no autocast
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
