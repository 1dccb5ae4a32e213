"""What a benchmark is made of: operations, their implementations, the shapes they run on.

To add an operation, add a file to `operations/` with a tuple OPERATIONS: inputs, oracle, bytes, implementations.
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
    """The sizes and the kind of one case; an operation uses the fields it knows."""

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
        return f"{sizes} {self.dtype_name}, {self.mode}, a gate a {self.gates}, {self.source} inputs"


def _can_always_run(shape: Shape) -> str | None:
    return None


def _as_they_are(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Implementation:
    """`run` is timed. `prepare` and `present` are not: they lend a peer with other conventions its own layout
    before, and ours afterwards. `why_not` says in words why a shape cannot run here, or returns None. `graph`: on a
    GPU, whether it is timed in a CUDA graph; None if its time decides."""

    name: str
    run: Callable[[Tensors, Shape], Tensors]
    why_not: Callable[[Shape], str | None] = _can_always_run
    note: str = ""
    slow_start: bool = False
    prepare: Callable[[Tensors], Tensors] = _as_they_are
    present: Callable[[Tensors], Tensors] = _as_they_are
    graph: bool | None = None


@dataclass(frozen=True)
class Operation:
    """`oracle` gets the inputs in float64 on the CPU; an implementation must return all of its outputs, by name.
    Where `gradients_of` names inputs, they require gradients; otherwise everything runs in inference mode. `tokens` and
    `batches` are the sizes it runs on unless told."""

    name: str
    inputs: Callable[[Shape], Tensors]
    oracle: Callable[[Tensors, Shape], Tensors]
    bytes_moved: Callable[[Shape], int]
    implementations: tuple[Implementation, ...]
    baseline: str
    gradients_of: tuple[str, ...] = ()
    tokens: tuple[int, ...] = (128, 1024, 8192)
    batches: tuple[int, ...] = (1,)


def with_gradients(
    forward: Callable[[Tensors, Shape], Tensors], gradients_of: tuple[str, ...]
) -> Callable[[Tensors, Shape], Tensors]:
    """Forward and backward: output `y` gets the cotangent among the inputs that is named `d_y`, and the gradient of
    input `x` is returned as `d_x`."""

    def run(inputs: Tensors, shape: Shape) -> Tensors:
        outputs = forward(inputs, shape)
        cotangents = [inputs[f"d_{name}"].to(output.dtype) for name, output in outputs.items()]
        gradients = torch.autograd.grad(list(outputs.values()), [inputs[name] for name in gradients_of], cotangents)
        return outputs | {f"d_{name}": gradient for name, gradient in zip(gradients_of, gradients, strict=True)}

    return run


def load_operations() -> tuple[Operation, ...]:
    from . import operations

    modules = sorted(module.name for module in pkgutil.iter_modules(operations.__path__))
    found = [importlib.import_module(f"{operations.__name__}.{name}").OPERATIONS for name in modules]
    return tuple(operation for group in found for operation in group)
