"""memory_prefill and memory_decode at Qwen3-4B's sizes: the calls of an attention layer for a prompt and one token."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from deltamem_kernels import backends, memory_decode, memory_prefill

from ..availability import sequence_backend_why_not
from ..registry import Implementation, Operation, Shape, Tensors
from .attention_correction import QUERIES, SCALE
from .attention_correction import inputs as correction_inputs
from .memory_projection import MODELS, PARAMETERS, hidden_inputs, rows

MODEL = "Qwen3-4B"
QUERY = next(each for each in QUERIES if each.name == f"{MODEL} q")
Run = Callable[[Tensors, Shape], Tensors]


def decode_inputs(shape: Shape) -> Tensors:
    """Return one token for each of `batch` requests, a pool with one slot more, and the query to correct."""
    made = hidden_inputs(MODELS[MODEL], shape)
    generator = torch.Generator().manual_seed(6)
    state = torch.randn(shape.batch + 1, shape.heads, shape.rank, shape.rank, generator=generator)
    slots = torch.randperm(shape.batch + 1, generator=generator)[: shape.batch]
    made |= {"state": state.to(shape.device), "state_indices": slots.to(shape.device)}
    query = correction_inputs(QUERY, shape)
    wide = torch.promote_types(shape.dtype, torch.float32)
    made |= {"base": query["base"], "delta_weight": query["weight"].to(wide), "norm_weight": query["norm_weight"]}
    return made | {name: query[name] for name in ("cos", "sin")}


def _prefill(backend: str) -> Run:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        parameters = (inputs[name] for name in PARAMETERS)
        return memory_prefill(inputs["x"], *parameters, heads=shape.heads, mode=shape.mode, backend=backend)._asdict()

    return run


def _decode(backend: str) -> Run:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        options = {"heads": shape.heads, "mode": shape.mode, "scale": SCALE, "head_dim": QUERY.head_dim}
        slots = inputs["state_indices"].long()  # the oracle receives all inputs as float64
        return memory_decode(**inputs | {"state_indices": slots}, **options, backend=backend)._asdict()

    return run


def _narrow(inputs: Tensors) -> Tensors:
    """Convert the memory's weights to the dtype of x."""
    narrow = {name: inputs[name].to(inputs["x"].dtype) for name in (*PARAMETERS, "delta_weight") if name in inputs}
    return inputs | narrow


def _prefill_bytes(shape: Shape) -> int:
    """Return the bytes of x and the weights, which are read, and of the reads and the states, which are written."""
    tokens, width, size = shape.batch * shape.tokens, MODELS[MODEL], shape.heads * shape.rank
    wide = max(4, shape.dtype.itemsize)
    states = shape.batch * size * shape.rank
    return tokens * width * shape.dtype.itemsize + wide * (rows(shape) * width + tokens * size + states)


def _decode_bytes(shape: Shape) -> int:
    """Return the bytes of the prefill, the states read, and the query with its weight, tables and result."""
    wide, size = max(4, shape.dtype.itemsize), shape.heads * shape.rank
    query = (2 * shape.batch * QUERY.width + 2 * QUERY.head_dim) * shape.dtype.itemsize
    return _prefill_bytes(shape) + wide * size * (shape.batch * shape.rank + QUERY.width) + query


def _decode_why_not(why_not: Callable[[Shape], str | None], shape: Shape) -> str | None:
    return "one token for each request: --tokens 1" if shape.tokens != 1 else why_not(shape)


def _operation(name: str, inputs: Callable[[Shape], Tensors], ours: Callable[[str], Run], bytes_moved) -> Operation:
    implementations: tuple[Implementation, ...] = ()
    for backend in backends():
        why_not = functools.partial(sequence_backend_why_not, backend)
        if ours is _decode:
            why_not = functools.partial(_decode_why_not, why_not)
        implementations += (
            Implementation(f"ours ({backend})", ours(backend), why_not),
            Implementation(f"ours ({backend}), 16-bit weights", ours(backend), why_not, prepare=_narrow),
        )
    sizes = {"tokens": (1,), "batches": (1, 16, 256)} if ours is _decode else {}
    return Operation(name, inputs, ours("reference"), bytes_moved, implementations, "ours (reference)", **sizes)


OPERATIONS = (
    _operation(f"memory_prefill {MODEL}", functools.partial(hidden_inputs, MODELS[MODEL]), _prefill, _prefill_bytes),
    _operation(f"memory_decode {MODEL}", decode_inputs, _decode, _decode_bytes),
)
