"""`attention_correction_norm_rope`: the correction of a query or key, with its norm and rotary embedding."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from ..backends.eager import eager
from ..operands import CorrectionOperands
from ..operands.checks import check_backend
from ..operands.correction import split_scale
from .attention_correction import run_correction
from .differentiation import refuse_tangents


def attention_correction_norm_rope(
    base: Tensor,
    reads: Tensor,
    weight: Tensor,
    scale: float | Tensor = 1.0,
    *,
    head_dim: int,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Correct the output of a query or key projection, then apply to each head its RMSNorm and the rotary position
    embedding, in one pass: `y = base + scale · reads Wᵀ`, and for each head of y::

        n = RMSNorm(y) · norm_weight
        (a, b) -> (a cos - b sin, b cos + a sin), where a and b are the halves of n

    as in Llama, Qwen3 and SmolLM3. The heads stay in the layout of the projection. For attention take
    `result.unflatten(-1, (-1, head_dim)).transpose(1, 2)`, `[B, heads, T, head_dim]`.

    Args:
        base: `[B, T, heads · head_dim]`, or `[N, heads · head_dim]` for decoding; as in `attention_correction`.
        reads, weight, scale: as in `attention_correction`.
        head_dim: the size of a head of the attention layer (not the memory's R).
        norm_weight: `[head_dim]`, the layer's q_norm or k_norm; None where it has none.
        norm_eps: added to the mean square before the root.
        cos, sin: `[B, T, head_dim]` or `[1, T, head_dim]` (`[N, head_dim]` or `[1, head_dim]`), any float dtype, as the
            model's rotary embedding makes them, for both halves; no gradient. Both None for a layer without rotary
            embedding.
        out: as in `attention_correction`. `out=base` with a norm cannot be recorded for backward, which needs base.
        backend: as in `delta_update`.

    Returns:
        The result in base's shape and dtype, rounded once; `out` if it was given. Results are bitwise deterministic,
        and a row does not depend on the others.

    First-order gradients for base, reads, weight, norm_weight and a tensor scale. Backward keeps the operands, base
    only where there is a norm, and no other tensor of base's size.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has run.
        RuntimeError: out is a leaf that requires grad, or a view of one, and gradients are recorded.
        NotImplementedError: an operand carries a tangent of forward-mode differentiation.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    gain, factor = split_scale(scale)
    operands = CorrectionOperands(base, reads, weight, gain, norm_weight, cos, sin, factor, norm_eps, head_dim)
    # A head_dim of 0 is an error here, and to the fast path the other form of the correction.
    has_heads = isinstance(head_dim, int) and head_dim != 0
    result = eager.correct(operands, out, backend) if has_heads and not is_compiling() else None
    if isinstance(result, Tensor):
        return result
    if result is None:
        operands.check(out, heads=True)
        check_backend(backend)
        refuse_tangents("attention_correction_norm_rope", (*operands, out))
    return run_correction(operands, out, backend)
