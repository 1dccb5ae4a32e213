"""memory_prefill where chunks make Triton's projection and their maps one kernel, and its operator."""

from __future__ import annotations

import pytest
import torch
from conftest import small_chunks
from problems import FLOAT32_TOLERANCE, assert_close, fence
from test_memory_layer import DEVICE, correction, launches, parameters, to  # noqa: F401 (a fixture)

from deltamem_kernels import (
    attention_correction,
    attention_correction_norm_rope,
    delta_update,
    memory_prefill,
    memory_projection,
)
from deltamem_kernels.backends.scan import force_scan

CHUNK, D = 8, 19


@pytest.fixture
def chunks():
    with force_scan(chunked=True), small_chunks(CHUNK):
        yield


def results(call: dict, options: dict, backend: str, weights: tuple) -> dict:
    leaves = {name: x.detach().requires_grad_() for name, x in call.items()}
    out = memory_prefill(**leaves, **options, backend=backend)
    cotangents = [w.to(x) for w, x in zip(weights, out, strict=True)]
    grads = torch.autograd.grad(list(out), list(leaves.values()), cotangents)
    return {**out._asdict(), **{f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}}


@pytest.mark.parametrize(
    ("H", "R", "mode", "decay", "per_head", "T", "normalize"),
    [
        (1, 8, "standard", False, False, 2 * CHUNK + 3, True),
        (3, 4, "lambda_outside", True, True, 3 * CHUNK, True),
        (1, 5, "no_lambda", False, False, 2 * CHUNK + 1, False),
    ],
)
def test_chunks_of_the_projection(chunks, launches, H, R, mode, decay, per_head, T, normalize):  # noqa: F811
    """Values and every gradient."""
    call = {"x": torch.randn(1, T, D), **parameters(H, R, decay, per_head, width=D)}
    call["initial_state"] = torch.randn(1, H, R, R)
    options = {"heads": H, "mode": mode, "normalize": normalize}
    weights = torch.randn(1, T, H, R), torch.randn(1, H, R, R)
    exact = results(to(call, dtype=torch.float64), options, "reference", weights)
    moved = {name: fence(x.to(DEVICE)) for name, x in call.items()}
    ours = results(moved, options, "triton", weights)
    assert launches[0] == "memory_prefill_kernel"
    assert_close(ours, exact, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("given", ["mask", "cu_seqlens", "rank"])
def test_chunks_that_lie_elsewhere(chunks, launches, given):  # noqa: F811
    """Where a chunk is not a tile of the projection, or its rows are too many, its map has a kernel of its own."""
    H, R = 1, 12 if given == "rank" else 4
    call = to({"x": torch.randn(1, 20, D), **parameters(H, R, False, width=D)}, DEVICE)
    options = {"mask": torch.rand(1, 20) < 0.8, "cu_seqlens": torch.tensor([0, 17, 20])}
    option = to({name: x for name, x in options.items() if name == given}, DEVICE)
    ours = memory_prefill(**call, **option, heads=H, backend="triton")
    assert "chunk_maps_kernel" in launches
    exact = memory_prefill(**to(call, "cpu", torch.float64), **to(option, "cpu"), heads=H, backend="reference")
    assert_close(ours._asdict(), exact._asdict(), FLOAT32_TOLERANCE)


def test_launches_of_a_layer(launches):  # noqa: F811
    """Five, of which the query's correction does what the frozen layer launches its norm and rotary for. The memory's
    three give the same bits as the operations one after another."""
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
def test_opcheck(save):
    weights = parameters(2, 4, True, width=D)
    arguments = (
        torch.randn(1, 5, D), *weights.values(), torch.randn(1, 2, 4, 4), torch.rand(1, 5) < 0.7, None, 2, True,
        "standard", "cpu", save,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.deltamem_kernels.memory_prefill, arguments)


@pytest.mark.parametrize("wanted", [("initial_state",), ("x",), ("beta_bias", "decay_weight")], ids="-".join)
def test_frozen_operands(wanted):
    """Of what needs no gradient none is computed, and x is not kept where no weight needs its own."""
    call = {"x": torch.randn(1, 5, D), **parameters(1, 4, True, width=D), "initial_state": torch.randn(1, 1, 4, 4)}
    weights = torch.randn(1, 5, 1, 4), torch.randn(1, 1, 4, 4)
    exact = results(to(call, dtype=torch.float64), {}, "reference", weights)
    leaves = {name: x.requires_grad_(name in wanted) for name, x in call.items()}
    out = memory_prefill(**leaves, backend="cpu")
    kept = {saved.data_ptr() for saved in out.reads.grad_fn.saved_tensors if saved is not None}
    assert (call["x"].data_ptr() in kept) is ("decay_weight" in wanted)
    grads = torch.autograd.grad(list(out), [leaves[name] for name in wanted], list(weights))
    ours = {f"d_{name}": g for name, g in zip(wanted, grads, strict=True)}
    assert_close(ours, {name: exact[name] for name in ours}, FLOAT32_TOLERANCE)


def test_under_torch_compile():
    """Forward and backward in one graph, through checks and operators."""
    call = {"x": torch.randn(2, 5, D), **parameters(1, 4, True, width=D), "initial_state": torch.randn(2, 1, 4, 4)}
    leaves = [x.requires_grad_() for x in call.values()]

    def loss(*values):
        out = memory_prefill(**dict(zip(call, values, strict=True)), backend="cpu")
        return out.reads.square().sum() + out.final_state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    ours, eager = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)
