"""delta_update as a citizen of PyTorch: operator registration, torch.compile, autograd, autocast, checkpointing,
threads, memory. And the promises that a user builds on: the same bits on every run, whatever stands beside."""

from __future__ import annotations

import gc
import itertools
import resource
import sys
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from problems import FLOAT32_TOLERANCE, MODES, NAMES, Problem, assert_close, cotangents_for, error, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deltamem_kernels import delta_update

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
    """A problem of a named form; what no_lambda does not take is left out."""
    options = {"T": 70, "R": 4, **FORMS[name]}
    if mode == "no_lambda":
        options["decay"] = False
    return make(mode=mode, **options)


def operator_operands(problem: Problem) -> list[Tensor | None]:
    """In the operator's order: q, k, v, beta, decay, write, initial_state, mask, cu_seqlens."""
    given = {**problem.operands, **problem.options}
    return [given.get(n) for n in ("q", "k", "v", "beta", "decay", "write", "initial_state", "mask", "cu_seqlens")]


def affine_problem() -> Problem:
    """The three gates one by one, as compat has them: the operator's fourth mode."""
    problem = make(T=70, R=4, decay=True, mask=True)
    problem.operands["write"] = torch.rand_like(problem.operands["beta"])
    problem.options["mode"] = "affine"
    return problem


PROBLEMS = {  # a mode for each form in turn: what the checks look at, no mode changes by itself
    **{f"{n}-{m}": partial(form, n, m) for n, m in zip(FORMS, itertools.cycle(MODES), strict=False)},
    "affine": affine_problem,
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_opcheck_of_the_forward_operator(problem, backend):
    given = PROBLEMS[problem]()
    operands, mode = operator_operands(given), given.options["mode"]
    for save in (False, True):
        torch.library.opcheck(torch.ops.deltamem_kernels.delta_update.default, (*operands, mode, backend, save))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_the_operator_itself_records_no_gradient(backend):
    """Called past the public function, on operands that want gradients, it has none to give, whatever it is made of:
    autograd stands around the operator. Hence no test of its dispatch through autograd."""
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
def test_opcheck_of_the_backward_operator(problem, backend):
    given = PROBLEMS[problem]()
    operands, mode = operator_operands(given), given.options["mode"]
    reads, final_state, checkpoints = torch.ops.deltamem_kernels.delta_update(*operands, mode, backend, True)
    d_reads, d_state = torch.randn_like(reads), torch.randn_like(final_state)
    all_of_them = [x is not None for x in operands[:7]]
    some = [need and i % 2 == 0 for i, need in enumerate(all_of_them)]
    for cotangents, needs in (((d_reads, d_state), all_of_them), ((d_reads, None), some), ((None, d_state), some)):
        torch.library.opcheck(
            torch.ops.deltamem_kernels.delta_update_backward.default,
            (*cotangents, *operands, checkpoints, mode, backend, needs),
        )


# torch.compile


class Counting:
    """A compiler that counts how often it is asked."""

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
    """A small memory layer around the operator, so that there is something to fuse and to differentiate through."""
    q, k, v, raw = (x @ weight).unflatten(-1, (4, 2, 4)).unbind(2)
    q, k = (torch.nn.functional.normalize(torch.tanh(y), dim=-1) for y in (q, k))
    reads, final_state = delta_update(
        q, k, v, raw.sigmoid(), mode=mode, initial_state=state, mask=mask, backend=backend
    )
    return torch.relu(reads.flatten(-2)) + x[..., :8], final_state * 2


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize(
    ("compiler", "backend", "mode"),
    [("aot_eager", None, "standard"), ("aot_eager", "reference", "lambda_outside"), ("inductor", "cpu", "no_lambda")],
)
def test_compiled_equals_eager(compiler, backend, mode):
    """One graph, forward and backward, for every batch and every length from 128 on, and one more for shorter ones:
    a tensor of no elements, which the states kept for backward then are, is a case of its own to torch.compile."""
    counting = Counting(compiler)
    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    compilations = []
    for B, T in ((3, 200), (5, 128), (7, 300), (6, 5), (9, 1000), (7, 63)):
        x, weight, state = torch.randn(B, T, 16), torch.randn(16, 32) / 4, torch.randn(B, 2, 4, 4)
        operands, options = (x, weight, state, torch.rand(B, T) < 0.7), {"mode": mode, "backend": backend}
        ours = through(partial(compiled, **options), *operands)
        compilations.append(counting.compilations)
        assert_close(ours, through(partial(layer, **options), *operands), FLOAT32_TOLERANCE)
    assert compilations == [1, 1, 1, 2, 2, 2]


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_without_gradients():
    """Nothing is kept for backward, and one graph does for all lengths."""
    counting = Counting("aot_eager")
    compiled = torch.compile(layer, backend=counting, fullgraph=True, dynamic=True)
    for B, T in ((3, 70), (5, 5), (6, 131), (7, 63), (9, 1000)):
        x, weight, state = torch.randn(B, T, 16), torch.randn(16, 32) / 4, torch.randn(B, 2, 4, 4)
        operands = (x, weight, state, torch.rand(B, T) < 0.7, "standard", None)
        for ours, eager in zip(compiled(*operands), layer(*operands), strict=True):
            assert error(ours, eager) <= FLOAT32_TOLERANCE
    assert counting.compilations == 1


@pytest.mark.usefixtures("_fresh_dynamo")
def test_compiled_packed_sequences():
    """The number of sequences, too, may change without another graph."""

    def packed(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        return tuple(delta_update(q, k, v, beta.sigmoid(), cu_seqlens=cu_seqlens))

    counting = Counting("aot_eager")
    compiled = torch.compile(packed, backend=counting, fullgraph=True, dynamic=True)
    for lengths in ((3, 64, 5, 0, 120), (170, 0, 2), (128, 1, 2, 3, 4, 5), (9, 9, 9, 0, 200)):
        problem = make(lengths=lengths, H=2, R=4, state=False)
        operands, bounds = list(problem.operands.values()), problem.options["cu_seqlens"]
        assert_close(through(compiled, *operands, bounds), through(packed, *operands, bounds), FLOAT32_TOLERANCE)
    assert counting.compilations == 1


def through(function: Callable, *operands: Tensor) -> dict[str, Tensor]:
    """Results of a function and the gradients of a fixed sum of them."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in operands]
    results = function(*leaves)
    loss = sum((i + 1) * y.square().sum() for i, y in enumerate(results))
    grads = torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])
    return {f"result {i}": y.detach() for i, y in enumerate(results)} | {f"grad {i}": g for i, g in enumerate(grads)}


# Autograd


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(implementation, backward_inside):
    """q, k, v from a linear layer in bfloat16, the gate kept in float32. What autocast does to a matrix product must
    not happen to the state's arithmetic."""
    T = 4 if implementation.slow else 70
    x = torch.randn(2, T, 16, device=implementation.device)
    projection, gate = (torch.nn.Linear(16, n, device=implementation.device) for n in (24, 8))

    def gradients(scan: Callable) -> dict[str, Tensor]:
        with torch.autocast(implementation.device, torch.bfloat16):
            q, k, v = projection(x).unflatten(-1, (3, 2, 4)).unbind(2)
            beta = gate(x).float().sigmoid().unflatten(-1, (2, 4))
            assert (q.dtype, beta.dtype) == (torch.bfloat16, torch.float32)
            reads, final_state = scan(q, k, v, beta)
            assert (reads.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)
        loss = reads.float().square().sum() + final_state.square().sum()
        parameters = {f"{n}.{m}": p for n, x in (("qkv", projection), ("beta", gate)) for m, p in x.named_parameters()}
        with torch.autocast(implementation.device, torch.bfloat16, enabled=backward_inside):
            grads = torch.autograd.grad(loss, list(parameters.values()))
        return {"reads": reads, "final_state": final_state, **dict(zip(parameters, grads, strict=True))}

    def exactly(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        reads, final_state = delta_update(*(y.double() for y in (q, k, v, beta)), backend="reference")
        return reads.to(q.dtype), final_state.float()

    ours = gradients(lambda *operands: delta_update(*operands, backend=implementation.backend))
    exact = gradients(exactly)
    assert all(torch.isfinite(y).all() for y in ours.values())
    assert error(ours["final_state"], exact["final_state"]) <= FLOAT32_TOLERANCE
    # Four roundings to bfloat16 lie on the way to a weight: the reads, their gradient, that of q, k and v, the product.
    # A last bit that falls the other way in one goes through all that follow.
    assert_close(ours, exact, 4 * torch.finfo(torch.bfloat16).eps)


def small(implementation, **options) -> Problem:
    """A problem with every operand, short where a token costs milliseconds."""
    sizes = {"T": 4, "R": 4, "H": 1, "B": 1} if implementation.slow else {"T": 70}
    return make(decay=True, **{**sizes, **options}).to(device=implementation.device)


def weights_of(problem: Problem) -> dict[str, Tensor]:
    device = problem.operands["q"].device
    return {n: x.to(device) for n, x in cotangents_for(problem.to(device="cpu")).items()}


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    return {n: x.detach().clone().requires_grad_() for n, x in problem.operands.items()}


def test_two_calls_that_share_their_operands(implementation):
    """The gradient is the sum of both calls', whatever the calls do to each other's buffers."""
    problem = small(implementation)
    leaves, weights = leaves_of(problem), weights_of(problem)
    separate = []
    for mode in ("standard", "lambda_outside"):
        out = delta_update(**leaves, mode=mode, backend=implementation.backend)
        separate.append(torch.autograd.grad(out, list(leaves.values()), list(weights.values())))
    both = [
        delta_update(**leaves, mode=mode, backend=implementation.backend) for mode in ("standard", "lambda_outside")
    ]
    together = torch.autograd.grad([*both[0], *both[1]], list(leaves.values()), [*weights.values()] * 2)
    for name, g, one, other in zip(leaves, together, *separate, strict=True):
        assert torch.equal(g, one + other), name


def test_backward_twice(implementation):
    """With retain_graph, the same bits: backward changes nothing of what was kept for it."""
    problem = small(implementation)
    leaves, weights = leaves_of(problem), weights_of(problem)
    out = delta_update(**leaves, backend=implementation.backend)
    grads = [
        torch.autograd.grad(out, list(leaves.values()), list(weights.values()), retain_graph=True) for _ in range(2)
    ]
    for name, first, second in zip(leaves, *grads, strict=True):
        assert torch.equal(first, second), name


def test_backward_accumulates_into_grad(implementation):
    problem = small(implementation)
    leaves = leaves_of(problem)
    for _ in range(2):
        delta_update(**leaves, backend=implementation.backend).reads.sum().backward()
    grads = torch.autograd.grad(
        delta_update(**leaves, backend=implementation.backend).reads.sum(), list(leaves.values())
    )
    for (name, x), g in zip(leaves.items(), grads, strict=True):
        assert torch.equal(x.grad, 2 * g), name


def test_a_second_derivative_is_refused_in_words(implementation):
    """Not silently zero."""
    leaves = leaves_of(small(implementation))
    reads, _ = delta_update(**leaves, backend=implementation.backend)
    (g,) = torch.autograd.grad(reads.square().sum(), leaves["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


def test_expanded_gradients_of_non_leaves(implementation):
    """sum() hands back one number with strides of zero; the operands are results of other operators."""
    problem = small(implementation)
    leaves = leaves_of(problem)
    reads, state = delta_update(**{n: x * 1 for n, x in leaves.items()}, backend=implementation.backend)
    (reads.sum() + state.sum()).backward()
    ones = {"reads": torch.ones_like(reads), "final_state": torch.ones_like(state)}
    plain = problem.forward_backward(implementation.backend, ones)
    for name, x in leaves.items():
        assert torch.equal(x.grad, plain[f"d_{name}"]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(implementation, use_reentrant):
    """The state goes in and comes out of functions: what is computed again is the same, bit for bit."""
    problem = small(implementation)
    weight = torch.randn(problem.operands["q"].shape[-1:] * 2, device=implementation.device)

    def block(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.nn.functional.normalize(torch.tanh(k @ weight), dim=-1)
        reads, state = delta_update(q, k, v, beta, decay, initial_state=state, backend=implementation.backend)
        return reads.tanh(), state

    def gradients(run: Callable) -> list[Tensor]:
        leaves = leaves_of(problem)
        q, *rest, state = leaves.values()
        for _ in range(2):  # the second block goes on from the first one's state
            q, state = run(q, *rest, state)
        return list(torch.autograd.grad(q.square().sum() + state.square().sum(), list(leaves.values())))

    def recomputed(*operands: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(block, *operands, use_reentrant=use_reentrant)

    if use_reentrant:  # refuses torch.autograd.grad
        leaves = leaves_of(problem)
        q, *rest, state = leaves.values()
        for _ in range(2):
            q, state = recomputed(q, *rest, state)
        (q.square().sum() + state.square().sum()).backward()
        again = [x.grad for x in leaves.values()]
    else:
        again = gradients(recomputed)
    for name, plain, other in zip(NAMES, gradients(block), again, strict=True):
        assert torch.equal(plain, other), name


def test_without_gradients_the_same_bits(implementation):
    """Three ways into the kernels: with what backward needs, without, and in inference mode."""
    problem = small(implementation, mask=True)
    leaves = leaves_of(problem)
    recorded = delta_update(**leaves, **problem.options, backend=implementation.backend)
    with torch.no_grad():
        plain = delta_update(**leaves, **problem.options, backend=implementation.backend)
    with torch.inference_mode():
        inference = delta_update(**leaves, **problem.options, backend=implementation.backend)
    assert all(x.requires_grad for x in recorded)
    assert not any(x.requires_grad for x in (*plain, *inference))
    for x, y, z in zip(recorded, plain, inference, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)


# The same bits


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
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [(70, 70, 70), (65, 130, 1, 64)], ids=str)
def test_neighbours_do_not_matter(implementation, lengths, mode, R):
    """Each sequence alone, packed with others, and in a batch where the shorter ones are padded behind and masked:
    the same bits, values and gradients."""
    if implementation.slow:
        if MODES.index(mode) != R % 3:
            pytest.skip("one mode for each rank where a token costs milliseconds")
        lengths = tuple(min(n, 3 + n % 3) for n in lengths[:2])
    problem = make(lengths=lengths, H=2, R=R, mode=mode).to(device=implementation.device)
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


# Memory


@pytest.mark.parametrize("without_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_kept_for_backward(implementation, dtype, without_heads):
    """Beyond the operands themselves, one state for every 64 tokens: no copies, however the operands are strided."""
    T = 130 if implementation.slow else 8192
    problem = make(B=1, T=T, H=1, R=8, decay=True, mask=True, fenced=True, dtype=dtype)
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


def test_results_are_freed_at_once(implementation):
    """By reference counts alone: nothing points at itself and waits for the garbage collector."""
    problem = small(implementation)
    leaves, weights = leaves_of(problem), weights_of(problem)
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
    weights = weights_of(problem)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(x), Tensor) for x in gc.get_objects())

    def calls() -> None:
        for _ in range(3 if implementation.slow else 10):
            problem.forward_backward(implementation.backend, weights)
            problem.forward(implementation.backend)

    calls()  # what is kept for good, is there now
    before = tensors()
    calls()
    assert tensors() == before


def test_many_calls_leave_no_memory_behind():
    """Below Python, too: hundreds of calls that allocate 2 MB and more each."""
    problem = make(B=1, T=8192, H=4, R=16)
    weights = cotangents_for(Problem(problem.operands, problem.options))

    def peak() -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    problem.forward_backward("cpu", weights)
    before, calls = peak(), 100
    for _ in range(calls):
        problem.forward_backward("cpu", weights)
    one_call = 6 * problem.operands["q"].nbytes + 8192 // 64 * 4 * 16 * 16 * 4  # reads, five gradients, checkpoints
    assert peak() - before < calls * one_call / 20


# Threads of Python


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_many_threads_at_once(backend):
    """Right results, the same bits as one after the other: the kernels' own memory belongs to a thread."""
    T = 20 if backend == "reference" else 200
    problems = [make(T=T + i, H=1 + i % 3, R=(3, 4, 8, 16)[i % 4], mode=MODES[i % 3]) for i in range(16)]
    weights = [cotangents_for(p) for p in problems]
    expected = [p.forward_backward(backend, w) for p, w in zip(problems, weights, strict=True)]
    together = threading.Barrier(8)

    def work(first: int) -> list[tuple[int, dict[str, Tensor]]]:
        together.wait()
        rounds = range(1 if backend == "reference" else 10)
        return [(i, problems[i].forward_backward(backend, weights[i])) for _ in rounds for i in (first, 15 - first)]

    with ThreadPoolExecutor(8) as pool:
        for i, ours in itertools.chain.from_iterable(pool.map(work, range(8))):
            for name, x in expected[i].items():
                assert torch.equal(ours[name], x), f"{name} of problem {i}"


def test_other_threads_run_during_a_call():
    """The GIL is released in the kernels. Nobody is forced to hand it over while this test runs, so a counting thread
    gets on only while it is free: a few steps where a call begins and ends, thousands in the kernels' time. Backward
    has more than twice forward's work, and holds up others for none of it either."""
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
    # The first call starts threads and the like. In the others, the least counts: where the GIL is held, others get on
    # when the system happens to stop this thread just where a call begins or ends, and not in each of five.
    in_forward, in_backward = (min(during[1:]) for during in progress.values())
    assert in_forward > 300, progress
    assert in_backward > in_forward, progress
