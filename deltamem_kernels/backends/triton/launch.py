"""A kernel's launch as a record, and the one place that every launch goes through."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

OPTIONS = {"num_stages": 1, "enable_fp_fusion": True}
"""The compiler's options where a launch has no others."""


class Launch(NamedTuple):
    """One launch of a kernel: a `triton.jit` function, the number of programs along each axis (with 0, nothing runs),
    and the kernel's arguments and the compiler's options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments with the default options."""
        return OPTIONS | self.arguments


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Run the launches one after another."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            if all(launch.grid):
                start(launch)


def start(launch: Launch) -> None:
    """Run one launch. All launches of the package come through here."""
    launch.kernel[launch.grid](**launch.keywords)


def strides(name: str, x: Tensor | None, dimensions: str, given: str = "") -> dict[str, int]:
    """Return x's strides by the kernels' names for them: `q_st` is the stride of dimension t of q. `given` names the
    dimensions that x has, if they are not the first ones of `dimensions`. A missing dimension has stride 0. All strides
    of a missing operand are 1."""
    names = stride_names(name, dimensions)
    if x is None:
        return dict.fromkeys(names, 1)
    own = x.stride()
    if given or len(own) < len(dimensions):
        by_dimension = dict(zip(given or dimensions, own, strict=False))
        own = tuple(by_dimension.get(d, 0) for d in dimensions)
    return dict(zip(names, own, strict=True))


@functools.cache
def stride_names(name: str, dimensions: str) -> tuple[str, ...]:
    return tuple(f"{name}_s{d}" for d in dimensions)


def cdiv(a: int, b: int) -> int:
    """Divide and round up, in a tenth of the time that triton.cdiv takes on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the smallest power of 2 that is at least n, for n of at least 1."""
    return 1 << (n - 1).bit_length()


def kernel_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name for the dtype of the arithmetic."""
    return tl.float64 if dtype == torch.float64 else tl.float32
