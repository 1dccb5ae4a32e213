"""Checks of a tensor that a call writes into: it has no internal overlap, and shares no memory with an operand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import fail


def check_writable(name: str, out: Tensor, operands: Mapping[str, object]) -> None:
    """Check that `out` can be written, and recorded by autograd, while the operands are read.

    Raises:
        ValueError: out has internal overlap, or shares memory with an operand.
        RuntimeError: out is a leaf that requires grad, or a view of one, and gradients are recorded.
    """
    strides = out.stride()
    if 0 in strides and any(stride == 0 and size > 1 for size, stride in zip(out.shape, strides, strict=True)):
        fail(ValueError, name, "a tensor without internal overlap, not an expanded one", out)
    if torch.is_grad_enabled():
        for leaf, what in ((out, "a leaf"), (out._base, "a view of a leaf")):
            if leaf is not None and leaf.requires_grad and leaf.is_leaf:  # torch raises only after the kernel has run
                raise RuntimeError(f"{name} is {what} that requires grad: it cannot be written in place")
    check_no_overlap(name, out, operands)


def check_no_overlap(name: str, out: Tensor, operands: Mapping[str, object]) -> None:
    """Check that `out` shares no memory with the operands. Values that are not tensors are ignored."""
    if torch.compiler.is_compiling():
        return  # there is no memory to look at
    for operand, x in operands.items():
        if isinstance(x, Tensor) and torch._C._is_alias_of(out, x) and _may_overlap(out, x):  # type: ignore[attr-defined]
            raise ValueError(f"{name} must not share memory with {operand}, which is read while {name} is written")


def _may_overlap(a: Tensor, b: Tensor) -> bool:
    """Return False if two tensors of one storage certainly do not overlap: they lie one after the other, or they are
    slices of the same rows, such as those of a fused projection's output."""
    if not a.numel() or not b.numel():
        return False
    return not any(_disjoint(a, b, pitch) for pitch in (0, *(stride * a.itemsize for stride in a.stride())))


def _disjoint(a: Tensor, b: Tensor, pitch: int) -> bool:
    (a_start, a_span), (b_start, b_span) = _extent(a, pitch), _extent(b, pitch)
    a_end, b_end = a_start + a_span, b_start + b_span
    return (a_end <= b_start or b_end <= a_start) and (not pitch or max(a_end, b_end) <= pitch)


def _extent(x: Tensor, pitch: int = 0) -> tuple[int, int]:
    """Start and length in bytes. With a pitch, the start within a row and the length there, as if all rows overlapped.
    Where strides are not multiples of the pitch, the length exceeds a row."""
    steps = [(n - 1, stride * x.itemsize) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    start = x.storage_offset() * x.itemsize
    if pitch:
        steps = [(n, stride) for n, stride in steps if stride % pitch]
        start %= pitch
    return int(start), int(sum(n * stride for n, stride in steps)) + x.itemsize
