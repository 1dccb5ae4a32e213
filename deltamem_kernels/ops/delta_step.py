"""`delta_step`: one token, or a few drafted ones, for each of many requests, on a pool of states."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends import choose
from ..backends.eager import eager
from ..operands import StepOperands
from ..operands.checks import check_backend, check_float
from .differentiation import refuse_tangents
from .operators import arguments, define, mark_written


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
    """Decode: each row reads its state in a pool, then updates it in place, by the rule of `delta_update`.

    With `out` given, the call allocates nothing and never waits for the GPU, so that a CUDA graph can capture it. It
    has no gradient.

    Args:
        state: the pool, `[slots, H, R, R]`, float32 (or bfloat16, float16, float64: rounded when written), any strides.
            It may be expanded only if update_state is False. Row = value, column = key. Updated in place, never copied.
        q, k, v: `[N, H, R]`, or `[N, T, H, R]` for T tokens one after another.
        beta, decay, mode: as in `delta_update`, `[N, (T,) H, R]` or `[N, (T,) H]`.
        state_indices: int32 or int64. `[N]`: the slot of each row, which starts from it and leaves its last state
            there; None means slot n for row n. `[N, T]`: a slot per drafted token, which gets the state after that
            token; the row starts from the slot of the last token accepted before, see num_accepted_tokens. Rows must
            not share slots.
        pad_slot_id: a row whose (first) slot is this reads zeros and touches nothing. The state after a later token
            whose slot is this is not stored.
        num_accepted_tokens: `[N]` int32 or int64, from 1 to T, with `[N, T]` state_indices: how many tokens of the
            last call were accepted. The row starts from `state_indices[n, num_accepted_tokens[n] - 1]`. None means 1.
        intermediate_states: `[N, T, H, R, R]` (`[N, H, R, R]` without T), any float dtype: gets the state after each
            token. With update_state=False the pool stays as it is, and the caller stores the accepted state.
        update_state: whether the pool is written.
        out: gets the reads: q's shape, any float dtype, any strides. It must not overlap an operand or itself. None
            allocates a tensor of q's dtype.
        backend: as in `delta_update`.

    Returns:
        The reads, of q's shape; `out` if it was given.

    Raises:
        TypeError, ValueError: an argument does not fit; nothing has run. On a CPU this includes a slot outside of the
            pool and a number of accepted tokens that is not from 1 to T. The kernels of `triton` and `cuda` do not
            raise for them: such a row is padding, and the state of a token with such a slot is not stored.
        NotImplementedError: an operand carries a tangent of forward-mode differentiation.
        BackendUnavailableError: the backend requested by name cannot run here.
    """
    if out is None:
        check_float("q", q, "[N, H, R] or [N, T, H, R]")
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    operands = StepOperands(
        state, q, k, v, beta, decay, state_indices, num_accepted_tokens, intermediate_states, out, mode, pad_slot_id,
        update_state,
    )  # fmt: skip
    done = None if is_compiling() else eager.step(operands, backend)
    if done is None:
        operands.check()
        check_backend(backend)
        refuse_tangents("delta_step", operands, "it has no gradient; use delta_update for training")
    if not done:
        torch.ops.deltamem_kernels.delta_step(*operands, backend or "")
    return out


def _step(*fields):
    *fields, backend = fields
    operands = StepOperands(*fields)
    choose(backend, operands.q.device).step(operands)
    mark_written(*operands.written)


def _step_fake(*fields):
    return None


define("delta_step", f"({arguments(StepOperands)}, str backend) -> ()", _step, _step_fake)
