"""memory_projection at the hidden sizes of three models: ours, and the best that PyTorch makes of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_kernels import backends, memory_projection

from ..registry import Implementation, Operation, Shape, Tensors, with_gradients
from .delta_update import _compiled_why_not, _ours_why_not

MODELS = {"SmolLM2-135M": 576, "SmolLM3-3B": 2048, "Qwen3-4B": 2560}
PARAMETERS = ("qkv_weight", "beta_weight", "beta_bias")
RESULTS = ("q", "k", "v", "beta")


def rows(shape: Shape) -> int:
    """Of all weights."""
    return 3 * shape.heads * shape.rank + (shape.heads * shape.rank if shape.gates == "row" else shape.heads)


def hidden_inputs(width: int, shape: Shape, seed: int = 4) -> Tensors:
    """x in the shape's dtype; the weights are float32 (float64 for float64), as a memory's are beside its model."""
    generator = torch.Generator().manual_seed(seed)
    made = {"x": torch.randn(shape.batch, shape.tokens, width, generator=generator).to(shape.dtype)}
    numbers = 3 * shape.heads * shape.rank
    dtype = torch.promote_types(shape.dtype, torch.float32)
    for name, count in (("qkv_weight", numbers), ("beta_weight", rows(shape) - numbers)):
        weight = torch.randn(count, width, generator=generator) / math.sqrt(width)
        made[name] = weight.to(dtype)
    made["beta_bias"] = torch.full((rows(shape) - numbers,), -1.5, dtype=dtype)
    return {name: y.to(shape.device) for name, y in made.items()}


def training_inputs(width: int, shape: Shape) -> Tensors:
    made = hidden_inputs(width, shape)
    generator = torch.Generator().manual_seed(5)
    sizes = (shape.batch, shape.tokens, shape.heads, shape.rank)
    for name in RESULTS:
        size = sizes[:3] if name == "beta" and shape.gates == "head" else sizes
        made[f"d_{name}"] = torch.randn(size, generator=generator).to(shape.device, made["beta_bias"].dtype)
    return made


def forward_bytes(width: int, shape: Shape) -> int:
    """x and the weights read, the results written."""
    tokens, wide = shape.batch * shape.tokens, max(4, shape.dtype.itemsize)
    return tokens * width * shape.dtype.itemsize + rows(shape) * width * wide + tokens * rows(shape) * wide


def training_bytes(width: int, shape: Shape) -> int:
    """Besides, x read again for the weights' gradients, their gradients written, the results' read; x is frozen."""
    return 2 * forward_bytes(width, shape)


def _ours(backend: str) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        operands = (inputs["x"], *(inputs[name] for name in PARAMETERS))
        p = memory_projection(*operands, heads=shape.heads, backend=backend)
        return {name: getattr(p, name) for name in RESULTS}

    return run


def _plain(x: Tensor, qkv_weight: Tensor, beta_weight: Tensor, beta_bias: Tensor, heads: int) -> tuple[Tensor, ...]:
    """One product of x with all weights, in x's dtype as a layer computes it, the rest in float32."""
    width = qkv_weight.shape[0]
    projected = F.linear(x, torch.cat([qkv_weight, beta_weight]).to(x.dtype)).to(qkv_weight.dtype)
    q, k, v = projected[..., :width].unflatten(-1, (3, heads, -1)).unbind(-3)
    q, k = (F.normalize(torch.tanh(y), dim=-1, eps=1e-6) for y in (q, k))
    beta = torch.sigmoid(projected[..., width:] + beta_bias)
    return q, k, v, beta if beta.shape[-1] == heads and v.shape[-1] > 1 else beta.unflatten(-1, (heads, -1))


@functools.cache
def _compiled() -> Callable:
    torch._dynamo.config.recompile_limit = 64  # one for each model, number of tokens and kind of gradient
    return torch.compile(_plain, fullgraph=True, dynamic=False)


def _with(function: Callable[[], Callable]) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        results = function()(inputs["x"], *(inputs[name] for name in PARAMETERS), shape.heads)
        return dict(zip(RESULTS, results, strict=True))

    return run


def _compiled_reason(shape: Shape) -> str | None:
    return _compiled_why_not(Shape(0, device=shape.device))  # of any number of tokens


IMPLEMENTATIONS = (
    *(Implementation(f"ours ({name})", _ours(name), functools.partial(_ours_why_not, name)) for name in backends()),
    Implementation("torch", _with(lambda: _plain)),
    Implementation("torch-compiled", _with(_compiled), _compiled_reason, slow_start=True),
)


def _operations(model: str, width: int) -> tuple[Operation, Operation]:
    forward = Operation(
        name=f"memory_projection {model} forward",
        inputs=functools.partial(hidden_inputs, width),
        oracle=_ours("reference"),
        bytes_moved=functools.partial(forward_bytes, width),
        implementations=IMPLEMENTATIONS,
        baseline="torch",
    )
    training = Operation(
        name=f"memory_projection {model} forward+backward",
        inputs=functools.partial(training_inputs, width),
        oracle=with_gradients(_ours("reference"), PARAMETERS),
        bytes_moved=functools.partial(training_bytes, width),
        implementations=tuple(
            Implementation(each.name, with_gradients(each.run, PARAMETERS), each.why_not, slow_start=each.slow_start)
            for each in IMPLEMENTATIONS
        ),
        baseline="torch",
        gradients_of=PARAMETERS,
    )
    return forward, training


OPERATIONS = tuple(operation for model, width in MODELS.items() for operation in _operations(model, width))
