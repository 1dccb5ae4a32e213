"""Launches of the kernels in forward.py and backward.py: what they are given, and how the work is cut."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from ..reference import CHECKPOINT_INTERVAL, accumulation_dtype
from .backward import delta_update_backward_kernel
from .forward import delta_update_forward_kernel

LANES = 32
REGISTER_RANK = 16
"""Up to this rank a lane keeps its state row in registers; above it a program shares the state of one head."""


def tiling(H: int, R: int) -> dict[str, int]:
    """Tiles (see _rule.py) and warps of a program. It depends on H and R alone: a sequence has the same bits alone and
    in a batch. A warp takes as many heads of one sequence as it has lanes for; sequences differ in length."""
    rows = triton.next_power_of_2(R)
    if R <= REGISTER_RANK:
        heads = min(triton.next_power_of_2(max(H, 1)), LANES // rows)
        return {"HEADS": heads, "ROWS": rows, "NC": R, "W": 1, "num_warps": 1}
    warps = {32: 4, 64: 16}.get(rows, 32) // (2 if torch.version.hip else 1)  # there a warp has 64 lanes
    return {"HEADS": 1, "ROWS": rows, "NC": 1, "W": rows, "num_warps": warps}


def forward_arguments(
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
) -> tuple[int, dict]:
    """Programs to launch, and the arguments of delta_update_forward_kernel with its outputs allocated."""
    B, T, H, R = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(q, k, v, beta, decay, write, initial_state)
    tiles = tiling(H, R)
    outputs = {
        "p_reads": _output(q, cu_seqlens),
        "p_final": q.new_empty((N, H, R, R), dtype=dtype),
        # Slots beyond the last chunk of a sequence are never read.
        "p_checkpoints": q.new_empty((B, T // CHECKPOINT_INTERVAL, H, R, R), dtype=dtype) if save else None,
    }
    operands = _operand_arguments(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens)
    return N * triton.cdiv(H, tiles["HEADS"]), outputs | operands | _constants(mode, R) | tiles


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
    """reads `[B, T, H, R]` in q's dtype; in that of the arithmetic final_state `[N, H, R, R]` and, with `save`, the
    checkpoints `[B, T // 64, H, R, R]` (else an empty tensor). Operands and modes as in backends/reference.py."""
    programs, arguments = forward_arguments(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, mode, save)
    _launch(delta_update_forward_kernel, programs, arguments, q)
    reads, final_state, checkpoints = (arguments[x] for x in ("p_reads", "p_final", "p_checkpoints"))
    return reads, final_state, q.new_empty((0,), dtype=final_state.dtype) if checkpoints is None else checkpoints


def backward_arguments(
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
) -> tuple[int, dict]:
    """Programs to launch, and the arguments of delta_update_backward_kernel with its outputs allocated."""
    H, R = q.shape[2:]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = tiling(H, R)
    programs = N * triton.cdiv(H, tiles["HEADS"])
    inputs = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "write": write}
    outputs = {
        f"p_d{name}": _output(x, cu_seqlens) if need and x is not None else None
        for (name, x), need in zip(inputs.items(), needs[:6], strict=True)
    }
    wanted = needs[6] and initial_state is not None
    outputs["p_dinitial"] = initial_state.new_empty((N, H, R, R)) if wanted else None
    # The states of one chunk's tokens, 64 of them for each program: 16 KiB a head at R = 8 in float32, 64 KiB at 16.
    state = tiles["HEADS"] * tiles["ROWS"] * tiles["W"] * tiles["NC"]
    needs_state = any(outputs[x] is not None for x in ("p_dq", "p_dk", "p_dbeta", "p_ddecay"))
    history = checkpoints.new_empty((programs, CHECKPOINT_INTERVAL, state)) if needs_state else None
    d_reads = q.new_zeros(()).expand(q.shape) if d_reads is None else d_reads
    gradients = (
        {"p_history": history, "p_checkpoints": checkpoints, "p_d_reads": d_reads, "p_d_final": d_final_state}
        | _strides("d_reads", d_reads, "bthr")
        | _strides("d_final", d_final_state, "nhrc")
    )
    per_head = {
        f"{name.upper()}_PER_HEAD": x is not None and x.ndim == 3
        for name, x in (("beta", beta), ("decay", decay), ("write", write))
    }
    operands = _operand_arguments(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens)
    return programs, outputs | gradients | operands | per_head | _constants(mode, R) | tiles


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
    """Gradients of q, k, v, beta, decay, write and initial_state, in their dtypes and shapes; None where `needs` says
    that nobody asks, and then not computed. d_reads `[B, T, H, R]`, d_final_state `[N, H, R, R]`: any strides."""
    programs, arguments = backward_arguments(
        d_reads, d_final_state, q, k, v, beta, decay, write, initial_state, mask, cu_seqlens, checkpoints, mode, needs
    )
    gradients = [arguments[f"p_d{x}"] for x in ("q", "k", "v", "beta", "decay", "write", "initial")]
    if any(x is not None for x in gradients):
        _launch(delta_update_backward_kernel, programs, arguments, q)
    return gradients


def _launch(kernel, programs: int, arguments: dict, like: Tensor) -> None:
    if programs:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](**arguments)


def _output(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Contiguous, like x. Zeros where cu_seqlens might leave tokens to no sequence: the host does not read it."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if cu_seqlens is None else x.new_zeros(x.shape)


def _operand_arguments(q, k, v, beta, decay, write, initial_state, mask, cu_seqlens) -> dict:
    T, H = q.shape[1:3]
    gates = {"beta": _per_row(beta, q), "decay": _per_row(decay, q), "write": _per_row(write, q)}
    tokens = {"q": q, "k": k, "v": v} | gates
    arguments = {f"p_{name}": x for name, x in tokens.items()}
    for name, x in tokens.items():
        arguments |= _strides(name, x, "bthr")
    arguments |= _strides("initial", initial_state, "nhrc") | _strides("mask", mask, "bt")
    return arguments | {"p_initial": initial_state, "p_mask": mask, "p_cu_seqlens": cu_seqlens, "T": T, "H": H}


def _per_row(gate: Tensor | None, q: Tensor) -> Tensor | None:
    return gate if gate is None or gate.ndim == 4 else gate.unsqueeze(-1).expand(q.shape)


def _strides(name: str, x: Tensor | None, dimensions: str) -> dict[str, int]:
    strides = (1,) * len(dimensions) if x is None else x.stride()
    return {f"{name}_s{d}": s for d, s in zip(dimensions, strides, strict=True)}


def _constants(mode: str, R: int) -> dict:
    return {"MODE": mode, "CHUNK": CHECKPOINT_INTERVAL, "R": R, "num_stages": 1, "enable_fp_fusion": True}
