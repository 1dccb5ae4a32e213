"""segment_mean at the hidden sizes of three models: ours, a product with a one-hot matrix, and scatter-add."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_kernels import backends, segment_mean

from ..registry import Implementation, Operation, Shape, Tensors
from .delta_update import _ours_why_not
from .memory_projection import MODELS, _compiled_reason

TOKENS_A_SEGMENT = 64


def segments(shape: Shape) -> int:
    return -(-shape.tokens // TOKENS_A_SEGMENT)


def inputs(width: int, shape: Shape) -> Tensors:
    """Messages one after another, as a dialogue has them, with a token between them that belongs to none."""
    x = torch.randn(shape.batch, shape.tokens, width, generator=torch.Generator().manual_seed(6))
    token = torch.arange(shape.tokens)
    ids = torch.where(token % TOKENS_A_SEGMENT == TOKENS_A_SEGMENT - 1, -1, token // TOKENS_A_SEGMENT)
    ids = ids.expand(shape.batch, -1).contiguous()
    return {"x": x.to(shape.device, shape.dtype), "ids": ids.to(shape.device, torch.float64)}


def bytes_moved(width: int, shape: Shape) -> int:
    """x and the ids read, the means written."""
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


@functools.cache
def _compiled() -> Callable:
    torch._dynamo.config.recompile_limit = 64  # one for each model, number of tokens and kind of gradient
    return torch.compile(_one_hot, fullgraph=True, dynamic=False)


def _with(function: Callable[[], Callable]) -> Callable[[Tensors, Shape], Tensors]:
    return lambda inputs, shape: {"means": function()(inputs["x"], inputs["ids"], segments(shape))}


def _ids(tensors: Tensors) -> Tensors:
    """Inputs reach the oracle as float64; ids are integers."""
    return {name: y.long() if name == "ids" else y for name, y in tensors.items()}


def _oracle(tensors: Tensors, shape: Shape) -> Tensors:
    return _ours("reference")(_ids(tensors), shape)


IMPLEMENTATIONS = (
    *(
        Implementation(f"ours ({name})", _ours(name), functools.partial(_ours_why_not, name), prepare=_ids)
        for name in backends()
    ),
    Implementation("one-hot product", _with(lambda: _one_hot), prepare=_ids),
    Implementation("scatter-add", _with(lambda: _scatter), prepare=_ids, note="atomics on a GPU: not reproducible"),
    Implementation("one-hot, compiled", _with(_compiled), _compiled_reason, slow_start=True, prepare=_ids),
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
