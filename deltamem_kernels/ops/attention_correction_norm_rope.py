"""`attention_correction_norm_rope`: the correction of a query or key, with what an attention layer does to it next."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_fits, check_once, fail, fits
from ._memory import check_apart
from .attention_correction import check, run


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
    """Corrects the output of a query or key projection, then applies to each head its RMSNorm and the rotary position
    embedding, in one pass: `y = base + scale · reads Wᵀ`, and for each head of y::

        n = RMSNorm(y) · norm_weight
        (a, b) -> (a cos - b sin, b cos + a sin), a and b the halves of n

    as Llama, Qwen3 and SmolLM3 have it. The heads stay side by side, as the projection left them; for attention take
    `result.unflatten(-1, (-1, head_dim)).transpose(1, 2)`, `[B, heads, T, head_dim]`.

    Args:
        base: `[B, T, heads · head_dim]`, or `[N, heads · head_dim]` for decoding; as in `attention_correction`.
        reads, weight, scale: as in `attention_correction`.
        head_dim: the numbers of a head of the attention layer (not of the memory's R).
        norm_weight: `[head_dim]`, the layer's q_norm or k_norm; None where it has none.
        norm_eps: added to the mean square before the root.
        cos, sin: `[B, T, head_dim]` or `[1, T, head_dim]` (`[N, head_dim]` or `[1, head_dim]`), any float dtype, as the
            model's rotary embedding makes them, for both halves; no gradient. None, both, for a layer without rotary.
        out: as in `attention_correction`. `out=base` with a norm cannot be recorded for backward, which needs base.
        backend: as in `delta_update`.

    Returns:
        The result in base's shape and dtype, rounded once; `out` if it was given. Differentiable once in base, reads,
        weight, norm_weight and a tensor scale. Backward keeps the operands, base only where there is a norm, and no
        other tensor of base's size. The same bits on every run; a row does not depend on the others.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything runs.
        RuntimeError: out is a leaf that requires grad, or a view of one, and gradients are recorded.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    check_once(
        _checked, _check, base, reads, weight, scale, norm_weight, norm_eps, out, backend, head_dim, cos, sin
    )  # fmt: skip
    return run(base, reads, weight, scale, norm_weight, cos, sin, norm_eps, head_dim, out, backend)


_checked: set[bytes] = set()


def _check(base, reads, weight, scale, norm_weight, norm_eps, out, backend, head_dim, cos, sin) -> None:
    check_head_dim(head_dim)
    check(base, reads, weight, scale, norm_weight, norm_eps, out, backend, head_dim)
    check_heads(base, base.shape, base.device, head_dim, cos, sin, out)


def check_head_dim(head_dim) -> None:
    if isinstance(head_dim, bool) or not isinstance(head_dim, int):
        fail(TypeError, "head_dim", "an integer", head_dim)


def check_heads(base: Tensor, shape, device, head_dim: int, cos, sin, out) -> None:
    """head_dim, an integer, and the tables; shape and device are base's."""
    if head_dim < 1 or shape[-1] % head_dim:
        raise ValueError(f"head_dim must divide base's last dimension {shape[-1]}, got {head_dim}")
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError(f"cos and sin must be given both or neither, got only {'sin' if cos is None else 'cos'}")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for a rotary embedding, got {head_dim}")
    row = (*shape[:-1], head_dim)
    if not (fits(cos, row, device) and fits(sin, row, device)):
        wanted = "[B, T, head_dim] or [1, T, head_dim]" if len(shape) == 3 else "[N, head_dim] or [1, head_dim]"
        check_fits("cos", cos, (row, (1, *row[1:])), wanted, device, "base")
        check_fits("sin", sin, (row, (1, *row[1:])), wanted, device, "base")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        name = "cos" if cos.requires_grad else "sin"
        raise ValueError(f"{name} must not require grad: there is no gradient for it")
    if out is not None:
        check_apart("out", out, ("cos", "sin"), (cos, sin))
