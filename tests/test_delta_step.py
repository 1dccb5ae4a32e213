"""delta_step: decoding on a pool of states, every backend against delta_update in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import MODES
from torch import Tensor

from deltamem_kernels import delta_step, delta_update
from deltamem_kernels.testing import FLOAT32_TOLERANCE, between_nans, memory_operands, relative_error

N, SLOTS, PAD = 5, 9, -1


def operands(T: int | None, H: int, R: int, *, device: str = "cpu", **gates: bool) -> dict[str, Tensor]:
    """Operands of N requests: one token without T, or T tokens."""
    return memory_operands((N, H) if T is None else (N, T, H), R, device=device, **gates)


def pool_of(H: int, R: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return a pool whose slots lie in pages of NaN, and the pages."""
    pages = torch.full((SLOTS, H * R * R + 7), float("nan"), dtype=dtype, device=device)
    pool = pages[:, 3 : 3 + H * R * R].view(SLOTS, H, R, R)
    pool.copy_(torch.randn(SLOTS, H, R, R))
    return pool, pages


def in_float64(pool: Tensor, slots: list[int], made: dict[str, Tensor], mode: str) -> tuple[Tensor, Tensor]:
    """Return reads and last states, from delta_update in float64."""
    made = {name: x.double().cpu() for name, x in made.items()}
    shape = made["q"].shape
    if len(shape) == 3:
        made = {name: x.unsqueeze(1) for name, x in made.items()}
    start = pool.double().cpu()[slots]
    out = delta_update(**made, mode=mode, initial_state=start, backend="reference")
    return out.reads.reshape(shape), out.final_state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("T", [None, 1, 3])
@pytest.mark.parametrize("R", [3, 4, 8, 16, 33])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_steps_on_a_paged_pool_are_exact_and_leave_other_slots_alone(implementation, mode, T, R, index_dtype):
    """Slots in any order and of any stride, one row padded. Other slots and the gaps between slots keep their bits."""
    H = 2 if R < 16 else 1
    gates = {"decay": R % 2 == 0 and mode != "no_lambda", "beta_per_head": R == 8}
    made = operands(T, H, R, device=implementation.device, **gates)
    pool, pages = pool_of(H, R, implementation.device)
    before = pages.clone()
    slots = torch.randperm(SLOTS)[:N].tolist()
    reads, states = in_float64(pool, slots, made, mode)
    slots[2] = PAD
    indices = torch.tensor(slots, dtype=index_dtype, device=implementation.device)
    ours = delta_step(pool, **made, mode=mode, state_indices=indices, backend=implementation.backend)
    live = [n for n in range(N) if n != 2]
    assert relative_error(ours[live], reads[live]) <= FLOAT32_TOLERANCE
    assert torch.count_nonzero(ours[2]) == 0
    for n in live:
        assert relative_error(pool[slots[n]], states[n]) <= FLOAT32_TOLERANCE
    untouched = [s for s in range(SLOTS) if s not in [slots[n] for n in live]]
    assert torch.equal(pages[untouched].nan_to_num(7.0), before[untouched].nan_to_num(7.0))
    assert pages[:, :3].isnan().all()
    assert pages[:, -4:].isnan().all()


def test_without_indices_row_n_uses_slot_n(implementation):
    made = operands(None, 1, 8, device=implementation.device)
    pool, _ = pool_of(1, 8, implementation.device)
    reads, states = in_float64(pool, list(range(N)), made, "standard")
    rest = pool[N:].clone()
    assert relative_error(delta_step(pool, **made, backend=implementation.backend), reads) <= FLOAT32_TOLERANCE
    assert relative_error(pool[:N], states) <= FLOAT32_TOLERANCE
    assert torch.equal(pool[N:], rest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pools_of_every_dtype_are_exact(implementation, dtype):
    """The arithmetic is float32, or float64 with a pool in float64. A 16-bit state is rounded when it is written."""
    made = operands(2, 1, 8, device=implementation.device)
    pool, _ = pool_of(1, 8, implementation.device, dtype)
    reads, states = in_float64(pool, list(range(N)), made, "standard")
    ours = delta_step(pool, **made, backend=implementation.backend)
    assert relative_error(ours, reads) <= FLOAT32_TOLERANCE
    rounding = implementation.rounding.get(dtype, 0) * torch.finfo(dtype).eps
    assert relative_error(pool[:N], states) <= (1e-13 if dtype == torch.float64 else 2e-7 + rounding)


def test_nothing_outside_of_strided_operands_is_read(implementation):
    made = {
        name: between_nans(x)
        for name, x in operands(3, 2, 8, decay=True, beta_per_head=True, device=implementation.device).items()
    }
    pool, _ = pool_of(2, 8, implementation.device)
    reads, _ = in_float64(pool, list(range(N)), made, "standard")
    out = between_nans(torch.zeros(made["q"].shape, dtype=torch.bfloat16, device=implementation.device))
    returned = delta_step(pool, **made, out=out, backend=implementation.backend)
    assert returned is out
    rounding = implementation.rounding[torch.bfloat16] * torch.finfo(torch.bfloat16).eps
    assert relative_error(out, reads) <= FLOAT32_TOLERANCE + rounding


@pytest.mark.parametrize("accepted", [1, 2, 4])
def test_rejected_drafts_leave_no_trace_in_a_slot_per_token(implementation, accepted):
    """To draft four tokens, accept some and go on is to go on from the accepted ones."""
    H, R, T = 2, 8, 4
    draft = operands(T, H, R, decay=True, device=implementation.device)
    after = operands(T, H, R, decay=True, device=implementation.device)
    start = torch.randn(N, H, R, R)
    pool = torch.full((N * T + 3, H, R, R), 5.0, device=implementation.device)
    slots = torch.randperm(N * T + 3)[: N * T].view(N, T).to(implementation.device)
    pool[slots[:, 0]] = start.to(implementation.device)
    options = {"state_indices": slots, "backend": implementation.backend}
    ones = torch.ones(N, dtype=torch.int32, device=implementation.device)
    delta_step(pool, **draft, num_accepted_tokens=ones, **options)
    again = delta_step(pool, **after, num_accepted_tokens=accepted * ones, **options)
    both = {name: torch.cat([draft[name][:, :accepted], after[name]], dim=1).double().cpu() for name in draft}
    never = delta_update(**both, initial_state=start.double(), backend="reference").reads[:, accepted:]
    assert relative_error(again, never) <= FLOAT32_TOLERANCE
    unused = [s for s in range(N * T + 3) if s not in slots.flatten().tolist()]
    assert (pool[unused] == 5.0).all()


@pytest.mark.parametrize("accepted", [1, 3])
def test_rejected_drafts_leave_no_trace_with_intermediate_states(implementation, accepted):
    H, R, T = 2, 8, 3
    draft = operands(T, H, R, decay=True, device=implementation.device)
    after = operands(T, H, R, decay=True, device=implementation.device)
    pool, pages = pool_of(H, R, implementation.device)
    before = pages.clone()
    start = pool[:N].clone()
    options = {"mode": "lambda_outside", "backend": implementation.backend}
    states = torch.empty(N, T, H, R, R, device=implementation.device)
    delta_step(pool, **draft, intermediate_states=states, update_state=False, **options)
    assert torch.equal(pages.nan_to_num(7.0), before.nan_to_num(7.0))
    pool[:N] = states[:, accepted - 1]
    again = delta_step(pool, **after, **options)
    both = {name: torch.cat([draft[name][:, :accepted], after[name]], dim=1).double().cpu() for name in draft}
    never = delta_update(**both, mode="lambda_outside", initial_state=start.double().cpu(), backend="reference")
    assert relative_error(again, never.reads[:, accepted:]) <= FLOAT32_TOLERANCE


def test_padded_rows_and_tokens_write_no_state(implementation):
    """A row whose first slot is the pad writes nothing. A later pad drops the state of that token."""
    made = operands(3, 1, 4, device=implementation.device)
    pool = torch.randn(20, 1, 4, 4, device=implementation.device)
    before = pool.clone()
    slots = torch.arange(15).view(5, 3).to(implementation.device)
    slots[1], slots[3, 2] = 99, 99
    reads = delta_step(pool, **made, state_indices=slots, pad_slot_id=99, backend=implementation.backend)
    assert torch.count_nonzero(reads[1]) == 0
    assert torch.count_nonzero(reads[3, 2]) > 0
    kept = [3, 4, 5, 11, *range(15, 20)]
    assert torch.equal(pool[kept], before[kept])
    changed = [s for s in range(15) if s not in kept]
    assert all(not torch.equal(pool[s], before[s]) for s in changed)


@pytest.mark.slow
def test_token_by_token_is_one_call_after_100_000_steps():
    """On a float32 pool the state does not drift from that of delta_update."""
    T, R = 100_000, 8
    made = {name: torch.nn.functional.normalize(torch.randn(1, T, 1, R), dim=-1) for name in ("q", "k", "v")}
    made["beta"] = torch.rand(1, T, 1, R)
    pool = torch.zeros(1, 1, R, R)
    reads = torch.empty(1, T, 1, R)
    with torch.inference_mode():
        for t in range(T):
            delta_step(pool, **{n: x[:, t] for n, x in made.items()}, out=reads[:, t], backend="cpu")
    once = delta_update(**made, backend="cpu")
    assert relative_error(pool, once.final_state) <= 1e-5
    assert relative_error(reads, once.reads) <= 1e-5


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torch_compile_sees_the_mutation_of_the_pool(backend):
    """A compiled decoding loop updates the pool as the eager one does."""

    def decode(pool: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, slots: Tensor) -> Tensor:
        first = delta_step(pool, q, k, v, beta, state_indices=slots, backend=backend)
        return first + delta_step(pool, q * 2, k, v, beta, state_indices=slots, backend=backend) + pool.sum()

    compiled = torch.compile(decode, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 4, 5):
        made = [x[:rows] for x in operands(None, 1, 8).values()]
        slots = torch.arange(rows)
        eager_pool = torch.randn(SLOTS, 1, 8, 8)
        compiled_pool = eager_pool.clone()
        with torch.no_grad():
            eager, ours = decode(eager_pool, *made, slots), compiled(compiled_pool, *made, slots)
        torch.testing.assert_close(ours, eager)
        assert torch.equal(compiled_pool, eager_pool)


@pytest.mark.parametrize(("T", "indices"), list(itertools.product([None, 2], [None, 1, 2])))
def test_the_operator_passes_opcheck(T, indices):
    made = operands(T, 1, 4)
    slots = (
        None
        if indices is None
        else torch.arange(N)
        if indices == 1 or T is None
        else torch.arange(SLOTS + 1).view(N, 2)
    )
    pool = torch.randn(SLOTS + 1, 1, 4, 4)
    states = torch.zeros(*made["q"].shape[:-2], 1, 4, 4)
    arguments = (
        pool,
        *made.values(),
        None,
        slots,
        None,
        states,
        torch.zeros_like(made["q"]),
        "standard",
        -1,
        True,
        "cpu",
    )
    torch.library.opcheck(torch.ops.deltamem_kernels.delta_step, arguments)


def good() -> dict:
    return {"state": torch.zeros(SLOTS, 1, 4, 4), **operands(2, 1, 4)}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"q": [1.0]}, TypeError, ["q must be a tensor", "list"]),
        ({"q": torch.zeros(N, 2, 1, 4, dtype=torch.int64)}, TypeError, ["q must be", "int64"]),
        ({"q": torch.zeros(N, 4)}, ValueError, ["q must be [N, H, R]", "[5, 4]"]),
        ({"k": torch.zeros(N, 2, 1, 5)}, ValueError, ["k must be of q's shape", "[5, 2, 1, 5]"]),
        ({"v": torch.zeros(N, 2, 1, 4, device="meta")}, ValueError, ["v must be on q's device", "meta"]),
        ({"beta": torch.zeros(N, 2, 4)}, ValueError, ["beta must be", "[5, 2, 4]"]),
        ({"decay": torch.zeros(N, 3, 1, 4)}, ValueError, ["decay must be", "[5, 3, 1, 4]"]),
        ({"decay": torch.zeros(N, 2, 1, 4), "mode": "no_lambda"}, ValueError, ["decay must be None", "no_lambda"]),
        ({"mode": "fast"}, ValueError, ["mode must be one of", "fast"]),
        ({"state": torch.zeros(SLOTS, 4, 4)}, ValueError, ["state must be [slots, H, R, R]", "[9, 4, 4]"]),
        ({"state": torch.zeros(SLOTS, 1, 4, 4, dtype=torch.int32)}, TypeError, ["state must be", "int32"]),
        ({"state": torch.zeros(3, 1, 4, 4)}, ValueError, ["state must have a slot for each of the N=5 rows"]),
        ({"state_indices": torch.zeros(N)}, TypeError, ["state_indices must be an int32 or int64", "float32"]),
        ({"state_indices": torch.zeros(4, dtype=torch.int64)}, ValueError, ["state_indices must be [N] or [N, T]"]),
        ({"state_indices": torch.arange(N) + 7}, ValueError, ["state_indices must be from 0 to 8", "got 9"]),
        ({"num_accepted_tokens": torch.ones(N, dtype=torch.int32)}, ValueError, ["num_accepted_tokens needs", "None"]),
        (
            {"state_indices": torch.arange(10).view(N, 2).clamp(max=8), "num_accepted_tokens": torch.full((N,), 3)},
            ValueError,
            ["num_accepted_tokens must be from 1 to T=2", "got 3"],
        ),
        ({"intermediate_states": torch.zeros(N, 1, 4, 4)}, ValueError, ["intermediate_states must be", "[5, 1, 4, 4]"]),
        ({"out": torch.zeros(N, 1, 4)}, ValueError, ["out must be of q's shape", "[5, 1, 4]"]),
        ({"q": torch.zeros(N, 2, 1, 4, requires_grad=True)}, ValueError, ["delta_step has no gradient"]),
        ({"backend": "gpu"}, ValueError, ["backend must be one of", "gpu"]),
        ({"pad_slot_id": None}, TypeError, ["pad_slot_id must be an int", "got NoneType None"]),
        ({"pad_slot_id": "x"}, TypeError, ["pad_slot_id must be an int", "got str 'x'"]),
        ({"pad_slot_id": 1.5}, TypeError, ["pad_slot_id must be an int", "got float 1.5"]),
        ({"pad_slot_id": True}, TypeError, ["pad_slot_id must be an int", "got bool True"]),
        ({"intermediate_states": [0.0]}, TypeError, ["intermediate_states must be a tensor", "got list"]),
        ({"update_state": None}, TypeError, ["update_state must be True or False", "got NoneType None"]),
        ({"update_state": 0}, TypeError, ["update_state must be True or False", "got int 0"]),
        *(
            ({name: torch.zeros(N, 2, 1, 4).to_sparse()}, TypeError, [f"{name} must be a dense tensor", "sparse_coo"])
            for name in ("q", "k", "v", "beta", "decay", "out")
        ),
        (
            {"state_indices": torch.arange(N).to_sparse()},
            TypeError,
            ["state_indices must be a dense tensor [N] or [N, T]", "got sparse_coo int64 [5]"],
        ),
        (
            {"state_indices": torch.arange(10).view(N, 2), "num_accepted_tokens": torch.ones(N).int().to_sparse()},
            TypeError,
            ["num_accepted_tokens must be a dense tensor [N]", "got sparse_coo int32 [5]"],
        ),
        ({"out": torch.zeros(N, 1, 1, 4).expand(N, 2, 1, 4)}, ValueError, ["out must be a tensor without internal"]),
        ({"state": torch.zeros(1, 1, 4, 4).expand(SLOTS, -1, -1, -1)}, ValueError, ["state must be a tensor without"]),
        (
            {"intermediate_states": torch.zeros(N, 1, 1, 4, 4).expand(N, 2, 1, 4, 4)},
            ValueError,
            ["intermediate_states must be a tensor without internal overlap, not an expanded one"],
        ),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_raise(change, exception, words, backend):
    call = good() | {"backend": backend} | change
    before = call["state"].clone()
    with pytest.raises(exception) as raised:
        delta_step(**call)
    for word in words:
        assert word in str(raised.value)
    assert torch.equal(call["state"], before)


@pytest.mark.parametrize("gradients", [False, True])
def test_written_tensors_that_overlap_an_operand_raise(gradients):
    """Also after a call that differs in nothing else, and where gradients could be recorded."""
    call = good() | {"decay": torch.rand(N, 2, 1, 4), "out": torch.zeros(N, 2, 1, 4)}
    call["intermediate_states"] = torch.zeros(N, 2, 1, 4, 4)
    with torch.set_grad_enabled(gradients):
        delta_step(**call)
        before = {name: x.clone() for name, x in call.items()}
        for name in ("q", "k", "v", "beta", "decay"):
            with pytest.raises(ValueError, match=f"out must not share memory with {name}, which is read while out is"):
                delta_step(**call | {"out": call[name]})
            with pytest.raises(ValueError, match=f"state must not share memory with {name}"):
                delta_step(**call | {name: call["state"].view(-1)[8:48].view(N, 2, 1, 4)})
            with pytest.raises(ValueError, match=f"intermediate_states must not share memory with {name}"):
                delta_step(**call | {name: call["intermediate_states"][..., 1]})
        for name in ("state", "intermediate_states"):
            with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
                delta_step(**call | {"out": call[name].view(-1)[-40:].view(N, 2, 1, 4)})
        assert all(torch.equal(x, before[name]) for name, x in call.items())


@pytest.mark.parametrize("T", [None, 1, 2])
def test_slices_of_one_storage_do_not_overlap(T):
    """The operands and reads are slices of a fused projection's rows. The states of a request are slices of a page."""
    H, R, leading = 2, 4, (N,) if T is None else (N, T)
    made = operands(T, H, R, decay=True)
    pool = torch.randn(N, H, R, R)
    states = torch.zeros(*leading, H, R, R)
    expected_pool, expected_states = pool.clone(), states.clone()
    expected = delta_step(expected_pool, **made, intermediate_states=expected_states)
    fused = torch.cat([*(x.flatten(-2) for x in made.values()), torch.zeros(*leading, H * R)], -1)
    *slices, out = (x.unflatten(-1, (H, R)) for x in fused.split(H * R, -1))
    pages = torch.cat([pool.view(N, -1), states.view(N, -1), torch.zeros(N, 3)], 1)
    pool = pages[:, : H * R * R].view(N, H, R, R)
    states = pages[:, H * R * R : -3].view(*leading, H, R, R)
    with torch.no_grad():
        delta_step(pool, *slices, intermediate_states=states, out=out)
    for ours, theirs in ((out, expected), (pool, expected_pool), (states, expected_states)):
        assert torch.equal(ours, theirs)


def test_a_pool_that_is_only_read_may_be_expanded():
    """Requests that all begin from one state."""
    call, states = good(), torch.zeros(N, 2, 1, 4, 4)
    start = torch.randn(1, 1, 4, 4)
    call["state"] = start.expand(N, -1, -1, -1)
    reads = delta_step(**call, intermediate_states=states, update_state=False)
    each = start.repeat(N, 1, 1, 1)
    assert torch.equal(reads, delta_step(**call | {"state": each}))
    assert torch.equal(states[:, -1], each)
