"""`memory_decode`: one decoding step of a layer's memory, from hidden states to the corrected query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import choose
from ..backends.eager import eager
from ..operands import DecodeOperands, QkvWeight
from ..operands.checks import check_backend, fail
from ..operands.correction import split_scale
from ..operands.projection import qkv_parts
from .differentiation import refuse_tangents
from .operators import arguments, check_fake, define, mark_written


class MemoryDecode(NamedTuple):
    """What `memory_decode` returns."""

    reads: Tensor
    """`[N, H, R]`, or `[N, 1, H, R]`; float32, or float64 where an operand of the projection is."""
    corrected: Tensor | None
    """The corrected base, in its shape; `out` if it was given; None without a base."""


def memory_decode(
    state: Tensor,
    x: Tensor,
    qkv_weight: QkvWeight,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None = None,
    decay_bias: Tensor | None = None,
    *,
    heads: int = 1,
    normalize: bool = True,
    mode: str = "standard",
    state_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    base: Tensor | None = None,
    delta_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    head_dim: int | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> MemoryDecode:
    """Decode one token for each of many requests: everything that an attention layer does with δ-mem's memory
    (arXiv 2605.12357) before attention. This is `memory_projection`, `delta_step` on the pool in place and, if `base`
    is given, the corrected query, by `attention_correction` or, with head_dim, `attention_correction_norm_rope`. The
    output's correction follows attention, from the reads. There is no gradient.

    On a CPU this is one call into C++, on a GPU with Triton two launches, or one without base. The call must at least
    read the weights, once for all rows of a small batch: at D = 576, R = 8 in float32 74 KB, 18 KB more for the
    query's, and 0.5 KB per row for its state, read and written.

    Args:
        state: the pool, `[slots, H, R, R]`, updated in place; dtypes and strides as in `delta_step`.
        x: hidden states, `[N, D]`, or `[N, 1, D]` as a layer has them. Then base, cos, sin, out and the results have
            that dimension too.
        qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize: as in `memory_projection`.
        mode: as in `delta_update`. There is no decay_weight in "no_lambda".
        state_indices: `[N]` int32 or int64, the slot of each row, no two the same; None means slot n for row n.
        pad_slot_id: a row whose slot is this reads zeros and touches no state; its base is corrected by zeros.
        base: `[N, Dq]`, the output of the query's projection, or of another projection; None corrects nothing.
        delta_weight: `[Dq, H·R]`, given with base.
        scale, norm_weight, norm_eps: as in `attention_correction`.
        head_dim, cos, sin: as in `attention_correction_norm_rope`, where norm_weight is `[head_dim]`. head_dim=None
            means no heads: there are no cos and sin, and norm_weight is `[Dq]`.
        out: gets the corrected base, of base's shape and dtype; `out=base` corrects in place. None allocates.
        backend: as in `delta_update`.

    Returns:
        MemoryDecode: reads and corrected. On `cpu` and `triton` the bits of a row do not depend on the other rows.
        Where PyTorch's matrix product runs, the last bit may depend on their number.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has run. On a CPU this includes a slot outside of the
            pool. The kernels of `triton` and `cuda` do not raise for it: such a row is padding.
        NotImplementedError: an operand carries a tangent of forward-mode differentiation.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    if base is None and out is not None:
        fail(ValueError, "out", "None without a base to correct", out)
    gain, factor = split_scale(scale)
    operands = DecodeOperands(
        state, x, qkv_parts(qkv_weight), beta_weight, beta_bias, decay_weight, decay_bias, state_indices,
        None if out is base else base, delta_weight, gain, norm_weight, cos, sin, out, heads, normalize, mode,
        pad_slot_id, factor, norm_eps, 0 if head_dim is None else head_dim,
    )  # fmt: skip
    results = None
    is_zero = isinstance(head_dim, int) and head_dim == 0  # an error here, and to the fast path no heads
    if not is_zero and not is_compiling():
        results = eager.decode(operands, backend)
    if results is None:
        operands.check(heads=head_dim is not None)
        check_backend(backend)
        refuse_tangents("memory_decode", operands, "it has no gradient; use memory_prefill for training")
    if not results:
        results = torch.ops.deltamem_kernels.memory_decode(*operands, backend or "")
    reads, corrected = results
    return MemoryDecode(reads, None if base is None else corrected if out is None else out)


def _decode(*fields):
    *fields, backend = fields
    operands = DecodeOperands(*fields)
    results = choose(backend, operands.x.device).decode(operands)
    mark_written(*operands.written)
    return tuple(results)


def _decode_fake(*fields):
    *fields, backend = fields
    operands = DecodeOperands(*fields)
    x, base = operands.x, operands.base
    check_fake(backend, x)
    projection = operands.projection
    reads = x.new_empty((*x.shape[:-1], projection.heads, projection.rank), dtype=projection.dtype)
    return reads, x.new_empty((0,)) if base is None or operands.out is not None else base.new_empty(base.shape)


# `corrected` is empty where out holds the result, or where nothing is corrected.
define(
    "memory_decode",
    f"({arguments(DecodeOperands)}, str backend) -> (Tensor reads, Tensor corrected)",
    _decode,
    _decode_fake,
)
