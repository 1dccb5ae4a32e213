"""`attention_correction`: what the memory read, added to the output of a projection."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from ._checks import check_backend, check_device, check_fits, check_float, check_once, check_shape, fail
from ._library import define, library, nobody_listens
from ._memory import check_writable


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
    """Corrects the output of a projection by what the memory read (δ-mem, arXiv 2605.12357): `base + u`, with
    `u = scale · reads Wᵀ`; with norm_weight `base + RMSNorm(u) · norm_weight`, the norm over all of D.

    Args:
        base: `[B, T, D]`, or `[N, D]` for decoding. float16, bfloat16, float32 or float64, any strides: a slice of a
            fused projection will do.
        reads: `[B, T, H, R]` (`[N, H, R]`), or without H for one head; any float dtype, any strides.
        weight: `[D, H·R]`, any float dtype, any strides.
        scale: a number, or a tensor of no dimensions on base's device (a trained scale), whose value is not read back.
        norm_weight: `[D]`, any float dtype; None means no norm.
        norm_eps: added to the mean square before the root.
        out: where the result goes: of base's shape and dtype. `out=base` corrects in place; any other must not share
            memory with an operand. None allocates.
        backend: as in `delta_update`.

    Returns:
        The corrected tensor, in base's shape and dtype; `out` if it was given. The arithmetic is float32, float64
        where an operand is float64. Differentiable once in base, reads, weight, norm_weight and a tensor scale, also
        with out, which then becomes part of the graph as after any operation in place. Backward keeps reads, weight,
        norm_weight and scale, nothing of base, and no tensor of the size of the correction. The same bits on every
        run; a row does not depend on the others.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything runs.
        RuntimeError: out is a leaf that requires grad, or a view of one, and gradients are recorded.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    check_once(_checked, check, base, reads, weight, scale, norm_weight, norm_eps, out, backend)
    return run(base, reads, weight, scale, norm_weight, None, None, norm_eps, 0, out, backend)


_checked: set[bytes] = set()


def check(base, reads, weight, scale, norm_weight, norm_eps, out, backend, head_dim: int | None = None) -> None:
    """The arguments that both forms of the correction have; the norm is over head_dim, or over D where it is None."""
    check_float("base", base, "[B, T, D] or [N, D]")
    if base.ndim not in (2, 3):
        fail(ValueError, "base", "[B, T, D] or [N, D]", base)
    *leading, width = shape = base.shape
    device = base.device
    check_float("weight", weight, "[D, H·R]")
    if weight.ndim != 2 or weight.shape[0] != width or weight.shape[1] < 1:
        fail(ValueError, "weight", f"[D, H·R] = [{width}, H·R], H·R at least 1", weight)
    check_float("reads", reads, "[B, T, H, R] or [B, T, R]")
    *rows, last = reads.shape or (0,)
    if len(rows) == len(leading) + 1:
        last *= rows.pop()
    if rows != leading or last != weight.shape[1]:
        wanted = "[B, T, H, R] or [B, T, R]" if len(leading) == 2 else "[N, H, R] or [N, R]"
        of_weight = f"H·R = {weight.shape[1]} as weight has"
        fail(ValueError, "reads", f"{wanted}, {leading} as base has and {of_weight}", reads)
    if reads.device != device or weight.device != device:
        check_device("reads", reads, device, "base")
        check_device("weight", weight, device, "base")
    check_options(base, shape, device, reads, weight, scale, norm_weight, norm_eps, out, head_dim)
    if backend is not None:
        check_backend(backend)


def check_options(
    base, shape, device, reads, weight, scale, norm_weight, norm_eps, out, head_dim: int | None, weight_name="weight"
) -> None:
    """What follows the operands, which fit; reads that are still to be computed are None."""
    if type(scale) is not float:
        _check_scale(scale, device)
    if type(norm_eps) is not float and (isinstance(norm_eps, bool) or not isinstance(norm_eps, (int, float))):
        fail(TypeError, "norm_eps", "a number", norm_eps)
    if not norm_eps >= 0:
        fail(ValueError, "norm_eps", "at least 0", norm_eps)
    if norm_weight is not None:
        wanted, size = ("[D]", shape[-1]) if head_dim is None else ("[head_dim]", head_dim)
        check_fits("norm_weight", norm_weight, ((size,),), wanted, device, "base")
    if out is not None:
        if out is not base:
            _check_out(out, base)
        operands = (None if out is base else base, reads, weight, scale, norm_weight)
        check_writable("out", out, ("base", "reads", weight_name, "scale", "norm_weight"), operands)


def _check_scale(scale, device: torch.device) -> None:
    if isinstance(scale, Tensor):
        check_float("scale", scale, "of no dimensions")
        check_shape("scale", scale, ((),), "a number")
        check_device("scale", scale, device, "base")
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        fail(TypeError, "scale", "a number, or a tensor of no dimensions", scale)


def _check_out(out, base: Tensor) -> None:
    if not isinstance(out, Tensor) or out.dtype != base.dtype or out.layout is not torch.strided:
        fail(TypeError, "out", f"a dense {str(base.dtype).removeprefix('torch.')} tensor, as base is", out)
    check_shape("out", out, (tuple(base.shape),), "of base's shape")
    check_device("out", out, base.device, "base")


# The operators. `gain` is the scale where that is a tensor. head_dim 0 means that the norm is over the correction;
# else it is over each head of the corrected tensor, and the rotary follows. What is written is one argument: a base of
# None means that out holds it.

_OPERANDS = "Tensor reads, Tensor weight, Tensor? gain, Tensor? norm_weight, Tensor? cos, Tensor? sin, "
_OPTIONS = "float scale, float norm_eps, int head_dim, str backend"
define(f"correct(Tensor base, {_OPERANDS}{_OPTIONS}) -> Tensor")
define(f"correct_into(Tensor(a!) out, Tensor? base, {_OPERANDS}{_OPTIONS}) -> ()")
define(f"correct_backward(Tensor d_out, Tensor? base, {_OPERANDS}{_OPTIONS}, bool[] needs) -> Tensor[]")


def _correct(base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, backend):
    return choose(backend, base.device).correct(
        base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, None
    )


def correct_into_unchecked(out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, backend):
    choose(backend, out.device).correct(
        out if base is None else base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, out
    )
    torch.autograd.graph.increment_version(out)  # a kernel's writing is not seen by itself


def _backward(
    d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, backend, needs
):  # fmt: skip
    grads = choose(backend, d_out.device).correct_backward(
        d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, needs
    )
    return [g for g in grads if g is not None]


def _correct_fake(base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, backend):
    if base.device.type == "meta":  # no kernel will run, a backend that could not is refused all the same
        choose(backend, base.device)
    return base.new_empty(base.shape)


def _correct_into_fake(*arguments):
    return None


def _backward_fake(
    d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, backend, needs
):  # fmt: skip
    operands = (d_out, reads, weight, gain, norm_weight)
    return [x.new_empty(x.shape) for x, need in zip(operands, needs, strict=True) if need]


class _Correct(torch.autograd.Function):
    """Around the operators, as in delta_update. `first` is base, written in place or not, or else the tensor that is
    written: what autograd makes of writing into a view of another tensor wants it before the other arguments."""

    @staticmethod
    def forward(ctx, first, base, reads, weight, gain, norm_weight, cos, sin, written, *options):
        operands = (reads, weight, gain, norm_weight, cos, sin)
        _, _, head_dim, _ = ctx.options = options
        ctx.set_materialize_grads(False)
        if written:
            torch.ops.deltamem_kernels.correct_into(first, base, *operands, *options)
            ctx.mark_dirty(first)
        normed = None
        if head_dim and norm_weight is not None:
            normed = first if base is None else base
        ctx.save_for_backward(normed, *operands)
        return first if written else torch.ops.deltamem_kernels.correct(first, *operands, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        if d_out is None:
            return (None,) * 13
        apart = ctx.needs_input_grad[1]
        needs = [ctx.needs_input_grad[0] or apart, *ctx.needs_input_grad[2:6]]
        d_base = None
        if not ctx.options[2] and needs[0]:
            d_base, needs[0] = d_out, False
        grads = []
        if any(needs):
            grads = torch.ops.deltamem_kernels.correct_backward(d_out, *ctx.saved_tensors, *ctx.options, needs)
        rest = iter(grads)
        results = [next(rest) if need else None for need in needs]
        d_base = results[0] if d_base is None else d_base
        return *((None, d_base) if apart else (d_base, None)), *results[1:], *(None,) * 7


def run(base, reads, weight, scale, norm_weight, cos, sin, norm_eps, head_dim, out, backend) -> Tensor:
    """Checked operands of either form."""
    gain, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    options = (factor, float(norm_eps), head_dim, backend or "")
    operands = (reads, weight, gain, norm_weight, cos, sin)
    in_place = out is base
    if torch.is_grad_enabled() and (
        base.requires_grad
        or reads.requires_grad
        or weight.requires_grad
        or (gain is not None and gain.requires_grad)
        or (norm_weight is not None and norm_weight.requires_grad)
    ):
        if in_place and head_dim and norm_weight is not None:
            raise ValueError("out must not be base where there is a norm and gradients are recorded, which need base")
        if out is None or torch.compiler.is_compiling():  # the compiler makes one pass of the copy
            result = _Correct.apply(base, None, *operands, False, *options)
            return result if out is None else out.copy_(result)
        return _Correct.apply(out, None if in_place else base, *operands, True, *options)
    direct = nobody_listens(base)
    if out is None:
        return (_correct if direct else torch.ops.deltamem_kernels.correct)(base, *operands, *options)
    into = correct_into_unchecked if direct else torch.ops.deltamem_kernels.correct_into
    into(out, None if in_place else base, *operands, *options)
    return out


library.impl("correct", _correct, "CompositeExplicitAutograd")
library.impl("correct_into", correct_into_unchecked, "CompositeExplicitAutograd")
library.impl("correct_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("deltamem_kernels::correct", _correct_fake, lib=library)
torch.library.register_fake("deltamem_kernels::correct_into", _correct_into_fake, lib=library)
torch.library.register_fake("deltamem_kernels::correct_backward", _backward_fake, lib=library)
