"""The operators of delta_update: registration, torch.compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from problems import MODES
from torch import Tensor

from deltamem_kernels import delta_update
from deltamem_kernels.testing import FLOAT32_TOLERANCE, Problem, assert_close_in_norm, relative_error, scan_problem

CPU_BACKENDS = ("cpu", "reference")
FORMS = {  # of a problem: shapes, gates and what is optional
    "plain": {"state": False},
    "state": {},
    "per-head": {"decay": True, "beta_per_head": True, "decay_per_head": True},
    "mask": {"mask": True, "decay": True},
    "packed": {"lengths": (0, 65, 1, 70, 0)},
    "packed-mask": {"lengths": (66, 3), "mask": True, "state": False, "index_dtype": torch.int32},
    "bfloat16": {"dtype": torch.bfloat16, "mask": True},
    "float64": {"dtype": torch.float64, "R": 3},
    "mixed": {"dtype": {"q": torch.bfloat16, "k": torch.float16, "v": torch.float64}, "decay": True},
    "strided": {"fenced": True, "decay": True, "mask": True},
}


def form(name: str, mode: str) -> Problem:
    """Return a problem of a named form, without a decay in the mode no_lambda."""
    options = {"T": 70, "R": 4, **FORMS[name]}
    if mode == "no_lambda":
        options["decay"] = False
    return scan_problem(mode=mode, **options)


def operator_operands(problem: Problem) -> list[Tensor | None]:
    """Return the operands in the operator's order."""
    given = {**problem.operands, **problem.options}
    return [given.get(n) for n in ("q", "k", "v", "beta", "decay", "write", "initial_state", "mask", "cu_seqlens")]


def affine_problem() -> Problem:
    """Return a problem with three independent gates, as compat has them: the operator's fourth mode."""
    problem = scan_problem(T=70, R=4, decay=True, mask=True)
    problem.operands["write"] = torch.rand_like(problem.operands["beta"])
    problem.options["mode"] = "affine"
    return problem


PROBLEMS = {  # one mode for each form: the modes do not change what opcheck looks at
    **{f"{n}-{m}": partial(form, n, m) for n, m in zip(FORMS, itertools.cycle(MODES), strict=False)},
    "affine": affine_problem,
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_forward_operator_passes_opcheck(problem, backend):
    given = PROBLEMS[problem]()
    operands, mode = operator_operands(given), given.options["mode"]
    for save in (False, True):
        torch.library.opcheck(torch.ops.deltamem_kernels.delta_update.default, (*operands, mode, backend, save))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_operator_itself_records_no_gradient(backend):
    """Autograd is around the operator, not in it: called directly, it has no gradient. So opcheck leaves out its test
    of dispatch through autograd."""
    given = form("state", "standard")
    operands = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in operator_operands(given)]
    for save in (False, True):
        torch.library.opcheck(
            torch.ops.deltamem_kernels.delta_update.default,
            (*operands, "standard", backend, save),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_backward_operator_passes_opcheck(problem, backend):
    given = PROBLEMS[problem]()
    operands, mode = operator_operands(given), given.options["mode"]
    reads, final_state, checkpoints = torch.ops.deltamem_kernels.delta_update(*operands, mode, backend, True)
    d_reads, d_state = torch.randn_like(reads), torch.randn_like(final_state)
    all_of_them = [x is not None for x in operands[:7]]
    some = [need and i % 2 == 0 for i, need in enumerate(all_of_them)]
    for cotangents, needs in (((d_reads, d_state), all_of_them), ((d_reads, None), some), ((None, d_state), some)):
        torch.library.opcheck(
            torch.ops.deltamem_kernels.delta_update_backward.default,
            (*cotangents, *operands, mode, checkpoints, backend, needs),
        )


# torch.compile


class Counting:
    """A compiler that counts its calls."""

    def __init__(self, backend: str) -> None:
        self.compile = torch._dynamo.lookup_backend(backend)
        self.compilations = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.compilations += 1
        return self.compile(graph, inputs)


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(x: Tensor, weight: Tensor, state: Tensor, mask: Tensor, mode: str, backend: str | None) -> tuple[Tensor, ...]:
    """A small memory layer around the operator, with something to fuse and to differentiate through."""
    q, k, v, raw = (x @ weight).unflatten(-1, (4, 2, 4)).unbind(2)
    q, k = (torch.nn.functional.normalize(torch.tanh(y), dim=-1) for y in (q, k))
    reads, final_state = delta_update(
        q, k, v, raw.sigmoid(), mode=mode, initial_state=state, mask=mask, backend=backend
    )
    return torch.relu(reads.flatten(-2)) + x[..., :8], final_state * 2


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("compiler", "backend", "mode"),
    [
        ("aot_eager", None, "standard"),
        ("aot_eager", "reference", "lambda_outside"),
        pytest.param("inductor", "cpu", "no_lambda", marks=pytest.mark.slow),
    ],
)
def test_compiled_results_and_gradients_are_those_of_eager_calls(compiler, backend, mode):
    """One graph, forward and backward, serves every batch and every length from 128. Shorter lengths need another one:
    the states kept for backward are then an empty tensor, which torch.compile specialises on."""
    counting = Counting(compiler)
    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    compilations = []
    for B, T in ((3, 200), (5, 128), (7, 300), (6, 5), (9, 1000), (7, 63)):
        x, weight, state = torch.randn(B, T, 16), torch.randn(16, 32) / 4, torch.randn(B, 2, 4, 4)
        operands, options = (x, weight, state, torch.rand(B, T) < 0.7), {"mode": mode, "backend": backend}
        ours = through(partial(compiled, **options), *operands)
        compilations.append(counting.compilations)
        assert_close_in_norm(ours, through(partial(layer, **options), *operands), FLOAT32_TOLERANCE)
    assert compilations == [1, 1, 1, 2, 2, 2]


@pytest.mark.usefixtures("_fresh_dynamo")
def test_without_gradients_one_graph_serves_all_lengths():
    counting = Counting("aot_eager")
    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    for B, T in ((3, 70), (5, 5), (6, 131), (7, 63), (9, 1000)):
        x, weight, state = torch.randn(B, T, 16), torch.randn(16, 32) / 4, torch.randn(B, 2, 4, 4)
        operands = (x, weight, state, torch.rand(B, T) < 0.7, "standard", None)
        for ours, eager in zip(compiled(*operands), layer(*operands), strict=True):
            assert relative_error(ours, eager) <= FLOAT32_TOLERANCE
    assert counting.compilations == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_one_graph_serves_any_number_of_packed_sequences():
    def packed(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        return tuple(delta_update(q, k, v, beta.sigmoid(), cu_seqlens=cu_seqlens))

    counting = Counting("aot_eager")
    compiled = torch.compile(packed, backend=counting, fullgraph=True, dynamic=True)
    for lengths in ((3, 64, 5, 0, 120), (170, 0, 2), (128, 1, 2, 3, 4, 5), (9, 9, 9, 0, 200)):
        problem = scan_problem(lengths=lengths, H=2, R=4, state=False)
        operands, bounds = list(problem.operands.values()), problem.options["cu_seqlens"]
        assert_close_in_norm(
            through(compiled, *operands, bounds), through(packed, *operands, bounds), FLOAT32_TOLERANCE
        )
    assert counting.compilations == 1


def through(function: Callable, *operands: Tensor) -> dict[str, Tensor]:
    """Return the results of a function and the gradients of a fixed sum of them."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in operands]
    results = function(*leaves)
    loss = sum((i + 1) * y.square().sum() for i, y in enumerate(results))
    grads = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
    return {f"result {i}": y.detach() for i, y in enumerate(results)} | {f"grad {i}": g for i, g in enumerate(grads)}
