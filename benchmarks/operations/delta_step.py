"""delta_step: one token (T = 1) or a few drafted tokens for each of many requests, on a pool of states.

A shape's `batch` is the number of requests, and `tokens` is the number of tokens of each request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from deltamem_kernels import backends, delta_step

from ..availability import backend_why_not
from ..compiling import compiled
from ..inputs import memory_operands
from ..registry import Implementation, Operation, Shape, Tensors

SPARE_SLOTS = 3


def inputs(shape: Shape) -> Tensors:
    """Return operands, and a pool with a slot for each token, in random order, and SPARE_SLOTS unused slots."""
    operands = memory_operands(shape)
    generator = torch.Generator().manual_seed(5)
    slots = shape.batch * shape.tokens + SPARE_SLOTS
    state = torch.randn(slots, shape.heads, shape.rank, shape.rank, generator=generator)
    indices = torch.randperm(slots, generator=generator)[: shape.batch * shape.tokens].view(shape.batch, shape.tokens)
    operands |= {"state": state, "indices": indices}
    operands["out"] = torch.empty_like(operands["q"])
    return {name: x.to(shape.device) for name, x in operands.items()}


def bytes_moved(shape: Shape) -> int:
    """Return the bytes of one state read and one written per token for each request, and of all operands and reads."""
    numbers = 4 * shape.rank + (shape.rank if shape.gates == "row" else 1)
    states = 4 * shape.rank**2 * (1 + shape.tokens)
    return shape.batch * shape.heads * (states + shape.tokens * numbers * shape.dtype.itemsize)


def _prepare(inputs: Tensors) -> Tensors:
    """Drop the token dimension if each request has one token, as a server does."""
    if inputs["q"].shape[1] > 1:
        return inputs
    return {name: x if name == "state" else x[:, 0].contiguous() for name, x in inputs.items()}


def _ours(backend: str) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        state, out, indices, *operands = (inputs[x] for x in ("state", "out", "indices", "q", "k", "v", "beta"))
        reads = delta_step(state, *operands, mode=shape.mode, state_indices=indices, out=out, backend=backend)
        return {"reads": reads}

    return run


def _present(outputs: Tensors) -> Tensors:
    reads = outputs["reads"]
    return {"reads": reads if reads.ndim == 4 else reads.unsqueeze(1)}


def _step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, indices: Tensor, mode: str) -> Tensor:
    """Compute all requests at once, token after token, in PyTorch. States are gathered and scattered by slot."""
    S = state[indices[:, 0]]
    reads = []
    for t in range(q.shape[1]):
        b = beta[:, t] if beta.ndim == 4 else beta[:, t].unsqueeze(-1)
        keep = torch.ones_like(b) if mode == "no_lambda" else 1 - b
        erase = keep * b if mode == "lambda_outside" else b
        reads.append((S @ q[:, t].unsqueeze(-1)).squeeze(-1))
        change = b * v[:, t] - erase * (S @ k[:, t].unsqueeze(-1)).squeeze(-1)
        S = keep.unsqueeze(-1) * S + change.unsqueeze(-1) * k[:, t].unsqueeze(-2)
        state.index_copy_(0, indices[:, t], S)
    return torch.stack(reads, dim=1)


def _pytorch(compile_it: bool) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        step = compiled(_step) if compile_it else _step
        operands = (inputs[name].to(inputs["state"].dtype) for name in ("q", "k", "v", "beta"))
        reads = step(inputs["state"], *operands, inputs["indices"].long(), shape.mode)
        return {"reads": reads.to(shape.dtype)}

    return run


OPERATIONS = (
    Operation(
        name="delta_step",
        inputs=inputs,
        oracle=_pytorch(compile_it=False),
        bytes_moved=bytes_moved,
        implementations=(
            *(
                Implementation(
                    f"ours ({name})",
                    _ours(name),
                    functools.partial(backend_why_not, name),
                    prepare=_prepare,
                    present=_present,
                )
                for name in backends()
            ),
            Implementation(
                "pytorch", _pytorch(compile_it=False), note="batched products, states gathered and scattered"
            ),
            Implementation(
                "pytorch-compiled", _pytorch(compile_it=True), note="the same with torch.compile", slow_start=True
            ),
        ),
        baseline="pytorch",
        tokens=(1, 4),
        batches=(1, 16, 256, 4096),
    ),
)
