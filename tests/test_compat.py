"""`deltamem_kernels.compat` against upstream's mathematics, token by token, and its names, shapes and dtypes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from deltamem_kernels import delta_update
from deltamem_kernels.compat import TritonScanSupport, triton_affine_scan, triton_scan_support
from deltamem_kernels.testing import (
    FLOAT32_TOLERANCE,
    assert_close_in_norm,
    between_nans,
    memory_operands,
    relative_error,
)

OPERANDS = ("state", "q", "k", "v", "keep", "erase", "write")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def device(implementation, monkeypatch) -> str:
    """Upstream's signature has no backend, so the environment names it."""
    monkeypatch.setenv("DELTAMEM_BACKEND", implementation.backend)
    return implementation.device


def operands(B: int = 2, T: int = 70, R: int = 8, device: str = "cpu") -> dict[str, Tensor]:
    """Unit keys and queries; the three gates are independent: keep + erase != 1, erase != write."""
    made = {"state": torch.randn(B, R, R), **memory_operands((B, T), R)}
    del made["beta"]
    gates = {name: torch.rand(B, T, R) for name in ("keep", "erase", "write")}
    return {n: x.to(device) for n, x in (made | gates).items()}


def loop(given: dict[str, Tensor], token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return state_out and reads in float64, from the formulas."""
    S, q, k, v, keep, erase, write = (given[n].double() for n in OPERANDS)
    reads = []
    for t in range(q.shape[1]):
        counts = torch.ones_like(S[:, 0, 0]) if token_mask is None else (token_mask[:, t] != 0).double()
        read = torch.einsum("bij,bj->bi", S, q[:, t])
        held = torch.einsum("bij,bj->bi", S, k[:, t])
        row = write[:, t] * v[:, t] - erase[:, t] * held
        written = keep[:, t, :, None] * S + torch.einsum("bi,bj->bij", row, k[:, t])
        reads.append(read * counts[:, None])
        S = torch.where(counts[:, None, None] > 0, written, S)
    return S, torch.stack(reads, dim=1)


def both(given: dict[str, Tensor], token_mask: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return values, and gradients of all seven operands through both results, ours and in float64."""
    weights = [
        torch.randn_like(x).to(given[n].dtype) for x, n in zip(loop(given, token_mask), ("state", "v"), strict=True)
    ]
    results = []
    for scan in (lambda x: triton_affine_scan(*x.values(), token_mask), lambda x: loop(x, token_mask)):
        leaves = {n: x.detach().requires_grad_() for n, x in given.items()}
        state_out, reads = scan(leaves)
        cotangents = [w.to(x.dtype) for w, x in zip(weights, (state_out, reads), strict=True)]
        grads = torch.autograd.grad([state_out, reads], list(leaves.values()), cotangents)
        values = {"state_out": state_out.detach(), "reads": reads.detach()}
        results.append(values | {f"d_{n}": g for n, g in zip(leaves, grads, strict=True)})
    return results[0], results[1]


@pytest.mark.parametrize("R", [1, 4, 5, 8, 16])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.int32, torch.int64, torch.float32])
def test_values_and_gradients_are_those_of_the_formulas(implementation, device, mask_dtype, R):
    given = operands(T=4 if implementation.slow else 70, R=R, device=device)
    mask = None
    if mask_dtype is not None:
        counts = torch.rand(given["q"].shape[:2], device=device) < 0.6
        mask = (counts * (3 if mask_dtype == torch.int64 else 1)).to(mask_dtype)  # whatever is not zero counts, once
    ours, exact = both(given, mask)
    for name in OPERANDS:
        assert (ours[f"d_{name}"].dtype, ours[f"d_{name}"].shape) == (given[name].dtype, given[name].shape)
    assert_close_in_norm(ours, exact, FLOAT32_TOLERANCE)


def test_nothing_outside_of_strided_operands_is_read(implementation, device):
    given = operands(T=4 if implementation.slow else 70, R=5)
    given = {n: between_nans(x.to(device)) for n, x in given.items()}
    mask = (torch.rand(given["q"].shape[1], given["q"].shape[0]) < 0.6).int().to(device).t()
    ours, exact = both(given, mask)
    assert_close_in_norm(ours, exact, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("T", [0, 1, 64])
def test_every_length_is_exact(implementation, device, T):
    if T == 0:
        given = operands(T=0, device=device)
        state_out, reads = triton_affine_scan(**given)
        assert torch.equal(state_out, given["state"])
        assert reads.shape == given["v"].shape
        return
    ours, exact = both(operands(T=min(T, 3) if implementation.slow else T, R=4, device=device))
    assert_close_in_norm(ours, exact, FLOAT32_TOLERANCE)


MIXED = [
    *({"all": dtype} for dtype in DTYPES),
    {"all": torch.bfloat16, "state": torch.float32},
    {"all": torch.float32, "state": torch.bfloat16},
    {"all": torch.float32, "v": torch.bfloat16},
    {"all": torch.bfloat16, "v": torch.float32},
    {"all": torch.bfloat16, "v": torch.float16},
    {"all": torch.float32, "q": torch.float64, "v": torch.float16},
    {"all": torch.float16, "keep": torch.float32, "erase": torch.bfloat16, "write": torch.float64},
]


@pytest.mark.parametrize("mixed", MIXED, ids=lambda m: "-".join(f"{n}={str(d)[6:]}" for n, d in m.items()))
def test_results_have_the_dtypes_of_state_and_v_and_gradients_those_of_their_operands(implementation, device, mixed):
    """Each is rounded once."""
    given = operands(T=4 if implementation.slow else 70, R=4, device=device)
    given = {n: x.to(mixed.get(n, mixed["all"])) for n, x in given.items()}
    ours, exact = both(given)
    assert ours["state_out"].dtype == given["state"].dtype
    assert ours["reads"].dtype == given["v"].dtype
    for name in OPERANDS:
        assert ours[f"d_{name}"].dtype == given[name].dtype
    for name, x in exact.items():  # rounded once to their dtype
        dtype = ours[name].dtype
        rounding = implementation.rounding.get(dtype, 0) * torch.finfo(dtype).eps
        assert relative_error(ours[name], x) <= FLOAT32_TOLERANCE + rounding, name


def test_the_state_of_a_call_is_not_rounded(implementation, device):
    """Upstream keeps it in its dtype, such as bfloat16. Here only the returned state is rounded, once."""
    given = operands(T=4 if implementation.slow else 200, R=4, device=device)
    given = {n: x.to(torch.bfloat16) for n, x in given.items()}
    state_out, reads = triton_affine_scan(**given)
    exact_state, exact_reads = loop(given)
    for ours, exact in ((state_out, exact_state), (reads, exact_reads)):
        limit = (
            implementation.rounding[torch.bfloat16] * torch.finfo(torch.bfloat16).eps * exact.abs()
            + FLOAT32_TOLERANCE * exact.abs().max()
        )
        assert ((ours.double() - exact).abs() <= limit).all()


def test_masked_tokens_have_no_effect(implementation, device):
    """NaN in its operands stays out of values and gradients."""
    T = 4 if implementation.slow else 70
    given = operands(T=T, R=4, device=device)
    mask = torch.ones(2, T, dtype=torch.int32, device=device)
    mask[:, 1::2] = 0
    clean, _ = both(given, mask)
    assert clean["reads"][:, 1::2].count_nonzero() == 0
    weights = [torch.randn_like(clean["state_out"]), torch.randn_like(clean["reads"])]
    results = []
    for value in (0.5, float("nan")):
        filled = {n: x if n == "state" else x.masked_fill(mask[..., None] == 0, value) for n, x in given.items()}
        leaves = [x.requires_grad_() for x in filled.values()]
        out = triton_affine_scan(*leaves, mask)
        results.append([*out, *torch.autograd.grad(out, leaves, weights)])
    for sound, sick in zip(*results, strict=True):
        assert torch.equal(sound, sick)


def test_coupled_gates_give_what_delta_update_gives(implementation, device):
    """keep = 1 - beta and erase = write = beta are the standard mode, to the rounding of 1 - beta."""
    given = operands(T=4 if implementation.slow else 70, R=4, device=device)
    beta = given["erase"]
    given |= {"keep": 1 - beta, "write": beta}
    state_out, reads = triton_affine_scan(**given)
    same = delta_update(
        given["q"], given["k"], given["v"], beta, initial_state=given["state"], backend=implementation.backend
    )
    assert relative_error(reads, same.reads) <= FLOAT32_TOLERANCE
    assert relative_error(state_out, same.final_state) <= FLOAT32_TOLERANCE


def test_arguments_may_be_given_by_name_or_by_position(implementation, device):
    given = operands(T=3, R=4, device=device)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
    by_name = triton_affine_scan(**given, token_mask=mask)
    for x, y in zip(triton_affine_scan(*given.values(), mask), by_name, strict=True):
        assert torch.equal(x, y)


def test_a_token_mask_on_another_device_is_moved(monkeypatch):
    """As upstream does. Without a GPU the operands are on the meta device, where only the shapes show it."""
    monkeypatch.delenv("DELTAMEM_BACKEND", raising=False)
    device = "cuda" if torch.cuda.is_available() else "meta"
    given, mask = operands(T=3, R=4), torch.tensor([[1, 0, 1], [0, 1, 1]])
    expected = triton_affine_scan(**given, token_mask=mask)
    ours = triton_affine_scan(**{n: x.to(device) for n, x in given.items()}, token_mask=mask)
    for x, y in zip(ours, expected, strict=True):
        assert (x.device.type, x.shape, x.dtype) == (device, y.shape, y.dtype)
        assert device == "meta" or relative_error(x, y) <= FLOAT32_TOLERANCE


# triton_scan_support


def test_tensors_of_every_float_dtype_and_device_are_supported():
    """Also in mixtures, and on a device that no Triton kernel runs on."""
    for dtype in DTYPES:
        given = {n: x.to(dtype) for n, x in operands(T=2, R=4).items()} | {"v": torch.rand(2, 2, 4)}
        assert triton_scan_support(**given) == TritonScanSupport(supported=True, reason="")
    assert triton_scan_support(**{n: x.to("meta") for n, x in operands(T=2, R=4).items()}).supported


def test_support_is_a_frozen_record():
    support = TritonScanSupport(True)
    assert (support.supported, support.reason) == (True, "")
    with pytest.raises(FrozenInstanceError):
        support.supported = False


REFUSED = {
    "expected 3D tensors, got q [2, 3, 1, 4]": {"q": torch.rand(2, 3, 1, 4)},
    "expected 3D tensors, got state [2, 1, 4, 4]": {"state": torch.rand(2, 1, 4, 4)},
    "unsupported dtype torch.int64 of k": {"k": torch.ones(2, 3, 4, dtype=torch.int64)},
    "unsupported dtype torch.complex64 of state": {"state": torch.ones(2, 4, 4, dtype=torch.complex64)},
    "write is on meta, the state on cpu": {"write": torch.rand(2, 3, 4, device="meta")},
    "state must be square in the last two dims, got [2, 4, 3]": {"state": torch.rand(2, 4, 3)},
    "rank must be from 1 to 128, got 129": {"state": torch.rand(2, 129, 129)},
    "rank must be from 1 to 128, got 0": {"state": torch.rand(2, 0, 0)},
    "q [3, 3, 4] does not match the state [2, 4, 4]": {"q": torch.rand(3, 3, 4)},
    "q [2, 3, 5] does not match the state [2, 4, 4]": {"q": torch.rand(2, 3, 5)},
    "erase [2, 2, 4] must have q's shape [batch, seq, rank] [2, 3, 4]": {"erase": torch.rand(2, 2, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_the_call_raises_with_the_reason_that_support_gives(reason):
    """As a RuntimeError, which upstream's code expects."""
    given = operands(T=3, R=4) | REFUSED[reason]
    support = triton_scan_support(**given)
    assert isinstance(support, TritonScanSupport)
    assert support == TritonScanSupport(supported=False, reason=reason)
    with pytest.raises(RuntimeError, match="affine scan is unavailable: ") as info:
        triton_affine_scan(**given)
    assert reason in str(info.value)


@pytest.mark.parametrize("name", OPERANDS)
def test_operands_of_two_dimensions_are_refused(name):
    """delta_update takes a gate per head; upstream's scan does not."""
    given = operands(T=3, R=4)
    given[name] = given[name][..., 0]
    assert triton_scan_support(**given).reason == f"expected 3D tensors, got {name} {list(given[name].shape)}"
    with pytest.raises(RuntimeError, match="expected 3D tensors"):
        triton_affine_scan(**given)
