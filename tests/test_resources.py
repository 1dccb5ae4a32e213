"""Memory, references and threads during calls of delta_update."""

from __future__ import annotations

import gc
import itertools
import resource
import sys
import threading
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import MODES, leaves_of, small
from torch import Tensor

from deltamem_kernels import delta_update
from deltamem_kernels.testing import scan_problem

pytestmark = pytest.mark.each_scan


@pytest.mark.parametrize("without_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_one_state_for_every_chunk(implementation, dtype, without_heads):
    """Besides the operands it keeps no copies, also of strided ones."""
    T = 2 * implementation.chunk + 2 if implementation.slow else 8192
    problem = scan_problem(B=1, T=T, H=1, R=8, decay=True, mask=True, fenced=True, dtype=dtype)
    problem.operands["v"] = problem.operands["v"].float()
    leaves = {n: x.to(implementation.device).requires_grad_() for n, x in problem.operands.items()}
    mask = problem.options["mask"].to(implementation.device)
    operands = {n: x.squeeze(1 if n == "initial_state" else 2) for n, x in leaves.items()} if without_heads else leaves
    theirs = {x.untyped_storage().data_ptr() for x in (*leaves.values(), mask)}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in theirs:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = delta_update(**operands, mask=mask, backend=implementation.backend)
    assert 0 < sum(kept.values()) <= T // implementation.chunk * 8 * 8 * 4
    assert out.reads.requires_grad


def test_results_are_freed_without_the_garbage_collector(implementation):
    """There are no cycles of references."""
    problem = small(implementation)
    leaves, weights = leaves_of(problem), problem.cotangents()
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            out = delta_update(**leaves, backend=implementation.backend)
            dying = [weakref.ref(x) for x in (*out, out.reads.grad_fn)]
            if backward:
                torch.autograd.grad(out, list(leaves.values()), list(weights.values()))
            del out
            assert [x() for x in dying] == [None] * 3
    finally:
        gc.enable()


def test_many_calls_leave_no_tensors(implementation):
    problem = small(implementation)
    weights = problem.cotangents()

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def calls() -> None:
        for _ in range(3 if implementation.slow else 10):
            problem.run_with_gradients(implementation.backend, weights)
            problem.run(implementation.backend)

    calls()  # allocates what is kept for good
    before = tensors()
    calls()
    assert tensors() == before


@pytest.mark.slow
def test_many_calls_leave_no_memory():
    """Nor below Python, after a hundred calls of more than 2 MB each."""
    problem = scan_problem(B=1, T=8192, H=4, R=16)
    weights = problem.cotangents()

    def peak() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    problem.run_with_gradients("cpu", weights)
    before, calls = peak(), 100
    for _ in range(calls):
        problem.run_with_gradients("cpu", weights)
    one_call = 6 * problem.operands["q"].nbytes + 8192 // 64 * 4 * 16 * 16 * 4  # reads, five gradients, checkpoints
    assert peak() - before < calls * one_call / 20


# Threads


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_calls_from_many_threads_have_the_same_bits(backend):
    """As one after the other: each thread has its own buffers."""
    T = 20 if backend == "reference" else 200
    problems = [scan_problem(T=T + i, H=1 + i % 3, R=(3, 4, 8, 16)[i % 4], mode=MODES[i % 3]) for i in range(16)]
    weights = [p.cotangents() for p in problems]
    expected = [p.run_with_gradients(backend, w) for p, w in zip(problems, weights, strict=True)]
    together = threading.Barrier(8)

    def work(first: int) -> list[tuple[int, dict[str, Tensor]]]:
        together.wait()
        rounds = range(1 if backend == "reference" else 10)
        return [(i, problems[i].run_with_gradients(backend, weights[i])) for _ in rounds for i in (first, 15 - first)]

    with ThreadPoolExecutor(8) as pool:
        for i, ours in itertools.chain.from_iterable(pool.map(work, range(8))):
            for name, x in expected[i].items():
                assert torch.equal(ours[name], x), f"{name} of problem {i}"


@pytest.mark.slow
def test_the_gil_is_released_during_a_call():
    """The interpreter does not switch threads during this test, so a counting thread advances only while the GIL is
    free: a few steps where a call begins and ends, thousands while kernels run. Backward has more than twice the work
    of forward."""
    x = torch.rand(1, 2_000_000, 1, 4)
    operands = [x.clone().requires_grad_() for _ in range(4)]
    out, cotangent = delta_update(*operands, backend="cpu"), torch.ones_like(x)

    def forward() -> None:
        delta_update(*operands, backend="cpu")

    def backward() -> None:
        torch.autograd.grad(out.reads, operands, cotangent, retain_graph=True)

    steps, stop, page = 0, False, bytes(16384)

    def count() -> None:
        nonlocal steps
        while not stop:
            steps += 1
            zlib.crc32(page)  # hands the GIL over while it runs, a microsecond or two

    interval = sys.getswitchinterval()
    other = threading.Thread(target=count)
    sys.setswitchinterval(1000)
    progress: dict[Callable, list[int]] = {forward: [], backward: []}
    try:
        other.start()
        for _ in range(6):
            for call, during in progress.items():
                before = steps
                call()
                during.append(steps - before)
    finally:
        stop = True
        sys.setswitchinterval(interval)
        other.join()
    # The first call starts threads. Of the others take the smallest count: with the GIL held, the other thread advances
    # only if the system stops this one just where a call begins or ends, which does not happen in each of five.
    in_forward, in_backward = (min(during[1:]) for during in progress.values())
    assert in_forward > 300, progress
    assert in_backward > in_forward, progress
