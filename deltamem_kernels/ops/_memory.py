"""Checks of a tensor that a call writes into: no two of its numbers in one place, no operand under it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._checks import fail

_same_storage = torch._C._is_alias_of  # type: ignore[attr-defined]


def check_writable(name: str, out: Tensor, names: Sequence[str], operands: Sequence[object]) -> None:
    """out can be written and recorded while the operands, some of them no tensors, are read."""
    strides = out.stride()
    if 0 in strides and any(stride == 0 and size > 1 for size, stride in zip(out.shape, strides, strict=True)):
        fail(ValueError, name, "a tensor with a place for each number, not an expanded one", out)
    if torch.is_grad_enabled():
        for leaf, what in ((out, "a leaf"), (out._base, "a view of a leaf")):
            if leaf is not None and leaf.requires_grad and leaf.is_leaf:  # torch says so only after the kernel has run
                raise RuntimeError(f"{name} is {what} that requires grad: it cannot be written in place")
    check_apart(name, out, names, operands)


def check_apart(name: str, out: Tensor, names: Sequence[str], operands: Sequence[object]) -> None:
    """No operand lies under out."""
    if torch.compiler.is_compiling():
        return  # there is no memory to look at
    for i, x in enumerate(operands):
        if isinstance(x, Tensor) and _same_storage(out, x) and _may_overlap(out, x):
            raise ValueError(f"{name} must not share memory with {names[i]}, which is read while {name} is written")


def _may_overlap(a: Tensor, b: Tensor) -> bool:
    """Of two tensors in one storage: False where they are certainly apart, one behind the other or as slices of the
    same rows, as those of a fused projection's output are, whatever dimensions a row has."""
    if not a.numel() or not b.numel():
        return False
    return not any(_apart(a, b, pitch) for pitch in (0, *(stride * a.itemsize for stride in a.stride())))


def _apart(a: Tensor, b: Tensor, pitch: int) -> bool:
    (a_start, a_span), (b_start, b_span) = _extent(a, pitch), _extent(b, pitch)
    a_end, b_end = a_start + a_span, b_start + b_span
    return (a_end <= b_start or b_end <= a_start) and (not pitch or max(a_end, b_end) <= pitch)


def _extent(x: Tensor, pitch: int = 0) -> tuple[int, int]:
    """Start and length in bytes; with a pitch, start in a row and length there, as if all rows were one upon another.
    Where strides are no multiples of the pitch, the length is more than a row."""
    steps = [(n - 1, stride * x.itemsize) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
    start = x.storage_offset() * x.itemsize
    if pitch:
        steps = [(n, stride) for n, stride in steps if stride % pitch]
        start %= pitch
    return int(start), int(sum(n * stride for n, stride in steps)) + x.itemsize
