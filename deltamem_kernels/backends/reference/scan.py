"""The delta rule in plain PyTorch, one token after another: the oracle that every other backend is tested against.

It favours being read over being fast. Every floating-point dtype and every device that PyTorch has will do. The
arithmetic is float32, or float64 if one operand is float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...operands import CHECKPOINT_INTERVAL, ScanCotangents, ScanOperands, ScanResult, StepOperands
from ..base import Gradients, plain_torch


def gates(mode: str, beta: Tensor, decay: Tensor | None, write: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return keep, erase and write of `S <- Diag(keep) S - Diag(erase) (S k) k^T + Diag(write) v k^T`."""
    if mode == "affine":  # the three are given separately: beta is erase, decay is keep
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
    """Return the gradients of beta, decay and write, from those of keep, erase and write."""
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
    """Yield, for each group of sequences that run together, their batch rows, their tokens, their states, and the index
    of the first checkpoint. Chunks start where a sequence starts. In a packed batch a sequence's checkpoints start at
    `floor(start / 64)`, which leaves each sequence the room it needs without knowing the lengths of the others.

    Raises:
        ValueError: cu_seqlens does not rise from 0 to T.
    """
    if cu_seqlens is None:
        yield slice(None), slice(0, q.shape[1]), slice(None), 0
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[1] or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"cu_seqlens must rise from 0 to T={q.shape[1]}, got {bounds}")
    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        yield slice(0, 1), slice(start, stop), slice(n, n + 1), start // CHECKPOINT_INTERVAL


def per_row(gate: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """Expand a gate `[B, T, H]` to `[B, T, H, R]`."""
    return (gate if gate.ndim == 4 else gate.unsqueeze(-1).expand(*gate.shape, rank)).to(dtype)


def masked(mask: Tensor | None, x: Tensor, value: float = 0.0) -> Tensor:
    """Replace x by `value` in the tokens that mask excludes, NaN included."""
    return x if mask is None else torch.where(mask[:, :, None, None], x, value)


@plain_torch
def scan(operands: ScanOperands, save: bool) -> ScanResult:
    """See `Backend.scan`."""
    q, mask, cu_seqlens = operands.q, operands.mask, operands.cu_seqlens
    H, R = q.shape[2:]
    dtype = operands.dtype
    qs, ks, vs, keep, erase, write = _token_operands(operands, dtype)
    reads = q.new_zeros(q.shape)
    checkpoints = q.new_zeros(operands.checkpoints_shape if save else (0,), dtype=dtype)
    final_state = q.new_zeros((operands.num_sequences, H, R, R), dtype=dtype)
    if operands.initial_state is not None:
        final_state.copy_(operands.initial_state)
    for rows, tokens, states, first in sequences(q, cu_seqlens):
        S = final_state[states]
        for t in range(tokens.start, tokens.stop):
            age = t - tokens.start
            if save and age and age % CHECKPOINT_INTERVAL == 0:
                checkpoints[rows, first + age // CHECKPOINT_INTERVAL - 1] = S
            reads[rows, t] = (S @ qs[rows, t, :, :, None]).squeeze(-1).to(q.dtype)
            if mask is not None:
                reads[rows, t] = torch.where(mask[rows, t, None, None], reads[rows, t], 0)
            S = _write(S, ks[rows, t], vs[rows, t], keep[rows, t], erase[rows, t], write[rows, t])
        final_state[states] = S
    return ScanResult(reads, final_state, checkpoints)


@plain_torch
def scan_backward(
    operands: ScanOperands, checkpoints: Tensor, cotangents: ScanCotangents, needs: list[bool]
) -> Gradients:
    """See `Backend.scan_backward`. G is the gradient of the state, carried from the last token to the first."""
    q, mask, initial_state = operands.q, operands.mask, operands.initial_state
    H, R = q.shape[2:]
    dtype = checkpoints.dtype
    qs, ks, vs, keep, erase, write = _token_operands(operands, dtype)
    grads = {name: torch.zeros(q.shape, dtype=dtype, device=q.device) for name in ("q", "k", "v", "keep", "erase", "w")}
    d_state = q.new_zeros((operands.num_sequences, H, R, R), dtype=dtype)
    if cotangents.final_state is not None:
        d_state.copy_(cotangents.final_state)
    d_reads = q.new_zeros(q.shape, dtype=dtype)
    if cotangents.reads is not None:
        d_reads = masked(mask, cotangents.reads.to(dtype))
    for rows, tokens, states, _ in sequences(q, operands.cu_seqlens):
        S = torch.zeros_like(d_state[states]) if initial_state is None else initial_state[states].to(dtype)
        history = []
        for t in range(tokens.start, tokens.stop):
            history.append(S)
            S = _write(S, ks[rows, t], vs[rows, t], keep[rows, t], erase[rows, t], write[rows, t])
        G = d_state[states]
        for t in reversed(range(tokens.start, tokens.stop)):
            S, at = history.pop(), (rows, t)
            Gk = (G @ ks[at].unsqueeze(-1)).squeeze(-1)
            Sk = (S @ ks[at].unsqueeze(-1)).squeeze(-1)
            row = write[at] * vs[at] - erase[at] * Sk
            grads["q"][at] = _sum_rows(d_reads[at], S)
            grads["k"][at] = _sum_rows(row, G) - _sum_rows(erase[at] * Gk, S)
            grads["v"][at] = write[at] * Gk
            grads["keep"][at] = (G * S).sum(-1)
            grads["erase"][at] = -Sk * Gk
            grads["w"][at] = vs[at] * Gk
            G = keep[at].unsqueeze(-1) * G - _outer(erase[at] * Gk, ks[at]) + _outer(d_reads[at], qs[at])
        d_state[states] = G
    beta, decay, _ = _gate_rows(operands, dtype)
    d_beta, d_decay, d_write = gates_adjoint(operands.mode, beta, decay, grads["keep"], grads["erase"], grads["w"])
    results = [grads["q"], grads["k"], grads["v"], d_beta, d_decay, d_write, d_state]
    return [
        _as_input(g, x, mask if i < 6 else None) if need and g is not None and x is not None else None
        for i, (g, x, need) in enumerate(zip(results, operands.differentiable, needs, strict=True))
    ]


def _gate_rows(
    operands: ScanOperands | StepOperands, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """beta, decay and write with a number per row."""
    gates = (operands.beta, operands.decay, getattr(operands, "write", None))
    beta, decay, write = (None if x is None else per_row(x, operands.q.shape[-1], dtype) for x in gates)
    assert beta is not None
    return beta, decay, write


def _token_operands(operands: ScanOperands | StepOperands, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, keep, erase and write. A masked token keeps everything and adds nothing."""
    mask = getattr(operands, "mask", None)
    keep, erase, write = gates(operands.mode, *_gate_rows(operands, dtype))
    qkv = (masked(mask, x.to(dtype)) for x in (operands.q, operands.k, operands.v))
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


@plain_torch
def step(operands: StepOperands) -> None:
    """See `Backend.step`. Rows run one after another."""
    if operands.q.ndim == 3:
        operands = _with_tokens(operands)
    state, out, intermediate_states = operands.state, operands.out, operands.intermediate_states
    dtype = operands.dtype
    qs, ks, vs, keep, erase, write = _token_operands(operands, dtype)
    for n, (start, after) in enumerate(_slots(operands)):
        if start is None:
            out[n] = 0
            continue
        S = state[start].to(dtype)
        for t, slot in enumerate(after):
            out[n, t] = (S @ qs[n, t].unsqueeze(-1)).squeeze(-1).to(out.dtype)
            S = _write(S, ks[n, t], vs[n, t], keep[n, t], erase[n, t], write[n, t])
            if intermediate_states is not None:
                intermediate_states[n, t] = S
            if slot is not None:
                state[slot] = S


def _slots(operands: StepOperands) -> list[tuple[int | None, list[int | None]]]:
    """Return for each row the slot it starts from, None for padding, and the slot that gets the state after each token,
    None for no slot.

    Raises:
        ValueError: on a CPU, a slot is outside of the pool, or a number of accepted tokens is not from 1 to T. On a GPU
            such a row is padding, and such a slot gets no state, as in the other backends' kernels.
    """
    (N, T), indices, accepted = operands.q.shape[:2], operands.state_indices, operands.num_accepted_tokens
    pad, pool, raises = operands.pad_slot_id, operands.state.shape[0], operands.state.device.type == "cpu"

    def in_pool(slot: int) -> int | None:
        if slot != pad and 0 <= slot < pool:
            return slot
        if slot != pad and raises:
            raise ValueError(f"state_indices must be from 0 to {pool - 1} or pad_slot_id, got {slot}")
        return None

    def row(slots: list[int], accepted: int) -> tuple[int | None, list[int | None]]:
        if not T or slots[0] == pad:
            return None, []
        if raises and not 1 <= accepted <= T:
            raise ValueError(f"num_accepted_tokens must be from 1 to T={T}, got {accepted}")
        if not raises and (not 1 <= accepted <= T or in_pool(slots[0]) is None):
            return None, []
        start = in_pool(slots[accepted - 1])
        return start, [in_pool(slot) if operands.update_state else None for slot in slots]

    if indices is not None and indices.ndim == 2:
        counts = [1] * N if accepted is None else accepted.tolist()
        return [row(*each) for each in zip(indices.tolist(), counts, strict=True)]
    starts = [in_pool(slot) for slot in (range(N) if indices is None else indices.tolist())]
    return [(start, [*[None] * (T - 1), start if operands.update_state else None][:T]) for start in starts]


def _with_tokens(operands: StepOperands) -> StepOperands:
    """Insert T = 1 into `[N, H, R]` operands."""
    names = ("q", "k", "v", "beta", "decay", "intermediate_states", "out")
    given = {name: x for name in names if (x := getattr(operands, name)) is not None}
    return operands._replace(**{name: x.unsqueeze(1) for name, x in given.items()})
