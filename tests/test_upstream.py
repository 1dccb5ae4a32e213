"""`patch` on a stand-in for the δ-mem authors' package. `python -m benchmarks.upstream_parity` runs on theirs."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from deltamem_kernels import compat
from deltamem_kernels.integrations.upstream import patch, unpatch
from deltamem_kernels.testing import FLOAT32_TOLERANCE, relative_error


def functions(authors: dict[str, ModuleType]) -> dict[str, object]:
    modules = {f"{name}.{key}": x for name, module in authors.items() for key, x in vars(module).items()}
    return modules | dict(vars(authors["core.delta_impl"].DeltaMemAttention))


def test_patch_replaces_the_scan_under_each_of_its_names(authors):
    layer, B, T, R = authors["core.delta"].DeltaMemAttention(), 3, 70, 4
    q, k, v = (torch.nn.functional.normalize(torch.randn(B, T, R, dtype=torch.float64), dim=-1) for _ in range(3))
    operands = [torch.randn(B, R, R, dtype=torch.float64), q, k, v, *torch.rand(3, B, T, R, dtype=torch.float64)]
    mask = torch.rand(B, T) < 0.7
    cotangents = torch.randn(B, R, R), torch.randn(B, T, R)

    def run(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in operands]
        results = layer.scan(*leaves, token_mask=mask)
        return [*results, *torch.autograd.grad(results, leaves, [x.to(dtype) for x in cotangents])]

    expected = run(torch.float64)
    patch()
    session = authors["runtime.session"]
    assert session.scan is authors["core.delta_impl"].triton_affine_scan is compat.triton_affine_scan
    assert session.support is authors["kernels.affine_scan"].triton_scan_support is compat.triton_scan_support
    for got, exact in zip(run(torch.float32), expected, strict=True):
        assert relative_error(got.detach(), exact.detach()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("granularity", ["message_mean", "sentence_mean"])
def test_patched_means_are_those_of_upstream(authors, granularity):
    layer, B, T = authors["core.delta"].DeltaMemAttention(granularity), 4, 40
    method = f"_build_{granularity.removesuffix('_mean')}_write_means"
    cases = []
    for mask in (None, torch.rand(B, T) < 0.5, torch.zeros(B, T, dtype=torch.bool)):
        sentences = torch.randint(-2, 9, (B, T))
        sentences[0] = -1
        for dtype in (torch.int64, torch.int32):
            cases.append((torch.randn(B, T, 6, dtype=torch.float64), mask, (sentences // 3).to(dtype), sentences))

    def run(x, mask, messages, sentences):
        layer.write_message_ids, layer.write_sentence_ids = messages, sentences
        return getattr(layer, method)(x, mask)

    expected = [run(*case) for case in cases]
    patch()
    written = 0
    for case, exact in zip(cases, expected, strict=True):
        got = run(*case)
        if exact[0] is None:
            assert got == (None, None, None)
            continue
        written += 1
        assert relative_error(got[0], exact[0]) <= 1e-12
        assert got[0].shape == exact[0].shape
        assert torch.equal(got[1], exact[1])
        assert torch.equal(got[2].long(), exact[2])
    assert written == 4
    layer.write_enabled = False
    assert run(*cases[0]) == (None, None, None)
    layer.write_enabled, layer.memory_write_granularity = True, "token"
    assert run(*cases[0]) == (None, None, None)
    layer.memory_write_granularity, layer.write_message_ids = granularity, None
    assert getattr(layer, method)(cases[0][0], None) == (None, None, None)


ALWAYS = {
    "triton_affine_scan", "triton_scan_support", "scan", "support",
    "_build_message_write_means", "_build_sentence_write_means", "forward",
}  # fmt: skip
WITH_STATES = {
    "_ensure_state",
    "_token_state_reads",
    "_memory_affine_scan_torch",
    "load_delta_mem_online_state",
    "load",
}


@pytest.mark.parametrize(
    ("options", "replaced"),
    [({}, ALWAYS), ({"state_dtype": torch.float32}, ALWAYS | WITH_STATES)],
    ids=["state as it is", "state in float32"],
)
def test_patch_may_be_repeated_and_undone(authors, options, replaced):
    before = functions(authors)
    unpatch()
    assert functions(authors) == before
    patch(**options)
    patched = functions(authors)
    assert {name.rpartition(".")[2] for name in before if patched[name] is not before[name]} == replaced
    patch(**options)
    assert functions(authors) == patched
    del sys.modules["deltamem.runtime.session"]  # what is imported later has the new functions, and loses them too
    authors["runtime.session"] = importlib.import_module("deltamem.runtime.session")
    assert functions(authors) == patched
    unpatch()
    assert functions(authors) == before


def test_another_state_dtype_raises_and_replaces_nothing(authors):
    before = functions(authors)
    for dtype in (torch.bfloat16, torch.int32, "float32"):
        with pytest.raises(ValueError, match=r"state_dtype must be torch\.float32, torch\.float64 or None, got "):
            patch(state_dtype=dtype)
        assert functions(authors) == before
    for first, second in ((None, torch.float32), (torch.float32, None), (torch.float32, torch.float64)):
        patch(state_dtype=first)
        patched = functions(authors)
        with pytest.raises(RuntimeError, match=f"called before with state_dtype={first}, got {second}: call unpatch"):
            patch(state_dtype=second)
        assert functions(authors) == patched
        unpatch()


def drop(owner, name):
    return lambda monkeypatch, authors: monkeypatch.delattr(owner(authors), name)


def replace(owner, name, new):
    return lambda monkeypatch, authors: monkeypatch.setattr(owner(authors), name, new)


def kernels(authors):
    return authors["kernels.affine_scan"]


def layer(authors):
    return authors["core.delta_impl"]


def attention(authors):
    return authors["core.delta_impl"].DeltaMemAttention


OTHERS = {
    "affine_scan has no function triton_scan_support": drop(kernels, "triton_scan_support"),
    "affine_scan has no function triton_affine_scan": replace(kernels, "triton_affine_scan", object()),
    r"triton_affine_scan takes \(state, q\), expected \(state, q, k, v, keep, erase, write, token_mask\)": replace(
        kernels, "triton_affine_scan", lambda state, q: None
    ),
    "delta_impl does not take triton_affine_scan from": replace(layer, "triton_affine_scan", None),
    "delta_impl has no class DeltaMemAttention": drop(layer, "DeltaMemAttention"),
    "DeltaMemAttention has no function _build_message": drop(attention, "_build_message_write_means"),
    r"_sentence_write_inputs takes \(self\), expected \(self, hidden_states, token_mask\)": replace(
        attention, "_sentence_write_inputs", lambda self: None
    ),
    r"forward takes \(self, x\), expected \(self, hidden_states, position_embeddings\)": replace(
        attention, "forward", lambda self, x: None
    ),
}
OF_STATES = {
    "DeltaMemAttention has no function _ensure_state": drop(attention, "_ensure_state"),
    r"_token_state_reads takes \(self, state\), expected": replace(
        attention, "_token_state_reads", lambda self, state: None
    ),
    "DeltaMemAttention has no function _memory_affine_scan_torch": drop(attention, "_memory_affine_scan_torch"),
    "delta_impl has no function load_delta_mem_online_state": drop(layer, "load_delta_mem_online_state"),
}


@pytest.mark.parametrize("message", OTHERS | OF_STATES)
def test_another_version_raises_and_nothing_is_replaced(authors, monkeypatch, message):
    (OTHERS | OF_STATES)[message](monkeypatch, authors)
    before = {name: dict(vars(module)) for name, module in authors.items()}
    with pytest.raises(RuntimeError, match=f"another version of `deltamem`: .*{message}.*Nothing was replaced"):
        patch(state_dtype=torch.float32)
    if message in OF_STATES:
        patch()
        unpatch()
    assert {name: dict(vars(module)) for name, module in authors.items()} == before


def test_another_package_of_that_name_raises(authors, monkeypatch):
    monkeypatch.setitem(sys.modules, "deltamem.core.delta_impl", None)
    with pytest.raises(RuntimeError, match=r"it has no module deltamem\.core\.delta_impl"):
        patch()


def test_a_missing_dependency_of_the_package_is_named(authors, monkeypatch):
    monkeypatch.delitem(sys.modules, "deltamem.core.delta_impl")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="torch"):
        patch()


def test_without_the_package_patch_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "deltamem", None)
    with pytest.raises(ImportError, match="patch\\(\\) needs the δ-mem authors' package `deltamem`"):
        patch()
