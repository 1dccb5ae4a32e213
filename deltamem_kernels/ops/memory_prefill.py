"""`memory_prefill`: a layer's memory over whole sequences, from hidden states to reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from ._checks import check_backend, check_cu_seqlens, check_float, check_mask, check_mode, check_shape, fail
from ._library import define, library
from .delta_update import DeltaUpdateOutput
from .delta_update import forward_fake as _scan_fake
from .memory_projection import check as check_projection
from .memory_projection import forward_fake as _projection_fake


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

    Triton launches: 2 (projection, scan) up to 64 tokens. Beyond, in chunks, 3 (projection with the chunks' maps, fold,
    scan) where H and R, rounded up to powers of two, make at most 16, R at most 8, without float64, mask and
    cu_seqlens; else 4 (maps apart), and 1 more with a mask; 2 more from 8,256 tokens on. The corrections are one launch
    each, of which that of the query does what a layer else launches its norm and rotary for.

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
    operands = (x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, initial_state, mask, cu_seqlens)
    if torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in operands):
        return DeltaUpdateOutput(*_MemoryPrefill.apply(*operands, heads, normalize, mode, backend or ""))
    results = torch.ops.deltamem_kernels.memory_prefill(*operands, heads, normalize, mode, backend or "", False)
    return DeltaUpdateOutput(*results[6:8])


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


# The operator: what memory_projection results in, then what delta_update does. Backward is those of the two.

define(
    "memory_prefill(Tensor x, Tensor qkv_weight, Tensor beta_weight, Tensor? beta_bias, Tensor? decay_weight, "
    "Tensor? decay_bias, Tensor? initial_state, Tensor? mask, Tensor? cu_seqlens, int heads, bool normalize, str mode, "
    "str backend, bool save) -> (Tensor q, Tensor k, Tensor v, Tensor beta, Tensor decay, Tensor norms, Tensor reads, "
    "Tensor final_state, Tensor checkpoints)"
)


def _forward(*operands):
    *operands, backend, save = operands
    return choose(backend, operands[0].device).memory_prefill_forward(*operands, save)


def forward_fake(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, initial_state, mask, cu_seqlens,
                  heads, normalize, mode, backend, save):  # fmt: skip
    projected = _projection_fake(
        x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, backend
    )
    q, k, v, beta, decay, _ = projected
    decay = None if decay_weight is None else decay
    return *projected, *_scan_fake(q, k, v, beta, decay, None, initial_state, mask, cu_seqlens, mode, backend, save)


class _MemoryPrefill(torch.autograd.Function):
    """Around the operator and not registered with it: a call that needs no gradient then skips autograd."""

    @staticmethod
    def forward(ctx, *operands):
        *tensors, _, _, mode, backend = operands
        *projected, reads, final_state, checkpoints = torch.ops.deltamem_kernels.memory_prefill(*operands, True)
        x, *parameters = tensors[:6]
        trained = any(ctx.needs_input_grad[i] for i in (1, 2, 4))
        ctx.save_for_backward(x if trained else None, *parameters, *tensors[6:], *projected, checkpoints)
        ctx.options = x.dtype, mode, backend
        ctx.set_materialize_grads(False)
        return reads, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_reads, d_final_state):
        saved, (x_dtype, mode, backend) = ctx.saved_tensors, ctx.options
        layer, states, (q, k, v, beta, decay, norms), checkpoints = saved[:6], saved[6:9], saved[9:15], saved[15]
        given = decay if layer[4] is not None else None
        needs = list(ctx.needs_input_grad[:7])
        projects = any(needs[:6])
        wanted = [*(projects,) * 4, projects and given is not None, False, needs[6]]
        grads = iter(
            torch.ops.deltamem_kernels.delta_update_backward(
                d_reads, d_final_state, q, k, v, beta, given, None, *states, checkpoints, mode, backend, wanted
            )
        )
        cotangents = [next(grads) if need else None for need in wanted[:5]]
        d_initial = next(grads) if needs[6] else None
        if projects:
            grads = iter(
                torch.ops.deltamem_kernels.memory_projection_backward(
                    *cotangents, *layer, q, k, beta, decay, norms, x_dtype, backend, needs[:6]
                )
            )
        return *(next(grads) if need else None for need in needs[:6]), d_initial, *(None,) * 6


library.impl("memory_prefill", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("deltamem_kernels::memory_prefill", forward_fake, lib=library)
