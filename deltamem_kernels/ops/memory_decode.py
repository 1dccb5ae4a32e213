"""`memory_decode`: one decoding step of a layer's memory, from hidden states to the corrected query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..backends.arithmetic import accumulation_dtype
from ._checks import (
    check_backend,
    check_device,
    check_fits,
    check_float,
    check_indices,
    check_int,
    check_mode,
    check_once,
    describe,
    fail,
)
from ._library import define, library, nobody_listens
from ._memory import check_apart, check_writable
from .attention_correction import check_options
from .attention_correction_norm_rope import check_head_dim, check_heads
from .memory_projection import check as check_projection


class MemoryDecode(NamedTuple):
    """What `memory_decode` returns."""

    reads: Tensor
    """`[N, H, R]`, or `[N, 1, H, R]`; float32, or float64 where an operand of the projection is."""
    corrected: Tensor | None
    """The corrected base, in its shape; `out` if it was given; None without a base."""


def memory_decode(
    state: Tensor,
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
    state_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    base: Tensor | None = None,
    delta_weight: Tensor | None = None,
    scale: float | Tensor = 1.0,
    head_dim: int | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> MemoryDecode:
    """One token for each of many requests, all that an attention layer does with δ-mem's memory (arXiv 2605.12357)
    before attention: `memory_projection`, `delta_step` on the pool in place and, where `base` is given, the corrected
    query, by `attention_correction` or, with head_dim, `attention_correction_norm_rope`. The output's correction
    follows attention, from the reads. It has no gradient.

    One call into C++ on a CPU; on a GPU with Triton two launches, one without base. The least that has to be moved is
    the weights, read once for all rows of a small batch: at D = 576, R = 8 in float32 74 KB, 18 KB more for the
    query's, and 0.5 KB a row for its state, read and written.

    Args:
        state: the pool, `[slots, H, R, R]`, updated in place; dtypes and strides as in `delta_step`.
        x: hidden states, `[N, D]`, or `[N, 1, D]` as a layer has them: then base, cos, sin, out and the results have
            that dimension too.
        qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize: as in `memory_projection`.
        mode: as in `delta_update`. There is no decay_weight in "no_lambda".
        state_indices: `[N]` int32 or int64, the slot of each row, no two the same; None means slot n for row n.
        pad_slot_id: a row whose slot is this reads zeros and touches no state; its base is corrected by zeros.
        base: `[N, Dq]`, the output of the query's projection, or another to correct; None corrects nothing.
        delta_weight: `[Dq, H·R]`, given with base.
        scale, norm_weight, norm_eps: as in `attention_correction`.
        head_dim, cos, sin: as in `attention_correction_norm_rope`, where norm_weight is `[head_dim]`. head_dim of None
            means no heads: then there are no cos and sin, and norm_weight is `[Dq]`.
        out: where the corrected base goes, of base's shape and dtype; `out=base` corrects in place. None allocates.
        backend: as in `delta_update`.

    Returns:
        MemoryDecode: reads and corrected. On `cpu` and `triton` a row has the same bits whatever the others are; where
        PyTorch's matrix product runs, the last bit may depend on their number.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything runs. On the CPU also a slot outside of
            the pool; on a GPU that is not looked at.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    check_once(
        _checked, _check, state, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize,
        mode, state_indices, pad_slot_id, base, delta_weight, scale, head_dim, norm_weight, norm_eps, cos, sin, out,
        backend,
    )  # fmt: skip
    gain, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    decode = decode_unchecked if nobody_listens(x) else torch.ops.deltamem_kernels.memory_decode
    reads, corrected = decode(
        state, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, state_indices,
        None if out is base else base, delta_weight, gain, norm_weight, cos, sin, out, heads, normalize, mode,
        pad_slot_id, factor, float(norm_eps), head_dim or 0, backend or "",
    )  # fmt: skip
    return MemoryDecode(reads, None if base is None else corrected if out is None else out)


_checked: set[bytes] = set()


def _check(state, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, mode,
           state_indices, pad_slot_id, base, delta_weight, scale, head_dim, norm_weight, norm_eps, cos, sin, out,
           backend):  # fmt: skip
    check_projection(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize)
    _check_step(state, x, qkv_weight, decay_weight, heads, mode, state_indices)
    check_int("pad_slot_id", pad_slot_id)
    if base is None:
        _check_no_base(delta_weight, scale, norm_weight, head_dim, cos, sin, out)
    else:
        width = qkv_weight.shape[0] // 3
        _check_base(x, base, delta_weight, scale, head_dim, norm_weight, norm_eps, cos, sin, out, width)
    if torch.is_grad_enabled():
        operands = (state, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, base, delta_weight, scale)
        for operand in (*operands, norm_weight, cos, sin, out):
            if isinstance(operand, Tensor) and operand.requires_grad:
                raise ValueError("memory_decode has no gradient: call it under torch.no_grad()")
    check_writable("state", state, ("x", "base"), (x, base))
    if out is not None:
        check_apart("out", out, ("state",), (state,))
    if backend is not None:
        check_backend(backend)


def _check_step(state, x, qkv_weight, decay_weight, heads, mode, state_indices) -> None:
    shape, device = x.shape, x.device
    if len(shape) == 3 and shape[1] != 1:
        fail(ValueError, "x", "[N, D] or [N, 1, D]", x)
    check_mode(mode)
    if mode == "no_lambda" and decay_weight is not None:
        fail(ValueError, "decay_weight", "None in mode 'no_lambda', which keeps everything (λ = 1)", decay_weight)
    rank = qkv_weight.shape[0] // (3 * heads)
    check_float("state", state, "[slots, H, R, R]")
    slots, *rest = state.shape or (0,)
    if rest != [heads, rank, rank]:
        fail(ValueError, "state", f"[slots, H, R, R] = [slots, {heads}, {rank}, {rank}]", state)
    if state.device != device:
        check_device("state", state, device, "x")
    if state_indices is None:
        if slots < shape[0]:
            raise ValueError(f"state must have a slot for each of the N={shape[0]} rows, got {describe(state)}")
        return
    check_indices("state_indices", state_indices, ((shape[0],),), "[N]", device, "x")


def _check_no_base(delta_weight, scale, norm_weight, head_dim, cos, sin, out) -> None:
    given = {"delta_weight": delta_weight, "norm_weight": norm_weight, "head_dim": head_dim, "cos": cos, "sin": sin}
    for name, value in (given | {"out": out}).items():
        if value is not None:
            fail(ValueError, name, "None without a base to correct", value)
    if isinstance(scale, Tensor) or scale != 1:
        fail(ValueError, "scale", "1 without a base to correct", scale)


def _check_base(x, base, delta_weight, scale, head_dim, norm_weight, norm_eps, cos, sin, out, width) -> None:
    check_float("base", base, "[N, Dq]")
    shape, device = base.shape, x.device
    if shape[:-1] != x.shape[:-1] or not shape:
        n = f"[N, Dq] with x's N={x.shape[0]}" if x.ndim == 2 else f"[N, 1, Dq], as x is, with N={x.shape[0]}"
        fail(ValueError, "base", n, base)
    if base.device != device:
        check_device("base", base, device, "x")
    check_fits("delta_weight", delta_weight, ((shape[-1], width),), "[Dq, H·R]", device, "x")
    if head_dim is not None:
        check_head_dim(head_dim)
    elif cos is not None or sin is not None:
        raise ValueError("head_dim must be given with cos and sin, got None")
    check_options(base, shape, device, None, delta_weight, scale, norm_weight, norm_eps, out, head_dim, "delta_weight")
    if head_dim is not None:
        check_heads(base, shape, device, head_dim, cos, sin, out)


# Of base and out the one that is None is the other: base of None is corrected in place. `corrected` is empty where out
# holds the result, or there is none. `rule` is the mode, see delta_step.
define(
    "memory_decode(Tensor(a!) state, Tensor x, Tensor qkv_weight, Tensor beta_weight, Tensor? beta_bias, "
    "Tensor? decay_weight, Tensor? decay_bias, Tensor? state_indices, Tensor? base, Tensor? delta_weight, "
    "Tensor? gain, Tensor? norm_weight, Tensor? cos, Tensor? sin, Tensor(b!)? out, int heads, bool normalize, "
    "str rule, int pad_slot_id, float scale, float norm_eps, int head_dim, str backend) "
    "-> (Tensor reads, Tensor corrected)"
)


def decode_unchecked(state, x, *operands):
    *operands, backend = operands
    results = choose(backend, x.device).memory_decode(state, x, *operands)
    out = operands[12]
    # A kernel's writing is not seen by itself.
    torch.autograd.graph.increment_version(state if out is None else (state, out))
    return results


def _decode_fake(state, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, state_indices, base,
                 delta_weight, gain, norm_weight, cos, sin, out, heads, *options):  # fmt: skip
    if x.device.type == "meta":  # no kernel will run, a backend that could not is refused all the same
        choose(options[-1], x.device)
    dtype = accumulation_dtype(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias)
    reads = x.new_empty((*x.shape[:-1], heads, qkv_weight.shape[0] // (3 * heads)), dtype=dtype)
    return reads, x.new_empty((0,)) if base is None or out is not None else base.new_empty(base.shape)


library.impl("memory_decode", decode_unchecked, "CompositeExplicitAutograd")
torch.library.register_fake("deltamem_kernels::memory_decode", _decode_fake, lib=library)
