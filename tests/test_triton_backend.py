"""The Triton backend: when Triton is imported, and weights of q, k and v in three tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltamem_kernels
from deltamem_kernels import memory_decode, memory_prefill, memory_projection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, R, D = 2, 4, 11


def run(program: str, *path: str) -> str:
    """Run a program that sees `path` first, and return what it prints."""
    root = str(Path(deltamem_kernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((*path, root)), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_triton_is_not_imported_before_the_first_call():
    program = (
        "import sys, torch, deltamem_kernels as d\n"
        "assert d.backends()['triton'], d.backends()['triton']\n"
        "print('triton' in sys.modules)\n"
        "x = torch.rand(1, 2, 1, 4)\n"
        "d.delta_update(x, x, x, x, backend='triton')\n"
        "loaded = [name for name in sys.modules if name.startswith('deltamem_kernels.backends.triton.layer.')]\n"
        "print('triton' in sys.modules, loaded)\n"
    )
    assert run(program).splitlines() == ["False", "True []"]


def test_triton_that_cannot_be_imported_makes_the_backend_unavailable(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so is missing')\n")
    program = (
        "import torch, deltamem_kernels as d\n"
        "x = torch.rand(1, 2, 1, 4)\n"
        "try: d.delta_update(x, x, x, x, backend='triton')\n"
        "except d.BackendUnavailableError as error: print(error)\n"
    )
    said = run(program, str(tmp_path))
    assert said == "backend 'triton' cannot run on cpu: triton cannot be imported: libtriton.so is missing"


def gates() -> dict[str, torch.Tensor]:
    return {
        "beta_weight": torch.randn(H, D, device=DEVICE),
        "beta_bias": torch.randn(H, device=DEVICE),
        "decay_weight": torch.randn(H * R, D, device=DEVICE),
    }


def three(weight: torch.Tensor, layout: str) -> tuple[torch.Tensor, ...]:
    """Copy the weights of q, k and v into tensors of their own."""
    q, k, v = (part.detach().clone() for part in weight.chunk(3))
    if layout == "transposed":
        q, k, v = (part.T.contiguous().T for part in (q, k, v))
    if layout == "k strided":
        k = torch.zeros(H * R, 2 * D, device=DEVICE)[:, ::2].copy_(k)
    return q, k, v


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "k strided"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_three_weights_have_the_bits_of_one(tokens, layout):
    """Also with strides that differ, and in the gradients."""
    x = torch.randn(1, tokens, D, device=DEVICE, requires_grad=True)
    weight = torch.randn(3 * H * R, D, device=DEVICE, requires_grad=True)
    parts = [part.requires_grad_() for part in three(weight, layout)]
    options = gates() | {"heads": H, "backend": "triton"}
    one, split = (memory_projection(x, w, **options) for w in (weight, tuple(parts)))
    cotangents = [torch.randn_like(y) for y in one]
    d_x, d_weight = torch.autograd.grad(list(one), [x, weight], cotangents)
    d_x_split, *d_parts = torch.autograd.grad(list(split), [x, *parts], cotangents)
    for a, b in zip((*one, d_x, d_weight), (*split, d_x_split, torch.cat(d_parts)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "k strided"])
def test_three_weights_have_the_bits_of_one_in_prefill_and_decoding(layout):
    x, pool = torch.randn(1, 3, D, device=DEVICE), torch.randn(3, H, R, R, device=DEVICE)
    weight = torch.randn(3 * H * R, D, device=DEVICE)
    options = gates() | {"heads": H, "backend": "triton"}
    results = []
    for w in (weight, three(weight, layout)):
        state = pool.clone()
        results.append((*memory_prefill(x, w, **options), memory_decode(state, x[0], w, **options).reads, state))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_three_weights_may_have_different_dtypes():
    x, weight = torch.randn(1, 20, D, device=DEVICE), torch.randn(3 * H * R, D, device=DEVICE)
    q, k, v = weight.chunk(3)
    call = {"qkv_weight": (q.bfloat16(), k, v.half()), **gates(), "heads": H}
    for rows in (x, x[:, :2]):
        ours, exact = (memory_projection(rows, **call, backend=name) for name in ("triton", "reference"))
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
