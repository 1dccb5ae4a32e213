"""segment_mean at the hidden sizes of three models, compared with a one-hot matrix product and scatter-add."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_kernels import backends, segment_mean

from ..availability import compiler_why_not, sequence_backend_why_not
from ..compiling import compiled
from ..registry import Implementation, Operation, Shape, Tensors
from .memory_projection import MODELS

SEGMENT_TOKENS = 64


def segments(shape: Shape) -> int:
    """Return the number of segments in a sequence."""
    return -(-shape.tokens // SEGMENT_TOKENS)


def inputs(width: int, shape: Shape) -> Tensors:
    """Return x and the ids of consecutive messages, separated by tokens that belong to no message."""
    x = torch.randn(shape.batch, shape.tokens, width, generator=torch.Generator().manual_seed(6))
    token = torch.arange(shape.tokens)
    ids = torch.where(token % SEGMENT_TOKENS == SEGMENT_TOKENS - 1, -1, token // SEGMENT_TOKENS)
    ids = ids.expand(shape.batch, -1).contiguous()
    return {"x": x.to(shape.device, shape.dtype), "ids": ids.to(shape.device, torch.float64)}


def bytes_moved(width: int, shape: Shape) -> int:
    """Return the bytes of x and the ids, which are read, and of the means, which are written."""
    numbers = shape.batch * (shape.tokens + segments(shape)) * width
    return numbers * shape.dtype.itemsize + 8 * shape.batch * shape.tokens


def _ours(backend: str) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        return {"means": segment_mean(inputs["x"], inputs["ids"], segments(shape), backend=backend).means}

    return run


def _one_hot(x: Tensor, ids: Tensor, M: int) -> Tensor:
    hot = F.one_hot(torch.where(ids < 0, M, ids), M + 1)[..., :M].to(x.dtype)
    return hot.transpose(1, 2) @ x / hot.sum(1).clamp_min(1).unsqueeze(-1)


def _scatter(x: Tensor, ids: Tensor, M: int) -> Tensor:
    at = torch.where(ids < 0, M, ids)
    sums = x.new_zeros(x.shape[0], M + 1, x.shape[2]).scatter_add_(1, at.unsqueeze(-1).expand_as(x), x)
    counts = x.new_zeros(x.shape[0], M + 1).scatter_add_(1, at, torch.ones_like(at, dtype=x.dtype))
    return (sums / counts.clamp_min(1).unsqueeze(-1))[:, :M]


def _pytorch(function: Callable, compile_it: bool = False) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        means = compiled(function) if compile_it else function
        return {"means": means(inputs["x"], inputs["ids"], segments(shape))}

    return run


def _integer_ids(tensors: Tensors) -> Tensors:
    """Convert the ids back to integers, since the oracle receives all inputs as float64."""
    return {name: y.long() if name == "ids" else y for name, y in tensors.items()}


def _oracle(tensors: Tensors, shape: Shape) -> Tensors:
    return _ours("reference")(_integer_ids(tensors), shape)


IMPLEMENTATIONS = tuple(
    replace(implementation, prepare=_integer_ids)
    for implementation in (
        *(
            Implementation(f"ours ({name})", _ours(name), functools.partial(sequence_backend_why_not, name))
            for name in backends()
        ),
        Implementation("one-hot product", _pytorch(_one_hot)),
        Implementation("scatter-add", _pytorch(_scatter), note="atomics on a GPU: not reproducible"),
        Implementation("one-hot, compiled", _pytorch(_one_hot, compile_it=True), compiler_why_not, slow_start=True),
    )
)
OPERATIONS = tuple(
    Operation(
        name=f"segment_mean {model} forward",
        inputs=functools.partial(inputs, width),
        oracle=_oracle,
        bytes_moved=functools.partial(bytes_moved, width),
        implementations=IMPLEMENTATIONS,
        baseline="one-hot product",
    )
    for model, width in MODELS.items()
)
