"""memory_projection at the hidden sizes of three models, compared with PyTorch, eager and compiled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_kernels import backends, memory_projection

from ..availability import compiler_why_not, sequence_backend_why_not
from ..compiling import compiled
from ..registry import Implementation, Operation, Shape, Tensors, with_gradients

MODELS = {"SmolLM2-135M": 576, "SmolLM3-3B": 2048, "Qwen3-4B": 2560}
PARAMETERS = ("qkv_weight", "beta_weight", "beta_bias")
RESULTS = ("q", "k", "v", "beta")


def rows(shape: Shape) -> int:
    """Return the number of rows of all weights together."""
    return 3 * shape.heads * shape.rank + (shape.heads * shape.rank if shape.gates == "row" else shape.heads)


def hidden_inputs(width: int, shape: Shape, seed: int = 4) -> Tensors:
    """Return x in the shape's dtype, and weights in float32 (float64 if the dtype is float64)."""
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
    """Return the bytes of x and the weights, which are read, and of the results, which are written."""
    tokens, wide = shape.batch * shape.tokens, max(4, shape.dtype.itemsize)
    return tokens * width * shape.dtype.itemsize + rows(shape) * width * wide + tokens * rows(shape) * wide


def training_bytes(width: int, shape: Shape) -> int:
    """Return the bytes of the forward, of x and the results' gradients read again, and of the weights' gradients.

    x requires no gradient.
    """
    return 2 * forward_bytes(width, shape)


def _ours(backend: str) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        operands = (inputs["x"], *(inputs[name] for name in PARAMETERS))
        p = memory_projection(*operands, heads=shape.heads, backend=backend)
        return {name: getattr(p, name) for name in RESULTS}

    return run


def _plain(x: Tensor, qkv_weight: Tensor, beta_weight: Tensor, beta_bias: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Multiply x with all weights in one product, in x's dtype, and compute the rest in float32."""
    width = qkv_weight.shape[0]
    projected = F.linear(x, torch.cat([qkv_weight, beta_weight]).to(x.dtype)).to(qkv_weight.dtype)
    q, k, v = projected[..., :width].unflatten(-1, (3, heads, -1)).unbind(-3)
    q, k = (F.normalize(torch.tanh(y), dim=-1, eps=1e-6) for y in (q, k))
    beta = torch.sigmoid(projected[..., width:] + beta_bias)
    return q, k, v, beta if beta.shape[-1] == heads and v.shape[-1] > 1 else beta.unflatten(-1, (heads, -1))


def _pytorch(compile_it: bool) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        function = compiled(_plain) if compile_it else _plain
        results = function(inputs["x"], *(inputs[name] for name in PARAMETERS), shape.heads)
        return dict(zip(RESULTS, results, strict=True))

    return run


IMPLEMENTATIONS = (
    *(
        Implementation(f"ours ({name})", _ours(name), functools.partial(sequence_backend_why_not, name))
        for name in backends()
    ),
    Implementation("torch", _pytorch(compile_it=False)),
    Implementation("torch-compiled", _pytorch(compile_it=True), compiler_why_not, slow_start=True),
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
