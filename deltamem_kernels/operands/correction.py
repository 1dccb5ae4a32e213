"""Operands of the correction of a projection's output by the memory's reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_device, check_float, check_int, check_number, check_shape, check_tensor, fail, requires_grad
from .overlap import check_no_overlap, check_writable
from .types import accumulation_dtype


class CorrectionOperands(NamedTuple):
    """`attention_correction`'s arguments, and those of its form with norm and rotary embedding.

    head_dim 0 means that the norm is over the correction. Otherwise the norm is over each head of the corrected tensor,
    and the rotary embedding follows."""

    base: Tensor | None
    """`[B, T, D]` or `[N, D]`. Backward keeps it only where there is a norm over heads."""
    reads: Tensor
    """`[B, T, H, R]` (`[N, H, R]`), or without H."""
    weight: Tensor
    """`[D, H·R]`."""
    gain: Tensor | None
    """The scale where it is a tensor, without dimensions."""
    norm_weight: Tensor | None
    """`[D]`, or `[head_dim]`."""
    cos: Tensor | None
    """`[B or 1, T, head_dim]` (`[N or 1, head_dim]`), as is sin."""
    sin: Tensor | None
    scale: float
    norm_eps: float
    head_dim: int

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The operands that have a gradient, in the order in which backward returns the gradients."""
        return self[:5]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:7]

    @property
    def norm_over_heads(self) -> bool:
        return self.head_dim > 0 and self.norm_weight is not None

    def dtype(self, *others: Tensor | None) -> torch.dtype:
        """The dtype of the arithmetic; others are further operands that count, such as the result's gradient."""
        return accumulation_dtype(*self.tensors, *others)

    def check(self, out: object, *, heads: bool = False) -> None:
        """Raise TypeError, ValueError or RuntimeError if an argument does not fit. heads: whether the caller asked for
        the form with head_dim."""
        base, reads, weight = self.base, self.reads, self.weight
        if heads:
            check_int("head_dim", self.head_dim, "an integer")
        check_float("base", base, "[B, T, D] or [N, D]")
        assert base is not None
        if base.ndim not in (2, 3):
            fail(ValueError, "base", "[B, T, D] or [N, D]", base)
        *leading, width = base.shape
        check_float("weight", weight, "[D, H·R]")
        if weight.ndim != 2 or weight.shape[0] != width or weight.shape[1] < 1:
            fail(ValueError, "weight", f"[D, H·R] = [{width}, H·R], H·R at least 1", weight)
        check_float("reads", reads, "[B, T, H, R] or [B, T, R]")
        *rows, last = reads.shape or (0,)
        if len(rows) == len(leading) + 1:
            last *= rows.pop()
        if rows != leading or last != weight.shape[1]:
            wanted = "[B, T, H, R] or [B, T, R]" if len(leading) == 2 else "[N, H, R] or [N, R]"
            of_weight = f"H·R = {weight.shape[1]} as weight has"
            fail(ValueError, "reads", f"{wanted}, {leading} as base has and {of_weight}", reads)
        check_device("reads", reads, base.device, "base")
        check_device("weight", weight, base.device, "base")
        self.check_options(out, {"reads": reads, "weight": weight}, heads=heads)

    def check_options(self, out: object, read: dict[str, object], *, heads: bool) -> None:
        """Check everything but base, reads and weight. `read` holds the operands, by the caller's names, that `out`
        must not overlap."""
        base = self.base
        assert base is not None
        like = ("base", base)
        if isinstance(self.gain, Tensor):
            check_float("scale", self.gain, "of no dimensions")
            check_shape("scale", self.gain, ((),), "a number")
            check_device("scale", self.gain, base.device, "base")
        else:
            check_number("scale", self.scale, "a number, or a tensor of no dimensions")
        check_number("norm_eps", self.norm_eps)
        if not self.norm_eps >= 0:
            fail(ValueError, "norm_eps", "at least 0", self.norm_eps)
        if self.norm_weight is not None:
            wanted, size = ("[head_dim]", self.head_dim) if heads else ("[D]", base.shape[-1])
            check_tensor("norm_weight", self.norm_weight, ((size,),), wanted, like)
        if out is not None:
            if out is not base:
                check_out(out, base)
            assert isinstance(out, Tensor)
            operands = {"base": None if out is base else base, **read, "scale": self.gain}
            check_writable("out", out, {**operands, "norm_weight": self.norm_weight})
        if heads:
            self._check_heads(base, out)

    def _check_heads(self, base: Tensor, out: object) -> None:
        """Check head_dim against base, and the tables of the rotary embedding."""
        head_dim, cos, sin = self.head_dim, self.cos, self.sin
        if head_dim < 1 or base.shape[-1] % head_dim:
            raise ValueError(f"head_dim must divide base's last dimension {base.shape[-1]}, got {head_dim}")
        if cos is None and sin is None:
            return
        if cos is None or sin is None:
            raise ValueError(f"cos and sin must be given both or neither, got only {'sin' if cos is None else 'cos'}")
        if head_dim % 2:
            raise ValueError(f"head_dim must be even for a rotary embedding, got {head_dim}")
        row = (*base.shape[:-1], head_dim)
        wanted = "[B, T, head_dim] or [1, T, head_dim]" if base.ndim == 3 else "[N, head_dim] or [1, head_dim]"
        for name, table in (("cos", cos), ("sin", sin)):
            check_tensor(name, table, (row, (1, *row[1:])), wanted, ("base", base))
            if requires_grad((table,)):
                raise ValueError(f"{name} must not require grad: there is no gradient for it")
        if isinstance(out, Tensor):
            check_no_overlap("out", out, {"cos": cos, "sin": sin})


def split_scale(scale: float | Tensor) -> tuple[Tensor | None, float]:
    """Split a scale into `gain`, where it is a tensor, and the number."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def check_out(out: object, base: Tensor) -> None:
    """Check that out has base's dtype, shape and device."""
    if not isinstance(out, Tensor) or out.dtype != base.dtype or out.layout is not torch.strided:
        fail(TypeError, "out", f"a dense {str(base.dtype).removeprefix('torch.')} tensor, as base is", out)
    check_shape("out", out, (tuple(base.shape),), "of base's shape")
    check_device("out", out, base.device, "base")
