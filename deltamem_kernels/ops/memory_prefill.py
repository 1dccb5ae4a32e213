"""`memory_prefill`: a layer's memory over whole sequences, from hidden states to reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import choose
from ..backends.eager import eager
from ..operands import PrefillOperands, Projected, QkvWeight
from ..operands.checks import check_backend, requires_grad
from ..operands.projection import qkv_parts
from .delta_update import DeltaUpdateOutput
from .delta_update import forward_fake as scan_fake
from .differentiation import first_order, refuse_tangents
from .memory_projection import forward_fake as projection_fake
from .memory_projection import weights_need_gradients
from .operators import arguments, define, where_needed


def memory_prefill(
    x: Tensor,
    qkv_weight: QkvWeight,
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
    """Run δ-mem's memory (arXiv 2605.12357) of an attention layer over whole sequences: `memory_projection` of the
    hidden states, then `delta_update`. The reads then go to `attention_correction` and its form for queries.

    The call must at least read x and the weights once and write the reads. At D = 2560 and R = 8 in bfloat16, x takes
    5 KB per token; q, k, v and the gates (128 bytes, written and read again) and the reads (32 bytes) add 6 %.

    Triton launches 2 kernels (projection, scan) up to 64 tokens. Longer sequences run in chunks: 3 kernels (projection
    with the chunks' maps, fold, scan) if H and R, rounded up to powers of two, make at most 16, R is at most 8, and
    there is no float64, mask or cu_seqlens; otherwise 4 (separate maps), and 1 more with a mask. From 8,256 tokens on
    there are 2 more. Each correction is one launch, and that of the query replaces the layer's own norm and rotary
    embedding.

    Args:
        x: `[B, T, D]`, float16, bfloat16, float32 or float64, any strides.
        qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize: as in `memory_projection`.
        mode: as in `delta_update`. There is no decay_weight in "no_lambda".
        initial_state: `[N, H, R, R]`, or None for zeros.
        mask: `[B, T]` bool. A token that is False reads zeros and writes nothing, whatever it holds. Where gradients
            are recorded, it must hold finite numbers.
        cu_seqlens: `[N + 1]`, packed sequences, B = 1.
        backend: as in `delta_update`.

    Returns:
        DeltaUpdateOutput: reads `[B, T, H, R]` and final_state `[N, H, R, R]`, float32 whatever x is, or float64 if an
        operand of the projection is.

    First-order gradients for x, the weights, the biases and initial_state. Backward keeps what the two operations keep.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has run.
        NotImplementedError: an operand carries a tangent of forward-mode differentiation.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    operands = PrefillOperands(
        x, qkv_parts(qkv_weight), beta_weight, beta_bias, decay_weight, decay_bias, initial_state, mask, cu_seqlens,
        heads, normalize, mode,
    )  # fmt: skip
    result = None if is_compiling() else eager.prefill(operands, backend)
    if result:
        return DeltaUpdateOutput(*result)
    if result is None:
        operands.check()
        check_backend(backend)
        refuse_tangents("memory_prefill", operands)
    _, weights, *rest = operands
    if requires_grad((*operands, *weights)):
        return DeltaUpdateOutput(*_Prefill.apply(x, *rest, backend or "", *weights)[:2])
    results = torch.ops.deltamem_kernels.memory_prefill(*operands, backend or "", False)
    return DeltaUpdateOutput(*results[6:8])


def _forward(*fields):
    *fields, backend, save = fields
    operands = PrefillOperands(*fields)
    projected, scanned = choose(backend, operands.x.device).prefill(operands, save)
    return *projected, *scanned


def _forward_fake(*fields):
    *fields, backend, save = fields
    operands = PrefillOperands(*fields)
    projected = projection_fake(*operands.projection, backend)
    return *projected, *scan_fake(*operands.scan(Projected(*projected)), backend, save)


# The results are those of memory_projection, then those of delta_update. Backward is that of the two operators.
define(
    "memory_prefill",
    f"({arguments(PrefillOperands)}, str backend, bool save) -> (Tensor q, Tensor k, Tensor v, Tensor beta, "
    "Tensor decay, Tensor norms, Tensor reads, Tensor final_state, Tensor checkpoints)",
    _forward,
    _forward_fake,
)


class _Prefill(torch.autograd.Function):
    """The one tensor or the three of qkv_weight come last, since autograd does not follow tensors in a list.

    The third result is empty. It connects the saved tensors with x, which is not always saved.
    """

    @staticmethod
    def forward(ctx, x, *fields):
        gates, states, options, qkv_weight = fields[:4], fields[4:7], fields[7:11], fields[11:]
        *projected, reads, final_state, checkpoints = torch.ops.deltamem_kernels.memory_prefill(
            x, qkv_weight, *gates, *states, *options, True
        )
        needs_x = weights_need_gradients(ctx.needs_input_grad[1:5], ctx.needs_input_grad[12:])
        saved = x if needs_x else None
        connection = x.new_empty((0,))
        ctx.save_for_backward(connection, saved, *gates, *states, *projected, checkpoints, *qkv_weight)
        _, _, mode, backend = options
        ctx.options = x.dtype, mode, backend
        ctx.set_materialize_grads(False)
        return reads, final_state, connection

    @staticmethod
    @first_order("memory_prefill")
    def backward(ctx, saved, d_reads, d_final_state, _):
        _, x, *saved = saved
        gates, states, projected, checkpoints, qkv_weight = saved[:4], saved[4:7], saved[7:13], saved[13], saved[14:]
        x_dtype, mode, backend = ctx.options
        q, k, v, beta, decay, norms = projected
        _, _, decay_weight, _ = gates
        given_decay = None if decay_weight is None else decay
        needs = [*ctx.needs_input_grad[:5], *ctx.needs_input_grad[12:]]
        needs_state = ctx.needs_input_grad[5]
        project = any(needs)
        scan_needs = [project, project, project, project, project and given_decay is not None, False, needs_state]
        grads = torch.ops.deltamem_kernels.delta_update_backward(
            d_reads, d_final_state, q, k, v, beta, given_decay, None, *states, mode, checkpoints, backend, scan_needs
        )
        d_q, d_k, d_v, d_beta, d_decay, _, d_initial = where_needed(grads, scan_needs)
        if project:
            grads = torch.ops.deltamem_kernels.memory_projection_backward(
                d_q, d_k, d_v, d_beta, d_decay, x, qkv_weight, *gates, q, k, beta, decay, norms, x_dtype, backend, needs
            )
        d_x, *rest = where_needed(grads if project else [], needs)
        return d_x, *rest[:4], d_initial, *(None,) * 6, *rest[4:]
