"""A frozen attention layer without and with a memory, which shows what the memory costs.

The layers are those of three models. They have q, k, v and o projections without bias, rotary embeddings and causal
attention; Qwen3's also normalises each head of q and k. A single token attends to 512 others. The memory corrects q and
o. The correction weights are zero, as at the start of training: both layers then return the same output, which is
checked, and the memory costs as much as with trained weights. On a GPU a single token is timed in a CUDA graph and,
as "eager", called from Python. "compiled" is torch.compile of the whole layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

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

from ..availability import compiler_why_not, sequence_backend_why_not
from ..compiling import compiled
from ..inputs import rotary_tables
from ..registry import Implementation, Operation, Shape, Tensors
from .memory_projection import PARAMETERS, hidden_inputs

CACHED = 512
SCALE = 2.0
QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class Layer:
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    head_norm: bool = False
    large: bool = True


LAYERS = {
    "SmolLM2-135M": Layer(576, 9, 3, 64, large=False),
    "SmolLM3-3B": Layer(2048, 16, 4, 128),
    "Qwen3-4B": Layer(2560, 32, 8, 128, head_norm=True),
}


def inputs(layer: Layer, shape: Shape) -> Tensors:
    made = hidden_inputs(layer.width, shape)
    generator = torch.Generator().manual_seed(6)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    for name, rows in (("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads)):
        made[f"{name}_proj"] = normal(rows * layer.head_dim, layer.width) / math.sqrt(layer.width)
    made["o_proj"] = normal(layer.width, layer.heads * layer.head_dim) / math.sqrt(layer.width)
    memory = shape.heads * shape.rank
    made |= {
        "delta_q": torch.zeros(layer.heads * layer.head_dim, memory),
        "delta_o": torch.zeros(layer.width, memory),
    }
    if layer.head_norm:
        made |= {f"{name}_norm": 1 + normal(layer.head_dim) / 10 for name in ("q", "k")}
    first = CACHED if shape.tokens == 1 else 0
    made |= rotary_tables(layer.head_dim, first, shape.tokens)
    made |= {name: normal(shape.batch, layer.kv_heads, first, layer.head_dim) for name in ("keys", "values")}
    made["state"] = torch.zeros(shape.batch, shape.heads, shape.rank, shape.rank)
    return {name: x.to(shape.device, made["x"].dtype) for name, x in made.items()}


def _split_heads(y: Tensor, layer: Layer) -> Tensor:
    return y.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)


def _norm(y: Tensor, weight: Tensor | None) -> Tensor:
    return y if weight is None else F.rms_norm(y, y.shape[-1:], weight, 1e-6)


def _rotary(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embeddings to `[B, heads, T, head_dim]` in the same way as transformers."""
    a, b = y.chunk(2, -1)
    return y * cos.unsqueeze(1) + torch.cat((-b, a), -1) * sin.unsqueeze(1)


def _attention(layer: Layer, query: Tensor, inputs: Tensors) -> Tensor:
    """Compute the layer from the normalised and rotated query to the output of o_proj."""
    x, cos, sin = inputs["x"], inputs["cos"], inputs["sin"]
    key = _norm(_split_heads(F.linear(x, inputs["k_proj"]), layer), inputs.get("k_norm"))
    key = torch.cat((inputs["keys"], _rotary(key, cos, sin)), 2)
    value = torch.cat((inputs["values"], _split_heads(F.linear(x, inputs["v_proj"]), layer)), 2)
    return F.linear(_softmax_attention(query, key, value).transpose(1, 2).flatten(2), inputs["o_proj"])


def _softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute causal attention, in float64 in blocks of queries, since thousands at once would take gigabytes."""
    causal, T = query.shape[2] > 1, query.shape[2]
    if query.dtype != torch.float64 or T <= QUERIES_AT_ONCE:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    blocks = []
    for first in range(0, T, QUERIES_AT_ONCE):
        last = min(first + QUERIES_AT_ONCE, T)
        mask = torch.arange(last, device=query.device) <= torch.arange(first, last, device=query.device)[:, None]
        block = query[:, :, first:last], key[:, :, :last], value[:, :, :last]
        blocks.append(F.scaled_dot_product_attention(*block, attn_mask=mask, enable_gqa=True))
    return torch.cat(blocks, 2)


def _frozen(layer: Layer, inputs: Tensors, shape: Shape) -> Tensors:
    query = _norm(_split_heads(F.linear(inputs["x"], inputs["q_proj"]), layer), inputs.get("q_norm"))
    return {"out": _attention(layer, _rotary(query, inputs["cos"], inputs["sin"]), inputs)}


def _with_memory(backend: str, layer: Layer, inputs: Tensors, shape: Shape) -> Tensors:
    x, weights = inputs["x"], [inputs[name] for name in PARAMETERS]
    query = F.linear(x, inputs["q_proj"])
    options = {"heads": shape.heads, "backend": backend}
    head_norm = {"head_dim": layer.head_dim, "norm_weight": inputs.get("q_norm")}
    if x.shape[1] == 1:
        rotary = {name: inputs[name][:, 0] for name in ("cos", "sin")}
        base, delta = query[:, 0], inputs["delta_q"]
        reads, corrected = memory_decode(
            inputs["state"], x[:, 0], *weights, base=base, delta_weight=delta, scale=SCALE, out=base,
            **options, **head_norm, **rotary,
        )  # fmt: skip
        query, reads = corrected.unsqueeze(1), reads.unsqueeze(1)
    else:
        reads, _ = memory_prefill(x, *weights, **options)
        rotary = {"cos": inputs["cos"], "sin": inputs["sin"], "backend": backend}
        query = attention_correction_norm_rope(query, reads, inputs["delta_q"], SCALE, out=query, **head_norm, **rotary)
    out = _attention(layer, _split_heads(query, layer), inputs)
    return {"out": attention_correction(out, reads, inputs["delta_o"], SCALE, out=out, backend=backend)}


def bytes_moved(layer: Layer, shape: Shape) -> int:
    """Return the bytes of the frozen layer: x, the weights, the cached keys and values, and the output."""
    weights = 2 * (layer.heads + layer.kv_heads) * layer.head_dim * layer.width
    cached = 2 * shape.batch * layer.kv_heads * layer.head_dim * (CACHED if shape.tokens == 1 else 0)
    return (2 * shape.batch * shape.tokens * layer.width + weights + cached) * shape.dtype.itemsize


Run = Callable[[Tensors, Shape], Tensors]
WhyNot = Callable[[Shape], "str | None"]


def _compile_per_shape(run: Run) -> Run:
    @functools.cache
    def for_shape(shape: Shape) -> Callable[[Tensors], Tensors]:
        return compiled(lambda inputs: run(inputs, shape))

    return lambda inputs, shape: for_shape(shape)(inputs)


def _eager_why_not(why_not: WhyNot, shape: Shape) -> str | None:
    return why_not(shape) or (None if shape.device == "cuda" else "on a CPU every call is eager: needs --device cuda")


def _in_all_forms(name: str, run: Run, why_not: WhyNot, slow: bool) -> tuple[Implementation, ...]:
    """Return an implementation timed by default, called from Python, and compiled."""
    compiled_why_not = lambda shape: why_not(shape) or compiler_why_not(shape)  # noqa: E731
    return (
        Implementation(name, run, why_not, slow_start=slow),
        Implementation(f"{name}, eager", run, functools.partial(_eager_why_not, why_not), slow_start=slow, graph=False),
        Implementation(f"{name}, compiled", _compile_per_shape(run), compiled_why_not, slow_start=True),
    )


def _operation(model: str, layer: Layer) -> Operation:
    frozen = functools.partial(_frozen, layer)
    implementations = _in_all_forms("frozen", frozen, lambda shape: None, layer.large)
    for name in backends():
        run = functools.partial(_with_memory, name, layer)
        why_not = functools.partial(sequence_backend_why_not, name)
        implementations += _in_all_forms(f"with memory ({name})", run, why_not, layer.large)
    return Operation(
        name=f"layer {model}",
        inputs=functools.partial(inputs, layer),
        oracle=frozen,
        bytes_moved=functools.partial(bytes_moved, layer),
        implementations=implementations,
        baseline="frozen",
    )


OPERATIONS = tuple(_operation(model, layer) for model, layer in LAYERS.items())
