"""`delta_update`: the delta rule over whole sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import choose
from ..backends.eager import eager
from ..operands import ScanCotangents, ScanOperands
from ..operands.checks import check_backend, requires_grad
from .differentiation import first_order, refuse_tangents
from .operators import arguments, check_fake, define, empty_like_needed, present, where_needed


class DeltaUpdateOutput(NamedTuple):
    """What `delta_update` returns."""

    reads: Tensor
    """`[B, T, H, R]` in q's dtype (`[B, T, R]` where q has no H): what the state held for each token's query."""
    final_state: Tensor
    """`[N, H, R, R]` (`[N, R, R]`), float32 or float64: the state after the last token. Row = value, column = key."""


def delta_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    mode: str = "standard",
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> DeltaUpdateOutput:
    """Apply the δ-mem delta rule (arXiv 2605.12357) to a batch of sequences. Each token first reads the state with its
    query, then updates the state with its key and value.

    Per token, with the state S (R x R) of its sequence and head::

        read = S q
        S   <- Diag(keep) S - Diag(erase) (S k) k^T + Diag(write) v k^T

    Args:
        q, k, v: `[B, T, H, R]`, or `[B, T, R]` for one head; then every result drops H. R from 1 to 128.
            float16, bfloat16, float32 or float64, in any mixture, any strides.
        beta: `[B, T, H, R]`, one per state row, or `[B, T, H]`, one per head.
        decay: λ, in either of beta's shapes; None means 1 - beta.
        mode: how keep, erase and write follow from β and λ: `"standard"` λ, β, β; `"lambda_outside"` (gated DeltaNet)
            λ, λβ, β; `"no_lambda"` (DeltaNet) 1, β, β, which takes no decay.
        initial_state: `[N, H, R, R]`, the state before the first token; None means zeros. Row = value, column = key.
        mask: `[B, T]` bool. A token that is False reads zeros and writes nothing.
        cu_seqlens: `[N + 1]` int32 or int64: N sequences packed in one row (B = 1). Sequence n holds the tokens from
            cu_seqlens[n] to cu_seqlens[n + 1]; empty sequences are allowed. Without it, N = B.
        backend: `"triton"`, `"cuda"`, `"cpu"` or `"reference"`. None means the environment variable DELTAMEM_BACKEND,
            or else the best that runs on q's device. See `backends()`.

    Returns:
        DeltaUpdateOutput: the reads and the final state. The arithmetic is float32, or float64 if an operand is
        float64.

    First-order gradients for any subset of the floating-point operands, through both results. A gradient computed with
    `create_graph=True` raises NotImplementedError when it is differentiated. Backward keeps the operands and one state
    for every 64 tokens. Results are bitwise deterministic and batch-invariant.

    Note: on the `cpu` and `cuda` backends, leading padding can change the last bits of a result; on `cuda`, trailing
    padding can too. On a GPU, long sequences of ranks up to 16 run in parallel chunks, others serially.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has run.
        NotImplementedError: an operand carries a tangent of forward-mode differentiation.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    operands = ScanOperands(q, k, v, beta, decay, None, initial_state, mask, cu_seqlens, mode)
    result = None if is_compiling() else eager.scan(operands, backend)
    if result:
        return DeltaUpdateOutput(*result)
    if result is None:
        operands.check()
        check_backend(backend)
        refuse_tangents("delta_update", operands)
    if q.ndim == 4:
        return run_scan(operands, backend)
    reads, final_state = run_scan(operands.with_heads(), backend)
    return DeltaUpdateOutput(reads.squeeze(2), final_state.squeeze(1))


def run_scan(operands: ScanOperands, backend: str | None = None) -> DeltaUpdateOutput:
    """Run the operator for operands that have been checked, mode "affine" included."""
    if requires_grad(operands):
        return DeltaUpdateOutput(*_Scan.apply(*operands, backend or ""))
    reads, final_state, _ = torch.ops.deltamem_kernels.delta_update(*operands, backend or "", False)
    return DeltaUpdateOutput(reads, final_state)


def _forward(*fields):
    *fields, backend, save = fields
    operands = ScanOperands(*fields)
    return tuple(choose(backend, operands.q.device).scan(operands, save))


def _backward(d_reads, d_final_state, *fields):
    *fields, checkpoints, backend, needs = fields
    operands = ScanOperands(*fields)
    cotangents = ScanCotangents(d_reads, d_final_state)
    return present(choose(backend, operands.q.device).scan_backward(operands, checkpoints, cotangents, needs))


def forward_fake(*fields):
    """Return empty results of the operator `delta_update`."""
    *fields, backend, save = fields
    operands = ScanOperands(*fields)
    q = operands.q
    check_fake(backend, q)
    H, R = q.shape[2:]
    return (
        q.new_empty(q.shape),
        q.new_empty((operands.num_sequences, H, R, R), dtype=operands.dtype),
        q.new_empty(operands.checkpoints_shape if save else (0,), dtype=operands.dtype),
    )


def _backward_fake(d_reads, d_final_state, *fields):
    *fields, _checkpoints, _backend, needs = fields
    return empty_like_needed(ScanOperands(*fields).differentiable, needs)


define(
    "delta_update",
    f"({arguments(ScanOperands)}, str backend, bool save) -> (Tensor reads, Tensor final_state, Tensor checkpoints)",
    _forward,
    forward_fake,
)
define(
    "delta_update_backward",
    f"(Tensor? d_reads, Tensor? d_final_state, {arguments(ScanOperands)}, Tensor checkpoints, str backend, "
    "bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *fields):
        *tensors, mode, backend = fields
        reads, final_state, checkpoints = torch.ops.deltamem_kernels.delta_update(*fields, True)
        ctx.save_for_backward(*tensors, checkpoints)
        ctx.mode, ctx.backend = mode, backend
        ctx.set_materialize_grads(False)
        return reads, final_state

    @staticmethod
    @first_order("delta_update")
    def backward(ctx, saved, d_reads, d_final_state):
        *tensors, checkpoints = saved
        needs = list(ctx.needs_input_grad[:7])
        grads = torch.ops.deltamem_kernels.delta_update_backward(
            d_reads, d_final_state, *tensors, ctx.mode, checkpoints, ctx.backend, needs
        )
        return *where_needed(grads, needs), *(None,) * 4
