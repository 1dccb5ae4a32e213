"""`delta_step`: one token, or a few drafted ones, for each of many requests, on a pool of states."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import choose
from ._checks import (
    MAX_RANK,
    check_backend,
    check_bool,
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
from ._memory import check_writable


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
            strides, but expanded only where it is not updated. Row = value, column = key. Updated in place, never
            copied.
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
        out: where the reads go: q's shape, any float dtype, any strides; under no operand and not expanded. None
            allocates them in q's dtype.
        backend: as in `delta_update`.

    Returns:
        The reads, of q's shape; `out` if it was given.

    Raises:
        TypeError, ValueError: an argument that does not fit, before anything runs. With `cpu` and
            `reference` also a slot outside of the pool; the others do not look at that.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.
    """
    check_once(
        _checked, _check, state, q, k, v, beta, decay, mode, state_indices, pad_slot_id, num_accepted_tokens,
        intermediate_states, update_state, out,
    )  # fmt: skip
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


def _check(state, q, k, v, beta, decay, mode, state_indices, pad_slot_id, num_accepted_tokens, intermediate_states,
           update_state, out) -> None:  # fmt: skip
    check_float("q", q, "[N, H, R] or [N, T, H, R]")
    shape, device = q.shape, q.device
    if len(shape) not in (3, 4):
        fail(ValueError, "q", "[N, H, R] or [N, T, H, R]", q)
    heads, rank = shape[-2:]
    if not 1 <= rank <= MAX_RANK:
        fail(ValueError, "q", f"of rank R from 1 to {MAX_RANK} in its last dimension", q)
    check_fits("k", k, (tuple(shape),), "of q's shape", device, "q")
    check_fits("v", v, (tuple(shape),), "of q's shape", device, "q")
    if out is not None:
        check_fits("out", out, (tuple(shape),), "of q's shape", device, "q")
    check_mode(mode)
    if mode == "no_lambda" and decay is not None:
        fail(ValueError, "decay", "None in mode 'no_lambda', which keeps everything (λ = 1)", decay)
    gates = (tuple(shape), tuple(shape[:-1]))
    check_fits("beta", beta, gates, "[N, (T,) H, R] or [N, (T,) H]", device, "q")
    if decay is not None:
        check_fits("decay", decay, gates, "[N, (T,) H, R] or [N, (T,) H]", device, "q")
    check_float("state", state, "[slots, H, R, R]")
    if state.ndim != 4 or state.shape[1:] != (heads, rank, rank):
        fail(ValueError, "state", f"[slots, H, R, R] = [slots, {heads}, {rank}, {rank}]", state)
    if state.device != device:
        check_device("state", state, device)
    if intermediate_states is not None:
        states = (*shape[:-2], heads, rank, rank)
        check_fits("intermediate_states", intermediate_states, (states,), "[N, (T,) H, R, R]", device, "q")
    if torch.is_grad_enabled() and (
        (q.requires_grad or k.requires_grad or v.requires_grad or beta.requires_grad or state.requires_grad)
        or any(x is not None and x.requires_grad for x in (decay, out, intermediate_states))
    ):
        raise ValueError("delta_step has no gradient: call it under torch.no_grad(), or delta_update for training")
    _check_slots(shape, device, state, state_indices, num_accepted_tokens)
    check_int("pad_slot_id", pad_slot_id)
    check_bool("update_state", update_state)
    names, operands = ("q", "k", "v", "beta", "decay"), (q, k, v, beta, decay)
    if update_state:
        check_writable("state", state, names, operands)
    if intermediate_states is not None:
        check_writable("intermediate_states", intermediate_states, names, operands)
    if out is not None:
        check_writable("out", out, (*names, "state", "intermediate_states"), (*operands, state, intermediate_states))


def _check_slots(shape, device, state, state_indices, num_accepted_tokens) -> None:
    rows, tokens = shape[0], shape[1] if len(shape) == 4 else 1
    if state_indices is None:
        if state.shape[0] < rows:
            raise ValueError(f"state must have a slot for each of the N={rows} rows, got {describe(state)}")
    else:
        check_indices("state_indices", state_indices, ((rows,), (rows, tokens)), "[N] or [N, T]", device)
    if num_accepted_tokens is not None:
        check_indices("num_accepted_tokens", num_accepted_tokens, ((rows,),), "[N]", device)
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
