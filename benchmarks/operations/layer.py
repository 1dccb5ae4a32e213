"""A frozen attention layer, and the same with the memory around it: what the memory costs a layer.

The layer is that of SmolLM2-135M: q, k, v and o projections without bias, rotary embedding, causal attention of 9 heads
on 3; a token alone attends to 512 others. The memory corrects q and o. The corrections' weights are zeros, as at the
start of training: both layers then give the same, which is checked, and the memory costs what it always does.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_kernels import (
    attention_correction,
    attention_correction_norm_rope,
    backends,
    memory_decode,
    memory_prefill,
)

from ..registry import Implementation, Operation, Shape, Tensors
from .delta_update import _ours_why_not
from .memory_projection import PARAMETERS, hidden_inputs

WIDTH, HEADS, KV_HEADS, HEAD_DIM, CACHED = 576, 9, 3, 64, 512
SCALE = 2.0


def inputs(shape: Shape) -> Tensors:
    made = hidden_inputs(WIDTH, shape)
    generator = torch.Generator().manual_seed(6)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        made[f"{name}_proj"] = normal(rows * HEAD_DIM, WIDTH) / math.sqrt(WIDTH)
    made["o_proj"] = normal(WIDTH, HEADS * HEAD_DIM) / math.sqrt(WIDTH)
    memory = shape.heads * shape.rank
    made |= {"delta_q": torch.zeros(HEADS * HEAD_DIM, memory), "delta_o": torch.zeros(WIDTH, memory)}
    first = CACHED if shape.tokens == 1 else 0
    frequencies = 10000.0 ** -torch.linspace(0, 1, HEAD_DIM // 2)
    angles = torch.arange(first, first + shape.tokens)[None, :, None] * torch.cat((frequencies, frequencies))
    made |= {"cos": angles.cos(), "sin": angles.sin()}
    made |= {name: normal(shape.batch, KV_HEADS, first, HEAD_DIM) for name in ("keys", "values")}
    made["state"] = torch.zeros(shape.batch, shape.heads, shape.rank, shape.rank)
    return {name: x.to(shape.device, made["x"].dtype) for name, x in made.items()}


def _heads(y: Tensor) -> Tensor:
    return y.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def _rotary(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers has it, on `[B, heads, T, head_dim]`."""
    a, b = y.chunk(2, -1)
    return y * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)


def _attention(query: Tensor, inputs: Tensors) -> Tensor:
    """From the query with its rotary to the output of o_proj."""
    x, cos, sin = inputs["x"], inputs["cos"], inputs["sin"]
    key = _rotary(_heads(F.linear(x, inputs["k_proj"])), cos, sin)
    key = torch.cat((inputs["keys"], key), 2)
    value = torch.cat((inputs["values"], _heads(F.linear(x, inputs["v_proj"]))), 2)
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=x.shape[1] > 1, enable_gqa=True)
    return F.linear(attended.transpose(1, 2).flatten(2), inputs["o_proj"])


def _frozen(inputs: Tensors, shape: Shape) -> Tensors:
    query = _rotary(_heads(F.linear(inputs["x"], inputs["q_proj"])), inputs["cos"], inputs["sin"])
    return {"out": _attention(query, inputs)}


def _with_memory(backend: str, inputs: Tensors, shape: Shape) -> Tensors:
    x, weights = inputs["x"], [inputs[name] for name in PARAMETERS]
    query = F.linear(x, inputs["q_proj"])
    options = {"heads": shape.heads, "backend": backend}
    rotary = {"head_dim": HEAD_DIM, "cos": inputs["cos"], "sin": inputs["sin"], "backend": backend}
    if x.shape[1] == 1:
        of_row = {name: inputs[name][:, 0] for name in ("cos", "sin")}
        base, delta = query[:, 0], inputs["delta_q"]
        reads, corrected = memory_decode(
            inputs["state"], x[:, 0], *weights, base=base, delta_weight=delta, scale=SCALE, out=base,
            **options | {"head_dim": HEAD_DIM} | of_row,
        )  # fmt: skip
        query, reads = corrected.unsqueeze(1), reads.unsqueeze(1)
    else:
        reads, _ = memory_prefill(x, *weights, **options)
        query = attention_correction_norm_rope(query, reads, inputs["delta_q"], SCALE, out=query, **rotary)
    out = _attention(_heads(query), inputs)
    return {"out": attention_correction(out, reads, inputs["delta_o"], SCALE, out=out, backend=backend)}


def bytes_moved(shape: Shape) -> int:
    """The layer's own: x read, the weights and the cached keys and values read, the output written."""
    weights = 2 * (HEADS + KV_HEADS) * HEAD_DIM * WIDTH
    cached = 2 * shape.batch * KV_HEADS * HEAD_DIM * (CACHED if shape.tokens == 1 else 0)
    return (2 * shape.batch * shape.tokens * WIDTH + weights + cached) * shape.dtype.itemsize


OPERATIONS = (
    Operation(
        name="layer SmolLM2-135M",
        inputs=inputs,
        oracle=_frozen,
        bytes_moved=bytes_moved,
        implementations=(
            Implementation("frozen", _frozen),
            *(
                Implementation(
                    f"with memory ({name})",
                    functools.partial(_with_memory, name),
                    functools.partial(_ours_why_not, name),
                )
                for name in backends()
            ),
        ),
        baseline="frozen",
    ),
)
