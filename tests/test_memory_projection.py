"""memory_projection: every backend against the same formulas in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import FLOAT32_TOLERANCE, assert_close, error, subsets
from projection_problems import GATES, NAMES, RESULTS, check, exactly, make, ours, plainly, weights_of, with_gradients
from torch import Tensor

from deltamem_kernels import delta_step, delta_update, memory_projection


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("beta", "decay"), list(itertools.product(GATES[:2], GATES)))
def test_gates(implementation, beta, decay, biases, normalize):
    operands = make(2, 19, beta=beta, decay=decay, biases=biases, device=implementation.device)
    check(operands, implementation, heads=2, normalize=normalize)


@pytest.mark.parametrize("T", [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65])
def test_lengths(implementation, T):
    check(make(2, T, device=implementation.device), implementation, heads=2)


@pytest.mark.parametrize("N", [0, 1, 5, 20])
def test_decoding_rows(implementation, N):
    check(make(N, decay="head", device=implementation.device), implementation, heads=2)


@pytest.mark.parametrize(("H", "R"), [(1, 1), (3, 1), (1, 3), (1, 4), (5, 5), (1, 8), (4, 16), (2, 33), (1, 128)])
@pytest.mark.parametrize("T", [2, 18])
def test_heads_and_ranks(implementation, H, R, T):
    check(make(1, T, H=H, R=R, decay="head", device=implementation.device), implementation, heads=H)


@pytest.mark.parametrize("D", [0, 1, 15, 16, 17, 31, 32, 33, 576, 645, 1300])
def test_widths(implementation, D):
    for T in (1, 17):
        wanted = None if D else ("beta_bias", "decay_bias")  # of no numbers no gradient can be wrong
        if D == T == 1:  # x's one gradient is a sum of both signs, which may all but cancel
            wanted = NAMES[1:]
        check(make(1, T, D=D, H=1, device=implementation.device), implementation, heads=1, wanted=wanted)


def test_no_sequences(implementation):
    check(make(0, 5, device=implementation.device), implementation, heads=2)


@pytest.mark.parametrize("T", [5, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_between_nans(implementation, T, dtype):
    """Non-contiguous operands and gradients, in parents whose margins are NaN."""
    types = {"x": dtype}
    operands = make(2, T, D=37, decay="head", dtype=types, fenced=True, device=implementation.device)
    check(operands, implementation, fenced=True, heads=2, tolerance=_tolerance(types))


def _tolerance(types: dict[str, torch.dtype]) -> float:
    """Gradients of 16-bit operands are right to the last bit their dtype has."""
    return max(FLOAT32_TOLERANCE, *(torch.finfo(t).eps for t in types.values()))


@pytest.mark.parametrize("T", [3, 21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", ["everything", "x", "weights"])
def test_16_bit_operands(implementation, T, dtype, narrow):
    """At most twice the error of PyTorch's layers in that dtype. Results are float32, and as good: nothing rounds x or
    the weights on the way."""
    names = {"everything": NAMES, "x": NAMES[:1], "weights": NAMES[1:]}[narrow]
    operands = make(2, T, D=70, dtype=dict.fromkeys(names, dtype), device=implementation.device)
    cotangents = weights_of(plainly(**{n: y.float() for n, y in operands.items()}, heads=2))
    cotangents = {n: y.to(dtype).float() for n, y in cotangents.items()}
    exact = exactly(operands, cotangents, heads=2)
    same = {n: y.to(dtype) for n, y in operands.items()}
    loop = with_gradients(plainly, same, cotangents, heads=2)
    results = with_gradients(lambda **y: ours(implementation.backend, y, heads=2), operands, cotangents)
    for name, y in exact.items():
        assert error(results[name], y) <= 2 * error(loop[name], y), name
        if name in RESULTS:
            assert error(results[name], y) <= FLOAT32_TOLERANCE, name


def test_mixed_dtypes(implementation):
    types = dict(zip(NAMES, itertools.cycle((torch.bfloat16, torch.float16, torch.float32)), strict=False))
    for T in (2, 19):
        operands = make(2, T, dtype=types, device=implementation.device)
        check(operands, implementation, heads=2, tolerance=_tolerance(types))


@pytest.mark.parametrize("double", NAMES)
def test_one_float64_operand_makes_the_arithmetic_float64(implementation, double):
    for T in (2, 19):
        operands = make(1, T, dtype={double: torch.float64}, device=implementation.device)
        check(operands, implementation, heads=2, wanted=(double,), tolerance=1e-13)


def test_every_subset_of_frozen_operands(implementation):
    operands = make(1, 3, D=9, R=4, device=implementation.device)
    for subset in subsets(NAMES, implementation):
        check(operands, implementation, heads=2, wanted=subset)


@pytest.mark.parametrize("through", RESULTS)
def test_gradient_through_one_result(implementation, through):
    operands = make(1, 5, device=implementation.device)
    cotangents = {through: torch.randn(1, 5, 2, 8)}
    exact = exactly(operands, cotangents, heads=2)
    results = with_gradients(lambda **y: ours(implementation.backend, y, heads=2), operands, cotangents)
    for name, y in exact.items():
        assert error(results[name], y) <= FLOAT32_TOLERANCE, name


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-3, 0.3, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_every_size(implementation, size, dtype):
    """tanh of the smallest, whose norm is at its floor, and of the largest: each direction is right, none is NaN."""
    for T in (2, 19):
        operands = make(1, T, D=1, R=4, dtype=dtype, device=implementation.device)
        operands["x"] *= size
        exact = plainly(**{n: y.double().cpu() for n, y in operands.items()}, heads=2)
        results = ours(implementation.backend, operands, heads=2)
        assert_close(results, exact, 2e-6 if dtype == torch.float32 else 1e-14)


def test_a_token_of_zeros(implementation):
    operands = make(1, 19, biases=False, device=implementation.device)
    operands["x"][0, 3] = 0
    check(operands, implementation, heads=2)
    results = ours(implementation.backend, operands, heads=2)
    assert torch.count_nonzero(results["q"][0, 3]) == torch.count_nonzero(results["k"][0, 3]) == 0
    assert (results["beta"][0, 3] == 0.5).all()


def test_nan_stays_in_its_token(implementation):
    for T in (5, 40):
        operands = make(1, T, device=implementation.device)
        clean = ours(implementation.backend, operands, heads=2)
        operands["x"][0, 2, 7] = float("nan")
        dirty = ours(implementation.backend, operands, heads=2)
        rest = [t for t in range(T) if t != 2]
        for name in RESULTS:
            assert torch.equal(dirty[name][:, rest], clean[name][:, rest]), name
            assert dirty[name][:, 2].isnan().all(), name


@pytest.mark.parametrize("T", [5, 40])
def test_nan_of_one_row_is_its_heads(T, implementation):
    """A norm that is NaN is no small one: the head's other numbers are NaN too, and nobody else's."""
    operands = make(1, T, device=implementation.device)
    clean = ours(implementation.backend, operands, heads=2)
    operands["qkv_weight"][1, 3] = float("nan")  # of q, head 0
    dirty = ours(implementation.backend, operands, heads=2)
    assert dirty["q"][:, :, 0].isnan().all()
    assert torch.equal(dirty["q"][:, :, 1], clean["q"][:, :, 1])
    for name in (x for x in RESULTS if x != "q"):
        assert torch.equal(dirty[name], clean[name]), name


def test_the_same_bits_beside_any_neighbours_and_with_any_threads(implementation):
    operands = make(3, 37, D=600, device=implementation.device)
    together = ours(implementation.backend, operands, heads=2)
    for b in range(3):
        alone = ours(implementation.backend, {**operands, "x": operands["x"][b : b + 1]}, heads=2)
        for name in RESULTS:
            if implementation.name != "reference":  # a matrix product of torch's promises no such thing
                assert torch.equal(alone[name][0], together[name][b]), name
            assert error(alone[name][0], together[name][b]) <= FLOAT32_TOLERANCE
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = ours(implementation.backend, operands, heads=2)
    finally:
        torch.set_num_threads(threads)
    if implementation.name != "reference":
        assert all(torch.equal(single[name], together[name]) for name in RESULTS)


def test_decoding_has_the_bits_of_prefill():
    """On the CPU a token is projected alike alone, among others, and in a pool of requests."""
    operands = make(1, 50, D=333)
    together = ours("cpu", operands, heads=2)
    for t in (0, 13, 49):
        rows = ours("cpu", {**operands, "x": operands["x"][:, t]}, heads=2)
        assert all(torch.equal(rows[name], together[name][:, t]) for name in RESULTS)


def test_feeds_the_memory(implementation):
    """Results go into delta_update, a row of them into delta_step, as they are."""
    T = 4 if implementation.slow else 20
    operands = make(2, T, decay="head", device=implementation.device)
    p = memory_projection(**operands, heads=2, backend=implementation.backend)
    out = delta_update(*p, backend=implementation.backend)
    pool = torch.zeros(2, 2, 8, 8, device=implementation.device)
    for t in range(T):
        row = memory_projection(**{**operands, "x": operands["x"][:, t]}, heads=2, backend=implementation.backend)
        reads = delta_step(pool, *row, backend=implementation.backend)
        assert error(reads, out.reads[:, t]) <= FLOAT32_TOLERANCE
    assert error(pool, out.final_state) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(("wanted", "kept"), [(("x",), False), (("beta_bias",), False), (("qkv_weight",), True)])
def test_x_is_kept_only_for_the_weights(wanted, kept):
    operands = make(2, 60, D=300, H=1)
    leaves = {n: y.requires_grad_(n in wanted) for n, y in operands.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (saved.append(y), y)[1], lambda y: y):
        memory_projection(**leaves)
    large = [y for y in saved if y.shape[:2] == (2, 60) and y.shape[2] > 1]
    assert [y.data_ptr() for y in large] == [operands["x"].data_ptr()] * kept


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(implementation, backward_inside):
    """What autocast does to a matrix product does not happen here."""
    operands = make(2, 19, device=implementation.device)
    cotangents = weights_of(plainly(**operands, heads=2))
    exact = exactly(operands, cotangents, heads=2)
    leaves = {n: y.requires_grad_() for n, y in operands.items()}
    with torch.autocast(implementation.device, torch.bfloat16):
        out = ours(implementation.backend, leaves, heads=2)
    with torch.autocast(implementation.device, torch.bfloat16, enabled=backward_inside):
        cotangents = [cotangents[n].to(implementation.device) for n in out]
        grads = torch.autograd.grad(list(out.values()), list(leaves.values()), cotangents)
    assert_close({**out, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}, exact, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("beta", "decay"), [("row", "head"), ("head", None)])
def test_gradcheck_of_the_reference(beta, decay, normalize):
    operands = make(2, 3, D=5, R=4, beta=beta, decay=decay, dtype=torch.float64)
    leaves = [y.requires_grad_() for y in operands.values()]

    def results(*leaves):
        y = ours("reference", dict(zip(operands, leaves, strict=True)), heads=2, normalize=normalize)
        return tuple(y.values())

    assert torch.autograd.gradcheck(results, leaves)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("form", ["everything", "coupled", "decoding", "16 bits"])
def test_opcheck(backend, form):
    operands = {
        "everything": lambda: make(2, 7, beta="head"),
        "coupled": lambda: make(2, 7, decay=None, biases=False),
        "decoding": lambda: make(7),
        "16 bits": lambda: make(2, 7, dtype={"x": torch.bfloat16}, fenced=True),
    }[form]()
    given, normalize = [operands.get(name) for name in NAMES], form != "coupled"
    forward = torch.ops.deltamem_kernels.memory_projection.default
    torch.library.opcheck(forward, (*given, 2, normalize, backend))
    q, k, v, beta, decay, norms = forward(*given, 2, normalize, backend)
    everything = [y is not None for y in given]
    x, *parameters = given
    d_decay = decay if form != "coupled" else None
    for x_kept, needs in ((x, everything), (None, [True, *[False] * 5])):
        torch.library.opcheck(
            torch.ops.deltamem_kernels.memory_projection_backward.default,
            (q, None, v, beta, d_decay, x_kept, *parameters, q, k, beta, decay, norms, x.dtype, backend, needs),
        )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("frozen", [False, True])
def test_under_torch_compile(backend, frozen):
    """One graph for all batches and lengths, forward and backward."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def layer(**operands: Tensor) -> Tensor:
        p = memory_projection(**operands, heads=2, backend=backend)
        return delta_update(*p, backend=backend).reads * 2

    compiled = torch.compile(layer, backend=compiler, fullgraph=True, dynamic=True)
    parameters = make(1, 1, D=12, R=4)
    for B, T in ((2, 70), (3, 80), (5, 99)):
        leaves = {n: y.requires_grad_(not frozen) for n, y in {**parameters, "x": torch.randn(B, T, 12)}.items()}
        reads, eager = compiled(**leaves), layer(**leaves)
        torch.testing.assert_close(reads, eager)
        if not frozen:
            d = torch.randn_like(eager)
            grads = (torch.autograd.grad(y, list(leaves.values()), d) for y in (reads, eager))
            torch.testing.assert_close(*grads)
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_meta_tensors_have_shapes_and_dtypes():
    operands = make(2, 7, decay="head", dtype=torch.bfloat16, device="meta")
    p = memory_projection(**operands, heads=2)
    assert [tuple(y.shape) for y in p] == [(2, 7, 2, 8)] * 4 + [(2, 7, 2)]
    assert {y.dtype for y in p} == {torch.float32}


def test_at_rank_one_a_gate_is_one_per_row():
    assert memory_projection(**make(2, 3, R=1, beta="head"), heads=2).beta.shape == (2, 3, 2, 1)
