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


class LayerStepWeights(NamedTuple):
    """The weights and options of a layer's memory."""

    qkv_weight: Sequence[Tensor]
    beta_weight: Tensor
    beta_bias: Tensor | None
    decay_weight: Tensor | None
    decay_bias: Tensor | None
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


class LayerStepOperands(NamedTuple):
    """`layer_step`'s arguments."""

    x: Tensor
    """`[B, D]`, or `[B, 1, D]`."""
    state: Tensor | None
    """`[B, H, R, R]`; None means zeros."""
    mask: Tensor | None
    """`[B]`, or `[B, 1]` as x is; bool."""
    weights: LayerStepWeights

    @property
    def projection(self) -> ProjectionOperands:
        w = self.weights
        return ProjectionOperands(
            self.x, w.qkv_weight, w.beta_weight, w.beta_bias, w.decay_weight, w.decay_bias, w.heads, w.normalize
        )

    def check(self) -> None:
        """Raise TypeError or ValueError if an argument does not fit."""
        self.projection.check()
        x, w, like = self.x, self.weights, ("x", self.x)
        batch, rank, width = x.shape[0], self.projection.rank, self.projection.width
        if x.ndim == 3 and x.shape[1] != 1:
            fail(ValueError, "x", "[B, D] or [B, 1, D]", x)
        check_mode(w.mode, w.decay_weight, "decay_weight")
        if self.state is not None:
            check_tensor("state", self.state, ((batch, w.heads, rank, rank),), "[B, H, R, R]", like)
        if self.mask is not None:
            check_mask(self.mask, tuple(x.shape[:-1]), like)
        if w.gains and len(w.gains) != len(w.delta_weights):
            raise ValueError(f"gains must be empty or {len(w.delta_weights)} tensors, got {len(w.gains)}")
        for weight in w.delta_weights:
            check_float("delta_weight", weight, "[out, H·R]")
            if weight.ndim != 2 or weight.shape[1] != width:
                fail(ValueError, "delta_weight", f"[out, H·R] with H·R = {width}", weight)
            check_device("delta_weight", weight, x.device, "x")
        for gain in w.gains:
            check_tensor("gain", gain, ((),), "a number", like)
        check_number("scale", w.scale)
        check_number("norm_eps", w.norm_eps)
        if not w.norm_eps >= 0:
            fail(ValueError, "norm_eps", "at least 0", w.norm_eps)
        if w.norm_weight is not None:
            if not w.delta_weights:
                fail(ValueError, "norm_weight", "None without corrections", w.norm_weight)
            check_tensor("norm_weight", w.norm_weight, ((w.delta_weights[-1].shape[0],),), "[out]", like)
        if requires_grad((*self[:3], *w, *w.qkv_weight, *w.delta_weights, *w.gains)):
            raise ValueError("layer_step has no gradient: call it under torch.no_grad()")
