"""`memory_prefill`: a layer's memory over whole sequences, from hidden states to reads."""

from __future__ import annotations

from torch import Tensor

from ._checks import check_backend, check_cu_seqlens, check_float, check_mask, check_mode, check_shape, fail
from .delta_update import DeltaUpdateOutput, delta_update
from .memory_projection import check as check_projection
from .memory_projection import run as run_projection


def memory_prefill(
    x: Tensor,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None = None,
    decay_bias: Tensor | None = None,
    *,
    heads: int = 1,
    normalize: bool = True,
    mode: str = "standard",
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> DeltaUpdateOutput:
    """What an attention layer asks of δ-mem's memory (arXiv 2605.12357) for whole sequences: `memory_projection` of its
    hidden states, then `delta_update`. The reads then go to `attention_correction` and its form for queries.

    The least that has to be moved is x and the weights, read once, and the reads written: at D = 2560 and R = 8 in
    bfloat16 5 KB of x a token, beside which q, k, v and the gates (128 bytes, written and read again) and the reads
    (32 bytes) are 6 %.

    Triton launches: 2 (projection, scan) up to 64 tokens. Beyond, in chunks, 4 (projection, chunks' maps, fold, scan),
    2 more from 8,256 tokens on, and 1 more with a mask. The corrections are one launch each.

    Args:
        x: `[B, T, D]`, float16, bfloat16, float32 or float64, any strides.
        qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize: as in `memory_projection`.
        mode: as in `delta_update`. There is no decay_weight in "no_lambda".
        initial_state: `[N, H, R, R]`, or None for zeros.
        mask: `[B, T]` bool; False: the token reads zeros and writes nothing, whatever stands there. Where gradients
            are wanted that has to be finite.
        cu_seqlens: `[N + 1]`, packed sequences, B = 1.
        backend: as in `delta_update`.

    Returns:
        DeltaUpdateOutput: reads `[B, T, H, R]` and final_state `[N, H, R, R]`, float32 whatever x is, float64 where an
        operand of the projection is. Differentiable once in x, the weights, the biases and initial_state; backward
        keeps what the two operations keep.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything runs.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    check_projection(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize)
    _check(x, qkv_weight, decay_weight, heads, mode, initial_state, mask, cu_seqlens)
    if backend is not None:
        check_backend(backend)
    operands = (x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias)
    p = run_projection(*operands, heads, normalize, backend)
    return delta_update(*p, mode=mode, initial_state=initial_state, mask=mask, cu_seqlens=cu_seqlens, backend=backend)


def _check(x, qkv_weight, decay_weight, heads, mode, initial_state, mask, cu_seqlens) -> None:
    """What the projection does not know; the scan's own names for its operands mean nothing to the caller."""
    if x.ndim != 3:
        fail(ValueError, "x", "[B, T, D]", x)
    check_mode(mode)
    if mode == "no_lambda" and decay_weight is not None:
        fail(ValueError, "decay_weight", "None in mode 'no_lambda', which keeps everything (λ = 1)", decay_weight)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, x.shape[0], x.device, of="x")
    if mask is not None:
        check_mask(mask, (x.shape[0], x.shape[1]), x.device, of="x")
    if initial_state is not None:
        rank = qkv_weight.shape[0] // (3 * heads)
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_float("initial_state", initial_state, "[N, H, R, R]")
        check_shape("initial_state", initial_state, [(sequences, heads, rank, rank)], "[N, H, R, R]")
        if initial_state.device != x.device:
            fail(ValueError, "initial_state", f"on x's device {x.device}", initial_state)
