"""The delta rule in plain PyTorch, one token after another: the oracle that every other backend is tested against.

It favours being read over being fast. Every floating dtype and every device that PyTorch has will do; the
arithmetic is float32, or float64 as soon as one operand is float64.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from . import composed
from .arithmetic import accumulation_dtype, as_kernel
from .reference_correction import correct, correct_backward
from .reference_projection import (
    memory_projection_backward,
    memory_projection_forward,
    segment_mean_backward,
    segment_mean_forward,
)

__all__ = [
    "CHECKPOINT_INTERVAL",
    "accumulation_dtype",
    "correct",
    "correct_backward",
    "delta_step",
    "delta_update_backward",
    "delta_update_forward",
    "memory_decode",
    "memory_prefill_forward",
    "memory_projection_backward",
    "memory_projection_forward",
    "segment_mean_backward",
    "segment_mean_forward",
]

CHECKPOINT_INTERVAL = 64
"""A state is kept for backward before every 64th token of a sequence; what lies between is computed again."""


def gates(mode: str, beta: Tensor, decay: Tensor | None, write: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """keep, erase and write of `S <- Diag(keep) S - Diag(erase) (S k) k^T + Diag(write) v k^T`."""
    if mode == "affine":  # the three given one by one: beta is erase, decay is keep
        assert decay is not None
        assert write is not None
        return decay, beta, write
    if mode == "no_lambda":
        return torch.ones_like(beta), beta, beta
    decay = 1 - beta if decay is None else decay
    if mode == "standard":
        return decay, beta, beta
    return decay, decay * beta, beta  # lambda_outside


def gates_adjoint(
    mode: str, beta: Tensor, decay: Tensor | None, d_keep: Tensor, d_erase: Tensor, d_write: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradients of keep, erase and write to those of beta, decay and write, as `gates` takes them."""
    if mode == "affine":
        return d_erase, d_keep, d_write
    if mode == "no_lambda":
        return d_erase + d_write, None, None
    if mode == "standard":
        d_beta, d_decay = d_erase + d_write, d_keep
    else:
        d_beta = (1 - beta if decay is None else decay) * d_erase + d_write
        d_decay = d_keep + beta * d_erase
    return (d_beta - d_decay, None, None) if decay is None else (d_beta, d_decay, None)


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[slice, slice, slice, int]]:
    """For each group of sequences that run together: their batch rows, their tokens, their states, and the
    index of the first checkpoint. Chunks start where a sequence starts; `floor(start / 64)` leaves each
    sequence of a packed batch the room it needs without knowing the lengths of the others."""
    if cu_seqlens is None:
        yield slice(None), slice(0, q.shape[1]), slice(None), 0
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1] or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to T={q.shape[1]}, got {bounds}")
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield slice(0, 1), slice(start, stop), slice(n, n + 1), start // CHECKPOINT_INTERVAL


def per_row(gate: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """`[B, T, H]` or `[B, T, H, R]` to `[B, T, H, R]`."""
    return (gate if gate.ndim == 4 else gate.unsqueeze(-1).expand(*gate.shape, rank)).to(dtype)


def masked(mask: Tensor | None, x: Tensor, value: float = 0.0) -> Tensor:
    """x with `value` in the tokens that mask leaves out: whatever stood there, NaN too, is gone."""
    return x if mask is None else torch.where(mask[:, :, None, None], x, value)


@as_kernel
def delta_update_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    write: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    mode: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """reads `[B, T, H, R]` in q's dtype, final_state `[N, H, R, R]`, and with `save` the checkpoints
    `[B, T // 64, H, R, R]` (else an empty tensor)."""
    B, T, H, R = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(q, k, v, beta, decay, write, initial_state)
    qs, ks, vs, keep, erase, write_ = _operands(q, k, v, beta, decay, write, mask, mode, dtype)
    reads = q.new_zeros(q.shape)
    checkpoints = q.new_zeros((B, T // CHECKPOINT_INTERVAL, H, R, R) if save else (0,), dtype=dtype)
    final_state = q.new_zeros((N, H, R, R), dtype=dtype)
    if initial_state is not None:
        final_state.copy_(initial_state)
    for rows, tokens, states, first in sequences(q, cu_seqlens):
        S = final_state[states]
        for t in range(tokens.start, tokens.stop):
            age = t - tokens.start
            if save and age and age % CHECKPOINT_INTERVAL == 0:
                checkpoints[rows, first + age // CHECKPOINT_INTERVAL - 1] = S
            reads[rows, t] = (S @ qs[rows, t, :, :, None]).squeeze(-1).to(q.dtype)
            if mask is not None:
                reads[rows, t] = torch.where(mask[rows, t, None, None], reads[rows, t], 0)
            S = _write(S, ks[rows, t], vs[rows, t], keep[rows, t], erase[rows, t], write_[rows, t])
        final_state[states] = S
    return reads, final_state, checkpoints


@as_kernel
def delta_update_backward(
    d_reads: Tensor | None,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    write: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    checkpoints: Tensor,
    mode: str,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of q, k, v, beta, decay, write and initial_state, in their dtypes and shapes; None where `needs`
    says that nobody asks. G is the gradient of the state, carried from the last token to the first."""
    B, _, H, R = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = checkpoints.dtype
    qs, ks, vs, keep, erase, write_ = _operands(q, k, v, beta, decay, write, mask, mode, dtype)
    grads = {name: torch.zeros(q.shape, dtype=dtype, device=q.device) for name in ("q", "k", "v", "keep", "erase", "w")}
    d_state = q.new_zeros((N, H, R, R), dtype=dtype)
    if d_final_state is not None:
        d_state.copy_(d_final_state)
    d_reads = q.new_zeros(q.shape, dtype=dtype) if d_reads is None else masked(mask, d_reads.to(dtype))
    for rows, tokens, states, _ in sequences(q, cu_seqlens):
        S = torch.zeros_like(d_state[states]) if initial_state is None else initial_state[states].to(dtype)
        history = []
        for t in range(tokens.start, tokens.stop):
            history.append(S)
            S = _write(S, ks[rows, t], vs[rows, t], keep[rows, t], erase[rows, t], write_[rows, t])
        G = d_state[states]
        for t in reversed(range(tokens.start, tokens.stop)):
            S, at = history.pop(), (rows, t)
            Gk = (G @ ks[at].unsqueeze(-1)).squeeze(-1)
            Sk = (S @ ks[at].unsqueeze(-1)).squeeze(-1)
            row = write_[at] * vs[at] - erase[at] * Sk
            grads["q"][at] = _sum_rows(d_reads[at], S)
            grads["k"][at] = _sum_rows(row, G) - _sum_rows(erase[at] * Gk, S)
            grads["v"][at] = write_[at] * Gk
            grads["keep"][at] = (G * S).sum(-1)
            grads["erase"][at] = -Sk * Gk
            grads["w"][at] = vs[at] * Gk
            G = keep[at].unsqueeze(-1) * G - _outer(erase[at] * Gk, ks[at]) + _outer(d_reads[at], qs[at])
        d_state[states] = G
    b, d, _ = _gate_rows(beta, decay, write, R, dtype)
    d_beta, d_decay, d_write = gates_adjoint(mode, b, d, grads["keep"], grads["erase"], grads["w"])
    results = [grads["q"], grads["k"], grads["v"], d_beta, d_decay, d_write, d_state]
    inputs = [q, k, v, beta, decay, write, initial_state]
    return [
        _as_input(g, x, mask if i < 6 else None) if need and g is not None and x is not None else None
        for i, (g, x, need) in enumerate(zip(results, inputs, needs, strict=True))
    ]


def _gate_rows(
    beta: Tensor, decay: Tensor | None, write: Tensor | None, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows = [None if x is None else per_row(x, rank, dtype) for x in (decay, write)]
    return per_row(beta, rank, dtype), rows[0], rows[1]


def _operands(q, k, v, beta, decay, write, mask, mode, dtype) -> tuple[Tensor, ...]:
    keep, erase, write = gates(mode, *_gate_rows(beta, decay, write, q.shape[-1], dtype))
    qkv = (masked(mask, x.to(dtype)) for x in (q, k, v))
    return *qkv, masked(mask, keep, 1.0), masked(mask, erase), masked(mask, write)


def _write(S: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor) -> Tensor:
    Sk = (S @ k.unsqueeze(-1)).squeeze(-1)
    return keep.unsqueeze(-1) * S + _outer(write * v - erase * Sk, k)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(-1) * columns.unsqueeze(-2)


def _sum_rows(weights: Tensor, S: Tensor) -> Tensor:
    return (weights.unsqueeze(-2) @ S).squeeze(-2)


def _as_input(grad: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    grad = grad if mask is None else masked(mask, grad)
    return (grad if grad.ndim == x.ndim else grad.sum(-1)).to(x.dtype).contiguous()


@as_kernel
def delta_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    state_indices: Tensor | None,
    num_accepted_tokens: Tensor | None,
    intermediate_states: Tensor | None,
    out: Tensor,
    mode: str,
    pad_slot_id: int,
    update_state: bool,
) -> None:
    """Rows one after another: reads into out, states into the pool and into intermediate_states. Operands are
    `[N, H, R]`, or `[N, T, H, R]`; a gate per head has one dimension less."""
    if q.ndim == 3:
        q, k, v, out, beta = (x.unsqueeze(1) for x in (q, k, v, out, beta))
        decay = None if decay is None else decay.unsqueeze(1)
        intermediate_states = None if intermediate_states is None else intermediate_states.unsqueeze(1)
    N, T = q.shape[:2]
    dtype = accumulation_dtype(state, q, k, v, beta, decay)
    qs, ks, vs, keep, erase, write = _operands(q, k, v, beta, decay, None, None, mode, dtype)
    slots = torch.arange(N).tolist() if state_indices is None else state_indices.tolist()
    accepted = [1] * N if num_accepted_tokens is None else num_accepted_tokens.tolist()
    for n, slot in enumerate(slots):
        per_token = slot if isinstance(slot, list) else None
        first = slot if per_token is None else per_token[0]
        start = pad_slot_id if first == pad_slot_id else (first if per_token is None else per_token[accepted[n] - 1])
        if start == pad_slot_id:
            out[n] = 0
            continue
        S = state[start].to(dtype)
        for t in range(T):
            out[n, t] = (S @ qs[n, t].unsqueeze(-1)).squeeze(-1).to(out.dtype)
            S = _write(S, ks[n, t], vs[n, t], keep[n, t], erase[n, t], write[n, t])
            if intermediate_states is not None:
                intermediate_states[n, t] = S
            if update_state and per_token is not None and per_token[t] != pad_slot_id:
                state[per_token[t]] = S
        if update_state and per_token is None:
            state[start] = S


def memory_decode(*operands) -> tuple[Tensor, Tensor]:
    """See `composed.memory_decode`."""
    return composed.memory_decode(sys.modules[__name__], *operands)


def memory_prefill_forward(*operands) -> tuple[Tensor, ...]:
    """See `composed.memory_prefill_forward`."""
    return composed.memory_prefill_forward(sys.modules[__name__], *operands)
