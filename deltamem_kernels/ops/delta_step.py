"""`delta_step`: one token, or a few drafted ones, for each of many requests, on a pool of states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ._checks import (
    FLOATS,
    INDICES,
    MAX_RANK,
    check_backend,
    check_device,
    check_float,
    check_mode,
    check_once,
    check_shape,
    describe,
    fail,
)
from ._library import define, library, nobody_listens


def delta_step(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    decay: Tensor | None = None,
    *,
    mode: str = "standard",
    state_indices: Tensor | None = None,
    pad_slot_id: int = -1,
    num_accepted_tokens: Tensor | None = None,
    intermediate_states: Tensor | None = None,
    update_state: bool = True,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Decodes: each row reads its state, then rewrites it in place, by the rule of `delta_update`.

    With `out` given it allocates nothing and never waits for the GPU: it can be captured in a CUDA graph. It has no
    gradient.

    Args:
        state: the pool, `[slots, H, R, R]`, float32 (or bfloat16, float16, float64: rounded when written), any
            strides. Row = value, column = key. Updated in place, never copied.
        q, k, v: `[N, H, R]`, or `[N, T, H, R]` for T tokens one after another.
        beta, decay, mode: as in `delta_update`, `[N, (T,) H, R]` or `[N, (T,) H]`.
        state_indices: int32 or int64. `[N]`: the slot of each row, which starts from it and leaves its last state
            there; None means slot n for row n. `[N, T]`: a slot for each drafted token, which gets the state after
            it; the row starts from the slot of the last token accepted before, see num_accepted_tokens. Rows must
            not share slots.
        pad_slot_id: a row whose (first) slot is this reads zeros and touches nothing; a later token whose slot is
            this leaves its state nowhere.
        num_accepted_tokens: `[N]` int32 or int64, from 1 to T, with `[N, T]` state_indices: how many tokens of the
            last call were accepted; the row starts from `state_indices[n, num_accepted_tokens[n] - 1]`. None means 1.
        intermediate_states: `[N, T, H, R, R]` (`[N, H, R, R]` without T), any float dtype: gets the state after each
            token. With update_state=False the pool stays as it is, and the caller puts the accepted state there.
        update_state: whether the pool is written.
        out: where the reads go: q's shape, any float dtype; None allocates them in q's dtype.
        backend: as in `delta_update`.

    Returns:
        The reads, of q's shape; `out` if it was given.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything runs. With `cpu` and
            `reference` also a slot outside of the pool; the others do not look at that.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    check_once(
        _checked,
        _check,
        state,
        q,
        k,
        v,
        beta,
        decay,
        mode,
        state_indices,
        num_accepted_tokens,
        intermediate_states,
        out,
    )
    if backend is not None:
        check_backend(backend)
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    step = _step if nobody_listens(q) else torch.ops.deltamem_kernels.delta_step
    step(
        state, q, k, v, beta, decay, state_indices, num_accepted_tokens, intermediate_states, out, mode, pad_slot_id,
        update_state, backend or "",
    )  # fmt: skip
    return out


_checked: set[bytes] = set()


def _check(state, q, k, v, beta, decay, mode, state_indices, num_accepted_tokens, intermediate_states, out) -> None:
    check_float("q", q, "[N, H, R] or [N, T, H, R]")
    shape, device = q.shape, q.device
    if len(shape) not in (3, 4):
        fail(ValueError, "q", "[N, H, R] or [N, T, H, R]", q)
    heads, rank = shape[-2:]
    if not 1 <= rank <= MAX_RANK:
        fail(ValueError, "q", f"of rank R from 1 to {MAX_RANK} in its last dimension", q)
    for name, x in (("k", k), ("v", v), ("out", out)):
        if not (isinstance(x, Tensor) and x.dtype in FLOATS and x.shape == shape and x.device == device):
            if x is None and name == "out":
                continue
            _refuse(name, x, (tuple(shape),), "of q's shape", device)
    check_mode(mode)
    if mode == "no_lambda" and decay is not None:
        fail(ValueError, "decay", "None in mode 'no_lambda', which keeps everything (λ = 1)", decay)
    for name, x in (("beta", beta), ("decay", decay)):
        if not (isinstance(x, Tensor) and x.dtype in FLOATS and x.shape == shape and x.device == device):
            if x is None and name == "decay":
                continue
            _refuse(name, x, (tuple(shape), tuple(shape[:-1])), "[N, (T,) H, R] or [N, (T,) H]", device)
    check_float("state", state, "[slots, H, R, R]")
    if state.ndim != 4 or state.shape[1:] != (heads, rank, rank):
        fail(ValueError, "state", f"[slots, H, R, R] = [slots, {heads}, {rank}, {rank}]", state)
    if state.device != device:
        check_device("state", state, device)
    if torch.is_grad_enabled() and (
        (q.requires_grad or k.requires_grad or v.requires_grad or beta.requires_grad or state.requires_grad)
        or any(x is not None and x.requires_grad for x in (decay, out, intermediate_states))
    ):
        raise ValueError("delta_step has no gradient: call it under torch.no_grad(), or delta_update for training")
    _check_slots(shape, device, state, state_indices, num_accepted_tokens)
    if intermediate_states is not None:
        _refuse(
            "intermediate_states",
            intermediate_states,
            ((*shape[:-2], heads, rank, rank),),
            "[N, (T,) H, R, R]",
            device,
        )


def _refuse(name, x, shapes, wanted, device) -> None:
    """Says what does not fit, if something does not: the usual operand was looked at in one expression before."""
    check_float(name, x, wanted)
    check_shape(name, x, shapes, wanted)
    check_device(name, x, device)


def _check_slots(shape, device, state, state_indices, num_accepted_tokens) -> None:
    rows, tokens = shape[0], shape[1] if len(shape) == 4 else 1
    if state_indices is None:
        if state.shape[0] < rows:
            raise ValueError(f"state must have a slot for each of the N={rows} rows, got {describe(state)}")
    else:
        if not isinstance(state_indices, Tensor) or state_indices.dtype not in INDICES:
            fail(TypeError, "state_indices", "an int32 or int64 tensor [N] or [N, T]", state_indices)
        check_shape("state_indices", state_indices, ((rows,), (rows, tokens)), "[N] or [N, T]")
        check_device("state_indices", state_indices, device)
    if num_accepted_tokens is not None:
        if not isinstance(num_accepted_tokens, Tensor) or num_accepted_tokens.dtype not in INDICES:
            fail(TypeError, "num_accepted_tokens", "an int32 or int64 tensor [N]", num_accepted_tokens)
        check_shape("num_accepted_tokens", num_accepted_tokens, ((rows,),), "[N]")
        check_device("num_accepted_tokens", num_accepted_tokens, device)
        if state_indices is None or state_indices.ndim != 2:
            raise ValueError(
                "num_accepted_tokens needs state_indices [N, T], a slot for each drafted token, got "
                + ("None" if state_indices is None else describe(state_indices))
            )


# `rule` is the mode: torch.compile calls operators that mutate with a keyword `mode` of its own.
define(
    "delta_step(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? decay, Tensor? state_indices, "
    "Tensor? num_accepted_tokens, Tensor(b!)? intermediate_states, Tensor(c!) out, str rule, int pad_slot_id, "
    "bool update_state, str backend) -> ()"
)


def _step(state, q, k, v, beta, decay, state_indices, num_accepted_tokens, intermediate_states, out, mode, pad_slot_id,
          update_state, backend):  # fmt: skip
    choose(backend, q.device).delta_step(
        state, q, k, v, beta, decay, state_indices, num_accepted_tokens, intermediate_states, out, mode, pad_slot_id,
        update_state,
    )  # fmt: skip
    # A kernel's writing is not seen by itself.
    torch.autograd.graph.increment_version([x for x in (state, out, intermediate_states) if x is not None])


def _step_fake(*arguments):
    return None


library.impl("delta_step", _step, "CompositeExplicitAutograd")
torch.library.register_fake("deltamem_kernels::delta_step", _step_fake, lib=library)
