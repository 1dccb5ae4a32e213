"""`delta_update`: reads and writes of the delta rule over whole sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from ..backends.reference import CHECKPOINT_INTERVAL, accumulation_dtype
from ._checks import (
    MAX_RANK,
    check_backend,
    check_cu_seqlens,
    check_device,
    check_float,
    check_mask,
    check_mode,
    check_shape,
    fail,
)
from ._library import define, library


class DeltaUpdateOutput(NamedTuple):
    """What `delta_update` returns."""

    reads: Tensor
    """`[B, T, H, R]` in q's dtype (`[B, T, R]` where q has no H): what the state held for each token's query."""
    final_state: Tensor
    """`[N, H, R, R]` (`[N, R, R]`), float32 or float64: the state behind the last token. Row = value, column = key."""


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
    """Runs the memory of δ-mem (arXiv 2605.12357) over sequences: every token reads the state, then rewrites it.

    Per token, with the state S (R x R) of its sequence and head::

        read = S q
        S   <- Diag(keep) S - Diag(erase) (S k) k^T + Diag(write) v k^T

    Args:
        q, k, v: `[B, T, H, R]`, or `[B, T, R]` for one head, whose results then have no H either. R from 1 to 128.
            float16, bfloat16, float32 or float64, mixed as you like, any strides.
        beta: `[B, T, H, R]`, one for each state row, or `[B, T, H]`, one for each head.
        decay: λ, in either of beta's shapes; None means 1 - beta.
        mode: how keep, erase and write come from β and λ: `"standard"` λ, β, β; `"lambda_outside"` (gated DeltaNet)
            λ, λβ, β; `"no_lambda"` (DeltaNet) 1, β, β, which takes no decay.
        initial_state: `[N, H, R, R]`, the state before the first token; None means zeros. Row = value, column = key.
        mask: `[B, T]` bool. A token that is False reads zeros and writes nothing.
        cu_seqlens: `[N + 1]` int32 or int64: N sequences packed in one row (B = 1), sequence n being the tokens from
            cu_seqlens[n] to cu_seqlens[n + 1]; empty ones are allowed. Without it, N = B.
        backend: `"triton"`, `"cuda"`, `"cpu"` or `"reference"`, exactly that; None takes DELTAMEM_BACKEND, or else
            the best that runs on q's device. See `backends()`.

    Returns:
        DeltaUpdateOutput: reads, and the final state. The arithmetic is float32, float64 where an operand is float64.
        Differentiable once in every floating operand, through both results. The same bits on every run, whatever
        else is in the batch. Backward keeps the operands and one state for every 64 tokens. On a GPU, long
        sequences of ranks up to 16 run in chunks side by side, others token after token. (Masked tokens in front may
        change the last bits with `cpu` and `cuda`, behind with `cuda`.)

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything runs.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    squeeze = _check(q, k, v, beta, decay, mode, initial_state, mask, cu_seqlens)
    if backend is not None:
        check_backend(backend)
    if squeeze:
        q, k, v = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)
        beta = _with_head(beta, q)
        decay = None if decay is None else _with_head(decay, q)
        if initial_state is not None and initial_state.ndim == 3:
            initial_state = initial_state.unsqueeze(1)
    reads, final_state = run(q, k, v, beta, decay, None, initial_state, mask, cu_seqlens, mode=mode, backend=backend)
    if squeeze:
        reads, final_state = reads.squeeze(2), final_state.squeeze(1)
    return DeltaUpdateOutput(reads, final_state)


def _check(q, k, v, beta, decay, mode, initial_state, mask, cu_seqlens) -> bool:
    """Raises where an argument does not fit; tells whether q comes without H."""
    check_float("q", q, "[B, T, H, R] or [B, T, R]")
    shape = q.shape
    if len(shape) not in (3, 4):
        fail(ValueError, "q", "[B, T, H, R] or [B, T, R]", q)
    squeeze = len(shape) == 3
    rank, heads = shape[-1], 1 if squeeze else shape[2]
    if not 1 <= rank <= MAX_RANK:
        fail(ValueError, "q", f"of rank R from 1 to {MAX_RANK} in its last dimension", q)
    if heads < 1:
        fail(ValueError, "q", "of at least one head, [B, T, H, R]", q)
    device = q.device
    for name, x in (("k", k), ("v", v)):
        check_float(name, x, "of q's shape")
        if x.shape != shape:
            check_shape(name, x, (tuple(shape),), "of q's shape")
        if x.device != device:
            check_device(name, x, device)
    check_mode(mode)
    if mode == "no_lambda" and decay is not None:
        fail(ValueError, "decay", "None in mode 'no_lambda', which keeps everything (λ = 1)", decay)
    batch, tokens = shape[0], shape[1]
    for name, x in (("beta", beta), ("decay", decay)):
        if name == "decay" and x is None:
            continue
        check_float(name, x, "[B, T, H, R] or [B, T, H]")
        if x.shape != shape:  # the common form needs no second look
            gate_shapes = [(batch, tokens, heads, rank), (batch, tokens, heads)]
            gate_shapes += [(batch, tokens, rank), (batch, tokens)] * squeeze
            check_shape(name, x, gate_shapes, "[B, T, H, R] or [B, T, H]")
        check_device(name, x, device)
    states = batch
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, batch, device)
        states = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_float("initial_state", initial_state, "[N, H, R, R]")
        state_shapes = [(states, heads, rank, rank)] + [(states, rank, rank)] * squeeze
        check_shape("initial_state", initial_state, state_shapes, "[N, H, R, R]")
        check_device("initial_state", initial_state, device)
    if mask is not None:
        check_mask(mask, (batch, tokens), device)
    return squeeze


def _with_head(gate: Tensor, q: Tensor) -> Tensor:
    """A gate beside a q that came without H, brought to `[B, T, 1, R]` or `[B, T, 1]`. `[B, T, 1]` is per head,
    which at R = 1 is per row as well."""
    if gate.ndim == 4 or (gate.ndim == 3 and gate.shape[2] == 1):
        return gate
    return gate.unsqueeze(2)


# The operator: one boundary for the dispatcher, autograd and torch.compile. `write` serves the mode "affine" alone,
# where beta is erase and decay is keep (see compat.py).

define(
    "delta_update(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? decay, Tensor? write, Tensor? initial_state, "
    "Tensor? mask, Tensor? cu_seqlens, str mode, str backend, bool save) "
    "-> (Tensor reads, Tensor final_state, Tensor checkpoints)"
)
define(
    "delta_update_backward(Tensor? d_reads, Tensor? d_final_state, Tensor q, Tensor k, Tensor v, Tensor beta, "
    "Tensor? decay, Tensor? write, Tensor? initial_state, Tensor? mask, Tensor? cu_seqlens, Tensor checkpoints, "
    "str mode, str backend, bool[] needs) -> Tensor[]"
)


def _forward(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode, backend, save):
    return choose(backend, q.device).delta_update_forward(
        q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode, save
    )


def _backward(d_reads, d_final_state, q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, checkpoints, mode,
              backend, needs):  # fmt: skip
    grads = choose(backend, q.device).delta_update_backward(
        d_reads, d_final_state, q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, checkpoints, mode, needs
    )
    return [g for g in grads if g is not None]


def forward_fake(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode, backend, save):
    if q.device.type == "meta":  # no kernel will run, a backend that could not is refused all the same
        choose(backend, q.device)
    B, T, H, R = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(q, k, v, beta, decay, write, initial_state)
    checkpoints = (B, T // CHECKPOINT_INTERVAL, H, R, R) if save else (0,)
    return (
        q.new_empty((B, T, H, R)),
        q.new_empty((N, H, R, R), dtype=dtype),
        q.new_empty(checkpoints, dtype=dtype),
    )


def _backward_fake(d_reads, d_final_state, q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, checkpoints,
                   mode, backend, needs):  # fmt: skip
    operands = (q, k, v, beta, decay, write, initial_state)
    return [x.new_empty(x.shape) for x, need in zip(operands, needs, strict=True) if need]


class _DeltaUpdate(torch.autograd.Function):
    """Around the operator and not registered with it: a call that needs no gradient then skips autograd (8 µs)."""

    @staticmethod
    def forward(ctx, q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode, backend):
        operands = (q, k, v, beta, decay, write, initial_state, mask, cu_seqlens)
        reads, final_state, checkpoints = torch.ops.deltamem_kernels.delta_update(*operands, mode, backend, True)
        ctx.save_for_backward(*operands, checkpoints)
        ctx.mode, ctx.backend = mode, backend
        ctx.set_materialize_grads(False)
        return reads, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_reads, d_final_state):
        *operands, checkpoints = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:7])
        grads = iter(
            torch.ops.deltamem_kernels.delta_update_backward(
                d_reads, d_final_state, *operands, checkpoints, ctx.mode, ctx.backend, needs
            )
        )
        return *(next(grads) if need else None for need in needs), *(None,) * 4


def run(*operands, mode: str, backend: str | None) -> tuple[Tensor, Tensor]:
    """reads and final state of checked operands: q, k, v, beta, decay, write, initial_state, mask, cu_seqlens."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        return _DeltaUpdate.apply(*operands, mode, backend or "")
    return torch.ops.deltamem_kernels.delta_update(*operands, mode, backend or "", False)[:2]


library.impl("delta_update", _forward, "CompositeExplicitAutograd")
library.impl("delta_update_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("deltamem_kernels::delta_update", forward_fake, lib=library)
torch.library.register_fake("deltamem_kernels::delta_update_backward", _backward_fake, lib=library)
