"""Values of slots and of accepted tokens that do not fit: they raise on a CPU, and are padding to kernels for GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltamem_kernels import delta_step, memory_decode
from deltamem_kernels.testing import memory_operands

N, SLOTS, R, D = 3, 9, 4, 6

ACCEPTED = {"state_indices": torch.arange(6).view(3, 2), "num_accepted_tokens": torch.ones(3, dtype=torch.int64)}
WRONG_SLOTS = {  # of the last row, so that rows before it could be written; the good calls that they change
    "past the pool": (
        {"state_indices": torch.tensor([3, 0, SLOTS])},
        f"state_indices must be from 0 to 8 .* got {SLOTS}",
    ),
    "negative": ({"state_indices": torch.tensor([3, 0, -2], dtype=torch.int32)}, "state_indices must .* got -2"),
    "-1 where the pad is another": ({"state_indices": torch.tensor([3, 0, -1]), "pad_slot_id": 7}, "got -1"),
    "of the last token": (ACCEPTED | {"state_indices": torch.tensor([[3, 4], [0, 1], [2, 9]])}, "got 9"),
    "of the first token": (ACCEPTED | {"state_indices": torch.tensor([[3, 4], [0, 1], [-5, 2]])}, "got -5"),
    "none accepted": (ACCEPTED | {"num_accepted_tokens": torch.tensor([1, 2, 0])}, "num_accepted_tokens must .* got 0"),
    "-1 accepted": (ACCEPTED | {"num_accepted_tokens": torch.tensor([1, 2, -1])}, "from 1 to T=2, got -1"),
    "3 of 2 accepted": (ACCEPTED | {"num_accepted_tokens": torch.tensor([1, 2, 3])}, "from 1 to T=2, got 3"),
}


def pool_call(change: dict, device: str) -> dict:
    """A call of three rows and two tokens, with tensors to write into that hold numbers."""
    made = memory_operands((N, 2, 1), R)
    written = {"state": torch.randn(SLOTS, 1, R, R), "out": torch.randn(N, 2, 1, R)}
    call = written | made | {"intermediate_states": torch.randn(N, 2, 1, R, R)} | change
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in call.items()}


@pytest.mark.parametrize("update_state", [True, False])
@pytest.mark.parametrize("what", WRONG_SLOTS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_on_a_cpu_wrong_slots_raise_before_anything_is_written(backend, what, update_state):
    change, message = WRONG_SLOTS[what]
    call = pool_call(change, "cpu") | {"update_state": update_state, "backend": backend}
    before = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor)}
    if what == "of the last token" and not update_state:  # which is not read then
        delta_step(**call)
        assert not torch.equal(call["out"], before["out"])
        return
    with pytest.raises(ValueError, match=message):
        delta_step(**call)
    assert all(torch.equal(call[name], x) for name, x in before.items())


@pytest.mark.quick
@pytest.mark.one_isa
@pytest.mark.parametrize("what", WRONG_SLOTS)
def test_kernels_for_gpus_treat_wrong_slots_as_pads(implementation, what):
    """The host does not look at values on a GPU, so that it cannot raise. Emulated kernels do what they do on a GPU."""
    change, message = WRONG_SLOTS[what]
    call = pool_call(change, implementation.device) | {"backend": implementation.backend}
    if implementation.device == "cpu" and not implementation.slow:
        with pytest.raises(ValueError, match=message):
            delta_step(**call)
        return
    padded = {name: x.clone() if isinstance(x, Tensor) else x for name, x in call.items()}
    if "accepted" in what:
        padded["num_accepted_tokens"][2] = 1
    slots = padded["state_indices"]
    slots[(2, 1) if what == "of the last token" else 2] = call.get("pad_slot_id", -1)
    before = call["state"].clone()
    delta_step(**call)
    delta_step(**padded)
    for name in ("state", "out", "intermediate_states"):
        assert torch.equal(call[name], padded[name]), name
    assert not torch.equal(call["state"], before)


@pytest.mark.parametrize("wrong", [SLOTS, -2])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_on_a_cpu_wrong_slots_of_a_decoding_layer_raise_before_anything_is_written(backend, wrong):
    call = {"x": torch.randn(N, D), "qkv_weight": torch.randn(3 * R, D), "beta_weight": torch.randn(R, D)}
    call |= {"beta_bias": None, "base": torch.randn(N, D), "delta_weight": torch.randn(D, R), "backend": backend}
    call["out"] = call["base"]
    pool = torch.randn(SLOTS, 1, R, R)
    before, base = pool.clone(), call["base"].clone()
    slots = torch.arange(N)
    slots[-1] = wrong
    with torch.no_grad(), pytest.raises(ValueError, match=f"state_indices must be from 0 to 8 .* got {wrong}"):
        memory_decode(pool, **call, state_indices=slots)
    assert torch.equal(pool, before)
    assert torch.equal(call["base"], base)
