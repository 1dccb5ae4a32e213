"""`python -m deltamem_kernels`: report versions, devices and backends, and check each backend's results.

The exit status is 1 if a backend fails or returns a wrong result. On a new GPU or compiler release a wrong result
usually means wrong code generation.
"""

from __future__ import annotations

import importlib.util
import itertools
import platform
import sys

import torch
from torch import Tensor

from . import (
    __version__,
    attention_correction,
    attention_correction_norm_rope,
    backends,
    delta_step,
    delta_update,
    memory_decode,
    memory_projection,
    segment_mean,
)
from .backends.native import library

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""Maximum relative error against float64. Rounding to bfloat16's 8 bits alone costs about 2e-3 on average."""


def main() -> int:
    """Print the report and return the exit status."""
    print(f"deltamem_kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}, {_triton()}")
    print(f"CPU {platform.machine()}, {torch.get_num_threads()} threads; GPU {_gpu()}")
    failed = False
    for name, status in backends().items():
        if not status:
            print(f"  {name:<10} cannot run: {status.reason}")
            continue
        try:
            cases, worst, mismatches = self_check(name)
        except Exception as error:
            print(f"  {name:<10} FAILED: {type(error).__name__}: {error}")
            failed = True
            continue
        note = f", {library.load('cpu').isa()}" if name == "cpu" else ""
        verdict = "WRONG" if mismatches else "right"
        print(f"  {name:<10} {verdict} ({cases} cases, float32 error at most {worst:.1e}{note})")
        for mismatch in mismatches:
            print(f"             {mismatch}")
        failed = failed or bool(mismatches)
    return int(failed)


def self_check(backend: str) -> tuple[int, float, list[str]]:
    """Compare a backend with the float64 reference on a few problems, forward and backward.

    Returns:
        The number of problems, the largest float32 error, and one line for each mismatch.
    """
    device = "cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
    interpreted = backend == "triton" and device == "cpu"
    # A token takes milliseconds in Triton's interpreter. At R = 16 `cuda` uses the chunked scan from 1,024 tokens.
    tokens = 3 if interpreted else 1100 if backend == "cuda" else 130
    ranks = (4,) if interpreted else (4, 8, 16)
    cases, worst, mismatches = 0, 0.0, []

    def compare(exact: dict[str, Tensor], ours: dict[str, Tensor], dtype: torch.dtype, what: str) -> None:
        nonlocal cases, worst
        for name, x in exact.items():
            error = ((ours[name].double().cpu() - x).norm() / x.norm()).item()
            worst = max(worst, error) if dtype == torch.float32 else worst
            if not error <= TOLERANCE[dtype]:
                mismatches.append(
                    f"{name}, {what}, {dtype}: error {error:.1e}, expected at most {TOLERANCE[dtype]:.0e}"
                )
        cases += 1

    for rank, mode, dtype in itertools.product(ranks, ("standard", "lambda_outside", "no_lambda"), TOLERANCE):
        operands = _scan_problem(tokens, rank, mode, dtype)
        exact = _scan_results(operands, mode, "reference", torch.float64, "cpu")
        compare(exact, _scan_results(operands, mode, backend, dtype, device), dtype, f"{mode}, R={rank}")
    for dtype in TOLERANCE:
        operands = _layer_problem(dtype, few=interpreted)
        exact = _layer_results(operands, "reference", torch.float64, "cpu")
        compare(exact, _layer_results(operands, backend, dtype, device), dtype, "layer")
    return cases, worst, mismatches


def _scan_problem(tokens: int, rank: int, mode: str, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rank)
    q, k, v, state = (torch.randn(2, n, 2, rank, generator=g) for n in (tokens, tokens, tokens, rank))
    unit = torch.nn.functional.normalize
    operands = {"q": unit(q, dim=-1), "k": unit(k, dim=-1), "v": v, "initial_state": state.transpose(1, 2)}
    operands["beta"] = torch.rand(2, tokens, 2, rank, generator=g)
    if mode == "lambda_outside":
        operands["decay"] = torch.rand(2, tokens, 2, generator=g)
    return {name: x.to(dtype) for name, x in operands.items()}


def _scan_results(
    operands: dict[str, Tensor], mode: str, backend: str, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in operands.items()}
    mask = torch.ones(leaves["q"].shape[:2], dtype=torch.bool, device=device)
    mask[0, 1] = False
    out = delta_update(**leaves, mode=mode, mask=mask, backend=backend)
    loss = out.reads.square().sum() + out.final_state.square().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {**{n: x.detach() for n, x in out._asdict().items()}, **dict(zip(leaves, grads, strict=True))}


def _layer_problem(dtype: torch.dtype, few: bool) -> dict[str, Tensor]:
    """Return hidden states and weights of a layer with two state heads of rank 4 and a head_dim of 8."""
    g = torch.Generator().manual_seed(2)
    N, D = (2, 16) if few else (37, 80)
    shapes = {"x": (1, N, D), "qkv": (24, D), "beta": (8, D), "bias": (8,), "delta": (D, 8), "norm": (8,)}
    shapes |= {"cos": (1, N, 8), "sin": (1, N, 8), "pool": (N, 2, 4, 4)}
    return {name: (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype) for name, shape in shapes.items()}


def _layer_results(operands: dict[str, Tensor], backend: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Run the layer's operations other than the scan. Return their results and gradients."""
    x = {name: y.to(device, dtype) for name, y in operands.items()}
    pool, weights = x.pop("pool"), ("x", "qkv", "beta", "bias", "delta", "norm")
    for name in weights:
        x[name].requires_grad_()
    p = memory_projection(x["x"], x["qkv"], x["beta"], x["bias"], heads=2, backend=backend)
    projected = (p.q, p.k, p.v, p.beta)
    out = attention_correction(x["x"], p.v, x["delta"], 0.5, backend=backend)
    rotary: dict = {"head_dim": 8, "norm_weight": x["norm"], "cos": x["cos"], "sin": x["sin"]}
    query = attention_correction_norm_rope(x["x"], p.q, x["delta"], 0.5, **rotary, backend=backend)
    ids = torch.arange(x["x"].shape[1], device=device).remainder(2).unsqueeze(0)
    means = segment_mean(x["x"], ids, 2, backend=backend).means
    results = {"projection": torch.cat([y.flatten() for y in projected])}
    results |= {"correction": out, "query": query, "means": means}
    loss = torch.stack([y.double().square().sum() for y in results.values()]).sum()
    grads = torch.autograd.grad(loss, [x[name] for name in weights])
    with torch.no_grad():
        pools = pool.clone(), pool.clone()
        q, k, v, beta = (y[0] for y in projected)
        results["step"] = delta_step(pools[0], q, k, v, beta, backend=backend)
        row = {name: x[name][0] for name in ("x", "cos", "sin")}
        options = rotary | {"heads": 2, "base": row["x"], "delta_weight": x["delta"], "scale": 0.5, "backend": backend}
        decoded = memory_decode(
            pools[1], row["x"], x["qkv"], x["beta"], x["bias"], **options | {"cos": row["cos"], "sin": row["sin"]}
        )
    assert decoded.corrected is not None
    results |= {"decoded": decoded.corrected, "stepped": pools[0], "pool": pools[1]}
    results = {name: y.detach() for name, y in results.items()}
    return results | {f"gradient of {name}": g for name, g in zip(weights, grads, strict=True)}


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton not installed"
    import triton

    return f"triton {triton.__version__}"


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


if __name__ == "__main__":
    sys.exit(main())
