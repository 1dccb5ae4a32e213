"""memory_decode, which a layer calls for each token: every backend against the single operations in float64."""

from __future__ import annotations

import pytest
import torch
from layer_problems import DEVICE, HEAD, PAD, SLOTS, D, N, correction, meta, parameters, to
from problems import MODES
from torch import Tensor

from deltamem_kernels import (
    attention_correction,
    attention_correction_norm_rope,
    delta_step,
    memory_decode,
    memory_prefill,
    memory_projection,
)
from deltamem_kernels.testing import FLOAT32_TOLERANCE, between_nans, relative_error

pytestmark = pytest.mark.one_isa
PARAMETERS = ("qkv_weight", "beta_weight", "beta_bias", "decay_weight", "decay_bias")


def one_after_another(state: Tensor, slots: list[int], call: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return reads, states after the step and the corrected base, from the single operations in float64."""
    call = to(call, "cpu", torch.float64)
    pool, heads, mode = state.double().cpu().clone(), call.get("heads", 1), call.get("mode", "standard")
    operands = [call.get(name) for name in PARAMETERS]
    p = memory_projection(call["x"], *operands, heads=heads, normalize=call.get("normalize", True), backend="reference")
    reads = delta_step(pool, *p, mode=mode, state_indices=torch.tensor(slots), backend="reference")
    if "base" not in call:
        return reads, pool, None
    names = ("head_dim", "norm_weight", "cos", "sin")
    correct = attention_correction_norm_rope if "head_dim" in call else attention_correction
    options = {name: call[name] for name in names if name in call}
    corrected = correct(call["base"], reads, call["delta_weight"], call["scale"], **options, backend="reference")
    return reads, pool, corrected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["none", "plain", "norm", "heads"])
@pytest.mark.parametrize(
    ("H", "R", "per_head", "split"),
    [(1, 8, False, True), (2, 4, True, False), (3, 5, False, True), (1, 17, True, False)],
)
def test_decoding_steps_are_exact_and_leave_other_slots_alone(implementation, mode, form, H, R, per_head, split):
    """Slots in any order, one row padded, operands between NaN."""
    call = {"x": torch.randn(N, D), **parameters(H, R, mode != "no_lambda" and R != 4, per_head, split=split)}
    call |= {} if form == "none" else correction(H, R, form)
    call |= {"heads": H, "mode": mode}
    pool = torch.randn(SLOTS, H, R, R)
    slots = torch.randperm(SLOTS)[:N].tolist()
    slots[2] = PAD
    reads, states, corrected = one_after_another(pool, slots, call)
    ours_pool = between_nans(pool.to(implementation.device))
    indices = torch.tensor(slots, dtype=torch.int32, device=implementation.device)
    call = to(call, implementation.device, fenced=True)
    ours = memory_decode(ours_pool, **call, state_indices=indices, backend=implementation.backend)
    assert relative_error(ours.reads, reads) <= FLOAT32_TOLERANCE
    assert torch.count_nonzero(ours.reads[2]) == 0
    assert relative_error(ours_pool, states) <= FLOAT32_TOLERANCE
    untouched = [s for s in range(SLOTS) if s not in slots]
    assert torch.equal(ours_pool[untouched].cpu(), pool[untouched])
    if form == "none":
        assert ours.corrected is None
    else:
        assert relative_error(ours.corrected, corrected) <= FLOAT32_TOLERANCE


@pytest.mark.each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("split", [False, True])
def test_decoding_is_exact_in_every_dtype_of_model_and_pool(implementation, dtype, pool_dtype, split):
    """x and base have the model's dtype, the weights float32, the pool its own. The scale is a tensor."""
    call = {"x": torch.randn(N, D).to(dtype), **parameters(2, 4, True, split=split), **correction(2, 4, "heads")}
    call |= {"base": call["base"].to(dtype), "scale": torch.tensor(0.7), "heads": 2}
    pool = torch.randn(SLOTS, 2, 4, 4).to(pool_dtype)
    reads, states, corrected = one_after_another(pool, list(range(N)), call)
    ours_pool = pool.to(implementation.device)
    ours = memory_decode(ours_pool, **to(call, implementation.device), backend=implementation.backend)
    assert ours.reads.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.corrected.dtype == dtype
    assert relative_error(ours.reads, reads) <= FLOAT32_TOLERANCE
    rounding = implementation.rounding.get(pool_dtype, 0) * torch.finfo(pool_dtype).eps
    assert relative_error(ours_pool, states) <= FLOAT32_TOLERANCE + rounding
    rounding = implementation.rounding.get(dtype, 0) * torch.finfo(dtype).eps
    assert relative_error(ours.corrected, corrected) <= FLOAT32_TOLERANCE + rounding


@pytest.mark.parametrize("form", ["plain", "norm", "heads"])
@pytest.mark.parametrize("in_place", [False, True])
def test_decoding_writes_into_out(implementation, form, in_place):
    call = to({"x": torch.randn(N, D), **parameters(1, 8, False), **correction(1, 8, form)}, implementation.device)
    pool = torch.randn(SLOTS, 1, 8, 8, device=implementation.device)
    _, _, corrected = one_after_another(pool, list(range(N)), call)
    wide = torch.full((N, 4 * HEAD + 6), 7.0, device=implementation.device)
    out = wide[:, 2:-4]
    if in_place:
        call["base"] = out.copy_(call["base"])
    ours = memory_decode(pool, **call, out=out, backend=implementation.backend)
    assert ours.corrected is out
    assert relative_error(out, corrected) <= FLOAT32_TOLERANCE
    assert (wide[:, :2] == 7).all()
    assert (wide[:, -4:] == 7).all()


def test_a_decoded_row_does_not_depend_on_the_others(implementation):
    call = to({"x": torch.randn(40, D), **parameters(2, 8, True), **correction(2, 8, "heads", 40)})
    call = to(call | {"heads": 2}, implementation.device)
    pool = torch.randn(40, 2, 8, 8, device=implementation.device)
    together, alone = pool.clone(), pool[7:8].clone()
    all_rows = memory_decode(together, **call, backend=implementation.backend)
    one = {name: x[7:8] if name in ("x", "base", "cos", "sin") else x for name, x in call.items()}
    row = memory_decode(alone, **one, backend=implementation.backend)
    pairs = ((all_rows.reads[7:8], row.reads), (all_rows.corrected[7:8], row.corrected), (together[7:8], alone))
    for among_others, by_itself in pairs:
        if implementation.backend in ("cpu", "triton"):
            assert torch.equal(among_others, by_itself)
        else:  # PyTorch's matrix product sums in another order if there are more rows
            assert relative_error(among_others, by_itself.double()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("form", ["none", "norm", "heads"])
def test_a_time_dimension_of_one_does_not_change_a_bit(implementation, form):
    """As a layer calls it, with `[N, 1, D]`."""
    call = {"x": torch.randn(N, D), **parameters(2, 4, True)} | ({} if form == "none" else correction(2, 4, form))
    call = to(call | {"heads": 2}, implementation.device)
    wide = {n: x.unsqueeze(1) if n in ("x", "base", "cos", "sin") else x for n, x in call.items()}
    pools = [torch.ones(N, 2, 4, 4, device=implementation.device) for _ in range(2)]
    rows = memory_decode(pools[0], **call, backend=implementation.backend)
    ours = memory_decode(pools[1], **wide, backend=implementation.backend)
    assert ours.reads.shape == (N, 1, 2, 4)
    assert torch.equal(ours.reads.squeeze(1), rows.reads)
    assert torch.equal(*pools)
    if form != "none":
        assert ours.corrected.shape == (N, 1, 4 * HEAD)
        assert torch.equal(ours.corrected.squeeze(1), rows.corrected)


def test_decoding_no_rows_changes_nothing(implementation):
    call = {"x": torch.randn(0, D), **parameters(1, 8, False), **correction(1, 8, "plain", 0)}
    pool = torch.randn(3, 1, 8, 8, device=implementation.device)
    before = pool.clone()
    ours = memory_decode(pool, **to(call, implementation.device), backend=implementation.backend)
    assert (ours.reads.shape, ours.corrected.shape) == ((0, 1, 8), (0, 4 * HEAD))
    assert torch.equal(pool, before)


def test_three_weights_have_the_bits_of_one_packed_weight(implementation):
    """In prefill, its gradients and decoding."""
    call = {"x": torch.randn(2, 5, D), **parameters(2, 4, True, split=True)}
    call = to(call, implementation.device) | {"heads": 2}
    packed = call | {"qkv_weight": torch.cat(call["qkv_weight"])}
    for each in (call, packed):
        each["x"] = each["x"].clone().requires_grad_()
    whole = [memory_prefill(**each, backend=implementation.backend) for each in (call, packed)]
    assert torch.equal(whole[0].reads, whole[1].reads)
    assert torch.equal(whole[0].final_state, whole[1].final_state)
    loss = [out.reads.square().sum() + out.final_state.sum() for out in whole]
    assert torch.equal(torch.autograd.grad(loss[0], call["x"])[0], torch.autograd.grad(loss[1], packed["x"])[0])
    pools = [torch.ones(2, 2, 4, 4, device=implementation.device) for _ in range(2)]
    with torch.no_grad():
        steps = [
            memory_decode(pool, **each | {"x": each["x"][:, 0]}, backend=implementation.backend)
            for pool, each in zip(pools, (call, packed), strict=True)
        ]
    assert torch.equal(steps[0].reads, steps[1].reads)
    assert torch.equal(*pools)
    assert not torch.equal(pools[0], torch.ones_like(pools[0]))


def test_prefill_then_decode_is_one_sequence(implementation):
    """Prefill of some tokens and decoding of the rest is prefill of all."""
    T, first = 7, 3
    call = to({"x": torch.randn(2, T, D), **parameters(2, 8, True)}, implementation.device) | {"heads": 2}
    rest = {name: w for name, w in call.items() if name != "x"}
    whole = memory_prefill(**call, backend=implementation.backend)
    begun = memory_prefill(call["x"][:, :first], **rest, backend=implementation.backend)
    pool = begun.final_state.clone()
    for t in range(first, T):
        step = memory_decode(pool, call["x"][:, t], **rest, backend=implementation.backend)
        assert relative_error(step.reads, whole.reads[:, t]) <= FLOAT32_TOLERANCE
    assert relative_error(pool, whole.final_state) <= FLOAT32_TOLERANCE


def test_decoding_launches_two_kernels(launches):
    """The second corrects the query and applies the norm and rotary embedding, for which the frozen layer launches
    kernels of its own. The correction of the output is a third one."""
    call = to({"x": torch.randn(N, D), **parameters(2, 4, True), **correction(2, 4, "heads")}, DEVICE) | {"heads": 2}
    ours = memory_decode(torch.randn(N, 2, 4, 4, device=DEVICE), **call, backend="triton")
    assert launches == ["memory_decode_kernel", "correct_kernel"]
    output = torch.randn(N, 12, device=DEVICE)
    weight = torch.randn(12, 8, device=DEVICE)
    attention_correction(output, ours.reads, weight, out=output, backend="triton")
    assert launches == ["memory_decode_kernel", "correct_kernel", "correct_kernel"]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_torch_compile_sees_what_decoding_writes(backend):
    """A compiled loop updates pool and query as the eager one does."""
    call = {**parameters(1, 8, True), **correction(1, 8, "heads")}

    def two_steps(pool: Tensor, x: Tensor, query: Tensor) -> Tensor:
        first = memory_decode(pool, x, **call | {"base": query, "out": query}, backend=backend)
        second = memory_decode(pool, -x, **call | {"base": first.corrected}, backend=backend)
        return first.reads + second.reads + second.corrected.sum() + pool.sum()

    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
    x, pool, query = torch.randn(N, D), torch.randn(SLOTS, 1, 8, 8), call["base"]
    pools, queries = (pool, pool.clone()), (query.clone(), query.clone())
    with torch.no_grad():
        torch.testing.assert_close(compiled(pools[1], x, queries[1]), two_steps(pools[0], x, queries[0]))
    assert torch.equal(pools[0], pools[1])
    assert torch.equal(queries[0], queries[1])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("form", ["none", "plain", "heads"])
@pytest.mark.parametrize("out", [False, True])
def test_the_decoding_operator_passes_opcheck(form, out, split):
    weights = parameters(1, 4, True, split=split)
    qkv = weights.pop("qkv_weight")
    qkv = list(qkv) if split else [qkv]
    given = {} if form == "none" else correction(1, 4, form)
    given.pop("scale", None)
    written = torch.zeros(N, 4 * HEAD) if out and given else None
    arguments = (
        torch.randn(SLOTS, 1, 4, 4), torch.randn(N, D), qkv, *weights.values(), torch.arange(N),
        *(given.get(name) for name in ("base", "delta_weight")), None,
        *(given.get(name) for name in ("norm_weight", "cos", "sin")), written,
        1, True, "standard", -1, 0.5, 1e-6, given.get("head_dim", 0), "cpu",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.deltamem_kernels.memory_decode, arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"x": torch.zeros(1, N, D)}, ValueError, ["x must be [N, D]", "[1, 5, 37]"]),
        ({"qkv_weight": torch.zeros(24, 9)}, ValueError, ["qkv_weight must be", "[24, 9]"]),
        ({"qkv_weight": (torch.zeros(8, D),) * 2}, ValueError, ["one tensor [3·H·R, D] or three", "got 2 tensors"]),
        ({"qkv_weight": (torch.zeros(8, 9),) * 3}, ValueError, ["qkv_weight must be [H·R, D]", "[8, 9]"]),
        ({"mode": "fast"}, ValueError, ["mode must be one of", "fast"]),
        ({"mode": "no_lambda"}, ValueError, ["decay_weight must be None in mode 'no_lambda'"]),
        ({"state": torch.zeros(SLOTS, 8, 8)}, ValueError, ["state must be [slots, H, R, R]", "[9, 8, 8]"]),
        ({"state": torch.zeros(SLOTS, 1, 8, 8, dtype=torch.int32)}, TypeError, ["state must be", "int32"]),
        ({"state": torch.zeros(3, 1, 8, 8)}, ValueError, ["state must have a slot for each of the N=5 rows"]),
        ({"state": meta(SLOTS, 1, 8, 8)}, ValueError, ["state must be on x's device", "meta"]),
        ({"state_indices": torch.zeros(N)}, TypeError, ["state_indices must be an int32 or int64", "float32"]),
        ({"state_indices": torch.zeros(4, dtype=torch.int64)}, ValueError, ["state_indices must be [N]", "[4]"]),
        ({"state_indices": torch.arange(N) + 7}, ValueError, ["state_indices must be from 0 to 8", "got 9"]),
        ({"base": [1.0]}, TypeError, ["base must be a tensor", "list"]),
        ({"base": torch.zeros(4, 4 * HEAD)}, ValueError, ["base must be [N, Dq] with x's N=5", "[4, 24]"]),
        ({"base": meta(N, 4 * HEAD)}, ValueError, ["base must be on x's device", "meta"]),
        ({"base": torch.zeros(N, 1, 4 * HEAD)}, ValueError, ["base must be [N, Dq] with x's N=5", "[5, 1, 24]"]),
        ({"base": None}, ValueError, ["delta_weight must be None without a base"]),
        (dict.fromkeys(correction(1, 8, "heads")) | {"scale": 2.0}, ValueError, ["scale must be 1 without a base"]),
        ({"delta_weight": None}, TypeError, ["delta_weight must be a tensor", "None"]),
        ({"delta_weight": torch.zeros(4 * HEAD, 7)}, ValueError, ["delta_weight must be [Dq, H·R]", "[24, 7]"]),
        ({"scale": "big"}, TypeError, ["scale must be a number", "big"]),
        ({"head_dim": None}, ValueError, ["head_dim must be given with cos and sin"]),
        (
            {"head_dim": 12, "cos": torch.zeros(N, 12), "sin": torch.zeros(N, 12)},
            ValueError,
            ["norm_weight must be [head_dim] = [12]", "[6]"],
        ),
        ({"head_dim": 5, "norm_weight": None}, ValueError, ["head_dim must divide", "got 5"]),
        ({"cos": None}, ValueError, ["cos and sin must be given both or neither"]),
        ({"norm_eps": -1.0}, ValueError, ["norm_eps must be at least 0"]),
        ({"out": torch.zeros(N, 3)}, ValueError, ["out must be of base's shape", "[5, 3]"]),
        ({"x": torch.zeros(N, D, requires_grad=True)}, ValueError, ["memory_decode has no gradient"]),
        ({"backend": "gpu"}, ValueError, ["backend must be one of", "gpu"]),
        ({"pad_slot_id": None}, TypeError, ["pad_slot_id must be an int", "got NoneType None"]),
        ({"pad_slot_id": "x"}, TypeError, ["pad_slot_id must be an int", "got str 'x'"]),
        ({"pad_slot_id": 1.5}, TypeError, ["pad_slot_id must be an int", "got float 1.5"]),
        ({"pad_slot_id": True}, TypeError, ["pad_slot_id must be an int", "got bool True"]),
        ({"state_indices": torch.arange(N).to_sparse()}, TypeError, ["state_indices must be a dense tensor", "sparse"]),
        ({"state": torch.zeros(1, 1, 8, 8).expand(N, -1, -1, -1)}, ValueError, ["state must be a tensor without"]),
    ],
)  # fmt: skip
def test_decoding_raises_for_arguments_that_do_not_fit(change, exception, words, backend):
    call = {"state": torch.randn(SLOTS, 1, 8, 8), "x": torch.randn(N, D), **parameters(1, 8, True)}
    call |= correction(1, 8, "heads") | {"backend": backend} | change
    before = call["state"].clone() if call["state"].device.type == "cpu" else None
    with pytest.raises(exception) as raised:
        memory_decode(**call)
    for word in words:
        assert word in str(raised.value)
    assert before is None or torch.equal(call["state"], before)


def test_a_pool_that_overlaps_an_operand_raises():
    memory = torch.randn(SLOTS * 64 + N * D)
    call = {"state": memory[: SLOTS * 64].view(SLOTS, 1, 8, 8), "x": torch.randn(N, D), **parameters(1, 8, True)}
    call |= {"base": torch.randn(N, D), "delta_weight": torch.randn(D, 8), "out": torch.zeros(N, D)}
    under = memory[-N * D - 1 : -1].view(N, D)
    before = memory.clone()
    with torch.no_grad():
        for change, words in (
            ({"x": under}, "state must not share memory with x, which is read while state is written"),
            ({"base": under}, "state must not share memory with base"),
            ({"base": under, "out": under}, "state must not share memory with base"),
            ({"out": under}, "out must not share memory with state"),
        ):
            with pytest.raises(ValueError, match=words):
                memory_decode(**call | change)
        assert torch.equal(memory, before)
        memory_decode(**call | {"x": memory[-N * D :].view(N, D)})
