"""attention_correction_norm_rope: every backend against float64, and the reference against a layer's own calls. What it
shares with attention_correction is tested there."""

from __future__ import annotations

from collections.abc import Callable

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

from deltamem_kernels import attention_correction, attention_correction_norm_rope
from deltamem_kernels.testing import FLOAT32_TOLERANCE, CorrectionProblem, correction_problem, relative_error

pytestmark = pytest.mark.one_isa
FORMS = {"plain": {}, "norm": {"norm": True}, "rope": {"rope": True}, "norm and rope": {"norm": True, "rope": True}}


def problem_of(form: str, implementation=None, **options) -> CorrectionProblem:
    device = implementation.device if implementation else "cpu"
    return correction_problem(**{"D": 48, "head_dim": 16, **options}, device=device, **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_computes_what_a_layer_would_run(form):
    problem = problem_of(form, H=2, R=4).to(dtype=torch.float64)
    exact = plain_correction(**problem.operands, **problem.options)  # its norm is in float32
    assert relative_error(problem.run("reference")["out"], exact) <= (1e-6 if "norm" in form else 1e-14)


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_the_convention_is_that_of_transformers(family):
    """With the tables of its rotary embedding."""
    transformers = pytest.importorskip("transformers")
    modules = {
        "llama": (transformers.LlamaConfig, transformers.models.llama.modeling_llama),
        "qwen3": (transformers.Qwen3Config, transformers.models.qwen3.modeling_qwen3),
        "smollm3": (transformers.SmolLM3Config, transformers.models.smollm3.modeling_smollm3),
    }
    config_class, modeling = modules[family]
    heads, head_dim, T = 3, 16, 7
    config = config_class(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=heads, head_dim=head_dim
    )
    rotary = next(c for n, c in vars(modeling).items() if n.endswith("RotaryEmbedding"))(config)
    problem = correction_problem(T=T, D=heads * head_dim, norm=family == "qwen3", head_dim=head_dim)
    cos, sin = rotary(problem.operands["base"], torch.arange(T)[None])
    problem.options |= {"cos": cos, "sin": sin}
    norm = None
    if family == "qwen3":
        norm = modeling.Qwen3RMSNorm(head_dim, problem.options["norm_eps"])
        norm.weight.data.copy_(problem.operands["norm_weight"])
    x = problem.operands
    y = (x["base"] + x["scale"] * x["reads"].flatten(-2) @ x["weight"].t()).unflatten(-1, (heads, head_dim))
    y = (y if norm is None else norm(y)).transpose(1, 2)
    theirs, _ = modeling.apply_rotary_pos_emb(y, y, cos, sin)
    ours = problem.run("reference")["out"].unflatten(-1, (heads, head_dim)).transpose(1, 2)
    assert relative_error(ours, theirs.detach()) <= 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_reference_are_those_of_finite_differences(form):
    problem = problem_of(form, B=1, T=2, H=2, R=2, D=8, head_dim=4, dtype=torch.float64)
    names, leaves = list(problem.operands), [x.requires_grad_() for x in problem.operands.values()]

    def call(*operands: Tensor) -> Tensor:
        return problem.operation(**dict(zip(names, operands, strict=True)), **problem.options, backend="reference")

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [0, 1, 3, 4, 5, 67])
def test_every_number_of_tokens_is_exact(implementation, form, T):
    check(problem_of(form, implementation, T=min(T, 18) if implementation.slow else T), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 4), (2, 6), (5, 16), (3, 34), (9, 64), (2, 128), (1, 256)])
def test_every_width_of_a_head_is_exact(implementation, form, heads, head_dim):
    check(problem_of(form, implementation, B=1, T=3, D=heads * head_dim, head_dim=head_dim), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", ["plain", "norm"])
@pytest.mark.parametrize("head_dim", [1, 3, 17])
def test_heads_of_odd_width_are_exact_without_rotary(implementation, form, head_dim):
    check(problem_of(form, implementation, D=3 * head_dim, head_dim=head_dim), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize(("H", "R"), [(1, 1), (2, 4), (3, 5), (4, 8), (1, 33), (1, 128), (3, 48)])
def test_every_number_of_state_heads_and_rank_is_exact(implementation, H, R):
    check(problem_of("norm and rope", implementation, B=1, T=3, H=H, R=R), implementation)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [{"B": None}, {"H": None}, {"one_rope": True}, {"B": None, "one_rope": True}], ids=str
)
def test_every_shape_of_a_call_is_exact(implementation, form, shape):
    """Decoding, no head dimension, tables that the batch shares."""
    check(problem_of(form, implementation, **shape), implementation)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("B", "T"), [(0, 3), (3, 0), (None, 0)])
def test_without_rows_results_are_empty_and_gradients_zero(implementation, form, B, T):
    problem = problem_of(form, implementation, B=B, T=T)
    ours = problem.run_with_gradients(implementation.backend, problem.cotangents())
    assert ours["out"].shape == problem.operands["base"].shape
    assert all(ours[f"d_{n}"].shape == x.shape for n, x in problem.operands.items())
    assert all(torch.count_nonzero(x) == 0 for x in ours.values())


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head_dim", [16, 10])
def test_nothing_outside_of_strided_operands_is_read(implementation, form, head_dim):
    problem = problem_of(form, implementation, H=2, R=3, D=3 * head_dim, head_dim=head_dim, fenced=True)
    check(problem, implementation, cotangents=problem.cotangents(fenced=True))


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_operands_lose_no_more_than_plain_pytorch(implementation, form, dtype):
    """Triton's interpreter truncates. In a few numbers that can exceed twice the error of rounding; in 40 rows it is
    about 1.6 times that error."""
    T = 40 if implementation.slow else 60
    check_16_bit(problem_of(form, implementation, T=T, dtype=dtype), implementation)


@pytest.mark.each_isa
@pytest.mark.parametrize("form", FORMS)
def test_operands_of_mixed_dtypes_and_float64_are_exact(implementation, form):
    dtypes = {"base": torch.bfloat16, "reads": torch.float16, "cos": torch.bfloat16, "norm_weight": torch.float16}
    check(problem_of(form, implementation, dtype=dtypes), implementation)
    check(problem_of(form, implementation, dtype=torch.float64), implementation, tolerance=1e-13)


@pytest.mark.parametrize("norm", [False, True])
def test_every_subset_of_operands_may_be_frozen(implementation, norm):
    problem = problem_of("norm and rope" if norm else "rope", implementation, B=1, T=3)
    for subset in subsets(tuple(problem.operands), implementation):
        check(problem, implementation, wanted=subset)


@pytest.mark.each_isa
def test_without_norm_and_rotary_it_is_the_plain_correction(implementation):
    problem = problem_of("plain", implementation)
    plain = attention_correction(**problem.operands, backend=implementation.backend)
    assert torch.equal(problem.run(implementation.backend)["out"], plain)


@pytest.mark.parametrize("form", FORMS)
def test_the_result_may_go_into_base_or_another_tensor(implementation, form):
    problem = problem_of(form, implementation)
    plain = problem.run(implementation.backend)["out"]
    whole = torch.randn(2, 5, 60, device=implementation.device)
    before, base, out = whole.clone(), whole[..., 4:52], torch.full_like(plain, float("nan"))
    assert problem.run(implementation.backend, out=out)["out"] is out
    assert torch.equal(out, plain)
    problem.operands["base"] = base.copy_(problem.operands["base"])
    assert problem.run(implementation.backend, out=base)["out"] is base
    assert torch.equal(base, plain)
    assert torch.equal(whole[..., :4], before[..., :4])
    assert torch.equal(whole[..., 52:], before[..., 52:])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_through_out_are_those_without_it(implementation, form, in_place):
    problem = problem_of(form, implementation)
    cotangents = problem.cotangents()
    plain = problem.run_with_gradients(implementation.backend, cotangents)
    leaves = {n: x.detach().clone().requires_grad_() for n, x in problem.operands.items()}
    made = {n: x * 1 for n, x in leaves.items()}
    out = made["base"] if in_place else torch.zeros_like(made["base"])

    def call() -> Tensor:
        return problem.operation(**made, **problem.options, backend=implementation.backend, out=out)

    if in_place and "norm" in form:
        with pytest.raises(ValueError, match="out must not be base where there is a norm"):
            call()
        return
    assert call() is out
    for name, g in zip(leaves, torch.autograd.grad(out, list(leaves.values()), cotangents["out"]), strict=True):
        assert torch.equal(g, plain[f"d_{name}"]), name


@pytest.mark.parametrize("form", FORMS)
def test_rows_do_not_depend_on_each_other(implementation, form):
    check_rows_are_independent(
        problem_of(form, implementation, B=1, T=7 if implementation.slow else 67, scale=0.7), implementation
    )


@pytest.mark.parametrize("form", FORMS)
def test_every_run_has_the_same_bits(implementation, form):
    check_runs_have_the_same_bits(problem_of(form, implementation, T=6 if implementation.slow else 700), implementation)


@pytest.mark.parametrize("form", FORMS)
def test_only_base_is_kept_for_backward_and_only_with_a_norm(implementation, form):
    """Nothing else of its size is kept."""
    problem = problem_of(form, implementation)
    kept = kept_for_backward(problem, implementation.backend, ("reads", "weight"))
    assert [x.data_ptr() for x in kept] == [problem.operands["base"].data_ptr()] * ("norm" in form)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("form", FORMS)
def test_the_operators_pass_opcheck(backend, form):
    problem = problem_of(form)
    base, reads, weight, gain = (problem.operands[n] for n in NAMES[:4])
    norm_weight, cos, sin = problem.operands.get("norm_weight"), problem.options.get("cos"), problem.options.get("sin")
    rest = (reads, weight, gain, norm_weight, cos, sin, 1.5, 1e-6, 16, backend)
    ops = torch.ops.deltamem_kernels
    torch.library.opcheck(ops.correct.default, (base, *rest))
    torch.library.opcheck(ops.correct_into.default, (base.clone(), None, *rest))
    torch.library.opcheck(ops.correct_into.default, (torch.empty_like(base), base, *rest))
    kept = base if norm_weight is not None else None
    for needs in ([True, True, True, True, norm_weight is not None], [True, False, False, False, False]):
        torch.library.opcheck(ops.correct_backward.default, (torch.randn_like(base), kept, *rest, needs))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("training", "in_place"), [(False, False), (False, True), (True, False)])
def test_torch_compile_sees_the_mutation_and_the_gradients(backend, training, in_place):
    torch._dynamo.reset()

    def layer(x: Tensor, projection: Tensor, reads: Tensor, weight: Tensor, norm: Tensor, cos: Tensor, sin: Tensor):
        base = x @ projection
        out = base if in_place else None
        return attention_correction_norm_rope(
            base, reads, weight, 2.0, head_dim=8, norm_weight=norm, cos=cos, sin=sin, out=out, backend=backend
        ).tanh()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (3, 4, 7):
        shapes = ((2, T, 6), (6, 24), (2, T, 2, 4), (24, 8), (8,))
        operands = [torch.randn(s).requires_grad_(training) for s in shapes]
        tables = [torch.randn(1, T, 8) for _ in range(2)]
        ours, eager = compiled(*operands, *tables), layer(*operands, *tables)
        assert relative_error(ours.detach(), eager.detach()) <= FLOAT32_TOLERANCE
        if training:
            for a, b in zip(*(torch.autograd.grad(y.square().sum(), operands) for y in (ours, eager)), strict=True):
                assert relative_error(a, b) <= FLOAT32_TOLERANCE


def bad(change: dict[str, Callable], kind: type[Exception], *words: str) -> object:
    return pytest.param(change, kind, words, id=f"{'-'.join(change)}-{words[-1]}")


CASES = [
    bad({"head_dim": lambda x: 16.0}, TypeError, "head_dim must be an integer", "got float 16.0"),
    bad({"head_dim": lambda x: True}, TypeError, "head_dim must be an integer", "got bool"),
    bad({"head_dim": lambda x: 0, "norm_weight": lambda x: None}, ValueError, "head_dim must divide", "48, got 0"),
    bad({"head_dim": lambda x: 32, "norm_weight": lambda x: None}, ValueError, "head_dim must divide", "48, got 32"),
    bad({"head_dim": lambda x: 3, "norm_weight": lambda x: None}, ValueError, "head_dim must be even", "got 3"),
    bad({"norm_weight": lambda x: x[1:]}, ValueError, "norm_weight must be [head_dim] = [16]", "got float32 [15]"),
    bad({"cos": lambda x: None}, ValueError, "cos and sin must be given both or neither", "got only sin"),
    bad({"sin": lambda x: None}, ValueError, "cos and sin must be given both or neither", "got only cos"),
    bad({"cos": lambda x: 1.0}, TypeError, "cos must be a tensor [B, T, head_dim] or [1, T, head_dim]", "got float"),
    bad({"cos": lambda x: x.long()}, TypeError, "cos must be float16, bfloat16, float32 or float64", "got int64"),
    bad({"sin": lambda x: x[:, 1:]}, ValueError, "sin must be", "[2, 5, 16] or [1, 5, 16]", "got float32 [2, 4, 16]"),
    bad({"sin": lambda x: x[..., :8]}, ValueError, "sin must be [B, T, head_dim]", "got float32 [2, 5, 8]"),
    bad({"sin": lambda x: x.to("meta")}, ValueError, "sin must be on base's device cpu", "on meta"),
    bad({"cos": lambda x: x.requires_grad_()}, ValueError, "cos must not require grad", "no gradient"),
]


@pytest.mark.parametrize(("changes", "kind", "words"), CASES)
def test_arguments_that_do_not_fit_raise(changes, kind, words):
    problem = problem_of("norm and rope")
    call = {**problem.operands, **problem.options}
    for name, change in changes.items():
        call[name] = change(call[name])
    with pytest.raises(kind) as caught:
        attention_correction_norm_rope(**call)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_out_that_overlaps_a_table_raises():
    problem = problem_of("rope", T=3, B=1, D=16)
    with pytest.raises(ValueError, match="out must not share memory with cos"):
        problem.run("reference", out=problem.options["cos"])
