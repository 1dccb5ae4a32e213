"""The scan in parallel chunks: when it is chosen, and that it is the same scan."""

from __future__ import annotations

import inspect

import pytest
import torch
from conftest import CUDA, small_chunks
from problems import MODES

from deltamem_kernels import delta_update
from deltamem_kernels.backends.scan_choice import MAP_RANK, choose_scan, force_scan
from deltamem_kernels.operands import CHECKPOINT_INTERVAL
from deltamem_kernels.testing import FLOAT32_TOLERANCE, Problem, assert_close_in_norm, scan_problem

DEVICE = "cuda" if CUDA else "cpu"


def test_the_choice_does_not_depend_on_the_batch():
    assert list(inspect.signature(choose_scan).parameters) == ["backend", "T", "H", "R"]


@pytest.mark.parametrize(
    ("backend", "T", "H", "R", "chunked", "why"),
    [
        ("triton", 65, 1, 8, True, "T = 65 tokens are more than one chunk of 64"),
        ("triton", 64, 1, 8, False, "up to 64 tokens are one chunk"),
        ("triton", 1 << 20, 4, 16, True, "more than one chunk"),
        ("triton", 8192, 1, 17, False, "R = 17, over 16"),
        ("triton", 8192, 1000, 8, False, "H = 1000 heads"),
        ("cpu", 8192, 1, 8, False, "the threads may have other sequences to run"),
    ],
)
def test_the_choice_gives_its_reason(backend, T, H, R, chunked, why):
    scan = choose_scan(backend, T, H, R)
    assert scan.chunked is chunked
    assert why in scan.reason


def test_a_forced_choice_ends_with_its_block():
    with force_scan(chunked=True):
        assert choose_scan("cpu", 1, 1, 1).chunked
        with force_scan(chunked=False):
            assert not choose_scan("triton", 8192, 1, 8).chunked
        assert not choose_scan("triton", 8192, 1, MAP_RANK + 1).chunked, "there is no such kernel"
    assert not choose_scan("cpu", 1, 1, 1).chunked


def both(problem: Problem, backend: str, device: str) -> tuple[dict, dict, dict]:
    """Return results and gradients of the plain scan, of the chunked one, and in float64."""
    problem = problem.to(device)
    weights = problem.cotangents()
    exact = problem.float64(weights)
    with force_scan(chunked=False):
        plain = problem.run_with_gradients(backend, weights)
    with force_scan(chunked=True):
        chunked = problem.run_with_gradients(backend, weights)
    return plain, chunked, exact


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.slow)])
def test_up_to_one_chunk_both_scans_have_the_same_bits(backend):
    """So the choice for short sequences cannot be seen."""
    T = CHECKPOINT_INTERVAL if backend == "cpu" or CUDA else 4
    with small_chunks(CHECKPOINT_INTERVAL if CUDA else 4):
        plain, chunked, exact = both(scan_problem(T=T, decay=True), backend, "cpu" if backend == "cpu" else DEVICE)
    assert_close_in_norm(chunked, exact, FLOAT32_TOLERANCE)
    for name, x in plain.items():
        assert torch.equal(chunked[name], x), name


@pytest.mark.slow
def test_chunks_of_the_real_length_are_exact():
    """The other tests here use shorter chunks."""
    with force_scan(chunked=True):
        plain, chunked, exact = both(scan_problem(B=1, T=130, H=1, R=4, decay=True), "triton", DEVICE)
    assert_close_in_norm(chunked, exact, FLOAT32_TOLERANCE)
    assert any(not torch.equal(plain[name], x) for name, x in chunked.items()), "it was the plain scan"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "mode"), [((29, 0, 3, 9, 1, 16, 4), "standard"), *(((0, 0, 41), mode) for mode in MODES)], ids=str
)
def test_groups_of_chunks_only_change_the_order_of_sums(lengths, mode):
    """Groups of two chunks, and all chunks in one group. A sequence within one group has the same bits."""
    problem = scan_problem(lengths=lengths, R=4, H=1, mode=mode)
    results = []
    for group in (2, 100):
        with small_chunks(4, group):
            results.append(both(problem, "triton", DEVICE)[1:])
    (grouped, exact), (at_once, same_exact) = results
    assert_close_in_norm(grouped, exact, FLOAT32_TOLERANCE)
    assert_close_in_norm(at_once, same_exact, FLOAT32_TOLERANCE)
    if len(lengths) > 3:
        start, stop = sum(lengths[:3]), sum(lengths[:4])  # nine tokens, two maps: one group
        assert torch.equal(grouped["reads"][:, start:stop], at_once["reads"][:, start:stop])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_chunked_scan_on_threads_is_exact_on_a_cpu(threads):
    problem = scan_problem(B=2, T=300, H=2, mask=True, mode="no_lambda")  # it forgets slowest
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain, chunked, exact = both(problem, "cpu", "cpu")
    finally:
        torch.set_num_threads(before)
    assert_close_in_norm(chunked, exact, FLOAT32_TOLERANCE)
    assert not torch.equal(plain["reads"], chunked["reads"])


def test_a_chunked_scan_of_a_long_sequence_is_exact():
    """200,000 tokens, from 3,125 maps."""
    problem = scan_problem(B=1, T=200_000, H=1, R=8)
    with force_scan(chunked=True):
        chunked = delta_update(**problem.operands, backend="cpu")
    plain = delta_update(**problem.to(dtype=torch.float64).operands, backend="cpu")
    assert_close_in_norm(chunked._asdict(), plain._asdict(), FLOAT32_TOLERANCE)
