"""Upstream's scan by its own names: code that imports `deltamem.kernels.affine_scan` changes one import.

    from deltamem_kernels.compat import triton_affine_scan, triton_scan_support

Any device and any backend will do, in spite of the names. Unlike upstream's, the arithmetic and the state inside a
call are float32, backward keeps one state for every 64 tokens, and results are the same bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops._checks import FLOATS, MAX_RANK, fail
from .ops.delta_update import run

__all__ = ["TritonScanSupport", "triton_affine_scan", "triton_scan_support"]


@dataclass(frozen=True)
class TritonScanSupport:
    """Whether `triton_affine_scan` takes these tensors and, if not, the reason."""

    supported: bool
    reason: str = ""


def triton_scan_support(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> TritonScanSupport:
    """Checks what `triton_affine_scan` would be given: shapes, dtypes and devices."""
    tensors = {"state": state, "q": q, "k": k, "v": v, "keep": keep, "erase": erase, "write": write}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            fail(TypeError, name, "a tensor", x)
        if x.ndim != 3:
            return TritonScanSupport(False, f"expected 3D tensors, got {name} {list(x.shape)}")
        if x.dtype not in FLOATS:
            return TritonScanSupport(False, f"unsupported dtype {x.dtype} of {name}")
        if x.device != state.device:
            return TritonScanSupport(False, f"{name} is on {x.device}, the state on {state.device}")
    batch, rank, columns = state.shape
    if rank != columns:
        return TritonScanSupport(False, f"state must be square in the last two dims, got {list(state.shape)}")
    if not 1 <= rank <= MAX_RANK:
        return TritonScanSupport(False, f"rank must be from 1 to {MAX_RANK}, got {rank}")
    if q.shape[0] != batch or q.shape[2] != rank:
        return TritonScanSupport(False, f"q {list(q.shape)} does not match the state {list(state.shape)}")
    for name in ("k", "v", "keep", "erase", "write"):
        if tensors[name].shape != q.shape:
            return TritonScanSupport(
                False, f"{name} {list(tensors[name].shape)} must have q's shape [batch, seq, rank] {list(q.shape)}"
            )
    return TritonScanSupport(True)


def triton_affine_scan(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    erase: Tensor,
    write: Tensor,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Reads and writes with the three gates given one by one.

    Args:
        state: `[batch, rank, rank]`, before the first token. Row = value, column = key.
        q, k, v, keep, erase, write: `[batch, seq, rank]`, float16, bfloat16, float32 or float64.
        token_mask: `[batch, seq]`, nonzero where a token counts; others read zeros and write nothing.

    Returns:
        The state behind the last token, in the dtype of state, and the reads `[batch, seq, rank]`, in that of v.

    Raises:
        RuntimeError: tensors that `triton_scan_support` refuses.
        TypeError, ValueError: what is no tensor, and a token_mask of another shape.
    """
    support = triton_scan_support(state, q, k, v, keep, erase, write)
    if not support.supported:
        raise RuntimeError(f"affine scan is unavailable: {support.reason}")
    if token_mask is not None and not isinstance(token_mask, Tensor):
        fail(TypeError, "token_mask", "a tensor [batch, seq]", token_mask)
    if token_mask is not None and token_mask.shape != q.shape[:2]:
        raise ValueError(f"token_mask must be [batch, seq] = {list(q.shape[:2])}, got {list(token_mask.shape)}")
    operands = [q.to(torch.promote_types(q.dtype, v.dtype)), k, v, erase, keep, write]
    mask = None if token_mask is None else token_mask.to(device=state.device, dtype=torch.bool)
    reads, final_state = run(
        *(x.unsqueeze(2) for x in operands), state.unsqueeze(1), mask, None, mode="affine", backend=None
    )
    return final_state.squeeze(1).to(state.dtype), reads.squeeze(2).to(v.dtype)
