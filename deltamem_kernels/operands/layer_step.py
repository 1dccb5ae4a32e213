"""Operands of all that a layer's memory does for one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .checks import (
    check_device,
    check_float,
    check_mask,
    check_mode,
    check_number,
    check_tensor,
    fail,
    requires_grad,
)
from .projection import ProjectionOperands


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

    @property
    def projection(self) -> ProjectionOperands:
        return ProjectionOperands(
            self.x, self.qkv_weight, self.beta_weight, self.beta_bias, self.decay_weight, self.decay_bias, self.heads,
            self.normalize,
        )  # fmt: skip

    def check(self) -> None:
        """Raise TypeError or ValueError if an argument does not fit."""
        self.projection.check()
        x, like = self.x, ("x", self.x)
        batch, rank, width = x.shape[0], self.projection.rank, self.projection.width
        if x.ndim == 3 and x.shape[1] != 1:
            fail(ValueError, "x", "[B, D] or [B, 1, D]", x)
        check_mode(self.mode, self.decay_weight, "decay_weight")
        if self.state is not None:
            check_tensor("state", self.state, ((batch, self.heads, rank, rank),), "[B, H, R, R]", like)
        if self.mask is not None:
            check_mask(self.mask, tuple(x.shape[:-1]), like)
        if self.gains and len(self.gains) != len(self.delta_weights):
            raise ValueError(f"gains must be empty or {len(self.delta_weights)} tensors, got {len(self.gains)}")
        for weight in self.delta_weights:
            check_float("delta_weight", weight, "[out, H·R]")
            if weight.ndim != 2 or weight.shape[1] != width:
                fail(ValueError, "delta_weight", f"[out, H·R] with H·R = {width}", weight)
            check_device("delta_weight", weight, x.device, "x")
        for gain in self.gains:
            check_tensor("gain", gain, ((),), "a number", like)
        check_number("scale", self.scale)
        check_number("norm_eps", self.norm_eps)
        if not self.norm_eps >= 0:
            fail(ValueError, "norm_eps", "at least 0", self.norm_eps)
        if self.norm_weight is not None:
            if not self.delta_weights:
                fail(ValueError, "norm_weight", "None without corrections", self.norm_weight)
            check_tensor("norm_weight", self.norm_weight, ((self.delta_weights[-1].shape[0],),), "[out]", like)
        if requires_grad((*self, *self.qkv_weight, *self.delta_weights, *self.gains)):
            raise ValueError("layer_step has no gradient: call it under torch.no_grad()")
