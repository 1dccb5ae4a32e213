"""memory_prefill: every backend against float64, its operator, and what Triton fuses."""

from __future__ import annotations

import pytest
import torch
from conftest import small_chunks
from layer_problems import DEVICE, D, N, meta, parameters, to
from problems import MODES, check

from deltamem_kernels import (
    attention_correction,
    attention_correction_norm_rope,
    delta_update,
    memory_prefill,
    memory_projection,
)
from deltamem_kernels.backends.scan_choice import force_scan
from deltamem_kernels.testing import (
    FLOAT32_TOLERANCE,
    Problem,
    assert_close_in_norm,
    assert_close_to_float64,
    between_nans,
    projection_weights,
)

pytestmark = pytest.mark.one_isa
CHUNK, NARROW = 8, 19


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("H", "R"), [(1, 8), (6, 4), (3, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_prefill_is_exact_in_values_and_gradients(implementation, mode, H, R, packed):
    B, T = (1, 12) if packed else (2, 9)
    split = R != 4  # whose gates are per head: with few heads the gradients of their biases may all be small
    call = {"x": torch.randn(B, T, D), **parameters(H, R, mode != "no_lambda", R == 4, split=split)}
    states = 3 if packed else B
    call["initial_state"] = torch.randn(states, H, R, R)
    options: dict = {"heads": H, "mode": mode, "mask": torch.rand(B, T) < 0.7}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 5, 5, 12])
    qkv = call.pop("qkv_weight")
    weights = dict(zip(("q_weight", "k_weight", "v_weight"), qkv, strict=True)) if split else {"qkv_weight": qkv}
    problem = Problem(prefill, {**call, **weights}, options)
    check(problem, implementation)


def prefill(q_weight=None, k_weight=None, v_weight=None, qkv_weight=None, **call):
    """memory_prefill with the weights of q, k and v one by one, or in one."""
    return memory_prefill(qkv_weight=(q_weight, k_weight, v_weight) if qkv_weight is None else qkv_weight, **call)


@pytest.mark.parametrize("wanted", [("k_weight",), ("q_weight", "v_weight", "x"), ("initial_state",)], ids="-".join)
def test_any_of_three_weights_may_be_frozen_in_prefill(implementation, wanted):
    call: dict = {"x": torch.randn(1, 5, D), **projection_weights(D, 1, 4, split=True)}
    call["initial_state"] = torch.randn(1, 1, 4, 4)
    check(Problem(prefill, call), implementation, wanted=wanted)


def test_prefill_has_the_bits_of_projection_and_scan(implementation):
    call = to({"x": torch.randn(2, 5, D), **parameters(1, 8, True)}, implementation.device)
    p = memory_projection(**call, backend=implementation.backend)
    parts = delta_update(*p, backend=implementation.backend)
    whole = memory_prefill(**call, backend=implementation.backend)
    assert torch.equal(whole.reads, parts.reads)
    assert torch.equal(whole.final_state, parts.final_state)


@pytest.mark.parametrize(("T", "count"), [(1, 2), (64, 2), (65, 3)])
def test_prefill_launches_few_kernels(launches, T, count):
    call = to({"x": torch.randn(1, T, 8), **parameters(1, 4, False, width=8)}, DEVICE)
    memory_prefill(**call, backend="triton")
    assert len(launches) == count, launches


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"x": torch.zeros(N, D)}, ValueError, ["x must be [B, T, D]", "[5, 37]"]),
        ({"mode": "no_lambda"}, ValueError, ["decay_weight must be None in mode 'no_lambda'"]),
        ({"mode": 3}, TypeError, ["mode must be one of", "3"]),
        ({"qkv_weight": (torch.zeros(8, D),) * 2}, ValueError, ["one tensor [3·H·R, D] or three", "got 2 tensors"]),
        ({"qkv_weight": (torch.zeros(8, 9),) * 3}, ValueError, ["qkv_weight must be [H·R, D]", "[8, 9]"]),
        ({"mask": torch.zeros(2, 4)}, TypeError, ["mask must be a bool tensor", "float32"]),
        ({"mask": torch.zeros(2, 5, dtype=torch.bool)}, ValueError, ["mask must be [B, T]", "[2, 5]"]),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, ["cu_seqlens needs packed sequences", "x with B = 2"]),
        ({"initial_state": torch.zeros(3, 1, 8, 8)}, ValueError, ["initial_state must be [N, H", "[3, 1, 8, 8]"]),
        ({"initial_state": meta(2, 1, 8, 8)}, ValueError, ["initial_state must be on x's device", "meta"]),
        ({"heads": 0}, ValueError, ["heads must be at least 1"]),
        ({"backend": 1}, TypeError, ["backend must be the name"]),
    ],
)  # fmt: skip
def test_prefill_raises_for_arguments_that_do_not_fit(change, exception, words):
    call = {"x": torch.randn(2, 4, D), **parameters(1, 8, True)} | change
    with pytest.raises(exception) as raised:
        memory_prefill(**call)
    for word in words:
        assert word in str(raised.value)


@pytest.fixture
def chunks():
    with force_scan(chunked=True), small_chunks(CHUNK):
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    ("H", "R", "mode", "decay", "per_head", "T", "normalize"),
    [
        (1, 8, "standard", False, False, 2 * CHUNK + 3, True),
        (3, 4, "lambda_outside", True, True, 3 * CHUNK, True),
        (1, 5, "no_lambda", False, False, 2 * CHUNK + 1, False),
    ],
)
def test_the_fused_kernel_is_exact_in_values_and_gradients(chunks, launches, H, R, mode, decay, per_head, T, normalize):
    call = {"x": torch.randn(1, T, NARROW), **parameters(H, R, decay, per_head, width=NARROW)}
    call["initial_state"] = torch.randn(1, H, R, R)
    operands = {name: between_nans(x.to(DEVICE)) for name, x in call.items()}
    problem = Problem(memory_prefill, operands, {"heads": H, "mode": mode, "normalize": normalize})
    assert_close_to_float64(problem, "triton")
    assert launches[0] == "memory_prefill_kernel"


@pytest.mark.slow
@pytest.mark.parametrize("given", ["mask", "cu_seqlens", "rank"])
def test_chunks_that_are_not_tiles_have_maps_of_their_own(chunks, launches, given):
    """Also where a chunk has too many rows."""
    H, R = 1, 12 if given == "rank" else 4
    call = to({"x": torch.randn(1, 20, NARROW), **parameters(H, R, False, width=NARROW)}, DEVICE)
    options = {"mask": torch.rand(1, 20) < 0.8, "cu_seqlens": torch.tensor([0, 17, 20])}
    option = to({name: x for name, x in options.items() if name == given}, DEVICE)
    ours = memory_prefill(**call, **option, heads=H, backend="triton")
    assert "chunk_maps_kernel" in launches
    exact = memory_prefill(**to(call, "cpu", torch.float64), **to(option, "cpu"), heads=H, backend="reference")
    assert_close_in_norm(ours._asdict(), exact._asdict(), FLOAT32_TOLERANCE)


@pytest.mark.slow
def test_a_layer_launches_five_kernels(launches):
    """The correction of the query applies the norm and rotary embedding of the frozen layer too. The first three
    kernels give the same bits as the operations one after another."""
    head, T = 4, 65
    call = to({"x": torch.randn(1, T, 8), **parameters(1, 4, False, width=8)}, DEVICE)
    query, output = (torch.randn(1, T, 2 * head, device=DEVICE) for _ in range(2))
    weight, table, norm = torch.randn(2 * head, 4), torch.randn(1, T, head), torch.randn(head)
    weight, table, norm = weight.to(DEVICE), table.to(DEVICE), norm.to(DEVICE)
    reads, state = memory_prefill(**call, backend="triton")
    rotary = {"head_dim": head, "norm_weight": norm, "cos": table, "sin": table}
    attention_correction_norm_rope(query, reads, weight, out=query, **rotary, backend="triton")
    attention_correction(output, reads, weight, out=output, backend="triton")
    scan = ["fold_kernel", "delta_update_forward_kernel"]
    assert launches == ["memory_prefill_kernel", *scan, "correct_kernel", "correct_kernel"]
    apart = delta_update(*memory_projection(**call, backend="triton"), backend="triton")
    assert torch.equal(reads, apart.reads)
    assert torch.equal(state, apart.final_state)


@pytest.mark.parametrize("save", [False, True])
def test_the_operator_passes_opcheck(save):
    weights = parameters(2, 4, True, width=NARROW)
    state, mask = torch.randn(1, 2, 4, 4), torch.rand(1, 5) < 0.7
    arguments = [torch.randn(1, 5, NARROW), [weights.pop("qkv_weight")], *weights.values(), state, mask, None]
    torch.library.opcheck(torch.ops.deltamem_kernels.memory_prefill, (*arguments, 2, True, "standard", "cpu", save))


@pytest.mark.parametrize("wanted", [("initial_state",), ("x",), ("beta_bias", "decay_weight")], ids="-".join)
def test_frozen_operands_get_no_gradient_and_keep_nothing(wanted):
    """x is not kept if no weight needs a gradient."""
    call = {
        "x": torch.randn(1, 5, NARROW),
        **parameters(1, 4, True, width=NARROW),
        "initial_state": torch.randn(1, 1, 4, 4),
    }
    assert_close_to_float64(Problem(memory_prefill, call), "cpu", wanted=wanted)
    leaves = {name: x.requires_grad_(name in wanted) for name, x in call.items()}
    out = memory_prefill(**leaves, backend="cpu")
    kept = {saved.data_ptr() for saved in out.reads.grad_fn.saved_tensors if saved is not None}
    assert kept
    assert (call["x"].data_ptr() in kept) is ("decay_weight" in wanted)


def test_torch_compile_makes_one_graph_with_its_backward():
    call = {
        "x": torch.randn(2, 5, NARROW),
        **parameters(1, 4, True, width=NARROW),
        "initial_state": torch.randn(2, 1, 4, 4),
    }
    leaves = [x.requires_grad_() for x in call.values()]

    def loss(*values):
        out = memory_prefill(**dict(zip(call, values, strict=True)), backend="cpu")
        return out.reads.square().sum() + out.final_state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    ours, eager = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)
