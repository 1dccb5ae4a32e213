"""The promises that a user of delta_update builds on: the same bits on every run, whatever stands beside; operands
are left alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from problems import FLOAT32_TOLERANCE, MODES, NAMES, Problem, assert_close, cotangents_for, make, small, weights_of
from torch import Tensor

from deltamem_kernels import delta_update


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("R", [4, 5, 8, 16])
def test_every_run_has_the_same_bits(implementation, R):
    """On one thread or several, which share sequences and heads among them."""
    sizes = {"R": R} if implementation.slow else {"B": 4, "T": 200, "H": 4, "R": R}
    problem = small(implementation, **sizes)
    weights = weights_of(problem)
    first = problem.forward_backward(implementation.backend, weights)
    for threads in (1,) if implementation.slow else (1, 2, 3, 1):
        torch.set_num_threads(threads)
        again = problem.forward_backward(implementation.backend, weights)
        for name, x in first.items():
            assert torch.equal(again[name], x), f"{name} on {threads} threads"


def alone(problem: Problem, weights: dict[str, Tensor], start: int, stop: int, n: int) -> tuple[Problem, dict]:
    """Sequence n of a packed problem as a batch of one, and its share of the weights."""
    cut = {m: x[n : n + 1] if m == "initial_state" else x[:, start:stop] for m, x in problem.operands.items()}
    options = {m: x for m, x in problem.options.items() if m != "cu_seqlens"}
    return Problem(cut, options), {
        "reads": weights["reads"][:, start:stop],
        "final_state": weights["final_state"][n : n + 1],
    }


@pytest.mark.parametrize("R", [4, 5, 8, 16])
@pytest.mark.parametrize("lengths", [(70, 70, 70), (65, 130, 1, 64)], ids=str)
def test_neighbours_do_not_matter(implementation, lengths, R):
    """Each sequence alone, packed with others, and in a batch where the shorter ones are padded behind and masked:
    the same bits, values and gradients."""
    if implementation.slow:
        stand_beside(implementation, tuple(min(n, 3 + n % 3) for n in lengths[:2]), MODES[R % 3], R)
    else:
        for mode in MODES:
            stand_beside(implementation, lengths, mode, R)


def stand_beside(implementation, lengths: tuple[int, ...], mode: str, R: int) -> None:
    problem = make(lengths=lengths, H=1 if implementation.slow else 2, R=R, mode=mode).to(device=implementation.device)
    weights = weights_of(problem)
    bounds = [0, *itertools.accumulate(lengths)]
    packed = problem.forward_backward(implementation.backend, weights)

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
    batched = Problem(batch, options).forward_backward(implementation.backend, padded_weights)

    for n, (start, stop) in enumerate(itertools.pairwise(bounds)):
        by_itself, its_weights = alone(problem, weights, start, stop, n)
        for name, x in by_itself.forward_backward(implementation.backend, its_weights).items():
            of_state = name.removeprefix("d_") in ("initial_state", "final_state")
            here = packed[name][n : n + 1] if of_state else packed[name][:, start:stop]
            assert torch.equal(here, x), f"{name} of sequence {n}, packed"
            here = batched[name][n : n + 1] if of_state else batched[name][n : n + 1, : stop - start]
            if implementation.chunked and implementation.device == "cpu" and not implementation.slow:
                # There no padding is left out; a CPU chooses the chunked scan for nobody.
                assert_close({name: here}, {name: x}, FLOAT32_TOLERANCE)
            else:
                assert torch.equal(here, x), f"{name} of sequence {n}, in a batch"


@pytest.mark.parametrize("row", [0, 1])
def test_padding_in_front_does_not_matter(implementation, row):
    """Masked tokens before a sequence, more than a chunk of them, and none that counts in another row, before or behind
    it: as without them. Where chunks are counted from the first token that counts, the same bits."""
    T, padding = (9, 11) if implementation.slow else (150, 130)
    problem = make(B=1, T=T, H=2).to(device=implementation.device)
    weights = weights_of(problem)
    by_itself = problem.forward_backward(implementation.backend, weights)

    def before(x: Tensor) -> Tensor:
        return torch.cat([x.new_full((1, padding, *x.shape[2:]), float("nan")), x], dim=1).repeat(
            2, 1, *(1,) * (x.ndim - 2)
        )

    operands = {n: x.repeat(2, 1, 1, 1) if n == "initial_state" else before(x) for n, x in problem.operands.items()}
    mask = torch.ones(2, padding + T, dtype=torch.bool, device=implementation.device)
    mask[row, :padding] = mask[1 - row] = False
    its_weights = {"reads": before(weights["reads"]), "final_state": weights["final_state"].repeat(2, 1, 1, 1)}
    padded = Problem(operands, {"mask": mask}).forward_backward(implementation.backend, its_weights)
    for name, x in by_itself.items():
        of_state = name.removeprefix("d_") in ("initial_state", "final_state")
        here = padded[name][row : row + 1] if of_state else padded[name][row : row + 1, padding:]
        if implementation.backend in ("cpu", "cuda"):  # whose chunks begin with the row
            assert_close({name: here}, {name: x}, FLOAT32_TOLERANCE)
        else:
            assert torch.equal(here, x), name
    assert torch.equal(padded["final_state"][1 - row], problem.operands["initial_state"][0])
    assert torch.equal(padded["d_initial_state"][1 - row], weights["final_state"][0])
    assert not any(padded[name][1 - row].any() for name in ("reads", "d_q", "d_k", "d_v", "d_beta"))


def pad(x: Tensor, length: int) -> Tensor:
    """More tokens behind, of numbers that would show."""
    return torch.cat([x, x.new_full((1, length - x.shape[1], *x.shape[2:]), 0.5)], dim=1)


@pytest.mark.parametrize("R", [4, 8])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("poisoned", NAMES)
def test_nan_stays_in_its_sequence_and_head(implementation, poisoned, packed, R):
    """All others have the bits they have beside a sound neighbour, though vectors hold several of them at once; and
    the sick one is not made to look well."""
    N, H, length = (2, 2, 3) if implementation.slow else (3, 3, 70)
    shape = {"lengths": (length,) * N} if packed else {"B": N, "T": length}
    problem = make(H=H, R=R, decay=True, **shape).to(device=implementation.device)
    weights = weights_of(problem)

    def heads(x: Tensor, name: str) -> Tensor:
        """A view as `[N, H, ...]`."""
        if name.removeprefix("d_") in ("initial_state", "final_state"):
            return x
        return x.view(N, length, H, R).transpose(1, 2)

    sound = problem.forward_backward(implementation.backend, weights)
    heads(problem.operands[poisoned], poisoned)[1, 1, 1 if poisoned != "initial_state" else 0] = float("nan")
    sick = problem.forward_backward(implementation.backend, weights)
    others = torch.ones(N, H, dtype=torch.bool, device=implementation.device)
    others[1, 1] = False
    for name in sound:
        assert torch.equal(heads(sick[name], name)[others], heads(sound[name], name)[others]), name
    assert heads(sick["reads"], "reads")[1, 1].isnan().any()
    assert sick["final_state"][1, 1].isnan().any() == (poisoned != "q")


def test_masked_tokens_see_neither_a_sick_state_nor_sick_gradients(implementation):
    """They read zeros where the state is NaN, and a NaN handed back for their reads goes nowhere."""
    problem = small(implementation)
    tokens = problem.operands["q"].shape[1]
    mask = torch.arange(tokens, device=implementation.device).expand(problem.operands["q"].shape[:2]) % 3 != 1
    problem.options["mask"] = mask
    weights = weights_of(problem)
    weights["reads"][~mask] = 0
    sound = problem.forward_backward(implementation.backend, weights)
    weights["reads"][~mask] = float("nan")
    for name, x in problem.forward_backward(implementation.backend, weights).items():
        assert torch.equal(x, sound[name]), name
    problem.operands["initial_state"].fill_(float("nan"))
    reads = problem.forward(implementation.backend)["reads"]
    assert torch.count_nonzero(reads[~mask]) == 0
    assert reads[mask].isnan().all()


@pytest.mark.parametrize("packed", [False, True])
def test_arguments_stay_as_they_were(implementation, packed):
    length = 3 if implementation.slow else 70
    shape = {"lengths": (length, 1)} if packed else {"T": length}
    problem = make(H=1, R=4, decay=True, mask=True, fenced=True, **shape)
    leaves = {n: x.to(implementation.device).requires_grad_() for n, x in problem.operands.items()}
    options = {n: x.to(implementation.device) if isinstance(x, Tensor) else x for n, x in problem.options.items()}
    weights = {n: x.to(implementation.device) for n, x in cotangents_for(problem).items()}
    arguments = {**leaves, **weights, **{n: x for n, x in options.items() if isinstance(x, Tensor)}}
    before = {n: (x._version, x.detach().clone()) for n, x in arguments.items()}
    out = delta_update(**leaves, **options, backend=implementation.backend)
    results = [x.detach().clone() for x in out]
    torch.autograd.grad(out, list(leaves.values()), list(weights.values()))
    for name, (version, values) in before.items():
        assert arguments[name]._version == version, name
        assert torch.equal(arguments[name], values), name
    for x, y in zip(out, results, strict=True):  # nor does backward touch the results
        assert torch.equal(x, y)
