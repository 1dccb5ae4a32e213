"""Operands of a layer's decoding step: projection, step on the pool, and the correction of one projection's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .checks import check_device, check_float, check_indices, check_int, check_mode, check_tensor, fail, requires_grad
from .correction import CorrectionOperands
from .overlap import check_no_overlap, check_writable
from .projection import Projected, ProjectionOperands
from .step import StepOperands, check_enough_slots, check_pool
from .types import Written


class DecodeOperands(NamedTuple):
    """`memory_decode`'s arguments. Where base is None and out is not, out holds the base and is corrected in place."""

    state: Written
    """The pool, `[slots, H, R, R]`."""
    x: Tensor
    """`[N, D]`, or `[N, 1, D]`."""
    qkv_weight: Sequence[Tensor]
    beta_weight: Tensor
    beta_bias: Tensor | None
    decay_weight: Tensor | None
    decay_bias: Tensor | None
    state_indices: Tensor | None
    base: Tensor | None
    """`[N, Dq]`, or `[N, 1, Dq]`."""
    delta_weight: Tensor | None
    """`[Dq, H·R]`; None corrects nothing."""
    gain: Tensor | None
    norm_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    out: Written | None
    heads: int
    normalize: bool
    mode: str
    pad_slot_id: int
    scale: float
    norm_eps: float
    head_dim: int

    @property
    def projection(self) -> ProjectionOperands:
        return ProjectionOperands(
            self.x, self.qkv_weight, self.beta_weight, self.beta_bias, self.decay_weight, self.decay_bias, self.heads,
            self.normalize,
        )  # fmt: skip

    def step(self, projected: Projected, reads: Tensor) -> StepOperands:
        """The operands of the step that follows the projection."""
        q, k, v, beta, decay, _ = projected
        given_decay = None if self.decay_weight is None else decay
        return StepOperands(
            self.state,
            q,
            k,
            v,
            beta,
            given_decay,
            self.state_indices,
            None,
            None,
            reads,
            self.mode,
            self.pad_slot_id,
            True,
        )

    def correction(self, reads: Tensor | None) -> CorrectionOperands:
        """The operands of the correction that follows the step; `reads` is None only where they are checked."""
        base = self.out if self.base is None else self.base
        return CorrectionOperands(
            base, reads, self.delta_weight, self.gain, self.norm_weight, self.cos, self.sin, self.scale,  # type: ignore[arg-type]
            self.norm_eps, self.head_dim,
        )  # fmt: skip

    @property
    def written(self) -> list[Tensor]:
        return [self.state] if self.out is None else [self.state, self.out]

    def check(self, *, heads: bool) -> None:
        """Raise TypeError, ValueError or RuntimeError if an argument does not fit. heads: whether head_dim is given."""
        self.projection.check()
        state, x, out = self.state, self.x, self.out
        rank = self.projection.rank
        if x.ndim == 3 and x.shape[1] != 1:
            fail(ValueError, "x", "[N, D] or [N, 1, D]", x)
        check_mode(self.mode, self.decay_weight, "decay_weight")
        check_pool(state, (self.heads, rank, rank), ("x", x))
        check_enough_slots(state, self.state_indices, x.shape[0])
        if self.state_indices is not None:
            check_indices("state_indices", self.state_indices, ((x.shape[0],),), "[N]", ("x", x))
        check_int("pad_slot_id", self.pad_slot_id)
        base: Tensor | None = out if self.base is None else self.base
        if base is None:
            self._check_no_correction(heads)
        else:
            self._check_correction(base, heads)
        if requires_grad((*self, *self.qkv_weight)):
            raise ValueError("memory_decode has no gradient: call it under torch.no_grad()")
        check_writable("state", state, {"x": x, "base": base})
        if out is not None:
            check_no_overlap("out", out, {"state": state})

    def _check_no_correction(self, heads: bool) -> None:
        given: dict[str, object] = {"delta_weight": self.delta_weight, "norm_weight": self.norm_weight}
        given |= {"head_dim": self.head_dim if heads else None, "cos": self.cos, "sin": self.sin}
        for name, value in given.items():
            if value is not None:
                fail(ValueError, name, "None without a base to correct", value)
        scale = self.scale if self.gain is None else self.gain
        if isinstance(scale, Tensor) or scale != 1:
            fail(ValueError, "scale", "1 without a base to correct", scale)

    def _check_correction(self, base: Tensor, heads: bool) -> None:
        x = self.x
        check_float("base", base, "[N, Dq]")
        if base.shape[:-1] != x.shape[:-1] or not base.ndim:
            n = f"[N, Dq] with x's N={x.shape[0]}" if x.ndim == 2 else f"[N, 1, Dq], as x is, with N={x.shape[0]}"
            fail(ValueError, "base", n, base)
        check_device("base", base, x.device, "x")
        width = self.projection.width
        check_tensor("delta_weight", self.delta_weight, ((base.shape[-1], width),), "[Dq, H·R]", ("x", x))
        if heads:
            check_int("head_dim", self.head_dim, "an integer")
        elif self.cos is not None or self.sin is not None:
            raise ValueError("head_dim must be given with cos and sin, got None")
        self.correction(None).check_options(self.out, {"delta_weight": self.delta_weight}, heads=heads)
