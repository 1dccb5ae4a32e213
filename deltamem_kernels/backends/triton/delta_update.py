"""Launches of the kernels in forward.py and backward.py: what they are given, and how the work is cut."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..reference import CHECKPOINT_INTERVAL, accumulation_dtype
from ..scan import choose_scan
from .backward import delta_update_backward_kernel
from .chunked import launches_before
from .forward import delta_update_forward_kernel
from .launch import constants, launch, strides, tiling

HISTORY_BYTES = 64 << 20
"""What backward's programs may take for the states of the chunks they are at: so many run at once, in more than one
turn where there are more chunks. It is scratch memory, best within the L2."""


def forward_launches(
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
) -> tuple[list[tuple], tuple[Tensor, Tensor, Tensor]]:
    """Kernel, programs and arguments of each launch, the scan's last, and what they fill, see delta_update_forward."""
    B, T, H, R = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = accumulation_dtype(q, k, v, beta, decay, write, initial_state)
    tiles = tiling(H, R)
    scan = choose_scan("triton", T, H, R)
    slots = B * (T // CHECKPOINT_INTERVAL)
    whole = cu_seqlens is None and not (scan.chunked and mask is not None)
    reads, final_state = _output(q, whole), q.new_empty((N, H, R, R), dtype=dtype)
    # Slots beyond the last chunk of a sequence are never read.
    states = (B, T // CHECKPOINT_INTERVAL, H, R, R) if save or scan.chunked else (0,)
    checkpoints = q.new_empty(states, dtype=dtype)
    arguments = {"p_reads": reads, "p_final": final_state}
    arguments["p_checkpoints"] = checkpoints if save or scan.chunked else None
    arguments |= _operand_arguments(q, k, v, beta, decay, write, initial_state, mask)
    arguments |= _spans(scan.chunked, mask, cu_seqlens, N) | constants(mode, R) | tiles
    programs = (N + slots if scan.chunked else N) * triton.cdiv(H, tiles["HEADS"])
    launches = launches_before(arguments, cu_seqlens, None, initial_state, arguments["p_checkpoints"], mode)
    launches.append((delta_update_forward_kernel, programs, arguments))
    return launches, (reads, final_state, checkpoints if save else q.new_empty((0,), dtype=dtype))


def delta_update_forward(*operands) -> tuple[Tensor, Tensor, Tensor]:
    """reads `[B, T, H, R]` in q's dtype; in that of the arithmetic final_state `[N, H, R, R]` and, with `save`, the
    checkpoints `[B, T // 64, H, R, R]` (else an empty tensor). Operands and modes as in backends/reference.py."""
    launches, outputs = forward_launches(*operands)
    for each in launches:
        launch(*each, operands[0])
    return outputs


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
    B, T, H, R = q.shape
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = tiling(H, R)
    scan = choose_scan("triton", T, H, R)
    pieces = N + B * (T // CHECKPOINT_INTERVAL) if scan.chunked else N
    work = pieces * triton.cdiv(H, tiles["HEADS"])
    whole = cu_seqlens is None and not (scan.chunked and mask is not None)
    inputs = {"q": q, "k": k, "v": v, "beta": beta, "decay": decay, "write": write}
    outputs = {
        f"p_d{name}": _output(x, whole) if need and x is not None else None
        for (name, x), need in zip(inputs.items(), needs[:6], strict=True)
    }
    wanted = needs[6] and initial_state is not None
    outputs["p_dinitial"] = initial_state.new_empty((N, H, R, R)) if wanted else None
    # The states of one chunk's tokens for each program: 16 KiB a head at R = 8 in float32, 64 KiB at 16.
    history_size = CHECKPOINT_INTERVAL * tiles["HEADS"] * tiles["ROWS"] * tiles["W"] * tiles["NC"]
    programs = min(work, max(1, HISTORY_BYTES // (history_size * checkpoints.element_size())))
    needs_state = any(outputs[x] is not None for x in ("p_dq", "p_dk", "p_dbeta", "p_ddecay"))
    gradients = {
        "p_history": checkpoints.new_empty((programs, history_size)) if needs_state else None,
        "p_checkpoints": checkpoints,
        "p_ends": torch.empty_like(checkpoints) if scan.chunked else None,
        "p_d_reads": q.new_zeros(()).expand(q.shape) if d_reads is None else d_reads,
        "p_d_final": d_final_state,
    }
    gradients |= strides("d_reads", gradients["p_d_reads"], "bthr") | strides("d_final", d_final_state, "nhrc")
    per_head = {
        f"{name.upper()}_PER_HEAD": x is not None and x.ndim == 3
        for name, x in (("beta", beta), ("decay", decay), ("write", write))
    }
    operands = _operand_arguments(q, k, v, beta, decay, write, initial_state, mask)
    operands |= _spans(scan.chunked, mask, cu_seqlens, N) | {"work": work}
    return programs, outputs | gradients | operands | per_head | constants(mode, R) | tiles


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
        d_reads = arguments["p_d_reads"]
        for before in launches_before(arguments, cu_seqlens, d_reads, d_final_state, arguments["p_ends"], mode):
            launch(*before, q)
        launch(delta_update_backward_kernel, programs, arguments, q)
    return gradients


def _output(x: Tensor, whole: bool) -> Tensor:
    """Contiguous, like x. Zeros unless the kernel writes the whole of it: tokens may belong to no sequence."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if whole else x.new_zeros(x.shape)


def _spans(chunks: bool, mask: Tensor | None, cu_seqlens: Tensor | None, N: int) -> dict:
    """Where the N sequences lie, see sequence_bounds: with a mask, a chunked scan counts from the tokens it leaves."""
    if not chunks or mask is None:
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        return {"p_spans": cu_seqlens, "SPAN": 1, "N": N, "CHUNKED": chunks}
    return {"p_spans": mask.new_empty((N, 3), dtype=torch.int64), "SPAN": 3, "N": N, "CHUNKED": chunks}


def _operand_arguments(q, k, v, beta, decay, write, initial_state, mask) -> dict:
    T, H = q.shape[1:3]
    gates = {"beta": _per_row(beta, q), "decay": _per_row(decay, q), "write": _per_row(write, q)}
    tokens = {"q": q, "k": k, "v": v} | gates
    arguments = {f"p_{name}": x for name, x in tokens.items()}
    for name, x in tokens.items():
        arguments |= strides(name, x, "bthr")
    arguments |= strides("initial", initial_state, "nhrc") | strides("mask", mask, "bt")
    return arguments | {"p_initial": initial_state, "p_mask": mask, "T": T, "H": H}


def _per_row(gate: Tensor | None, q: Tensor) -> Tensor | None:
    return gate if gate is None or gate.ndim == 4 else gate.unsqueeze(-1).expand(q.shape)
