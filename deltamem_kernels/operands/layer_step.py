"""Operands of all that a layer's memory does for one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LayerStepOperands(NamedTuple):
    """`layer_step`'s arguments."""

    x: Tensor
    """`[B, D]`, or `[B, 1, D]`."""
    state: Tensor | None
    """`[B, H, R, R]`; None means zeros."""
    qkv_weight: Sequence[Tensor]
    beta_weight: Tensor
    beta_bias: Tensor | None
    decay_weight: Tensor | None
    decay_bias: Tensor | None
    mask: Tensor | None
    """`[B]`, or `[B, 1]` as x is; bool."""
    delta_weights: Sequence[Tensor]
    """For each correction, `[out, H·R]`."""
    gains: Sequence[Tensor]
    """A scale for each correction where scales are tensors, without dimensions; otherwise empty."""
    norm_weight: Tensor | None
    """`[out]`, of the RMSNorm of the last correction."""
    heads: int
    normalize: bool
    mode: str
    scale: float
    norm_eps: float
