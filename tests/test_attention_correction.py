"""attention_correction: every backend against float64, in place and not, and its operators under PyTorch's tools."""

from __future__ import annotations

import pytest
import torch
from correction_problems import (
    NAMES,
    check_16_bit,
    check_rows_are_independent,
    check_runs_have_the_same_bits,
    kept_for_backward,
    plain_correction,
)
from problems import check, subsets
from torch import Tensor

from deltamem_kernels import attention_correction
from deltamem_kernels.testing import (
    FLOAT32_TOLERANCE,
    CorrectionProblem,
    between_nans,
    correction_problem,
    relative_error,
)

pytestmark = pytest.mark.one_isa
FORMS = {"plain": {}, "norm": {"norm": True}}


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_computes_what_a_layer_would_run(form):
    problem = correction_problem(H=2, R=4, **FORMS[form]).to(dtype=torch.float64)
    exact = plain_correction(**problem.operands, **problem.options)  # its norm is in float32
    assert relative_error(problem.run("reference")["out"], exact) <= (
        1e-6 if problem.operands.get("norm_weight") is not None else 1e-14
    )


def test_the_reference_gives_results_worked_out_by_hand():
    base, reads, weight = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[3.0, 4.0]]),
        torch.tensor([[1.0, 0.0], [0.5, -1.0]]),
    )
    plain = attention_correction(base, reads, weight, 2.0, backend="reference")
    assert plain.tolist() == [[1 + 2 * 3, 2 + 2 * (1.5 - 4)]]
    rms = ((6**2 + 5**2) / 2) ** 0.5
    normed = attention_correction(base, reads, weight, 2.0, norm_weight=torch.tensor([1.0, 10.0]), backend="reference")
    torch.testing.assert_close(normed, torch.tensor([[1 + 6 / rms, 2 - 50 / rms]]))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_reference_are_those_of_finite_differences(form):
    """The other backends are compared with the gradients of the reference."""
    problem = correction_problem(B=1, T=2, H=2, R=2, D=3, dtype=torch.float64, **FORMS[form])
    names, leaves = list(problem.operands), [x.requires_grad_() for x in problem.operands.values()]

    def call(*operands: Tensor) -> Tensor:
        return attention_correction(**dict(zip(names, operands, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [0, 1, 2, 3, 4, 5, 67])
def test_every_number_of_tokens_is_exact(implementation, form, T):
    T = min(T, 18) if implementation.slow else T
    check(correction_problem(T=T, D=40, device=implementation.device, **FORMS[form]), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("H", "R"), [(1, 1), (1, 3), (2, 4), (1, 8), (3, 5), (4, 8), (1, 33), (1, 128), (3, 64)])
def test_every_number_of_heads_and_rank_is_exact(implementation, form, H, R):
    check(correction_problem(B=1, T=3, H=H, R=R, device=implementation.device, **FORMS[form]), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("D", [1, 2, 15, 16, 17, 63, 64, 65, 130, 576])
def test_every_width_is_exact(implementation, form, D):
    # A single number over its own norm is nearly its sign, and its gradient nearly cancels: so take more rows.
    T = 3 if D > 1 else 18 if implementation.slow else 67
    check(correction_problem(B=1, T=T, D=D, device=implementation.device, **FORMS[form]), implementation)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("B", "T"), [(0, 3), (3, 0), (None, 0)])
def test_without_rows_results_are_empty_and_gradients_zero(implementation, form, B, T):
    """The gradients of weight and norm are zeros of their shapes."""
    problem = correction_problem(B=B, T=T, device=implementation.device, **FORMS[form])
    ours = problem.run_with_gradients(implementation.backend, problem.cotangents())
    assert ours["out"].shape == problem.operands["base"].shape
    assert all(ours[f"d_{n}"].shape == x.shape for n, x in problem.operands.items())
    assert all(torch.count_nonzero(x) == 0 for x in ours.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [{"B": None}, {"H": None}, {"B": None, "H": None}, {"scale": -0.5}, {"scale": 3}], ids=str
)
def test_every_shape_of_a_call_is_exact(implementation, form, shape):
    """Decoding, one head without its dimension, a scale that is a number."""
    check(correction_problem(device=implementation.device, **FORMS[form], **shape), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("D", [16, 37])
def test_nothing_outside_of_strided_operands_is_read(implementation, form, D):
    problem = correction_problem(D=D, H=2, R=3, fenced=True, device=implementation.device, **FORMS[form])
    check(problem, implementation, cotangents=problem.cotangents(fenced=True))


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [48, 37])
def test_16_bit_operands_lose_no_more_than_plain_pytorch(implementation, form, dtype, D):
    T = 40 if implementation.slow else 60
    check_16_bit(correction_problem(T=T, D=D, dtype=dtype, device=implementation.device, **FORMS[form]), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32, torch.float16])
def test_operands_of_mixed_dtypes_are_exact(implementation, form, base):
    dtypes = {"base": base, "reads": torch.bfloat16, "weight": torch.float16, "norm_weight": torch.bfloat16}
    check(correction_problem(dtype=dtypes, device=implementation.device, **FORMS[form]), implementation)


@pytest.mark.parametrize("form", FORMS)
def test_float64_operands_are_exact_to_float64(implementation, form):
    check(
        correction_problem(dtype=torch.float64, D=37, device=implementation.device, **FORMS[form]),
        implementation,
        tolerance=1e-13,
    )
    check(
        correction_problem(dtype={"weight": torch.float64}, device=implementation.device, **FORMS[form]), implementation
    )


@pytest.mark.parametrize("norm", [False, True])
def test_every_subset_of_operands_may_be_frozen(implementation, norm):
    problem = correction_problem(B=1, T=3, norm=norm, D=20, device=implementation.device)
    for subset in subsets(tuple(problem.operands), implementation):
        check(problem, implementation, wanted=subset)


@pytest.mark.parametrize("form", FORMS)
def test_zero_reads_change_no_bit(implementation, form):
    """As with a new state, also where there is a norm."""
    problem = correction_problem(device=implementation.device, **FORMS[form])
    problem.operands["reads"].zero_()
    assert torch.equal(problem.run(implementation.backend)["out"], problem.operands["base"])


# In place, and into other tensors


def fused_projection(problem: CorrectionProblem) -> tuple[Tensor, Tensor]:
    """Return base as the middle columns of a wider tensor, and that tensor."""
    base = problem.operands["base"]
    whole = torch.randn(*base.shape[:-1], base.shape[-1] + 11).to(base)
    middle = whole[..., 4 : 4 + base.shape[-1]]
    middle.copy_(base)
    return middle, whole


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("D", [24, 37])
def test_a_slice_of_a_fused_projection_is_corrected_in_place(implementation, form, D):
    problem = correction_problem(D=D, device=implementation.device, **FORMS[form])
    plain = problem.run(implementation.backend)["out"]
    base, whole = fused_projection(problem)
    before, version = whole.clone(), base._version
    problem.operands["base"] = base
    assert problem.run(implementation.backend, out=base)["out"] is base
    assert base._version > version
    assert torch.equal(base, plain)
    assert torch.equal(whole[..., :4], before[..., :4])
    assert torch.equal(whole[..., 4 + D :], before[..., 4 + D :])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fenced", [False, True])
def test_the_result_may_go_into_another_tensor(implementation, form, fenced):
    problem = correction_problem(device=implementation.device, **FORMS[form])
    base = problem.operands["base"].clone()
    out = torch.full_like(base, float("nan"))
    out = between_nans(out) if fenced else out
    assert problem.run(implementation.backend, out=out)["out"] is out
    assert torch.equal(out, problem.run(implementation.backend)["out"])
    assert torch.equal(problem.operands["base"], base)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("where", ["base", "other", "slice"])
def test_gradients_through_out_are_those_without_it(implementation, form, frozen, where):
    """out is base, another tensor, or a slice of one."""
    problem = correction_problem(device=implementation.device, scale=0.5, **FORMS[form])
    wanted = tuple(n for n in problem.operands if not (frozen and n == "base"))
    cotangents = problem.cotangents()
    plain = problem.run_with_gradients(implementation.backend, cotangents, wanted)
    leaves = {n: x.detach().clone().requires_grad_(n in wanted) for n, x in problem.operands.items()}
    made = {n: x * 1 if n in wanted else x for n, x in leaves.items()}  # a leaf cannot be written in place
    if where == "slice":
        whole = torch.zeros(*made["base"].shape[:-1], made["base"].shape[-1] + 3, device=implementation.device)
        out = whole[..., 1:-2]
    else:
        whole = out = made["base"] if where == "base" else torch.zeros_like(made["base"])
    result = problem.operation(**made, **problem.options, backend=implementation.backend, out=out)
    assert result is out
    assert torch.equal(result.detach(), plain["out"])
    seen = whole[..., 1:-2] if where == "slice" else whole
    grads = torch.autograd.grad((seen * cotangents["out"]).sum(), [leaves[n] for n in wanted])
    for name, g in zip(wanted, grads, strict=True):
        assert torch.equal(g, plain[f"d_{name}"]), name


def test_leaves_are_not_written_in_place(implementation):
    problem = correction_problem(device=implementation.device)
    base = problem.operands["base"].requires_grad_()
    before = base.detach().clone()
    with pytest.raises(RuntimeError, match="out is a leaf that requires grad"):
        problem.run(implementation.backend, out=base)
    problem.operands["base"] = base[:, 1:]
    problem.operands["reads"] = problem.operands["reads"][:, 1:]
    with pytest.raises(RuntimeError, match="out is a view of a leaf that requires grad"):
        problem.run(implementation.backend, out=problem.operands["base"])
    assert torch.equal(base, before)
    with torch.no_grad():
        problem.run(implementation.backend, out=problem.operands["base"])
    assert not torch.equal(base, before)


def test_autograd_notices_a_tensor_written_in_place(implementation):
    """The version of a tensor changes, so that a backward that kept it raises."""
    problem = correction_problem(device=implementation.device)
    with torch.no_grad():
        base = problem.operands["base"]
    x = torch.randn_like(base, requires_grad=True)
    product = x * base
    with torch.no_grad():
        problem.run(implementation.backend, out=base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_slices_of_the_same_rows_do_not_overlap(implementation):
    """base, reads and out are slices of one buffer, as a fused projection makes them."""
    memory = torch.randn(2, 5, 60, device=implementation.device)
    base, reads, out = memory[..., :24], memory[..., 24:32], memory[..., 32:56]
    weight = torch.randn(24, 8, device=implementation.device)
    exact = CorrectionProblem(attention_correction, {"base": base, "reads": reads, "weight": weight}).float64({})["out"]
    attention_correction(base, reads, weight, out=out, backend=implementation.backend)
    assert relative_error(out, exact) <= FLOAT32_TOLERANCE
    attention_correction(base, reads, weight, out=base, backend=implementation.backend)
    assert relative_error(base, exact) <= FLOAT32_TOLERANCE


# Independent rows, equal bits, memory


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_depend_on_each_other(implementation, form, dtype):
    T = 7 if implementation.slow else 133
    problem = correction_problem(B=1, T=T, D=130, dtype=dtype, scale=0.7, device=implementation.device, **FORMS[form])
    check_rows_are_independent(problem, implementation)


@pytest.mark.parametrize("form", FORMS)
def test_every_run_has_the_same_bits(implementation, form):
    T = 6 if implementation.slow else 700
    check_runs_have_the_same_bits(
        correction_problem(T=T, D=100, device=implementation.device, **FORMS[form]), implementation
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base_wanted", [False, True])
def test_nothing_of_the_size_of_base_is_kept_for_backward(implementation, form, base_wanted):
    problem = correction_problem(device=implementation.device, **FORMS[form])
    wanted = tuple(n for n in problem.operands if base_wanted or n != "base")
    assert kept_for_backward(problem, implementation.backend, wanted) == []


def test_arguments_are_not_changed(implementation):
    problem = correction_problem(norm=True, fenced=True, device=implementation.device)
    before = {n: x.clone() for n, x in problem.operands.items()}
    problem.run_with_gradients(implementation.backend, problem.cotangents())
    assert all(torch.equal(x, before[n]) for n, x in problem.operands.items())


def test_autocast_has_no_effect(implementation):
    """base and reads are bfloat16, as autocast's layers make them; weights are float32."""
    dtypes = {"base": torch.bfloat16, "reads": torch.bfloat16}
    problem = correction_problem(dtype=dtypes, norm=True, device=implementation.device)
    with torch.autocast(implementation.device, torch.bfloat16):
        check(problem, implementation)


def test_a_second_derivative_raises(implementation):
    problem = correction_problem(device=implementation.device)
    weight = problem.operands["weight"].requires_grad_()
    (g,) = torch.autograd.grad(problem.run(implementation.backend)["out"].square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="first-order gradients only"):
        g.sum().backward()


# Operators and torch.compile


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fenced", [False, True])
def test_the_operators_pass_opcheck(backend, form, fenced):
    problem = correction_problem(fenced=fenced, **FORMS[form])
    base, reads, weight, gain = (problem.operands[n] for n in NAMES[:4])
    operands = (reads, weight, gain, problem.operands.get("norm_weight"), None, None)
    options = (1.5, 1e-6, 0, backend)
    ops = torch.ops.deltamem_kernels
    torch.library.opcheck(ops.correct.default, (base, *operands, *options))
    torch.library.opcheck(ops.correct_into.default, (base.clone(), None, *operands, *options))
    torch.library.opcheck(ops.correct_into.default, (torch.empty_like(base), base, *operands, *options))
    for needs in ([False, True, True, True, form == "norm"], [False, True, False, False, False]):
        torch.library.opcheck(ops.correct_backward.default, (base, None, *operands, *options, needs))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("how", ["new", "in place", "in place in a slice", "other"])
@pytest.mark.parametrize("training", [False, True])
def test_torch_compile_sees_the_mutation_and_the_gradients(backend, how, training):
    """In one graph."""
    torch._dynamo.reset()

    def layer(x: Tensor, projection: Tensor, reads: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        y = x @ projection
        base = y[..., 2:] if how == "in place in a slice" else y
        weight = weight[: base.shape[-1]]
        out = {"new": None, "other": torch.zeros_like(base)}.get(how, base)
        corrected = attention_correction(base, reads, weight, scale, out=out, backend=backend)
        return corrected.tanh() + (0 if out is None else out) + y.sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (3, 4, 7):
        shapes = ((2, T, 6), (6, 20), (2, T, 2, 4), (20, 8), ())
        operands = [torch.randn(s).requires_grad_(training) for s in shapes]
        ours, eager = compiled(*operands), layer(*operands)
        assert relative_error(ours.detach(), eager.detach()) <= FLOAT32_TOLERANCE
        if training:
            for a, b in zip(*(torch.autograd.grad(y.square().sum(), operands) for y in (ours, eager)), strict=True):
                assert relative_error(a, b) <= FLOAT32_TOLERANCE
