"""attention_correction and attention_correction_norm_rope at the widths of three models."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from deltamem_kernels import attention_correction, attention_correction_norm_rope, backends

from ..availability import compiler_why_not, sequence_backend_why_not
from ..compiling import compiled
from ..inputs import rotary_tables
from ..registry import Implementation, Operation, Shape, Tensors

SCALE, EPS = 2.0, 1e-6


@dataclass(frozen=True)
class Projection:
    """The projection whose output is corrected. Queries have a head_dim and are also rotated (and normalised)."""

    name: str
    width: int
    head_dim: int = 0
    norm: bool = False


OUTPUTS = (
    Projection("SmolLM2-135M q and o", 576),
    Projection("SmolLM3-3B q and o", 2048),
    Projection("Qwen3-4B q", 4096),
    Projection("Qwen3-4B o", 2560),
)
QUERIES = (
    Projection("SmolLM2-135M q", 576, 64),
    Projection("SmolLM3-3B q", 2048, 128),
    Projection("Qwen3-4B q", 4096, 128, norm=True),
)


def inputs(projection: Projection, shape: Shape) -> Tensors:
    generator = torch.Generator().manual_seed(4)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    rows, width = (shape.batch, shape.tokens), projection.width
    tensors = {
        "base": normal(*rows, width),
        "reads": normal(*rows, shape.heads, shape.rank),
        "weight": normal(width, shape.heads * shape.rank) / width**0.5,
    }
    if projection.head_dim:
        tensors |= rotary_tables(projection.head_dim, 0, shape.tokens)
    if projection.norm:
        tensors["norm_weight"] = normal(projection.head_dim) + 1
    return {name: x.to(shape.device, shape.dtype) for name, x in tensors.items()}


def bytes_moved(projection: Projection, shape: Shape) -> int:
    """Return the bytes of base, reads, weight, tables and norm weight, each read once, and of the written result."""
    tokens, K = shape.batch * shape.tokens, shape.heads * shape.rank
    numbers = 2 * tokens * projection.width + tokens * K + projection.width * K
    numbers += 2 * shape.tokens * projection.head_dim + (projection.head_dim if projection.norm else 0)
    return numbers * shape.dtype.itemsize


def _ours(projection: Projection, backend: str, in_place: bool, inputs: Tensors, shape: Shape) -> Tensors:
    out = inputs["base"] if in_place else None
    if not projection.head_dim:
        return {"out": attention_correction(**inputs, scale=SCALE, out=out, backend=backend)}
    options = {"head_dim": projection.head_dim, "norm_eps": EPS, "out": out, "backend": backend}
    return {"out": attention_correction_norm_rope(**inputs, scale=SCALE, **options)}


def _addmm(in_place: bool, inputs: Tensors, shape: Shape) -> Tensors:
    base, reads, weight = inputs["base"], inputs["reads"], inputs["weight"]
    rows = base.view(-1, base.shape[-1])
    out = rows if in_place else None
    return {"out": torch.addmm(rows, reads.view(len(rows), -1), weight.t(), alpha=SCALE, out=out).view(base.shape)}


def _separate_calls(
    head_dim: int,
    base: Tensor,
    reads: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm_weight: Tensor | None = None,
) -> Tensor:
    """Compute the correction with the calls of a PyTorch layer: addmm, then transformers' norm and rotary embedding."""
    rows = base.view(-1, base.shape[-1])
    y = torch.addmm(rows, reads.view(len(rows), -1), weight.t(), alpha=SCALE).view(base.shape)
    if not head_dim:
        return y
    y = y.unflatten(-1, (-1, head_dim))
    if norm_weight is not None:
        y = torch.nn.functional.rms_norm(y, (head_dim,), norm_weight, EPS)
    a, b = y.chunk(2, -1)
    return (y * cos.unsqueeze(-2) + torch.cat((-b, a), -1) * sin.unsqueeze(-2)).flatten(-2)


def _pytorch(projection: Projection, compile_it: bool, inputs: Tensors, shape: Shape) -> Tensors:
    function = compiled(_separate_calls) if compile_it else _separate_calls
    return {"out": function(projection.head_dim, **inputs)}


def _operation(projection: Projection) -> Operation:
    function = "attention_correction_norm_rope" if projection.head_dim else "attention_correction"
    ours = tuple(
        Implementation(
            f"ours ({name}){where}",
            functools.partial(_ours, projection, name, bool(where)),
            functools.partial(sequence_backend_why_not, name),
        )
        for name in backends()
        for where in ("", " in place")
    )
    addmm = (
        Implementation("addmm", functools.partial(_addmm, False)),
        Implementation("addmm in place", functools.partial(_addmm, True)),
    )
    eager = Implementation(
        "pytorch", functools.partial(_pytorch, projection, False), note="addmm, then elementwise calls"
    )
    return Operation(
        name=f"{function} {projection.name}",
        inputs=functools.partial(inputs, projection),
        oracle=functools.partial(_ours, projection, "reference", False),
        bytes_moved=functools.partial(bytes_moved, projection),
        implementations=(
            *ours,
            *((eager,) if projection.head_dim else addmm),
            Implementation(
                "pytorch-compiled",
                functools.partial(_pytorch, projection, True),
                compiler_why_not,
                note="torch.compile of the same calls",
                slow_start=True,
            ),
        ),
        baseline="pytorch" if projection.head_dim else "addmm",
    )


OPERATIONS = tuple(_operation(projection) for projection in (*OUTPUTS, *QUERIES))
