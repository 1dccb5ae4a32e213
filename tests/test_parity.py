"""Every backend against the float64 oracle: values, final states and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import (
    FLOAT32_TOLERANCE,
    MODES,
    NAMES,
    Problem,
    assert_close,
    cotangents_for,
    error,
    make,
    oracle,
    subsets,
)

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
GATES = [  # mode, free decay, beta per head, decay per head
    *itertools.product(("standard", "lambda_outside"), (False,), (False, True), (False,)),
    *itertools.product(("standard", "lambda_outside"), (True,), (False, True), (False, True)),
    *itertools.product(("no_lambda",), (False,), (False, True), (False,)),
]


def check(problem: Problem, implementation, tolerance: float = FLOAT32_TOLERANCE, fenced: bool = False) -> None:
    weights = cotangents_for(problem, fenced=fenced)
    exact = oracle(problem, weights)
    on_device = {n: x.to(implementation.device) for n, x in weights.items()}
    operands = {
        n: x if x.device.type == implementation.device else x.to(implementation.device)
        for n, x in problem.operands.items()
    }
    options = {n: x.to(implementation.device) if isinstance(x, torch.Tensor) else x for n, x in problem.options.items()}
    ours = Problem(operands, options).forward_backward(implementation.backend, on_device)
    for name, x in problem.operands.items():
        assert ours[f"d_{name}"].dtype == x.dtype
    assert ours["reads"].dtype == problem.operands["q"].dtype
    assert_close(ours, exact, tolerance)


@pytest.mark.parametrize(("mode", "decay", "beta_per_head", "decay_per_head"), GATES)
def test_gates(implementation, mode, decay, beta_per_head, decay_per_head):
    T = 6 if implementation.slow else 70
    check(make(T=T, mode=mode, decay=decay, beta_per_head=beta_per_head, decay_per_head=decay_per_head), implementation)


@pytest.mark.parametrize(("chunks", "tokens"), LENGTHS.values(), ids=LENGTHS)
def test_lengths(implementation, chunks, tokens):
    slow = implementation.slow
    T = chunks * implementation.chunk + tokens
    if slow and chunks > 2 and not implementation.chunked:
        T = chunks + tokens  # minutes, and nothing new
    check(make(B=1 if slow else 2, T=T, H=1 if slow else 3, R=4 if slow else 8, mask=not slow), implementation)


@pytest.mark.parametrize("R", RANKS)
def test_ranks(implementation, R):
    T = (2 if R > 33 else 5) if implementation.slow else 67
    check(make(B=1, T=T, R=R, mode="lambda_outside", decay=True, beta_per_head=R % 2 == 0, fenced=True), implementation)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences(implementation, mode, mask, index_dtype):
    lengths = (0, 65, 3, 0, 64, 1, 130, 0)
    if implementation.slow:
        lengths = (0, 3, 0, 6, 1, 12, 0) if implementation.chunked else (0, 3, 0, 5, 1)
    H, R = (1, 4) if implementation.slow else (2, 8)
    check(make(lengths=lengths, H=H, R=R, mode=mode, mask=mask, index_dtype=index_dtype), implementation)


def test_strided_cu_seqlens(implementation):
    problem = make(lengths=(3, 0, 6), R=4, mask=True)
    bounds = problem.options["cu_seqlens"]
    problem.options["cu_seqlens"] = torch.stack([bounds, bounds + 100], dim=1)[:, 0]
    check(problem, implementation)


@pytest.mark.parametrize("R", [3, 8, 16])
@pytest.mark.parametrize("mask", [False, True])
def test_operands_between_nans(implementation, R, mask):
    """Non-contiguous operands and gradients, in parents whose margins are NaN."""
    T = 5 if implementation.slow else 66
    problem = make(T=T, R=R, decay=True, decay_per_head=True, mask=mask, fenced=True)
    check(problem, implementation, fenced=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R", [4, 5, 8])
def test_16_bit_operands(implementation, dtype, R):
    """At most twice the error of the same loop in plain PyTorch in that dtype."""
    problem = make(T=5 if implementation.slow else 70, R=R, dtype=dtype)
    weights = cotangents_for(problem)
    exact = oracle(problem, weights)
    problem = problem.to(device=implementation.device)
    weights = {n: x.to(implementation.device) for n, x in weights.items()}
    ours = problem.forward_backward(implementation.backend, weights)
    loop = same_dtype_loop(problem, weights)
    for name in exact:
        limit = 2 * error(loop[name], exact[name])
        assert error(ours[name], exact[name]) <= limit, name


def test_mixed_dtypes(implementation):
    dtypes = {
        "q": torch.bfloat16,
        "k": torch.float16,
        "v": torch.float32,
        "beta": torch.bfloat16,
        "decay": torch.float16,
    }
    problem = make(T=4 if implementation.slow else 66, decay=True, dtype=dtypes)
    weights = cotangents_for(problem)
    exact = oracle(problem, weights)
    ours = problem.to(device=implementation.device).forward_backward(
        implementation.backend, {n: x.to(implementation.device) for n, x in weights.items()}
    )
    # The results in 16 bits are right to the last bit that their dtype has, those in float32 to the usual measure.
    for name, x in exact.items():
        assert error(ours[name], x) <= max(FLOAT32_TOLERANCE, torch.finfo(ours[name].dtype).eps), name


def test_float64(implementation):
    problem = make(T=4 if implementation.slow else 66, R=5, mode="lambda_outside", decay=True, dtype=torch.float64)
    check(problem, implementation, tolerance=1e-13)  # the arithmetic is float64 too
    assert problem.forward("reference")["final_state"].dtype == torch.float64


def test_every_subset_of_frozen_operands(implementation):
    problem = make(B=1, T=3 if implementation.slow else 65, H=1, R=4, decay=True, decay_per_head=True)
    weights = cotangents_for(problem)
    exact = oracle(problem, weights)
    problem = problem.to(device=implementation.device)
    weights = {n: x.to(implementation.device) for n, x in weights.items()}
    for subset in subsets(NAMES, implementation):
        ours = problem.forward_backward(implementation.backend, weights, subset)
        assert_close(ours, {n: exact[n] for n in ours}, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("through", ["reads", "final_state"])
def test_gradient_through_one_result(implementation, through):
    problem = make(T=3 if implementation.slow else 70)
    weights = cotangents_for(problem, reads=through == "reads", final_state=through == "final_state")
    wanted = tuple(n for n in problem.operands if not (through == "final_state" and n == "q"))
    exact = oracle(problem, weights, wanted)
    problem = problem.to(device=implementation.device)
    ours = problem.forward_backward(
        implementation.backend, {n: x.to(implementation.device) for n, x in weights.items()}, wanted
    )
    assert_close(ours, exact, FLOAT32_TOLERANCE)


def test_masked_tokens_are_as_if_absent(implementation):
    """Whatever stands in a masked token, NaN too: no read, no write, no gradient, and the state's gradient passes."""
    T = 6 if implementation.slow else 70
    problem = make(T=T, mask=True, decay=True).to(device=implementation.device)
    mask = problem.options["mask"]
    clean = {**problem.operands}
    for name in ("q", "k", "v", "beta", "decay"):
        problem.operands[name] = problem.operands[name].masked_fill(~mask[..., None, None], float("nan"))
        clean[name] = clean[name].masked_fill(~mask[..., None, None], 0.5)
    weights = {
        n: x.to(implementation.device)
        for n, x in cotangents_for(Problem(clean, problem.options).to(device="cpu")).items()
    }
    ours = problem.forward_backward(implementation.backend, weights)
    same = Problem(clean, problem.options).forward_backward(implementation.backend, weights)
    for name, x in same.items():
        assert torch.equal(ours[name], x), name
    for name in ("reads", "d_q", "d_k", "d_v", "d_beta", "d_decay"):
        assert torch.count_nonzero(ours[name][~mask]) == 0, name


def test_one_head_without_its_dimension(implementation):
    problem = make(T=4 if implementation.slow else 66, H=1, decay=True, decay_per_head=True).to(
        device=implementation.device
    )
    weights = {n: x.to(implementation.device) for n, x in cotangents_for(problem.to(device="cpu")).items()}
    with_head = problem.forward_backward(implementation.backend, weights)
    dimension = {n: 1 if n in ("initial_state", "final_state") else 2 for n in (*NAMES, "reads", "final_state")}
    squeezed = Problem({n: x.squeeze(dimension[n]) for n, x in problem.operands.items()}, problem.options)
    without = squeezed.forward_backward(
        implementation.backend, {n: x.squeeze(dimension[n]) for n, x in weights.items()}
    )
    for name, x in with_head.items():
        assert torch.equal(without[name], x.squeeze(dimension[name.removeprefix("d_")])), name


def same_dtype_loop(problem: Problem, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The coupled standard mode as one writes it in PyTorch, everything in the operands' dtype."""
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
