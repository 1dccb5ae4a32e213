"""delta_update is bitwise deterministic and batch-invariant, NaN stays where it is, and operands are not changed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from problems import MODES, NAMES, small
from torch import Tensor

from deltamem_kernels import delta_update
from deltamem_kernels.testing import FLOAT32_TOLERANCE, Problem, assert_close_in_norm, scan_problem

pytestmark = pytest.mark.each_scan


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("R", [4, 5, 8, 16])
def test_every_run_has_the_same_bits(implementation, R):
    """On any number of threads."""
    sizes = {"R": R} if implementation.slow else {"B": 4, "T": 200, "H": 4, "R": R}
    problem = small(implementation, **sizes)
    weights = problem.cotangents()
    first = problem.run_with_gradients(implementation.backend, weights)
    for threads in (1,) if implementation.slow else (1, 2, 3, 1):
        torch.set_num_threads(threads)
        again = problem.run_with_gradients(implementation.backend, weights)
        for name, x in first.items():
            assert torch.equal(again[name], x), f"{name} on {threads} threads"


def alone(problem: Problem, weights: dict[str, Tensor], start: int, stop: int, n: int) -> tuple[Problem, dict]:
    """Return sequence n of a packed problem as a batch of one, and its part of the cotangents."""
    cut = {m: x[n : n + 1] if m == "initial_state" else x[:, start:stop] for m, x in problem.operands.items()}
    options = {m: x for m, x in problem.options.items() if m != "cu_seqlens"}
    return replace(problem, operands=cut, options=options), {
        "reads": weights["reads"][:, start:stop],
        "final_state": weights["final_state"][n : n + 1],
    }


@pytest.mark.parametrize("R", [4, 5, 8, 16])
@pytest.mark.parametrize("lengths", [(70, 70, 70), (65, 130, 1, 64)], ids=str)
def test_a_sequence_has_the_same_bits_alone_packed_and_in_a_batch(implementation, lengths, R):
    """In values and gradients. In the batch, shorter sequences have masked padding at their end."""
    if implementation.slow:
        check_company(implementation, tuple(min(n, 3 + n % 3) for n in lengths[:2]), MODES[R % 3], R)
    else:
        for mode in MODES:
            check_company(implementation, lengths, mode, R)


def check_company(implementation, lengths: tuple[int, ...], mode: str, R: int) -> None:
    problem = scan_problem(lengths=lengths, H=1 if implementation.slow else 2, R=R, mode=mode).to(
        device=implementation.device
    )
    weights = problem.cotangents()
    bounds = [0, *itertools.accumulate(lengths)]
    packed = problem.run_with_gradients(implementation.backend, weights)

    longest = max(lengths)
    batch = {
        m: x if m == "initial_state" else torch.cat([pad(x[:, a:b], longest) for a, b in itertools.pairwise(bounds)])
        for m, x in problem.operands.items()
    }
    options = {m: x for m, x in problem.options.items() if m != "cu_seqlens"}
    if min(lengths) < longest:
        options["mask"] = torch.tensor([[t < n for t in range(longest)] for n in lengths], device=implementation.device)
    padded_weights = {
        "reads": torch.cat([pad(weights["reads"][:, a:b], longest) for a, b in itertools.pairwise(bounds)]),
        "final_state": weights["final_state"],
    }
    batched = replace(problem, operands=batch, options=options).run_with_gradients(
        implementation.backend, padded_weights
    )

    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        by_itself, its_weights = alone(problem, weights, start, stop, n)
        for name, x in by_itself.run_with_gradients(implementation.backend, its_weights).items():
            of_state = name.removeprefix("d_") in ("initial_state", "final_state")
            here = packed[name][n : n + 1] if of_state else packed[name][:, start:stop]
            assert torch.equal(here, x), f"{name} of sequence {n}, packed"
            here = batched[name][n : n + 1] if of_state else batched[name][n : n + 1, : stop - start]
            if implementation.chunked and implementation.device == "cpu" and not implementation.slow:
                # There padding is not skipped. A CPU never chooses the chunked scan by itself.
                assert_close_in_norm({name: here}, {name: x}, FLOAT32_TOLERANCE)
            else:
                assert torch.equal(here, x), f"{name} of sequence {n}, in a batch"


@pytest.mark.parametrize("row", [0, 1])
def test_leading_padding_does_not_change_the_result(implementation, row):
    """There are more masked tokens than a chunk holds, and another row, before or after, has only masked tokens. Where
    chunks are counted from the first token that is not masked, the bits are the same."""
    T, padding = (9, 11) if implementation.slow else (150, 130)
    problem = scan_problem(B=1, T=T, H=2).to(device=implementation.device)
    weights = problem.cotangents()
    by_itself = problem.run_with_gradients(implementation.backend, weights)

    def before(x: Tensor) -> Tensor:
        return torch.cat([x.new_full((1, padding, *x.shape[2:]), float("nan")), x], dim=1).repeat(
            2, 1, *(1,) * (x.ndim - 2)
        )

    operands = {n: x.repeat(2, 1, 1, 1) if n == "initial_state" else before(x) for n, x in problem.operands.items()}
    mask = torch.ones(2, padding + T, dtype=torch.bool, device=implementation.device)
    mask[row, :padding] = mask[1 - row] = False
    its_weights = {"reads": before(weights["reads"]), "final_state": weights["final_state"].repeat(2, 1, 1, 1)}
    padded = replace(problem, operands=operands, options={**problem.options, "mask": mask}).run_with_gradients(
        implementation.backend, its_weights
    )
    for name, x in by_itself.items():
        of_state = name.removeprefix("d_") in ("initial_state", "final_state")
        here = padded[name][row : row + 1] if of_state else padded[name][row : row + 1, padding:]
        if implementation.backend in ("cpu", "cuda"):  # their chunks begin with the row
            assert_close_in_norm({name: here}, {name: x}, FLOAT32_TOLERANCE)
        else:
            assert torch.equal(here, x), name
    assert torch.equal(padded["final_state"][1 - row], problem.operands["initial_state"][0])
    assert torch.equal(padded["d_initial_state"][1 - row], weights["final_state"][0])
    assert not any(padded[name][1 - row].any() for name in ("reads", "d_q", "d_k", "d_v", "d_beta"))


def pad(x: Tensor, length: int) -> Tensor:
    """Append tokens of numbers that would show."""
    return torch.cat([x, x.new_full((1, length - x.shape[1], *x.shape[2:]), 0.5)], dim=1)


@pytest.mark.parametrize("R", [4, 8])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("poisoned", NAMES)
def test_nan_stays_in_its_sequence_and_head(implementation, poisoned, packed, R):
    """All others have the same bits as without it, although vectors hold several of them. The NaN shows in its own
    results."""
    N, H, length = (2, 2, 3) if implementation.slow else (3, 3, 70)
    shape = {"lengths": (length,) * N} if packed else {"B": N, "T": length}
    problem = scan_problem(H=H, R=R, decay=True, **shape).to(device=implementation.device)
    weights = problem.cotangents()

    def heads(x: Tensor, name: str) -> Tensor:
        """A view as `[N, H, ...]`."""
        if name.removeprefix("d_") in ("initial_state", "final_state"):
            return x
        return x.view(N, length, H, R).transpose(1, 2)

    clean = problem.run_with_gradients(implementation.backend, weights)
    heads(problem.operands[poisoned], poisoned)[1, 1, 1 if poisoned != "initial_state" else 0] = float("nan")
    dirty = problem.run_with_gradients(implementation.backend, weights)
    others = torch.ones(N, H, dtype=torch.bool, device=implementation.device)
    others[1, 1] = False
    for name in clean:
        assert torch.equal(heads(dirty[name], name)[others], heads(clean[name], name)[others]), name
    assert heads(dirty["reads"], "reads")[1, 1].isnan().any()
    assert dirty["final_state"][1, 1].isnan().any() == (poisoned != "q")


def test_masked_tokens_pass_on_no_nan_of_the_state_or_of_gradients(implementation):
    """They read zeros from a state of NaN. A NaN in the gradient of their reads reaches no operand."""
    problem = small(implementation)
    tokens = problem.operands["q"].shape[1]
    mask = torch.arange(tokens, device=implementation.device).expand(problem.operands["q"].shape[:2]) % 3 != 1
    problem.options["mask"] = mask
    weights = problem.cotangents()
    weights["reads"][~mask] = 0
    clean = problem.run_with_gradients(implementation.backend, weights)
    weights["reads"][~mask] = float("nan")
    for name, x in problem.run_with_gradients(implementation.backend, weights).items():
        assert torch.equal(x, clean[name]), name
    problem.operands["initial_state"].fill_(float("nan"))
    reads = problem.run(implementation.backend)["reads"]
    assert torch.count_nonzero(reads[~mask]) == 0
    assert reads[mask].isnan().all()


@pytest.mark.parametrize("packed", [False, True])
def test_arguments_are_not_changed(implementation, packed):
    length = 3 if implementation.slow else 70
    shape = {"lengths": (length, 1)} if packed else {"T": length}
    problem = scan_problem(H=1, R=4, decay=True, mask=True, fenced=True, device=implementation.device, **shape)
    leaves, options = {n: x.requires_grad_() for n, x in problem.operands.items()}, problem.options
    weights = problem.cotangents()
    arguments = {**leaves, **weights, **{n: x for n, x in options.items() if isinstance(x, Tensor)}}
    before = {n: (x._version, x.detach().clone()) for n, x in arguments.items()}
    out = delta_update(**leaves, **options, backend=implementation.backend)
    results = [x.detach().clone() for x in out]
    torch.autograd.grad(out, list(leaves.values()), list(weights.values()))
    for name, (version, values) in before.items():
        assert arguments[name]._version == version, name
        assert torch.equal(arguments[name], values), name
    for x, y in zip(out, results, strict=True):  # backward does not change the results either
        assert torch.equal(x, y)
