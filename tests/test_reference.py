"""The reference: its gradients against finite differences. All backends: cases worked out by hand, and laws of the
delta rule that hold for any numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import GATES, MODES
from torch import Tensor

from deltamem_kernels import delta_update
from deltamem_kernels.backends.native import library
from deltamem_kernels.testing import FLOAT32_TOLERANCE, Problem, assert_close_in_norm, relative_error, scan_problem

pytestmark = pytest.mark.each_scan


@pytest.mark.parametrize("layout", ["batch", "mask", "packed", "packed-mask"])
@pytest.mark.parametrize(("mode", "decay", "beta_per_head", "decay_per_head"), GATES)
def test_gradients_are_those_of_finite_differences(mode, decay, beta_per_head, decay_per_head, layout):
    problem = scan_problem(
        B=2,
        T=3,
        H=2 if layout == "batch" else 1,
        R=2 if layout == "batch" else 3,
        mode=mode,
        decay=decay,
        beta_per_head=beta_per_head,
        decay_per_head=decay_per_head,
        mask="mask" in layout,
        lengths=(2, 0, 1) if "packed" in layout else None,
        dtype=torch.float64,
    )
    if "mask" in layout:  # one token of either kind
        problem.options["mask"][0, :2] = torch.tensor([True, False])
    assert finite_differences_agree(problem)


def test_gradients_across_a_chunk_are_those_of_finite_differences():
    """There are more than the 64 tokens after which a state is kept for backward."""
    problem = scan_problem(B=1, T=66, H=1, R=2, mode="lambda_outside", decay=True, dtype=torch.float64)
    assert finite_differences_agree(problem, fast_mode=True)


def finite_differences_agree(problem: Problem, **how) -> bool:
    def results(*operands: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(problem.operands, operands, strict=True))
        return delta_update(**named, **problem.options, backend="reference")

    return torch.autograd.gradcheck(results, tuple(x.requires_grad_() for x in problem.operands.values()), **how)


# Worked out by hand. Every number is a small multiple of a power of two: the arithmetic is exact in any order.

STATE = [[1.0, 2.0], [3.0, 4.0]]  # not symmetric: rows are values, columns are keys
ONE_TOKEN = {"q": [[1.0, -1.0]], "k": [[2.0, 1.0]], "v": [[5.0, 7.0]], "beta": [[0.5, 0.25]]}
# read = S q = [1 - 2, 3 - 4] = [-1, -1]   (S^T q would be [-2, -2])
# S k = [2 + 2, 6 + 4] = [4, 10]
BY_HAND = {
    # keep = 1 - beta = [0.5, 0.75]
    # row 0: 0.5  [1, 2] + (0.5 5 - 0.5 4)    [2, 1] = [0.5, 1]  + 0.5   [2, 1] = [1.5, 1.5]
    # row 1: 0.75 [3, 4] + (0.25 7 - 0.25 10) [2, 1] = [2.25, 3] - 0.75  [2, 1] = [0.75, 2.25]
    "standard, coupled": (ONE_TOKEN, "standard", [[-1, -1]], [[1.5, 1.5], [0.75, 2.25]]),
    # keep = decay = [0.25, 0.5]
    # row 0: 0.25 [1, 2] + 0.5 [2, 1] = [0.25, 0.5] + [1, 0.5]        = [1.25, 1]
    # row 1: 0.5  [3, 4] - 0.75 [2, 1] = [1.5, 2]   - [1.5, 0.75]     = [0, 1.25]
    "standard, decay by row": ({**ONE_TOKEN, "decay": [[0.25, 0.5]]}, "standard", [[-1, -1]], [[1.25, 1], [0, 1.25]]),
    # keep = 1 - beta, erase = keep beta = [0.25, 0.1875], write = beta
    # row 0: [0.5, 1]  + (2.5 - 0.25 4)     [2, 1] = [0.5, 1]  + 1.5    [2, 1] = [3.5, 2.5]
    # row 1: [2.25, 3] + (1.75 - 0.1875 10) [2, 1] = [2.25, 3] - 0.125  [2, 1] = [2, 2.875]
    "lambda_outside, coupled": (ONE_TOKEN, "lambda_outside", [[-1, -1]], [[3.5, 2.5], [2, 2.875]]),
    # keep = 0.5 in both rows, erase = [0.25, 0.125], write = beta
    # row 0: 0.5 [1, 2] + (2.5 - 0.25 4)   [2, 1] = [0.5, 1] + 1.5 [2, 1] = [3.5, 2.5]
    # row 1: 0.5 [3, 4] + (1.75 - 0.125 10) [2, 1] = [1.5, 2] + 0.5 [2, 1] = [2.5, 2.5]
    "lambda_outside, decay by head": (
        {**ONE_TOKEN, "decay": [0.5]}, "lambda_outside", [[-1, -1]], [[3.5, 2.5], [2.5, 2.5]]
    ),
    # keep = 1: row 0: [1, 2] + 0.5 [2, 1] = [2, 2.5]; row 1: [3, 4] - 0.75 [2, 1] = [1.5, 3.25]
    "no_lambda": (ONE_TOKEN, "no_lambda", [[-1, -1]], [[2, 2.5], [1.5, 3.25]]),
    # beta = 0.5 in both rows: row 1: [3, 4] + (3.5 - 5) [2, 1] = [0, 2.5]
    "no_lambda, beta by head": ({**ONE_TOKEN, "beta": [0.5]}, "no_lambda", [[-1, -1]], [[2, 2.5], [0, 2.5]]),
    # the second token reads what the first left: [[1.5, 1.5], [0.75, 2.25]] [1, 2] = [4.5, 5.25]
    # and writes with k = [0, 1], v = [1, 1], beta = [1, 0.5], S k = [1.5, 2.25]:
    # row 0: 0   S + (1 - 1.5)       [0, 1] = [0, -0.5]
    # row 1: 0.5 S + (0.5 - 1.125)   [0, 1] = [0.375, 1.125] - 0.625 [0, 1] = [0.375, 0.5]
    "two tokens": (
        {"q": [[1, -1], [1, 2]], "k": [[2, 1], [0, 1]], "v": [[5, 7], [1, 1]], "beta": [[0.5, 0.25], [1, 0.5]]},
        "standard", [[-1, -1], [4.5, 5.25]], [[0, -0.5], [0.375, 0.5]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_results_are_those_worked_out_by_hand(implementation, case):
    numbers, mode, reads, final_state = BY_HAND[case]
    operands = {n: on(implementation, x).unsqueeze(0) for n, x in numbers.items()}  # one sequence, one head
    state = on(implementation, STATE).unsqueeze(0)
    out = delta_update(**operands, mode=mode, initial_state=state, backend=implementation.backend)
    assert torch.equal(out.reads, on(implementation, reads).unsqueeze(0))
    assert torch.equal(out.final_state, on(implementation, final_state).unsqueeze(0))


def test_a_masked_token_reads_zeros_and_writes_nothing(implementation):
    """The third token reads the state that the first one left."""
    operands = {
        "q": [[1, -1], [9, 9], [1, 2]], "k": [[2, 1], [9, 9], [0, 1]], "v": [[5, 7], [9, 9], [1, 1]],
        "beta": [[0.5, 0.25], [0.5, 0.5], [1, 0.5]],
    }  # fmt: skip
    out = delta_update(
        **{n: on(implementation, x).unsqueeze(0) for n, x in operands.items()},
        initial_state=on(implementation, STATE).unsqueeze(0),
        mask=torch.tensor([[True, False, True]], device=implementation.device),
        backend=implementation.backend,
    )
    assert torch.equal(out.reads, on(implementation, [[[-1, -1], [0, 0], [4.5, 5.25]]]))
    assert torch.equal(out.final_state, on(implementation, [[[0, -0.5], [0.375, 0.5]]]))


# R = 1, so that a state is a number s: after the token it is keep s + (write v - erase s k) k. With s = 3, k = 2,
# v = 5, beta = 1/4, a query of 7 for the token and of 1/2 for what it leaves, decay 1/2 where it is free:
#   read = 7 s = 21, S k = 6; d(loss)/d(read) = 2 and d(loss)/d(final state) = 4
#   G = 4:  d_v = 4 write k, d_keep = 4 s = 12, d_erase = -4 s k k = -48, d_write = 4 v k = 40
#   d_q = 2 s = 6, d_k = 4 (write v - 2 erase s k), d_s = 2 q + 4 (keep - erase k k)
SCALAR_BY_HAND = {
    # keep 3/4, erase 1/4, write 1/4: final 9/4 + (5/4 - 6/4) 2 = 7/4
    # d_v 2, d_k 4 (5/4 - 3) = -7, d_beta = -48 + 40 - 12 = -20, d_s = 14 + 4 (3/4 - 1) = 13
    ("standard", None): (1.75, {"q": 6, "k": -7, "v": 2, "beta": -20, "initial_state": 13}),
    # keep 1/2: final 3/2 - 1/2 = 1; d_beta = -48 + 40 = -8, d_decay = 12, d_s = 14 + 4 (1/2 - 1) = 12
    ("standard", 0.5): (1.0, {"q": 6, "k": -7, "v": 2, "beta": -8, "decay": 12, "initial_state": 12}),
    # keep 1/2, erase 1/8, write 1/4: final 3/2 + (5/4 - 3/4) 2 = 5/2; d_k = 4 (5/4 - 3/2) = -1
    # d_beta = -48/2 + 40 = 16, d_decay = 12 - 48/4 = 0, d_s = 14 + 4 (1/2 - 1/2) = 14
    ("lambda_outside", 0.5): (2.5, {"q": 6, "k": -1, "v": 2, "beta": 16, "decay": 0, "initial_state": 14}),
    # keep 3/4, erase 3/16, write 1/4: final 9/4 + (5/4 - 9/8) 2 = 5/2; d_k = 4 (5/4 - 9/4) = -4
    # d_beta = -48 (1 - 2 beta) + 40 - 12 = 4, d_s = 14 + 4 (3/4 - 3/4) = 14
    ("lambda_outside", None): (2.5, {"q": 6, "k": -4, "v": 2, "beta": 4, "initial_state": 14}),
    # keep 1: final 3 - 1/2 = 5/2; d_beta = -8, d_s = 14 + 4 (1 - 1) = 14
    ("no_lambda", None): (2.5, {"q": 6, "k": -7, "v": 2, "beta": -8, "initial_state": 14}),
}


@pytest.mark.parametrize(("mode", "decay"), SCALAR_BY_HAND)
def test_gradients_are_those_worked_out_by_hand(implementation, mode, decay):
    final_state, gradients = SCALAR_BY_HAND[mode, decay]
    operands = {"q": 7.0, "k": 2.0, "v": 5.0, "beta": 0.25, "decay": decay, "initial_state": 3.0}
    leaves = {
        n: torch.full((1, 1, 1, 1), x, device=implementation.device, requires_grad=True)
        for n, x in operands.items()
        if x is not None
    }
    out = delta_update(**leaves, mode=mode, backend=implementation.backend)
    assert (out.reads.item(), out.final_state.item()) == (21.0, final_state)
    grads = torch.autograd.grad(2 * out.reads.sum() + 4 * out.final_state.sum(), list(leaves.values()))
    assert {n: g.item() for n, g in zip(leaves, grads, strict=True)} == gradients


# Laws. hypothesis draws the shapes and the seed of the numbers, and prints both if a law fails.

law = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS = st.integers(0, 2**31 - 1)
RANKS = st.sampled_from([1, 2, 3, 4, 5, 8, 11, 16, 17])
LENGTHS = st.sampled_from([1, 2, 5, 63, 64, 65, 70])


def lawful(test: Callable) -> Callable:
    """Run a law on problems of any seed, rank, length and mode."""
    return given(seed=SEEDS, R=RANKS, T=LENGTHS, mode=st.sampled_from(MODES))(law(test))


@pytest.fixture
def tokens_at_most(implementation) -> int:
    """The longest sequence: emulated, a token takes milliseconds."""
    return 4 if implementation.slow else 70


@lawful
def test_beta_of_zero_leaves_the_state(implementation, tokens_at_most, seed, R, T, mode):
    """Bit for bit, where the decay keeps everything."""
    problem = drawn(implementation, tokens_at_most, seed, R, T, mode, decay=mode != "no_lambda")
    problem["beta"].zero_()
    if "decay" in problem:
        problem["decay"].fill_(1)
    out = delta_update(**problem, backend=implementation.backend)
    assert torch.equal(out.final_state, problem["initial_state"])


@lawful
def test_no_lambda_stores_a_value_exactly(implementation, tokens_at_most, seed, R, T, mode):
    """With beta = 1 and a unit key, a read with that key returns the value, whatever the state was."""
    problem = drawn(implementation, tokens_at_most, seed, R, T, "no_lambda")
    problem["beta"].fill_(1)
    problem["q"] = problem["k"].roll(1, dims=1)
    out = delta_update(**problem, backend=implementation.backend)
    # The old value is subtracted as it is read, so the error is relative to its size.
    scale = problem["initial_state"].norm() + problem["v"].norm()
    if T > 1:
        assert (out.reads[:, 1:] - problem["v"][:, :-1]).norm() <= FLOAT32_TOLERANCE * scale
    last = (out.final_state @ problem["k"][:, -1].unsqueeze(-1)).squeeze(-1)
    assert (last - problem["v"][:, -1]).norm() <= FLOAT32_TOLERANCE * scale


@lawful
def test_results_are_linear_in_the_values(implementation, tokens_at_most, seed, R, T, mode):
    """From a state of zeros, reads and final state are linear in v."""
    problem = drawn(implementation, tokens_at_most, seed, R, T, mode, state=False)
    one, other = problem.pop("v"), torch.randn_like(problem["q"])
    run = lambda v: delta_update(**problem, v=v, backend=implementation.backend)  # noqa: E731
    for together, first, second in zip(run(3 * one - 0.7 * other), run(one), run(other), strict=True):
        scale = 3 * first.norm() + 0.7 * second.norm()  # each of the three is right to that of its own size
        assert (together - (3 * first - 0.7 * second)).norm() <= 2 * FLOAT32_TOLERANCE * scale


@lawful
def test_a_permutation_of_the_batch_permutes_the_results(implementation, tokens_at_most, seed, R, T, mode):
    """Bit for bit."""
    problem = drawn(implementation, tokens_at_most, seed, R, T, mode, B=3)
    order = torch.randperm(3).to(implementation.device)
    permuted = {n: x[order] if isinstance(x, Tensor) else x for n, x in problem.items()}
    results = delta_update(**problem, backend=implementation.backend)
    for x, y in zip(results, delta_update(**permuted, backend=implementation.backend), strict=True):
        assert torch.equal(x[order], y)


@lawful
def test_reversing_the_heads_reverses_the_results(implementation, tokens_at_most, seed, R, T, mode):
    problem = drawn(implementation, tokens_at_most, seed, R, T, mode, H=3)
    heads = {n: 1 if n == "initial_state" else 2 for n, x in problem.items() if isinstance(x, Tensor)}
    reversed_ = {n: x.flip(heads[n]) if n in heads else x for n, x in problem.items()}
    out = delta_update(**problem, backend=implementation.backend)
    other = delta_update(**reversed_, backend=implementation.backend)
    assert torch.equal(out.reads.flip(2), other.reads)
    assert torch.equal(out.final_state.flip(1), other.final_state)


@lawful
def test_without_values_results_scale_with_the_initial_state(implementation, tokens_at_most, seed, R, T, mode):
    """By a power of two, bit for bit, if nothing decays to a subnormal number."""
    problem = drawn(implementation, tokens_at_most, seed, R, T, mode)
    problem["v"].zero_()
    problem["beta"] = 0.1 * problem["beta"]
    out = delta_update(**problem, backend=implementation.backend)
    problem["initial_state"] = 8 * problem["initial_state"]
    for x, scaled in zip(out, delta_update(**problem, backend=implementation.backend), strict=True):
        assert torch.equal(8 * x, scaled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_no_tokens_return_the_initial_state(implementation, mode, dtype):
    problem = scan_problem(T=0, mode=mode, dtype=dtype).to(device=implementation.device)
    out = problem.run(implementation.backend)
    assert out["reads"].shape == (2, 0, 2, 8)
    assert torch.equal(out["final_state"], problem.operands["initial_state"].to(out["final_state"].dtype))
    del problem.operands["initial_state"]
    assert torch.count_nonzero(problem.run(implementation.backend)["final_state"]) == 0


@lawful
def test_splitting_a_sequence_across_calls_does_not_change_the_result(implementation, tokens_at_most, seed, R, T, mode):
    """In values and gradients, if the second call starts from the state of the first."""
    problem = drawn(implementation, tokens_at_most, seed, R, T, mode, decay=mode != "no_lambda", H=1)
    cut = int(torch.randint(0, problem["q"].shape[1] + 1, ()))
    whole, split = both_ways(problem, cut, implementation.backend)
    assert_close_in_norm(split, whole, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_may_be_split_at_every_token(implementation, mode):
    """Of more than two chunks: before the first token, between any two, and after the last."""
    T = 2 * implementation.chunk + 2
    if implementation.slow or implementation.backend == "reference":
        T = 5 if implementation.chunked else 3  # a token takes long; a chunk has four
    problem = scan_problem(B=1, T=T, H=1, R=3 if implementation.slow else 8, mode=mode).to(device=implementation.device)
    every = 1 if implementation.slow or not implementation.chunked else 13  # a CPU never chooses chunks by itself
    for cut in range(0, T + 1, every):
        whole, split = both_ways({**problem.operands, **problem.options}, cut, implementation.backend)
        assert_close_in_norm(split, whole, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("isa", library.load("cpu").isas())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("R", [3, 4, 8, 16])
@pytest.mark.parametrize("cut", [64, 128])
def test_splitting_between_chunks_does_not_change_a_bit_on_a_cpu(isa, cut, R, mode):
    """Such a split keeps the order of the arithmetic."""
    problem = scan_problem(B=1, T=150, H=1, R=R, mode=mode)
    kernels = library.load("cpu")
    before = kernels.isa()
    kernels.use_isa(isa)
    try:
        whole, split = both_ways({**problem.operands, **problem.options}, cut, "cpu")
    finally:
        kernels.use_isa(before)
    assert torch.equal(split["reads"], whole["reads"])
    assert torch.equal(split["final_state"], whole["final_state"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_million_tokens_do_not_drift(mode):
    """float32 is compared with float64 in the same kernels. Gates near 0.01 keep a memory of hundreds of tokens.
    no_lambda never forgets what no key overwrites."""
    T = 1_000_000
    problem = scan_problem(B=1, T=T, H=1, R=8, mode=mode)
    problem.operands["beta"] = 0.01 * problem.operands["beta"]
    ours, exact = problem.run("cpu"), problem.to(dtype=torch.float64).run("cpu")
    assert relative_error(ours["final_state"], exact["final_state"]) <= FLOAT32_TOLERANCE
    assert relative_error(ours["reads"][:, -1000:], exact["reads"][:, -1000:]) <= FLOAT32_TOLERANCE


def on(implementation, numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=implementation.device)


def drawn(implementation, tokens_at_most: int, seed: int, R: int, T: int, mode: str, **form) -> dict:
    """Return a problem from a seed that hypothesis drew, as arguments of delta_update."""
    torch.manual_seed(seed)
    if implementation.slow:
        R = min(R, 5)
    problem = scan_problem(T=min(T, tokens_at_most), R=R, mode=mode, **form).to(device=implementation.device)
    return {**problem.operands, **problem.options}


def both_ways(problem: dict, cut: int, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return values and gradients of one call, and of two with the state passed from the first to the second."""
    options = {n: x for n, x in problem.items() if not isinstance(x, Tensor)}
    operands = {n: x for n, x in problem.items() if isinstance(x, Tensor)}
    whole = Problem(delta_update, operands, options)
    weights = whole.cotangents()
    leaves = {n: x.detach().requires_grad_() for n, x in operands.items()}
    state = leaves["initial_state"]
    pieces = []
    for tokens in (slice(None, cut), slice(cut, None)):
        part = {n: x[:, tokens] for n, x in leaves.items() if n != "initial_state"}
        reads, state = delta_update(**part, **options, initial_state=state, backend=backend)
        pieces.append(reads)
    out = {"reads": torch.cat(pieces, dim=1), "final_state": state}
    grads = torch.autograd.grad([out[n] for n in weights], list(leaves.values()), list(weights.values()))
    split = {n: x.detach() for n, x in out.items()} | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}
    return whole.run_with_gradients(backend, weights), split
