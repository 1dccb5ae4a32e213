"""memory_projection: every backend against the same formulas in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import subsets
from projection_problems import GATES, NAMES, RESULTS, SPLIT_NAMES, check_projection, plain_projection
from torch import Tensor

from deltamem_kernels import delta_step, delta_update, memory_projection
from deltamem_kernels.testing import (
    FLOAT32_TOLERANCE,
    Problem,
    assert_close_in_norm,
    projection_problem,
    projection_weights,
    relative_error,
)

pytestmark = pytest.mark.one_isa
SPLIT = pytest.mark.parametrize("split", [False, True], ids=["packed", "split"])
"""One weight of q, k and v, or three."""


def problem_on(implementation, *tokens: int, **options) -> Problem:
    return projection_problem(*tokens, device=implementation.device, **options)


@SPLIT
@pytest.mark.each_isa
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("beta", "decay"), list(itertools.product(GATES[:2], GATES)))
def test_every_form_of_the_gates_is_exact(implementation, beta, decay, biases, normalize, split):
    forms = {"beta": beta, "decay": decay, "biases": biases, "normalize": normalize, "split": split}
    check_projection(problem_on(implementation, 2, 19, **forms), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("T", [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65])
def test_every_number_of_tokens_is_exact(implementation, T):
    check_projection(problem_on(implementation, 2, T, split=T % 2 == 0), implementation)


@SPLIT
@pytest.mark.parametrize("N", [0, 1, 5, 20])
def test_rows_without_a_time_dimension_are_exact(implementation, N, split):
    check_projection(problem_on(implementation, N, decay="head", split=split), implementation)


@SPLIT
@pytest.mark.each_isa
@pytest.mark.parametrize(("H", "R"), [(1, 1), (3, 1), (1, 3), (1, 4), (5, 5), (1, 8), (4, 16), (2, 33), (1, 128)])
@pytest.mark.parametrize("T", [2, 18])
def test_every_number_of_heads_and_rank_is_exact(implementation, H, R, T, split):
    check_projection(problem_on(implementation, 1, T, H=H, R=R, decay="head", split=split), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("D", [0, 1, 15, 16, 17, 31, 32, 33, 576, 645, 1300])
def test_every_width_is_exact(implementation, D):
    for T in (1, 17):
        wanted = None if D else ("beta_bias", "decay_bias")  # the other operands hold no numbers
        if D == T == 1:  # the one gradient of x is a sum of numbers of both signs, which may cancel
            wanted = NAMES[1:]
        check_projection(problem_on(implementation, 1, T, D=D, H=1), implementation, wanted=wanted)


def test_no_sequences_have_empty_results(implementation):
    check_projection(problem_on(implementation, 0, 5), implementation)


@SPLIT
@pytest.mark.each_isa
@pytest.mark.parametrize("T", [5, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_of_strided_operands_is_read(implementation, T, dtype, split):
    """Operands and gradients are not contiguous and lie between NaN."""
    problem = problem_on(implementation, 2, T, D=37, decay="head", dtype={"x": dtype}, fenced=True, split=split)
    check_projection(problem, implementation, cotangents=problem.cotangents(fenced=True))


@SPLIT
@pytest.mark.each_isa
@pytest.mark.parametrize("T", [3, 21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("narrow", ["everything", "x", "weights"])
def test_16_bit_operands_lose_nothing(implementation, T, dtype, narrow, split):
    """Results are float32 and as exact as those of float32 operands, on every backend. Where Triton uses TF32, a
    product of two 16-bit numbers is exact, because TF32 holds their 11 bits and sums are float32; where only x has 16
    bits, three TF32 products hold 22 bits of a weight. No gradient has more than twice the error of PyTorch's layers in
    that dtype."""
    all_names = SPLIT_NAMES if split else NAMES
    names = {"everything": all_names, "x": all_names[:1], "weights": all_names[1:]}[narrow]
    problem = problem_on(implementation, 2, T, D=70, dtype=dict.fromkeys(names, dtype), split=split)
    cotangents = {n: y.to(dtype).float() for n, y in problem.cotangents().items()}
    ours = check_projection(problem, implementation, cotangents=cotangents)
    exact = problem.float64(cotangents, oracle=plain_projection)
    layers = Problem(plain_projection, problem.to(dtype=dtype).operands, problem.options)
    theirs = layers.run_with_gradients(None, cotangents)
    for name, y in exact.items():
        assert relative_error(ours[name], y) <= 2 * relative_error(theirs[name], y), name


@SPLIT
@pytest.mark.each_isa
@pytest.mark.parametrize("first", [torch.bfloat16, torch.float16, torch.float32])
def test_operands_of_mixed_dtypes_are_exact(implementation, split, first):
    dtypes = itertools.cycle((torch.bfloat16, torch.float16, torch.float32))
    types = dict(zip(SPLIT_NAMES if split else NAMES, itertools.dropwhile(lambda x: x != first, dtypes), strict=False))
    for T in (2, 19):
        check_projection(problem_on(implementation, 2, T, dtype=types, split=split), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("double", [*NAMES, *SPLIT_NAMES[1:4]])
def test_one_float64_operand_makes_the_arithmetic_float64(implementation, double):
    split = double in SPLIT_NAMES[1:4]
    for T in (2, 19):
        problem = problem_on(implementation, 1, T, dtype={double: torch.float64}, split=split)
        check_projection(problem, implementation, wanted=(double,), tolerance=1e-13)


@SPLIT
def test_every_subset_of_operands_may_be_frozen(implementation, split):
    problem = problem_on(implementation, 1, 3, D=9, R=4, split=split)
    cotangents = problem.cotangents()
    exact = problem.float64(cotangents, oracle=plain_projection)
    for subset in subsets(tuple(problem.operands), implementation):
        ours = problem.run_with_gradients(implementation.backend, cotangents, subset)
        assert_close_in_norm(ours, {n: exact[n] for n in ours})


@pytest.mark.parametrize("T", [3, 19])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_three_weights_have_the_bits_of_one_packed_weight(implementation, T, x_dtype):
    """Also as slices of one packed tensor, and where their strides differ."""
    problem = problem_on(implementation, 2, T, D=33, dtype={"x": x_dtype})
    cotangents = problem.cotangents()
    packed = problem.run_with_gradients(implementation.backend, cotangents)
    slices = dict(zip(SPLIT_NAMES[1:4], problem.operands["qkv_weight"].chunk(3), strict=True))
    copies = {name: weight.clone() for name, weight in slices.items()}
    transposed = copies | {"k_weight": copies["k_weight"].t().contiguous().t()}
    rest = {name: y for name, y in problem.operands.items() if name != "qkv_weight"}
    for weights in (slices, copies, transposed):
        split = Problem(problem.operation, rest | weights, problem.options)
        ours = split.run_with_gradients(implementation.backend, cotangents)
        ours["d_qkv_weight"] = torch.cat([ours.pop(f"d_{name}") for name in SPLIT_NAMES[1:4]])
        assert ours.keys() == packed.keys()
        for name, y in packed.items():
            assert torch.equal(ours[name], y), name


@pytest.mark.parametrize("through", RESULTS)
def test_gradients_through_one_result_are_exact(implementation, through):
    problem = problem_on(implementation, 1, 5)
    cotangents = {through: torch.randn(1, 5, 2, 8, device=implementation.device)}
    check_projection(problem, implementation, cotangents=cotangents)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e-3, 0.3, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projections_of_every_magnitude_are_exact(implementation, size, dtype):
    """The smallest have norms at their floor, the largest saturate tanh."""
    for T in (2, 19):
        problem = problem_on(implementation, 1, T, D=1, R=4, dtype=dtype)
        problem.operands["x"] *= size
        problem.operands["x"][0, 1] = -problem.operands["x"][0, 0]  # not all gates saturate at 0
        exact = problem.float64({}, (), oracle=plain_projection)
        tolerance = 2e-6 if dtype == torch.float32 else 1e-14
        assert_close_in_norm(problem.run(implementation.backend), exact, tolerance)


def test_a_token_of_zeros_has_q_and_k_of_zeros(implementation):
    problem = problem_on(implementation, 1, 19, biases=False)
    problem.operands["x"][0, 3] = 0
    ours = check_projection(problem, implementation)
    assert torch.count_nonzero(ours["q"][0, 3]) == torch.count_nonzero(ours["k"][0, 3]) == 0
    assert (ours["beta"][0, 3] == 0.5).all()


@pytest.mark.each_isa
def test_nan_stays_in_its_token(implementation):
    for T in (5, 40):
        problem = problem_on(implementation, 1, T)
        clean = problem.run(implementation.backend)
        problem.operands["x"][0, 2, 7] = float("nan")
        dirty = problem.run(implementation.backend)
        rest = [t for t in range(T) if t != 2]
        for name in RESULTS:
            assert torch.equal(dirty[name][:, rest], clean[name][:, rest]), name
            assert dirty[name][:, 2].isnan().all(), name


@pytest.mark.each_isa
@pytest.mark.parametrize("T", [5, 40])
def test_nan_in_a_row_of_the_weight_stays_in_its_head(T, implementation):
    """A norm that is NaN is not taken for a small one: all numbers of the head are NaN."""
    problem = problem_on(implementation, 1, T)
    clean = problem.run(implementation.backend)
    problem.operands["qkv_weight"][1, 3] = float("nan")  # of q, head 0
    dirty = problem.run(implementation.backend)
    assert dirty["q"][:, :, 0].isnan().all()
    assert torch.equal(dirty["q"][:, :, 1], clean["q"][:, :, 1])
    for name in (x for x in RESULTS if x != "q"):
        assert torch.equal(dirty[name], clean[name]), name


def test_results_do_not_depend_on_the_batch_or_the_threads(implementation):
    problem = problem_on(implementation, 3, 37, D=600)
    together = problem.run(implementation.backend)
    for b in range(3):
        operands = {**problem.operands, "x": problem.operands["x"][b : b + 1]}
        alone = Problem(problem.operation, operands, problem.options).run(implementation.backend)
        for name in RESULTS:
            if implementation.name != "reference":  # torch's matrix products do not promise it
                assert torch.equal(alone[name][0], together[name][b]), name
            assert relative_error(alone[name][0], together[name][b]) <= FLOAT32_TOLERANCE
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = problem.run(implementation.backend)
    finally:
        torch.set_num_threads(threads)
    if implementation.name != "reference":
        assert all(torch.equal(single[name], together[name]) for name in RESULTS)


@SPLIT
def test_on_a_cpu_decoding_has_the_bits_of_prefill(split):
    problem = projection_problem(1, 50, D=333, split=split)
    together = problem.run("cpu")
    for t in (0, 13, 49):
        operands = {**problem.operands, "x": problem.operands["x"][:, t]}
        rows = Problem(problem.operation, operands, problem.options).run("cpu")
        assert all(torch.equal(rows[name], together[name][:, t]) for name in RESULTS)


@SPLIT
def test_results_are_the_operands_of_delta_update_and_delta_step(implementation, split):
    T = 4 if implementation.slow else 20
    problem = problem_on(implementation, 2, T, decay="head", split=split)
    out = delta_update(**problem.run(implementation.backend), backend=implementation.backend)
    pool = torch.zeros(2, 2, 8, 8, device=implementation.device)
    for t in range(T):
        operands = {**problem.operands, "x": problem.operands["x"][:, t]}
        row = Problem(problem.operation, operands, problem.options).run(implementation.backend)
        reads = delta_step(pool, **row, backend=implementation.backend)
        assert relative_error(reads, out.reads[:, t]) <= FLOAT32_TOLERANCE
    assert relative_error(pool, out.final_state) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("wanted", "kept"), [("x", False), ("beta_bias", False), ("qkv_weight", True), ("v_weight", True)]
)
def test_x_is_kept_only_for_the_gradients_of_weights(wanted, kept):
    problem = projection_problem(2, 60, D=300, H=1, split=wanted == "v_weight")
    problem.operands[wanted].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: (saved.append(y), y)[1], lambda y: y):
        problem.run()
    assert saved
    large = [y for y in saved if y.shape[:2] == (2, 60) and y.shape[2] > 1]
    assert [y.data_ptr() for y in large] == [problem.operands["x"].data_ptr()] * kept


@SPLIT
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_has_no_effect(implementation, backward_inside, split):
    problem = problem_on(implementation, 2, 19, split=split)
    cotangents = problem.cotangents()
    exact = problem.float64(cotangents, oracle=plain_projection)
    leaves = {n: y.requires_grad_() for n, y in problem.operands.items()}
    with torch.autocast(implementation.device, torch.bfloat16):
        out = problem.run(implementation.backend)
    with torch.autocast(implementation.device, torch.bfloat16, enabled=backward_inside):
        grads = torch.autograd.grad(list(out.values()), list(leaves.values()), [cotangents[n] for n in out])
    assert_close_in_norm({**out, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}, exact)


@SPLIT
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("beta", "decay"), [("row", "head"), ("head", None)])
def test_gradients_of_the_reference_are_those_of_finite_differences(beta, decay, normalize, split):
    forms = {"beta": beta, "decay": decay, "normalize": normalize, "split": split}
    problem = projection_problem(2, 3, D=5, R=4, dtype=torch.float64, **forms)
    leaves = [y.requires_grad_() for y in problem.operands.values()]

    def results(*leaves):
        operands = dict(zip(problem.operands, leaves, strict=True))
        return tuple(Problem(problem.operation, operands, problem.options).run("reference").values())

    assert torch.autograd.gradcheck(results, leaves)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("form", ["everything", "split", "coupled", "decoding", "16 bits"])
def test_the_operators_pass_opcheck(backend, form):
    given = {
        "everything": lambda: projection_problem(2, 7, beta="head"),
        "split": lambda: projection_problem(2, 7, split=True),
        "coupled": lambda: projection_problem(2, 7, decay=None, biases=False),
        "decoding": lambda: projection_problem(7),
        "16 bits": lambda: projection_problem(2, 7, dtype={"x": torch.bfloat16}, fenced=True),
    }[form]().operands
    names = SPLIT_NAMES[1:4] if form == "split" else NAMES[1:2]
    x, qkv, gates = given["x"], [given[name] for name in names], [given.get(name) for name in NAMES[2:]]
    normalize = form != "coupled"
    forward = torch.ops.deltamem_kernels.memory_projection.default
    torch.library.opcheck(forward, (x, qkv, *gates, 2, normalize, backend))
    q, k, v, beta, decay, norms = forward(x, qkv, *gates, 2, normalize, backend)
    everything = [True, *(y is not None for y in gates), *(True for _ in qkv)]
    d_decay = decay if form != "coupled" else None
    for x_kept, needs in ((x, everything), (None, [True, *[False] * (len(everything) - 1)])):
        torch.library.opcheck(
            torch.ops.deltamem_kernels.memory_projection_backward.default,
            (q, None, v, beta, d_decay, x_kept, qkv, *gates, q, k, beta, decay, norms, x.dtype, backend, needs),
        )


@SPLIT
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("frozen", [False, True])
def test_torch_compile_makes_one_graph_for_all_batches_and_lengths(backend, frozen, split):
    """Forward and backward."""
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def layer(x: Tensor, qkv: tuple[Tensor, ...], *gates: Tensor) -> Tensor:
        p = memory_projection(x, qkv if split else qkv[0], *gates, heads=2, backend=backend)
        return delta_update(*p, backend=backend).reads * 2

    compiled = torch.compile(layer, backend=compiler, fullgraph=True, dynamic=True)
    weights = [w.requires_grad_(not frozen) for w in projection_weights(12, 2, 4, split=split).values()]
    qkv, gates = tuple(weights[:-4]), weights[-4:]
    for B, T in ((2, 70), (3, 80), (5, 99)):
        x = torch.randn(B, T, 12, requires_grad=not frozen)
        reads, eager = compiled(x, qkv, *gates), layer(x, qkv, *gates)
        torch.testing.assert_close(reads, eager)
        if not frozen:
            d = torch.randn_like(eager)
            grads = (torch.autograd.grad(y, [x, *weights], d) for y in (reads, eager))
            torch.testing.assert_close(*grads)
    assert len(graphs) == 1
    torch._dynamo.reset()


@SPLIT
def test_meta_tensors_have_shapes_and_dtypes(split):
    problem = projection_problem(2, 7, decay="head", dtype=torch.bfloat16, device="meta", split=split)
    results = problem.run()
    assert [tuple(results[name].shape) for name in RESULTS] == [(2, 7, 2, 8)] * 4 + [(2, 7, 2)]
    assert {y.dtype for y in results.values()} == {torch.float32}


def test_at_rank_one_a_gate_is_one_per_row():
    assert projection_problem(2, 3, R=1, beta="head").run()["beta"].shape == (2, 3, 2, 1)
