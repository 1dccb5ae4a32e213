"""What every statement in plain PyTorch shares: the dtype of the arithmetic, and running as a kernel would."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor


def as_kernel(function: Callable) -> Callable:
    """As a kernel would, the function records no gradient and does not hear of autocast."""

    @functools.wraps(function)
    def plain(*operands):
        device = next(x.device.type for x in operands if isinstance(x, Tensor))
        autocast = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with torch.no_grad(), autocast:
            return function(*operands)

    return plain


def accumulation_dtype(*operands: Tensor | None) -> torch.dtype:
    """float64 as soon as one operand is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in operands) else torch.float32
