"""Operands of the means over segments of tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .checks import check_float, check_indices, check_int, check_mask, fail
from .types import Symbolic


class SegmentOperands(NamedTuple):
    """`segment_mean`'s arguments."""

    x: Tensor
    """`[B, T, D]`."""
    segment_ids: Tensor
    """`[B, T]`; a token with a negative id belongs to no segment."""
    num_segments: Symbolic
    mask: Tensor | None
    """`[B, T]` bool."""

    def check(self) -> None:
        """Raise TypeError or ValueError if an argument does not fit."""
        x = self.x
        check_float("x", x, "[B, T, D]")
        if x.ndim != 3:
            fail(ValueError, "x", "[B, T, D]", x)
        tokens = (x.shape[0], x.shape[1])
        check_indices("segment_ids", self.segment_ids, (tokens,), "[B, T]", ("x", x))
        if self.mask is not None:
            check_mask(self.mask, tokens, ("x", x))
        check_int("num_segments", self.num_segments, "an int, the number of segments M")
        if self.num_segments < 0:
            raise ValueError(f"num_segments must be 0 or more, got {self.num_segments}")
