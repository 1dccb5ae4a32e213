"""memory_prefill and memory_decode, what a layer calls: every backend against the float64 oracle, which is the three
operations one after another."""

from __future__ import annotations

import pytest
import torch
from problems import FLOAT32_TOLERANCE, MODES, assert_close, error, fence
from torch import Tensor

from deltamem_kernels import (
    attention_correction,
    attention_correction_norm_rope,
    delta_step,
    delta_update,
    memory_decode,
    memory_prefill,
    memory_projection,
)

N, SLOTS, PAD, D, HEAD = 5, 9, -1, 37, 6
PARAMETERS = ("qkv_weight", "beta_weight", "beta_bias", "decay_weight", "decay_bias")


def parameters(H: int, R: int, decay: bool, per_head: bool = False, width: int = D) -> dict[str, Tensor]:
    gates = H if per_head else H * R
    made = {"qkv_weight": torch.randn(3 * H * R, width), "beta_weight": torch.randn(gates, width)}
    made["beta_bias"] = torch.randn(gates)
    if decay:
        made |= {"decay_weight": torch.randn(H * R, width), "decay_bias": torch.randn(H * R)}
    return {name: w / width**0.5 if w.ndim == 2 else w for name, w in made.items()}


def correction(H: int, R: int, form: str, rows: int = N) -> dict:
    """base and what goes with it: "plain", "norm" over the correction, or "heads" with norm and rotary."""
    made: dict = {"base": torch.randn(rows, 4 * HEAD), "delta_weight": torch.randn(4 * HEAD, H * R), "scale": 0.7}
    if form == "norm":
        made["norm_weight"] = torch.randn(4 * HEAD)
    if form == "heads":
        made |= {"head_dim": HEAD, "norm_weight": torch.randn(HEAD)}
        made |= {"cos": torch.randn(rows, HEAD), "sin": torch.randn(rows, HEAD)}
    return made


def to(made: dict, device: str | None = None, dtype: torch.dtype | None = None, fenced: bool = False) -> dict:
    move = lambda x: x.detach().to(device=device, dtype=dtype if x.is_floating_point() else None).clone()  # noqa: E731
    wrap = fence if fenced else (lambda x: x)
    return {name: wrap(move(x)) if isinstance(x, Tensor) else x for name, x in made.items()}


def oracle(state: Tensor, slots: list[int], call: dict) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reads, states after the step and the corrected base, by the operations on their own, in float64."""
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
@pytest.mark.parametrize(("H", "R", "per_head"), [(1, 8, False), (2, 4, True), (3, 5, False), (1, 17, True)])
def test_decode(implementation, mode, form, H, R, per_head):
    """Slots in any order, one row padded, operands between NaNs; the other slots keep their bits."""
    call = {"x": torch.randn(N, D), **parameters(H, R, mode != "no_lambda" and R != 4, per_head)}
    call |= {} if form == "none" else correction(H, R, form)
    call |= {"heads": H, "mode": mode}
    pool = torch.randn(SLOTS, H, R, R)
    slots = torch.randperm(SLOTS)[:N].tolist()
    slots[2] = PAD
    reads, states, corrected = oracle(pool, slots, call)
    ours_pool = fence(pool.to(implementation.device))
    indices = torch.tensor(slots, dtype=torch.int32, device=implementation.device)
    call = to(call, implementation.device, fenced=True)
    ours = memory_decode(ours_pool, **call, state_indices=indices, backend=implementation.backend)
    assert error(ours.reads, reads) <= FLOAT32_TOLERANCE
    assert torch.count_nonzero(ours.reads[2]) == 0
    assert error(ours_pool, states) <= FLOAT32_TOLERANCE
    untouched = [s for s in range(SLOTS) if s not in slots]
    assert torch.equal(ours_pool[untouched].cpu(), pool[untouched])
    if form == "none":
        assert ours.corrected is None
    else:
        assert error(ours.corrected, corrected) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decode_in_other_dtypes(implementation, dtype, pool_dtype):
    """x and base in the model's dtype, the memory's weights in float32; the pool in its own. A tensor scale."""
    call = {"x": torch.randn(N, D).to(dtype), **parameters(2, 4, True), **correction(2, 4, "heads")}
    call |= {"base": call["base"].to(dtype), "scale": torch.tensor(0.7), "heads": 2}
    pool = torch.randn(SLOTS, 2, 4, 4).to(pool_dtype)
    reads, states, corrected = oracle(pool, list(range(N)), call)
    ours_pool = pool.to(implementation.device)
    ours = memory_decode(ours_pool, **to(call, implementation.device), backend=implementation.backend)
    assert ours.reads.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours.corrected.dtype == dtype
    assert error(ours.reads, reads) <= FLOAT32_TOLERANCE
    assert error(ours_pool, states) <= max(FLOAT32_TOLERANCE, torch.finfo(pool_dtype).eps)
    assert error(ours.corrected, corrected) <= max(FLOAT32_TOLERANCE, torch.finfo(dtype).eps)


@pytest.mark.parametrize("form", ["plain", "norm", "heads"])
@pytest.mark.parametrize("in_place", [False, True])
def test_decode_writes_into_out(implementation, form, in_place):
    call = to({"x": torch.randn(N, D), **parameters(1, 8, False), **correction(1, 8, form)}, implementation.device)
    pool = torch.randn(SLOTS, 1, 8, 8, device=implementation.device)
    _, _, corrected = oracle(pool, list(range(N)), call)
    wide = torch.full((N, 4 * HEAD + 6), 7.0, device=implementation.device)
    out = wide[:, 2:-4]
    if in_place:
        call["base"] = out.copy_(call["base"])
    ours = memory_decode(pool, **call, out=out, backend=implementation.backend)
    assert ours.corrected is out
    assert error(out, corrected) <= FLOAT32_TOLERANCE
    assert (wide[:, :2] == 7).all()
    assert (wide[:, -4:] == 7).all()


def test_decode_of_a_row_does_not_depend_on_the_others(implementation):
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
        else:  # PyTorch's matrix product adds up in another order where there are more rows
            assert error(among_others, by_itself.double()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("form", ["none", "norm", "heads"])
def test_decode_of_what_a_layer_has(implementation, form):
    """`[N, 1, D]` and what goes with it: the same bits."""
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


def test_decode_of_nothing(implementation):
    call = {"x": torch.randn(0, D), **parameters(1, 8, False), **correction(1, 8, "plain", 0)}
    pool = torch.randn(3, 1, 8, 8, device=implementation.device)
    before = pool.clone()
    ours = memory_decode(pool, **to(call, implementation.device), backend=implementation.backend)
    assert (ours.reads.shape, ours.corrected.shape) == ((0, 1, 8), (0, 4 * HEAD))
    assert torch.equal(pool, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("H", "R"), [(1, 8), (2, 4), (3, 5)])
@pytest.mark.parametrize("packed", [False, True])
def test_prefill(implementation, mode, H, R, packed):
    """Values and every gradient, through reads and final states."""
    B, T = (1, 12) if packed else (2, 9)
    call = {"x": torch.randn(B, T, D), **parameters(H, R, mode != "no_lambda", R == 4)}
    states = 3 if packed else B
    call["initial_state"] = torch.randn(states, H, R, R)
    options: dict = {"heads": H, "mode": mode, "mask": torch.rand(B, T) < 0.7}
    if packed:
        options["cu_seqlens"] = torch.tensor([0, 5, 5, 12])
    weights = torch.randn(B, T, H, R), torch.randn(states, H, R, R)

    def run(call: dict, options: dict, backend: str) -> dict[str, Tensor]:
        leaves = {name: x.requires_grad_() for name, x in call.items()}
        out = memory_prefill(**leaves, **options, backend=backend)
        cotangents = [w.to(x) for w, x in zip(weights, out, strict=True)]
        grads = torch.autograd.grad(list(out), list(leaves.values()), cotangents)
        return {**out._asdict(), **{f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}}

    exact = run(to(call, dtype=torch.float64), options, "reference")
    moved = to(call, implementation.device), to(options, implementation.device)
    assert_close(run(*moved, implementation.backend), exact, FLOAT32_TOLERANCE)


def test_prefill_then_decode_is_one_sequence(implementation):
    """The split law: prefill of some tokens and decoding of the rest is prefill of all."""
    T, first = 7, 3
    call = to({"x": torch.randn(2, T, D), **parameters(2, 8, True)}, implementation.device) | {"heads": 2}
    rest = {name: w for name, w in call.items() if name != "x"}
    whole = memory_prefill(**call, backend=implementation.backend)
    begun = memory_prefill(call["x"][:, :first], **rest, backend=implementation.backend)
    pool = begun.final_state.clone()
    for t in range(first, T):
        step = memory_decode(pool, call["x"][:, t], **rest, backend=implementation.backend)
        assert error(step.reads, whole.reads[:, t]) <= FLOAT32_TOLERANCE
    assert error(pool, whole.final_state) <= FLOAT32_TOLERANCE


def test_prefill_is_its_parts_to_the_bit(implementation):
    call = to({"x": torch.randn(2, 5, D), **parameters(1, 8, True)}, implementation.device)
    p = memory_projection(**call, backend=implementation.backend)
    parts = delta_update(*p, backend=implementation.backend)
    whole = memory_prefill(**call, backend=implementation.backend)
    assert torch.equal(whole.reads, parts.reads)
    assert torch.equal(whole.final_state, parts.final_state)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched, by name."""
    from deltamem_kernels.backends.triton import launch

    seen: list[str] = []
    start = launch.start
    monkeypatch.setattr(launch, "start", lambda kernel, *rest: (seen.append(kernel.fn.__name__), start(kernel, *rest)))
    return seen


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_launches_of_decoding(launches):
    """Two up to the corrected query, of which the second also does what the frozen layer launches its norm and rotary
    for; the output's correction is the layer's other one."""
    call = to({"x": torch.randn(N, D), **parameters(2, 4, True), **correction(2, 4, "heads")}, DEVICE) | {"heads": 2}
    ours = memory_decode(torch.randn(N, 2, 4, 4, device=DEVICE), **call, backend="triton")
    assert launches == ["memory_decode_kernel", "correct_kernel"]
    output = torch.randn(N, 12, device=DEVICE)
    weight = torch.randn(12, 8, device=DEVICE)
    attention_correction(output, ours.reads, weight, out=output, backend="triton")
    assert launches == ["memory_decode_kernel", "correct_kernel", "correct_kernel"]


@pytest.mark.parametrize(("T", "count"), [(1, 2), (64, 2), (65, 3)])
def test_launches_of_prefill(launches, T, count):
    call = to({"x": torch.randn(1, T, 8), **parameters(1, 4, False, width=8)}, DEVICE)
    memory_prefill(**call, backend="triton")
    assert len(launches) == count, launches


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_decode_under_torch_compile(backend):
    """What the operator writes is declared: a compiled loop updates pool and query as the eager one does."""
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


@pytest.mark.parametrize("form", ["none", "plain", "heads"])
@pytest.mark.parametrize("out", [False, True])
def test_opcheck(form, out):
    weights = parameters(1, 4, True)
    given = {} if form == "none" else correction(1, 4, form)
    given.pop("scale", None)
    written = torch.zeros(N, 4 * HEAD) if out and given else None
    arguments = (
        torch.randn(SLOTS, 1, 4, 4), torch.randn(N, D), *weights.values(), torch.arange(N),
        *(given.get(name) for name in ("base", "delta_weight")), None,
        *(given.get(name) for name in ("norm_weight", "cos", "sin")), written,
        1, True, "standard", -1, 0.5, 1e-6, given.get("head_dim", 0), "cpu",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.deltamem_kernels.memory_decode, arguments)


def meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device="meta")


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"x": torch.zeros(1, N, D)}, ValueError, ["x must be [N, D]", "[1, 5, 37]"]),
        ({"qkv_weight": torch.zeros(24, 9)}, ValueError, ["qkv_weight must be", "[24, 9]"]),
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
        ({"head_dim": 5}, ValueError, ["norm_weight must be"]),
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
        ({"state": torch.zeros(1, 1, 8, 8).expand(N, -1, -1, -1)}, ValueError, ["state must be a tensor with a place"]),
    ],
)  # fmt: skip
def test_bad_input_of_decode(change, exception, words):
    call = {"state": torch.randn(SLOTS, 1, 8, 8), "x": torch.randn(N, D), **parameters(1, 8, True)}
    call |= correction(1, 8, "heads") | {"backend": "cpu"} | change
    before = call["state"].clone() if call["state"].device.type == "cpu" else None
    with pytest.raises(exception) as raised:
        memory_decode(**call)
    for word in words:
        assert word in str(raised.value)
    assert before is None or torch.equal(call["state"], before)


def test_the_pool_must_not_lie_under_an_operand():
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


@pytest.mark.parametrize(
    ("change", "exception", "words"),
    [
        ({"x": torch.zeros(N, D)}, ValueError, ["x must be [B, T, D]", "[5, 37]"]),
        ({"mode": "no_lambda"}, ValueError, ["decay_weight must be None in mode 'no_lambda'"]),
        ({"mode": 3}, TypeError, ["mode must be one of", "3"]),
        ({"mask": torch.zeros(2, 4)}, TypeError, ["mask must be a bool tensor", "float32"]),
        ({"mask": torch.zeros(2, 5, dtype=torch.bool)}, ValueError, ["mask must be [B, T]", "[2, 5]"]),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, ["cu_seqlens needs packed sequences", "x with B = 2"]),
        ({"initial_state": torch.zeros(3, 1, 8, 8)}, ValueError, ["initial_state must be [N, H", "[3, 1, 8, 8]"]),
        ({"initial_state": meta(2, 1, 8, 8)}, ValueError, ["initial_state must be on x's device", "meta"]),
        ({"heads": 0}, ValueError, ["heads must be at least 1"]),
        ({"backend": 1}, TypeError, ["backend must be the name"]),
    ],
)  # fmt: skip
def test_bad_input_of_prefill(change, exception, words):
    call = {"x": torch.randn(2, 4, D), **parameters(1, 8, True)} | change
    with pytest.raises(exception) as raised:
        memory_prefill(**call)
    for word in words:
        assert word in str(raised.value)
