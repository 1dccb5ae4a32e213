"""The parts of a benchmark: operations, their implementations, and the shapes they run on.

To add an operation, add a file to `operations/` that defines a tuple OPERATIONS.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The sizes and options of one case. An operation uses the fields that apply to it."""

    tokens: int
    batch: int = 1
    heads: int = 1
    rank: int = 8
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    mode: str = "standard"
    gates: str = "row"
    source: str = "random"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        sizes = f"B={self.batch} T={self.tokens} H={self.heads} R={self.rank}"
        return f"{sizes} {self.dtype_name}, {self.mode}, one gate per {self.gates}, {self.source} inputs"


def _runs_everywhere(shape: Shape) -> str | None:
    return None


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operation."""

    name: str
    run: Callable[[Tensors, Shape], Tensors]
    """The timed call, from inputs to outputs."""
    why_not: Callable[[Shape], str | None] = _runs_everywhere
    """Returns why a shape cannot run on this machine, or None."""
    note: str = ""
    slow_start: bool = False
    """Whether --quick skips the implementation."""
    prepare: Callable[[Tensors], Tensors] = _unchanged
    """Converts the inputs to the implementation's own layout; not timed."""
    present: Callable[[Tensors], Tensors] = _unchanged
    """Converts the outputs back; not timed."""
    graph: bool | None = None
    """On a GPU, whether it is timed in a CUDA graph. None decides by its duration."""


@dataclass(frozen=True)
class Operation:
    """A benchmarked operation."""

    name: str
    inputs: Callable[[Shape], Tensors]
    oracle: Callable[[Tensors, Shape], Tensors]
    """Computes the expected outputs from the inputs in float64 on the CPU. Implementations return the same names."""
    bytes_moved: Callable[[Shape], int]
    """The fewest bytes that any implementation has to read and write."""
    implementations: tuple[Implementation, ...]
    baseline: str
    """Name of the implementation that the speed of the others is relative to."""
    gradients_of: tuple[str, ...] = ()
    """Inputs that require gradients. If there are none, everything runs in inference mode."""
    tokens: tuple[int, ...] = (128, 1024, 8192)
    """Default sequence lengths."""
    batches: tuple[int, ...] = (1,)
    """Default batch sizes."""


def with_gradients(
    forward: Callable[[Tensors, Shape], Tensors], gradients_of: tuple[str, ...]
) -> Callable[[Tensors, Shape], Tensors]:
    """Extend a forward function with its backward.

    The cotangent of output `y` is the input named `d_y`. The gradient of input `x` is returned as output `d_x`.
    """

    def run(inputs: Tensors, shape: Shape) -> Tensors:
        outputs = forward(inputs, shape)
        cotangents = [inputs[f"d_{name}"].to(output.dtype) for name, output in outputs.items()]
        gradients = torch.autograd.grad(list(outputs.values()), [inputs[name] for name in gradients_of], cotangents)
        return outputs | {f"d_{name}": gradient for name, gradient in zip(gradients_of, gradients, strict=True)}

    return run


def load_operations() -> tuple[Operation, ...]:
    """Load all operations from `operations/`."""
    from . import operations

    modules = sorted(module.name for module in pkgutil.iter_modules(operations.__path__))
    found = [importlib.import_module(f"{operations.__name__}.{name}").OPERATIONS for name in modules]
    return tuple(operation for group in found for operation in group)
