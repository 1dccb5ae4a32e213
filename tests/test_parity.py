"""Every backend against the float64 oracle: values, final states and all gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import GATES, MODES, NAMES, check, subsets

from deltamem_kernels.testing import FLOAT32_TOLERANCE, Problem, assert_close_in_norm, relative_error, scan_problem

pytestmark = pytest.mark.each_scan

LENGTHS = {
    "0": (0, 0),
    "1": (0, 1),
    "2": (0, 2),
    "C-1": (1, -1),
    "C": (1, 0),
    "C+1": (1, 1),
    "2C": (2, 0),
    "2C+2": (2, 2),
}
LENGTHS |= {"4C": (4, 0), "5C+1": (5, 1)}  # with more than one group of chunks
RANKS = (1, 2, 3, 4, 5, 8, 12, 16, 33, 64, 128)


@pytest.mark.parametrize(("mode", "decay", "beta_per_head", "decay_per_head"), GATES)
def test_every_form_of_the_gates_is_exact(implementation, mode, decay, beta_per_head, decay_per_head):
    T = 6 if implementation.slow else 70
    check(
        scan_problem(T=T, mode=mode, decay=decay, beta_per_head=beta_per_head, decay_per_head=decay_per_head),
        implementation,
    )


@pytest.mark.parametrize(("chunks", "tokens"), LENGTHS.values(), ids=LENGTHS)
def test_sequences_of_every_length_are_exact(implementation, chunks, tokens):
    slow = implementation.slow
    T = chunks * implementation.chunk + tokens
    if slow and chunks > 2 and not implementation.chunked:
        T = chunks + tokens  # more chunks take minutes and run no other code
    check(scan_problem(B=1 if slow else 2, T=T, H=1 if slow else 3, R=4 if slow else 8, mask=not slow), implementation)


@pytest.mark.parametrize("R", RANKS)
def test_every_rank_is_exact(implementation, R):
    T = (2 if R > 33 else 5) if implementation.slow else 67
    check(
        scan_problem(
            B=1,
            T=T,
            R=R,
            mode="lambda_outside",
            decay=True,
            beta_per_head=R % 2 == 0,
            fenced=True,
            device=implementation.device,
        ),
        implementation,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_exact(implementation, mode, mask, index_dtype):
    lengths = (0, 65, 3, 0, 64, 1, 130, 0)
    if implementation.slow:
        lengths = (0, 3, 0, 6, 1, 12, 0) if implementation.chunked else (0, 3, 0, 5, 1)
    H, R = (1, 4) if implementation.slow else (2, 8)
    check(scan_problem(lengths=lengths, H=H, R=R, mode=mode, mask=mask, index_dtype=index_dtype), implementation)


def test_cu_seqlens_may_be_strided(implementation):
    problem = scan_problem(lengths=(3, 0, 6), R=4, mask=True)
    bounds = problem.options["cu_seqlens"]
    problem.options["cu_seqlens"] = torch.stack([bounds, bounds + 100], dim=1)[:, 0]
    check(problem, implementation)


@pytest.mark.parametrize("R", [3, 8, 16])
@pytest.mark.parametrize("mask", [False, True])
def test_nothing_outside_of_strided_operands_is_read(implementation, R, mask):
    """Operands and gradients are not contiguous and lie between NaN."""
    T = 5 if implementation.slow else 66
    problem = scan_problem(
        T=T, R=R, decay=True, decay_per_head=True, mask=mask, fenced=True, device=implementation.device
    )
    check(problem, implementation, cotangents=problem.cotangents(fenced=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R", [4, 5, 8])
def test_16_bit_operands_lose_no_more_than_a_loop_in_their_dtype(implementation, dtype, R):
    """The error is at most twice that of the same loop in plain PyTorch, all in that dtype."""
    problem = scan_problem(T=5 if implementation.slow else 70, R=R, dtype=dtype)
    problem = problem.to(implementation.device)
    weights = problem.cotangents()
    exact = problem.float64(weights)
    ours = problem.run_with_gradients(implementation.backend, weights)
    loop = same_dtype_loop(problem, weights)
    for name in exact:
        limit = 2 * relative_error(loop[name], exact[name])
        assert relative_error(ours[name], exact[name]) <= limit, name


def test_operands_of_mixed_dtypes_are_exact(implementation):
    dtypes = {
        "q": torch.bfloat16,
        "k": torch.float16,
        "v": torch.float32,
        "beta": torch.bfloat16,
        "decay": torch.float16,
    }
    check(scan_problem(T=4 if implementation.slow else 66, decay=True, dtype=dtypes), implementation)


def test_float64_operands_are_exact_to_float64(implementation):
    """The arithmetic is float64 too."""
    problem = scan_problem(
        T=4 if implementation.slow else 66, R=5, mode="lambda_outside", decay=True, dtype=torch.float64
    )
    ours = check(problem, implementation, tolerance=1e-13)
    assert ours["reads"].dtype == ours["final_state"].dtype == torch.float64


def test_every_subset_of_operands_may_be_frozen(implementation):
    problem = scan_problem(B=1, T=3 if implementation.slow else 65, H=1, R=4, decay=True, decay_per_head=True)
    problem = problem.to(implementation.device)
    weights = problem.cotangents()
    exact = problem.float64(weights)
    for subset in subsets(NAMES, implementation):
        ours = problem.run_with_gradients(implementation.backend, weights, subset)
        assert_close_in_norm(ours, {n: exact[n] for n in ours}, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("through", ["reads", "final_state"])
def test_gradients_through_one_result_are_exact(implementation, through):
    """A query reaches no final state: its gradient is zero."""
    problem = scan_problem(T=3 if implementation.slow else 70, device=implementation.device)
    weights = {through: problem.cotangents()[through]}
    check(problem, implementation, cotangents=weights)


def test_masked_tokens_have_no_effect(implementation):
    """A masked token may hold NaN. It reads zeros, writes nothing and has gradients of zeros; the gradient of the state
    passes through it."""
    T = 6 if implementation.slow else 70
    problem = scan_problem(T=T, mask=True, decay=True, device=implementation.device)
    mask = problem.options["mask"]
    clean = {**problem.operands}
    for name in ("q", "k", "v", "beta", "decay"):
        problem.operands[name] = problem.operands[name].masked_fill(~mask[..., None, None], float("nan"))
        clean[name] = clean[name].masked_fill(~mask[..., None, None], 0.5)
    weights = problem.cotangents()
    ours = problem.run_with_gradients(implementation.backend, weights)
    same = replace(problem, operands=clean).run_with_gradients(implementation.backend, weights)
    for name, x in same.items():
        assert torch.equal(ours[name], x), name
    for name in ("reads", "d_q", "d_k", "d_v", "d_beta", "d_decay"):
        assert torch.count_nonzero(ours[name][~mask]) == 0, name


def test_the_head_dimension_may_be_left_out(implementation):
    problem = scan_problem(T=4 if implementation.slow else 66, H=1, decay=True, decay_per_head=True).to(
        device=implementation.device
    )
    weights = problem.cotangents()
    with_head = problem.run_with_gradients(implementation.backend, weights)
    dimension = {n: 1 if n in ("initial_state", "final_state") else 2 for n in (*NAMES, "reads", "final_state")}
    squeezed = replace(problem, operands={n: x.squeeze(dimension[n]) for n, x in problem.operands.items()})
    without = squeezed.run_with_gradients(
        implementation.backend, {n: x.squeeze(dimension[n]) for n, x in weights.items()}
    )
    for name, x in with_head.items():
        assert torch.equal(without[name], x.squeeze(dimension[name.removeprefix("d_")])), name


def same_dtype_loop(problem: Problem, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The coupled standard mode in plain PyTorch, all in the operands' dtype."""
    leaves = {n: x.detach().requires_grad_() for n, x in problem.operands.items()}
    S, reads = leaves["initial_state"], []
    for t in range(leaves["q"].shape[1]):
        q, k, v, beta = (leaves[n][:, t] for n in ("q", "k", "v", "beta"))
        reads.append((S @ q.unsqueeze(-1)).squeeze(-1))
        change = beta * v - beta * (S @ k.unsqueeze(-1)).squeeze(-1)
        S = (1 - beta).unsqueeze(-1) * S + change.unsqueeze(-1) * k.unsqueeze(-2)
    out = {"reads": torch.stack(reads, dim=1), "final_state": S}
    grads = torch.autograd.grad(
        list(out.values()), list(leaves.values()), [weights[n].to(x.dtype) for n, x in out.items()]
    )
    return {**{n: x.detach() for n, x in out.items()}, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}
