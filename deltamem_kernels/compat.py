"""The scan under the names of the δ-mem authors' module `deltamem.kernels.affine_scan`: a drop-in replacement.

    from deltamem_kernels.compat import triton_affine_scan, triton_scan_support

Despite the names, all devices and backends are supported. Unlike in the authors' module, the arithmetic and the state
within a call are float32 (float64 for float64 inputs), backward keeps one state for every 64 tokens, and results are
bitwise deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .operands import ScanOperands
from .operands.checks import FLOATS, MAX_RANK, fail
from .ops.delta_update import run_scan
from .ops.differentiation import refuse_tangents

__all__ = ["TritonScanSupport", "triton_affine_scan", "triton_scan_support"]


@dataclass(frozen=True)
class TritonScanSupport:
    """Whether `triton_affine_scan` supports given tensors, and the reason if it does not."""

    supported: bool
    reason: str = ""


def triton_scan_support(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> TritonScanSupport:
    """Check shapes, dtypes and devices of the arguments of `triton_affine_scan`.

    Raises:
        TypeError: an argument is not a tensor.
    """
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
    """Apply the δ-mem rule with the three gates `keep`, `erase` and `write` as separate arguments.

    Each token first reads the state with its query, then updates it with its key and value.

    Args:
        state: `[batch, rank, rank]`, the state before the first token. Rows index values, columns index keys.
        q, k, v, keep, erase, write: `[batch, seq, rank]`, float16, bfloat16, float32 or float64.
        token_mask: `[batch, seq]`, zero for masked tokens, which read zeros and write nothing. Any dtype.

    Returns:
        The state after the last token, in state's dtype, and the reads `[batch, seq, rank]`, in v's dtype.

    Raises:
        RuntimeError: `triton_scan_support` does not support the tensors.
        NotImplementedError: a tensor carries a tangent of forward-mode differentiation.
        TypeError: an argument is not a tensor.
        ValueError: token_mask has the wrong shape.
    """
    support = triton_scan_support(state, q, k, v, keep, erase, write)
    if not support.supported:
        raise RuntimeError(f"affine scan is unavailable: {support.reason}")
    if token_mask is not None and not isinstance(token_mask, Tensor):
        fail(TypeError, "token_mask", "a tensor [batch, seq]", token_mask)
    if token_mask is not None and token_mask.shape != q.shape[:2]:
        raise ValueError(f"token_mask must be [batch, seq] = {list(q.shape[:2])}, got {list(token_mask.shape)}")
    mask = None if token_mask is None else token_mask.to(device=state.device, dtype=torch.bool)
    q_, k_, v_, keep_, erase_, write_ = (x.unsqueeze(2) for x in (q, k, v, keep, erase, write))
    q_ = q_.to(torch.promote_types(q.dtype, v.dtype))
    operands = ScanOperands(q_, k_, v_, erase_, keep_, write_, state.unsqueeze(1), mask, None, "affine")
    refuse_tangents("triton_affine_scan", operands)
    reads, final_state = run_scan(operands)
    return final_state.squeeze(1).to(state.dtype), reads.squeeze(2).to(v.dtype)
