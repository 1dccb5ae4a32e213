"""The arguments that the kernels of forward and backward have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ....operands import ScanOperands, StepOperands
from ...scan_choice import choose_scan
from ..launch import cdiv, strides
from . import sizes

TOKEN_OPERANDS = ("q", "k", "v", "beta", "decay", "write")


def token_arguments(operands: ScanOperands | StepOperands, names: Iterable[str], given: str = "") -> dict[str, Any]:
    """Return pointers and strides of operands `[B, T, H, R]`. `given` is as for `strides`."""
    arguments: dict[str, Any] = {}
    for name in names:
        x = getattr(operands, name)
        arguments |= {f"p_{name}": x} | strides(name, x, "bthr", given)
    return arguments


def scan_arguments(operands: ScanOperands) -> dict[str, Any]:
    """Return the operands, the tiles, and where the sequences lie (see `sequence_bounds`)."""
    _, T, H, R = operands.q.shape
    N, mask, cu_seqlens = operands.num_sequences, operands.mask, operands.cu_seqlens
    chunked = choose_scan("triton", T, H, R).chunked
    arguments = token_arguments(operands, TOKEN_OPERANDS) | sizes.tiling(H, R)
    arguments |= {"p_initial": operands.initial_state} | strides("initial", operands.initial_state, "nhrc")
    arguments |= {"p_mask": mask} | strides("mask", mask, "bt")
    arguments |= {"N": N, "T": T, "H": H, "R": R, "MODE": operands.mode, "CHUNK": sizes.CHUNK, "CHUNKED": chunked}
    if chunked and mask is not None:  # chunks are counted from the first token that the mask keeps
        return arguments | {"p_spans": mask.new_empty((N, 3), dtype=torch.int64), "SPAN": 3}
    return arguments | {"p_spans": None if cu_seqlens is None else cu_seqlens.contiguous(), "SPAN": 1}


def pieces_of_work(operands: ScanOperands, scan: dict[str, Any]) -> int:
    """Return the number of pieces of work: groups of heads of the sequences or, in a chunked scan, of the sequences'
    first chunks and of the slots for further chunks."""
    B, T, H, _ = operands.q.shape
    pieces = scan["N"] + (B * (T // scan["CHUNK"]) if scan["CHUNKED"] else 0)
    return pieces * cdiv(H, scan["HEADS"])


def empty_tokens(x: Tensor, scan: dict[str, Any]) -> Tensor:
    """Return a contiguous tensor like x for the results of all tokens. If some tokens may belong to no sequence, it
    holds zeros, because the kernels do not write those."""
    if scan["p_spans"] is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return x.new_zeros(x.shape)
