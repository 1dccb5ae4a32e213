"""What the annotations of the records say beyond the Python type, and the dtype of the arithmetic."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

Written = Annotated[Tensor, "written"]
"""A tensor that the operation writes in place."""
Symbolic = Annotated[int, "symbolic"]
"""A size that torch.compile may keep symbolic."""


def accumulation_dtype(*operands: Tensor | None) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 if one operand is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in operands) else torch.float32
