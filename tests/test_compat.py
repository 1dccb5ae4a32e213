"""`deltamem_kernels.compat` against upstream's mathematics, token by token, and its names, shapes and dtypes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from problems import FLOAT32_TOLERANCE, assert_close, error, fence, rounding
from torch import Tensor

from deltamem_kernels import delta_update
from deltamem_kernels.compat import TritonScanSupport, triton_affine_scan, triton_scan_support

OPERANDS = ("state", "q", "k", "v", "keep", "erase", "write")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.fixture
def device(implementation, monkeypatch) -> str:
    """Upstream's signature has no backend: the environment names it."""
    monkeypatch.setenv("DELTAMEM_BACKEND", implementation.backend)
    return implementation.device


def operands(B: int = 2, T: int = 70, R: int = 8, device: str = "cpu") -> dict[str, Tensor]:
    """Unit keys and queries, the three gates each by itself: keep + erase != 1, erase != write."""
    unit = lambda x: torch.nn.functional.normalize(x, dim=-1)  # noqa: E731
    gates = {name: torch.rand(B, T, R) for name in ("keep", "erase", "write")}
    made = {"state": torch.randn(B, R, R), "q": unit(torch.randn(B, T, R)), "k": unit(torch.randn(B, T, R))}
    return {n: x.to(device) for n, x in (made | {"v": torch.randn(B, T, R)} | gates).items()}


def loop(given: dict[str, Tensor], token_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """state_out and reads in float64: the formulas as they are written."""
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
    """Values, and the gradients of all seven operands through both results, ours and in float64."""
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
def test_values_and_gradients(implementation, device, mask_dtype, R):
    given = operands(T=4 if implementation.slow else 70, R=R, device=device)
    mask = None
    if mask_dtype is not None:
        counts = torch.rand(given["q"].shape[:2], device=device) < 0.6
        mask = (counts * (3 if mask_dtype == torch.int64 else 1)).to(mask_dtype)  # whatever is not zero counts, once
    ours, exact = both(given, mask)
    for name in OPERANDS:
        assert (ours[f"d_{name}"].dtype, ours[f"d_{name}"].shape) == (given[name].dtype, given[name].shape)
    assert_close(ours, exact, FLOAT32_TOLERANCE)


def test_operands_of_any_strides(implementation, device):
    given = operands(T=4 if implementation.slow else 70, R=5)
    given = {n: fence(x.to(device)) for n, x in given.items()}
    mask = (torch.rand(given["q"].shape[1], given["q"].shape[0]) < 0.6).int().to(device).t()
    ours, exact = both(given, mask)
    assert_close(ours, exact, FLOAT32_TOLERANCE)


@pytest.mark.parametrize("T", [0, 1, 64])
def test_lengths(implementation, device, T):
    if T == 0:
        given = operands(T=0, device=device)
        state_out, reads = triton_affine_scan(**given)
        assert torch.equal(state_out, given["state"])
        assert reads.shape == given["v"].shape
        return
    ours, exact = both(operands(T=min(T, 3) if implementation.slow else T, R=4, device=device))
    assert_close(ours, exact, FLOAT32_TOLERANCE)


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
def test_dtypes(implementation, device, mixed):
    """state_out comes back in the dtype of state, reads in that of v, gradients in those of their operands."""
    given = operands(T=4 if implementation.slow else 70, R=4, device=device)
    given = {n: x.to(mixed.get(n, mixed["all"])) for n, x in given.items()}
    ours, exact = both(given)
    assert ours["state_out"].dtype == given["state"].dtype
    assert ours["reads"].dtype == given["v"].dtype
    for name in OPERANDS:
        assert ours[f"d_{name}"].dtype == given[name].dtype
    for name, x in exact.items():  # right to the last bit of its dtype
        assert error(ours[name], x) <= max(FLOAT32_TOLERANCE, torch.finfo(ours[name].dtype).eps), name


def test_the_state_of_a_call_is_not_rounded(implementation, device):
    """Upstream keeps it in bfloat16 where that is its dtype; here only what is handed back is rounded, once."""
    given = operands(T=4 if implementation.slow else 200, R=4, device=device)
    given = {n: x.to(torch.bfloat16) for n, x in given.items()}
    state_out, reads = triton_affine_scan(**given)
    exact_state, exact_reads = loop(given)
    for ours, exact in ((state_out, exact_state), (reads, exact_reads)):
        limit = rounding(torch.bfloat16, implementation) * exact.abs() + FLOAT32_TOLERANCE * exact.abs().max()
        assert ((ours.double() - exact).abs() <= limit).all()


def test_a_masked_token_counts_for_nothing(implementation, device):
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


def test_same_as_delta_update(implementation, device):
    """keep = 1 - beta and erase = write = beta are the standard mode, to the rounding of 1 - beta."""
    given = operands(T=4 if implementation.slow else 70, R=4, device=device)
    beta = given["erase"]
    given |= {"keep": 1 - beta, "write": beta}
    state_out, reads = triton_affine_scan(**given)
    same = delta_update(
        given["q"], given["k"], given["v"], beta, initial_state=given["state"], backend=implementation.backend
    )
    assert error(reads, same.reads) <= FLOAT32_TOLERANCE
    assert error(state_out, same.final_state) <= FLOAT32_TOLERANCE


def test_arguments_by_name_and_by_position(implementation, device):
    given = operands(T=3, R=4, device=device)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
    by_name = triton_affine_scan(**given, token_mask=mask)
    for x, y in zip(triton_affine_scan(*given.values(), mask), by_name, strict=True):
        assert torch.equal(x, y)


def test_token_mask_of_another_device_is_brought_over(implementation, device):
    """As upstream does."""
    given = operands(T=3, R=4, device=device)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    for x, y in zip(
        triton_affine_scan(**given, token_mask=mask),
        triton_affine_scan(**given, token_mask=mask.to(device)),
        strict=True,
    ):
        assert torch.equal(x, y)


# triton_scan_support


def test_support_of_good_tensors():
    """Any float dtype, mixed, and any device: also one that no Triton kernel can run on."""
    for dtype in DTYPES:
        given = {n: x.to(dtype) for n, x in operands(T=2, R=4).items()} | {"v": torch.rand(2, 2, 4)}
        assert triton_scan_support(**given) == TritonScanSupport(supported=True, reason="")
    assert triton_scan_support(**{n: x.to("meta") for n, x in operands(T=2, R=4).items()}).supported


def test_support_is_upstreams_record():
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
def test_refused_tensors(reason):
    """The same sentence from the question and, as a RuntimeError, from the call: upstream's code expects one."""
    given = operands(T=3, R=4) | REFUSED[reason]
    support = triton_scan_support(**given)
    assert isinstance(support, TritonScanSupport)
    assert support == TritonScanSupport(supported=False, reason=reason)
    with pytest.raises(RuntimeError, match="affine scan is unavailable: ") as info:
        triton_affine_scan(**given)
    assert reason in str(info.value)


@pytest.mark.parametrize("name", OPERANDS)
def test_a_gate_or_vector_of_two_dimensions_is_refused(name):
    """delta_update takes a gate per head; upstream's scan does not."""
    given = operands(T=3, R=4)
    given[name] = given[name][..., 0]
    assert triton_scan_support(**given).reason == f"expected 3D tensors, got {name} {list(given[name].shape)}"
    with pytest.raises(RuntimeError, match="expected 3D tensors"):
        triton_affine_scan(**given)
