"""attention_correction, and its form for queries with norm and rotary, at the widths of three models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltamem_kernels import attention_correction, attention_correction_norm_rope, backends

from ..registry import Implementation, Operation, Shape, Tensors
from .delta_update import _compiled_why_not, _ours_why_not

SCALE, EPS = 2.0, 1e-6


@dataclass(frozen=True)
class Projection:
    """What is corrected: D numbers a token, of heads where it is a query."""

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
        frequencies = 10000.0 ** -torch.linspace(0, 1, projection.head_dim // 2)
        angles = torch.arange(shape.tokens)[None, :, None] * torch.cat((frequencies, frequencies))
        tensors |= {"cos": angles.cos(), "sin": angles.sin()}
    if projection.norm:
        tensors["norm_weight"] = normal(projection.head_dim) + 1
    return {name: x.to(shape.device, shape.dtype) for name, x in tensors.items()}


def bytes_moved(projection: Projection, shape: Shape) -> int:
    """base, reads, weight, the tables and the norm's weight read once, the result written."""
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


def _calls(
    head_dim: int,
    base: Tensor,
    reads: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm_weight: Tensor | None = None,
) -> Tensor:
    """The best of what a layer would call: addmm, and what transformers does to a query."""
    rows = base.view(-1, base.shape[-1])
    y = torch.addmm(rows, reads.view(len(rows), -1), weight.t(), alpha=SCALE).view(base.shape)
    if not head_dim:
        return y
    y = y.unflatten(-1, (-1, head_dim))
    if norm_weight is not None:
        y = torch.nn.functional.rms_norm(y, (head_dim,), norm_weight, EPS)
    a, b = y.chunk(2, -1)
    return (y * cos.unsqueeze(-2) + torch.cat((-b, a), -1) * sin.unsqueeze(-2)).flatten(-2)


@functools.cache
def _compiled() -> Callable:
    return torch.compile(_calls, fullgraph=True, dynamic=False)


def _pytorch(projection: Projection, compiled: bool, inputs: Tensors, shape: Shape) -> Tensors:
    return {"out": (_compiled() if compiled else _calls)(projection.head_dim, **inputs)}


def _operation(projection: Projection) -> Operation:
    function = "attention_correction_norm_rope" if projection.head_dim else "attention_correction"
    ours = tuple(
        Implementation(
            f"ours ({name}){where}",
            functools.partial(_ours, projection, name, bool(where)),
            functools.partial(_ours_why_not, name),
        )
        for name in backends()
        for where in ("", " in place")
    )
    addmm = (
        Implementation("addmm", functools.partial(_addmm, False)),
        Implementation("addmm in place", functools.partial(_addmm, True)),
    )
    eager = Implementation("pytorch", functools.partial(_pytorch, projection, False), note="addmm, then small calls")
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
                _compiler_why_not,
                note="torch.compile of the same calls",
                slow_start=True,
            ),
        ),
        baseline="pytorch" if projection.head_dim else "addmm",
    )


def _compiler_why_not(shape: Shape) -> str | None:
    return _compiled_why_not(replace(shape, tokens=0))  # any length will do


OPERATIONS = tuple(_operation(projection) for projection in (*OUTPUTS, *QUERIES))
