"""`attention_correction`: the memory's reads, added to the output of a projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import choose
from ..backends.eager import eager
from ..operands import CorrectionOperands
from ..operands.checks import check_backend, requires_grad
from ..operands.correction import split_scale
from .differentiation import first_order, refuse_tangents
from .operators import arguments, check_fake, define, empty_like_needed, mark_written, present, where_needed


def attention_correction(
    base: Tensor,
    reads: Tensor,
    weight: Tensor,
    scale: float | Tensor = 1.0,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Correct the output of a projection by the memory's reads (δ-mem, arXiv 2605.12357): `base + u` with
    `u = scale · reads Wᵀ`, or `base + RMSNorm(u) · norm_weight` with a norm over all of D.

    Args:
        base: `[B, T, D]`, or `[N, D]` for decoding. float16, bfloat16, float32 or float64, any strides, such as a slice
            of a fused projection.
        reads: `[B, T, H, R]` (`[N, H, R]`), or without H for one head; any float dtype, any strides.
        weight: `[D, H·R]`, any float dtype, any strides.
        scale: a number, or a tensor without dimensions on base's device (a trained scale), which is not read back.
        norm_weight: `[D]`, any float dtype; None means no norm.
        norm_eps: added to the mean square before the root.
        out: gets the result: of base's shape and dtype. `out=base` corrects in place; any other tensor must not share
            memory with an operand. None allocates.
        backend: as in `delta_update`.

    Returns:
        The corrected tensor, in base's shape and dtype; `out` if it was given. The arithmetic is float32, or float64 if
        an operand is float64. Results are bitwise deterministic, and a row does not depend on the others.

    First-order gradients for base, reads, weight, norm_weight and a tensor scale, also with out, which then becomes
    part of the graph as after any in-place operation. Backward keeps reads, weight, norm_weight and scale, nothing of
    base, and no tensor of the size of the correction.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has run.
        RuntimeError: out is a leaf that requires grad, or a view of one, and gradients are recorded.
        NotImplementedError: an operand carries a tangent of forward-mode differentiation.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    gain, factor = split_scale(scale)
    operands = CorrectionOperands(base, reads, weight, gain, norm_weight, None, None, factor, norm_eps, 0)
    result = None if is_compiling() else eager.correct(operands, out, backend)
    if isinstance(result, Tensor):
        return result
    if result is None:
        operands.check(out)
        check_backend(backend)
        refuse_tangents("attention_correction", (*operands, out))
    return run_correction(operands, out, backend)


def run_correction(operands: CorrectionOperands, out: Tensor | None, backend: str | None) -> Tensor:
    """Run the operator for operands that have been checked, of either form of the correction."""
    base, *rest = operands
    assert base is not None
    backend = backend or ""
    in_place = out is base
    if requires_grad(operands):
        if in_place and operands.norm_over_heads:
            raise ValueError("out must not be base where there is a norm and gradients are recorded, which need base")
        if out is None or is_compiling():  # the compiler fuses the copy
            result = _Correct.apply(base, None, *rest, backend, False)
            return result if out is None else out.copy_(result)
        return _Correct.apply(out, None if in_place else base, *rest, backend, True)
    if out is None:
        return torch.ops.deltamem_kernels.correct(*operands, backend)
    torch.ops.deltamem_kernels.correct_into(out, None if in_place else base, *rest, backend)
    return out


def _correct(*fields):
    *fields, backend = fields
    operands = CorrectionOperands(*fields)
    return choose(backend, operands.base.device).correct(operands, None)


def _correct_into(out, base, *fields):
    *fields, backend = fields
    operands = CorrectionOperands(out if base is None else base, *fields)
    choose(backend, out.device).correct(operands, out)
    mark_written(out)


def _backward(d_out, *fields):
    *fields, backend, needs = fields
    return present(choose(backend, d_out.device).correct_backward(CorrectionOperands(*fields), d_out, needs))


def _correct_fake(*fields):
    *fields, backend = fields
    base = CorrectionOperands(*fields).base
    check_fake(backend, base)
    return base.new_empty(base.shape)


def _correct_into_fake(*fields):
    return None


def _backward_fake(d_out, *fields):
    *fields, _backend, needs = fields
    return empty_like_needed((d_out, *CorrectionOperands(*fields).differentiable[1:]), needs)


_OPERANDS = f"{arguments(CorrectionOperands)}, str backend"
define("correct", f"({_OPERANDS}) -> Tensor", _correct, _correct_fake)
# A base of None means that out holds it: what is written is one argument.
define("correct_into", f"(Tensor(a!) out, {_OPERANDS}) -> ()", _correct_into, _correct_into_fake)
define("correct_backward", f"(Tensor d_out, {_OPERANDS}, bool[] needs) -> Tensor[]", _backward, _backward_fake)


class _Correct(torch.autograd.Function):
    """The first argument is base, or the tensor that is written in place; then base is the second one, or None if they
    are the same. When a view is written, autograd requires that tensor to be the first argument."""

    @staticmethod
    def forward(ctx, first, base, *fields):
        *operands, backend, written = fields
        _, _, _, norm_weight, *_, head_dim = operands
        ctx.options = (*operands[6:], backend)
        ctx.set_materialize_grads(False)
        base_for_norm = (first if base is None else base) if head_dim and norm_weight is not None else None
        if written:
            torch.ops.deltamem_kernels.correct_into(first, base, *operands, backend)
            ctx.mark_dirty(first)
        ctx.save_for_backward(base_for_norm, *operands[:6])
        return first if written else torch.ops.deltamem_kernels.correct(first, *operands, backend)

    @staticmethod
    @first_order("attention_correction")
    def backward(ctx, saved, d_out):
        needs_first, needs_base, *needs_rest = ctx.needs_input_grad[:6]
        if d_out is None:
            return (None,) * 13
        needs, d_base = [needs_first or needs_base, *needs_rest], None
        head_dim = ctx.options[2]
        if not head_dim and needs[0]:
            d_base, needs[0] = d_out, False
        grads = []
        if any(needs):
            grads = torch.ops.deltamem_kernels.correct_backward(d_out, *saved, *ctx.options, needs)
        computed, *rest = where_needed(grads, needs)
        d_base = computed if d_base is None else d_base
        return *((None, d_base) if needs_base else (d_base, None)), *rest, *(None,) * 7
