"""`python -m benchmarks.gpu.cases`: every kernel of a backend on a small problem, against float64. Small, so that it
can run under compute-sanitizer; inputs are made on the CPU and copied: no other kernel writes what ours read."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deltamem_kernels import (
    attention_correction,
    attention_correction_norm_rope,
    delta_step,
    delta_update,
    memory_decode,
    memory_projection,
)

TOLERANCE = 2e-5
LENGTHS = {4: 70, 8: 600, 16: 130}
"""A tile and a bit; long enough for chunks on each backend; two chunks and a bit."""
Call = Callable[..., dict[str, Tensor]]


def cases() -> Iterator[tuple[str, Call, dict[str, Tensor], tuple[str, ...]]]:
    """Name, call, operands in float64 on the CPU, and those that want gradients."""
    for R, T in LENGTHS.items():
        for mode in ("standard", "lambda_outside", "no_lambda"):
            yield f"delta_update {mode} R={R} T={T}", _update(mode=mode), _scan(2, T, 2, R), tuple(_scan(1, 1, 1, R))
    packed = _scan(1, 200, 1, 8) | {"cu_seqlens": torch.tensor([0, 0, 130, 131, 200])}
    packed |= {"initial_state": _normal(4, 1, 8, 8), "mask": torch.rand(1, 200) < 0.7}
    yield "delta_update packed, masked", _update(), packed, ("q", "k", "v", "beta", "initial_state")
    for T in (1, 3):
        yield f"delta_step T={T}", _step, _slots(5, T, 2, 8), ()
    layer = {"x": _normal(3, 5, 48), "qkv_weight": _normal(48, 48) / 7, "beta_weight": _normal(16, 48) / 7}
    yield "memory_projection", _project, layer, ()
    correction = {"base": _normal(2, 5, 64), "reads": _normal(2, 5, 2, 8), "weight": _normal(64, 16)}
    yield "attention_correction", _correct, correction, ()
    rotary = {"cos": _normal(1, 5, 32).cos(), "sin": _normal(1, 5, 32).sin(), "norm_weight": _normal(32)}
    yield "attention_correction_norm_rope", _correct_query, correction | rotary, ()
    decode = {n: x[0] if n == "x" else x for n, x in layer.items()} | {"state": _normal(6, 2, 8, 8)}
    decode |= {"state_indices": torch.tensor([4, -1, 0, 2, 5]), "base": _normal(5, 64), "delta_weight": _normal(64, 16)}
    yield "memory_decode", _decode, decode, ()


def _normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def _scan(B: int, T: int, H: int, R: int) -> dict[str, Tensor]:
    q, k = (F.normalize(_normal(B, T, H, R), dim=-1) for _ in range(2))
    return {"q": q, "k": k, "v": _normal(B, T, H, R), "beta": _normal(B, T, H, R).sigmoid()}


def _slots(N: int, T: int, H: int, R: int) -> dict[str, Tensor]:
    made = {n: x if T > 1 else x[:, 0] for n, x in _scan(N, T, H, R).items()}
    slots = torch.randperm(N * T + 2)[: N * T].view(N, T)
    slots[1] = -1
    return made | {"state": _normal(N * T + 2, H, R, R), "state_indices": slots}


def _update(**options: str) -> Call:
    return lambda backend, **operands: delta_update(**operands, **options, backend=backend)._asdict()


def _step(backend: str, state: Tensor, **operands: Tensor) -> dict[str, Tensor]:
    return {"reads": delta_step(state, **operands, backend=backend), "state": state}


def _project(backend: str, **operands: Tensor) -> dict[str, Tensor]:
    projected = memory_projection(**operands, beta_bias=None, heads=2, backend=backend)._asdict()
    return {n: projected[n] for n in ("q", "k", "v", "beta")}


def _correct(backend: str, **operands: Tensor) -> dict[str, Tensor]:
    return {"out": attention_correction(**operands, scale=0.5, backend=backend)}


def _correct_query(backend: str, **operands: Tensor) -> dict[str, Tensor]:
    return {"out": attention_correction_norm_rope(**operands, scale=0.5, head_dim=32, backend=backend)}


def _decode(backend: str, state: Tensor, **operands: Tensor) -> dict[str, Tensor]:
    out = memory_decode(state, **operands, beta_bias=None, heads=2, scale=0.5, backend=backend)
    return {"reads": out.reads, "corrected": out.corrected, "state": state}


def results(call: Call, operands: dict, wanted: tuple[str, ...], backend: str, device: str, dtype) -> dict[str, Tensor]:
    given = {n: (x.to(dtype) if x.is_floating_point() else x).clone().to(device) for n, x in operands.items()}
    if not wanted:
        with torch.no_grad():
            return call(backend, **given)
    leaves = [given[n].requires_grad_() for n in wanted]
    out = call(backend, **given)
    cotangents = [torch.ones(x.shape, dtype=torch.float64).cos_().to(device, x.dtype) for x in out.values()]
    gradients = torch.autograd.grad(list(out.values()), leaves, cotangents)
    return {n: x.detach() for n, x in out.items()} | {f"d_{n}": x for n, x in zip(wanted, gradients, strict=True)}


def error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The worst relative error of all results; NaN counts as the worst there is."""
    errors = [((ours[n].cpu().double() - x).norm() / x.norm().clamp_min(1e-30)).item() for n, x in exact.items()]
    return max(e if e == e else float("inf") for e in errors)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.cases", description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    rows = []
    for name, call, operands, wanted in cases():
        if options.only in name:
            exact = results(call, operands, wanted, "reference", "cpu", torch.float64)
            off = error(results(call, operands, wanted, options.backend, options.device, torch.float32), exact)
            rows.append({"case": name, "backend": options.backend, "error": off, "status": _verdict(off)})
            print(f"{rows[-1]['status']:6} {off:.1e}  {name}", flush=True)
    if options.rows:
        options.rows.write_text(json.dumps({"rows": rows}))
    return int(not rows or any(row["status"] != "ok" for row in rows))


def _verdict(off: float) -> str:
    return "ok" if off <= TOLERANCE else "WRONG"


if __name__ == "__main__":
    sys.exit(main())
