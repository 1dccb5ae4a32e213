"""`memory_projection`: from hidden states to what the memory is read and written with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import choose
from ..backends.arithmetic import accumulation_dtype
from ._checks import MAX_RANK, check_backend, check_bool, check_device, check_fits, check_float, check_once, fail, fits
from ._library import define, library, nobody_listens


class MemoryProjection(NamedTuple):
    """What `memory_projection` returns, float32 (float64 where an operand is): what `delta_update` takes."""

    q: Tensor
    """`[B, T, H, R]`, as are k and v."""
    k: Tensor
    v: Tensor
    beta: Tensor
    """`[B, T, H, R]` where beta_weight has H·R rows, `[B, T, H]` where it has H."""
    decay: Tensor | None
    """Likewise; None without a decay_weight."""


def memory_projection(
    x: Tensor,
    qkv_weight: Tensor,
    beta_weight: Tensor,
    beta_bias: Tensor | None,
    decay_weight: Tensor | None = None,
    decay_bias: Tensor | None = None,
    *,
    heads: int = 1,
    normalize: bool = True,
    backend: str | None = None,
) -> MemoryProjection:
    """Projects hidden states to the operands of δ-mem's memory (arXiv 2605.12357), in one pass over x.

    Per token and head::

        q = l2norm(tanh(Wq x))    k = l2norm(tanh(Wk x))    v = Wv x        l2norm(y) = y / max(|y|, 1e-6)
        β = sigmoid(Wβ x + bβ)    λ = sigmoid(Wλ x + bλ)

    Args:
        x: hidden states, `[B, T, D]`, or `[N, D]` for decoding, whose results then have no T. float16, bfloat16,
            float32 or float64, as for the weights and biases, mixed as you like, any strides.
        qkv_weight: `[3·H·R, D]`, the rows of q, then k, then v; of each, R for a head. R from 1 to 128.
        beta_weight: `[H·R, D]`, a gate for each state row, or `[H, D]`, one for each head.
        beta_bias: as many numbers as beta_weight has rows; None means zeros.
        decay_weight, decay_bias: λ's, in either of beta's shapes; None where λ is not projected (it is 1 - β, or 1).
        heads: H.
        normalize: False leaves out tanh and l2norm: q = Wq x, k = Wk x.
        backend: as in `delta_update`.

    Returns:
        MemoryProjection: q, k, v, beta, decay. Products and sums are float32 whatever the operands, float64 where one
        is float64, and so are the results: they are small, and the memory's arithmetic goes on from there.
        Differentiable once in x, every weight and every bias, any subset of them. Backward keeps the results, 2·H norms
        a token and, only where a weight wants its gradient, x.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything runs.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    operands = (x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias)
    check_once(_checked, check, *operands, heads, normalize)
    if backend is not None:
        check_backend(backend)
    return run(*operands, heads, normalize, backend)


def run(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, backend) -> MemoryProjection:
    """Of checked operands."""
    operands = (x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias)
    if torch.is_grad_enabled() and any(o is not None and o.requires_grad for o in operands):
        q, k, v, beta, decay = _MemoryProjection.apply(*operands, heads, normalize, backend or "")
    else:
        project = _forward if nobody_listens(x) else torch.ops.deltamem_kernels.memory_projection
        q, k, v, beta, decay, _ = project(*operands, heads, normalize, backend or "")
    return MemoryProjection(q, k, v, beta, None if decay_weight is None else decay)


_checked: set[bytes] = set()


def check(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize) -> None:
    check_float("x", x, "[B, T, D] or [N, D]")
    shape, device = x.shape, x.device
    if len(shape) not in (2, 3):
        fail(ValueError, "x", "[B, T, D] or [N, D]", x)
    if not isinstance(heads, int) or isinstance(heads, bool):
        fail(TypeError, "heads", "an int, the number of heads H", heads)
    if heads < 1:
        raise ValueError(f"heads must be at least 1, got {heads}")
    check_bool("normalize", normalize)
    check_float("qkv_weight", qkv_weight, "[3·H·R, D]")
    if qkv_weight.ndim != 2 or qkv_weight.shape[1] != shape[-1]:
        fail(ValueError, "qkv_weight", f"[3·H·R, D] with x's D={shape[-1]}", qkv_weight)
    rows, width = qkv_weight.shape
    if rows % (3 * heads) or not 1 <= rows // (3 * heads) <= MAX_RANK:
        fail(ValueError, "qkv_weight", f"[3·H·R, D] with H={heads} and R from 1 to {MAX_RANK}", qkv_weight)
    if qkv_weight.device != device:
        check_device("qkv_weight", qkv_weight, device, "x")
    _check_gate("beta", beta_weight, beta_bias, rows // 3, width, heads, device)
    if decay_weight is not None:
        _check_gate("decay", decay_weight, decay_bias, rows // 3, width, heads, device)
    elif decay_bias is not None:
        fail(ValueError, "decay_bias", "None without a decay_weight", decay_bias)


def _check_gate(name, weight, bias, rows, width, heads, device) -> None:
    if not fits(weight, (rows, width), device):
        shapes = ((rows, width), (heads, width))
        check_fits(f"{name}_weight", weight, shapes, "[H·R, D] or [H, D]", device, "x")
        rows = weight.shape[0]
    if bias is not None and not fits(bias, (rows,), device):
        check_fits(f"{name}_bias", bias, ((rows,),), f"of as many numbers as {name}_weight has rows", device, "x")


# The operators. A decay that is not projected, and norms that are not taken, are empty tensors.

define(
    "memory_projection(Tensor x, Tensor qkv_weight, Tensor beta_weight, Tensor? beta_bias, Tensor? decay_weight, "
    "Tensor? decay_bias, int heads, bool normalize, str backend) "
    "-> (Tensor q, Tensor k, Tensor v, Tensor beta, Tensor decay, Tensor norms)"
)
define(
    "memory_projection_backward(Tensor? d_q, Tensor? d_k, Tensor? d_v, Tensor? d_beta, Tensor? d_decay, Tensor? x, "
    "Tensor qkv_weight, Tensor beta_weight, Tensor? beta_bias, Tensor? decay_weight, Tensor? decay_bias, Tensor q, "
    "Tensor k, Tensor beta, Tensor decay, Tensor norms, ScalarType x_dtype, str backend, bool[] needs) -> Tensor[]"
)


def _forward(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, backend):
    return choose(backend, x.device).memory_projection_forward(
        x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize
    )


def _backward(*operands):
    *operands, backend, needs = operands
    grads = choose(backend, operands[6].device).memory_projection_backward(*operands, needs)
    return [g for g in grads if g is not None]


def forward_fake(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, backend):
    if x.device.type == "meta":  # no kernel will run, a backend that could not is refused all the same
        choose(backend, x.device)
    dtype = accumulation_dtype(x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias)
    tokens, rank = x.shape[:-1], qkv_weight.shape[0] // (3 * heads)

    def gate(weight):
        return (*tokens, heads, rank) if weight.shape[0] == heads * rank else (*tokens, heads)

    rows = (*tokens, heads, rank)
    shapes = [rows, rows, rows, gate(beta_weight), (0,) if decay_weight is None else gate(decay_weight)]
    shapes.append((2, *tokens, heads) if normalize else (0,))
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _backward_fake(d_q, d_k, d_v, d_beta, d_decay, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias,
                   q, k, beta, decay, norms, x_dtype, backend, needs):  # fmt: skip
    parameters = (qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias)
    grads = [w.new_empty(w.shape) for w, need in zip(parameters, needs[1:], strict=True) if need]
    return [q.new_empty((*q.shape[:-2], qkv_weight.shape[1]), dtype=x_dtype)] * needs[0] + grads


class _MemoryProjection(torch.autograd.Function):
    """Around the operator and not registered with it: a call that needs no gradient then skips autograd."""

    @staticmethod
    def forward(ctx, x, qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias, heads, normalize, backend):
        parameters = (qkv_weight, beta_weight, beta_bias, decay_weight, decay_bias)
        q, k, v, beta, decay, norms = torch.ops.deltamem_kernels.memory_projection(
            x, *parameters, heads, normalize, backend
        )
        trained = any(ctx.needs_input_grad[i] for i in (1, 2, 4))
        ctx.save_for_backward(x if trained else None, *parameters, q, k, beta, decay, norms)
        ctx.x_dtype, ctx.backend = x.dtype, backend
        ctx.set_materialize_grads(False)
        return q, k, v, beta, decay

    @staticmethod
    @once_differentiable
    def backward(ctx, d_q, d_k, d_v, d_beta, d_decay):
        needs = list(ctx.needs_input_grad[:6])
        grads = iter(
            torch.ops.deltamem_kernels.memory_projection_backward(
                d_q, d_k, d_v, d_beta, d_decay, *ctx.saved_tensors, ctx.x_dtype, ctx.backend, needs
            )
        )
        return *(next(grads) if need else None for need in needs), *(None,) * 3


library.impl("memory_projection", _forward, "CompositeExplicitAutograd")
library.impl("memory_projection_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("deltamem_kernels::memory_projection", forward_fake, lib=library)
torch.library.register_fake("deltamem_kernels::memory_projection_backward", _backward_fake, lib=library)
