"""One small problem of every operation on every backend. These run on emulated GPUs also in the quick tests."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from correction_problems import plain_correction
from problems import check
from projection_problems import check_projection
from torch import Tensor

from deltamem_kernels import (
    attention_correction_norm_rope,
    delta_step,
    delta_update,
    memory_decode,
    memory_prefill,
)
from deltamem_kernels.testing import (
    Problem,
    assert_close_in_norm,
    correction_problem,
    memory_operands,
    projection_problem,
    projection_weights,
    scan_problem,
    segment_problem,
)

pytestmark = [pytest.mark.quick, pytest.mark.each_scan]


def test_a_scan_is_exact(implementation):
    options = {"decay": True, "mask": True, "mode": "lambda_outside", "device": implementation.device}
    check(scan_problem(B=1, T=9, H=2, R=4, **options), implementation)


def test_a_scan_of_packed_sequences_is_exact(implementation):
    check(scan_problem(lengths=(2, 0, 7), H=1, R=4, device=implementation.device), implementation)


@pytest.mark.parametrize("split", [False, True])
def test_a_projection_is_exact(implementation, split):
    check_projection(projection_problem(1, 5, D=17, R=4, split=split, device=implementation.device), implementation)


def test_a_correction_is_exact(implementation):
    check(correction_problem(T=3, norm=True, device=implementation.device), implementation)


def test_a_correction_with_norm_and_rotary_is_exact(implementation):
    problem = correction_problem(T=3, head_dim=8, norm=True, rope=True, device=implementation.device)
    check(problem, implementation)
    plain = replace(problem, operation=plain_correction).to("cpu").run()
    assert_close_in_norm(problem.run(implementation.backend), plain, 1e-5)


def test_a_segment_mean_is_exact(implementation):
    check(segment_problem(2, 9, 5, 3, mask=True, device=implementation.device), implementation)


def test_a_prefill_is_exact(implementation):
    operands = {"x": torch.randn(1, 9, 17), **projection_weights(17, 1, 4), "initial_state": torch.randn(1, 1, 4, 4)}
    check(Problem(memory_prefill, operands), implementation)


def test_steps_are_exact(implementation):
    """Of two tokens on a pool."""
    operands = memory_operands((3, 2, 1), 4, decay=True)
    pool = torch.randn(4, 1, 4, 4)
    slots = torch.tensor([2, 0, 3])
    exact = delta_update(
        **{n: x.double() for n, x in operands.items()}, initial_state=pool[slots].double(), backend="reference"
    )
    ours = pool.to(implementation.device)
    on_device = {n: x.to(implementation.device) for n, x in operands.items()}
    reads = delta_step(ours, **on_device, state_indices=slots.to(ours.device), backend=implementation.backend)
    assert_close_in_norm({"reads": reads, "final_state": ours[slots]}, exact._asdict())
    assert torch.equal(ours[1].cpu(), pool[1])


@pytest.mark.parametrize("split", [False, True])
def test_a_decoding_step_is_exact(implementation, split):
    """Against the single operations in float64."""
    projection, pool = projection_problem(2, D=17, H=1, R=4, split=split), torch.randn(2, 1, 4, 4)
    correction = correction_problem(B=None, T=2, R=4, D=16, head_dim=8, norm=True, rope=True, scale=0.7)
    rest = {name: x for name, x in correction.operands.items() if name not in ("reads", "weight")}
    rest |= {**correction.options, "delta_weight": correction.operands["weight"]}

    exact_pool, double = pool.double(), {"backend": "reference"}
    exact = projection.float64({}, ())
    reads = delta_step(exact_pool, **exact, **double)
    wide = correction.to(dtype=torch.float64)
    corrected = attention_correction_norm_rope(**wide.operands | {"reads": reads}, **wide.options, **double)

    operands = projection.to(implementation.device).operands
    rest = {name: x.to(implementation.device) if isinstance(x, Tensor) else x for name, x in rest.items()}
    qkv = [operands.pop(f"{part}_weight") for part in "qkv"] if split else operands.pop("qkv_weight")
    call = {**operands, **rest, "qkv_weight": tuple(qkv) if split else qkv}
    ours_pool = pool.to(implementation.device)
    ours = memory_decode(ours_pool, **call, backend=implementation.backend)
    results = {"reads": ours.reads, "corrected": ours.corrected, "pool": ours_pool}
    assert_close_in_norm(results, {"reads": reads, "corrected": corrected, "pool": exact_pool})
