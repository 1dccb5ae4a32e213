"""`python -m benchmarks.gpu.checks BACKEND`: the package's self-check of one backend, every kernel against float64.

With --graph, decoding steps are captured in CUDA graphs and replayed with other slots, pads, states and operands in the
same buffers. A replay must have the bits of the call itself and be right against float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import deltamem_kernels as dm
from deltamem_kernels.__main__ import self_check

from . import store

TOLERANCE = 2e-5
REPLAYS = 4
ROWS, SLOTS, WIDTH, QUERY, HEAD_DIM = 5, 24, 48, 64, 32
Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]


def normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def slots(T: int) -> Tensor:
    """`[N, T]`: a slot of its own for each row and token. One row, or more at random, is padding."""
    drawn = torch.randperm(SLOTS)[: ROWS * T].view(ROWS, T)
    drawn[(torch.rand(ROWS) < 0.2) | (torch.arange(ROWS) == torch.randint(ROWS, ()))] = -1
    return drawn


def drafts(T: int = 3) -> Tensors:
    q, k = (F.normalize(normal(ROWS, T, 2, 8), dim=-1) for _ in range(2))
    operands = {"q": q, "k": k, "v": normal(ROWS, T, 2, 8), "beta": normal(ROWS, T, 2, 8).sigmoid()}
    operands |= {"state": normal(SLOTS, 2, 8, 8), "state_indices": slots(T)}
    return operands | {"num_accepted_tokens": torch.randint(1, T + 1, (ROWS,))}


def step() -> Tensors:
    return {name: x if name == "state" else x[:, 0] for name, x in drafts(1).items() if name != "num_accepted_tokens"}


def layer() -> Tensors:
    weights = {"qkv_weight": normal(48, WIDTH) / 7, "beta_weight": normal(16, WIDTH) / 7, "beta_bias": normal(16)}
    query = {"base": normal(ROWS, QUERY), "delta_weight": normal(QUERY, 16), "norm_weight": normal(HEAD_DIM)}
    tables = {"cos": normal(ROWS, HEAD_DIM).cos(), "sin": normal(ROWS, HEAD_DIM).sin()}
    pool = {"state": normal(SLOTS, 2, 8, 8), "state_indices": slots(1)[:, 0]}
    return {"x": normal(ROWS, WIDTH)} | weights | query | tables | pool


def call_step(backend: str, state: Tensor, **given: Tensor) -> Tensors:
    return {"reads": dm.delta_step(state, **given, backend=backend), "state": state}


def call_layer(backend: str, state: Tensor, **given: Tensor) -> Tensors:
    """What a layer calls before attention, and the correction in place after it."""
    options = {"heads": 2, "scale": 2.0, "head_dim": HEAD_DIM, "backend": backend}
    reads, corrected = dm.memory_decode(state, **given, **options)
    output = given["base"] + 1
    dm.attention_correction(output, reads, given["delta_weight"], 2.0, out=output, backend=backend)
    return {"reads": reads, "corrected": corrected, "output": output, "state": state}


PROBLEMS: dict[str, tuple[Callable[[], Tensors], Callable[..., Tensors]]] = {
    "step": (step, call_step),
    "step of drafts": (drafts, call_step),
    "decoding layer": (layer, call_layer),
}
"""Operands in float64 on the CPU, drawn again by each call, and the results, with the states that were changed."""


def error(ours: Tensors, exact: Tensors) -> float:
    """The largest relative error of all results. A NaN counts as infinite."""
    errors = [((ours[n].cpu().double() - x).norm() / x.norm().clamp_min(1e-30)).item() for n, x in exact.items()]
    return max(e if e == e else float("inf") for e in errors)


def capture(call: Call) -> tuple[Callable[[], object], Tensors]:
    """The replay of a CUDA graph of the call, and the tensors in which a replay leaves the results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is captured must have run before, on another stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    return graph.replay, captured


def call_again(call: Call) -> tuple[Callable[[], object], Tensors]:
    """Stands in for `capture` on a CPU."""
    captured = call()
    return lambda: [captured[name].copy_(x) for name, x in call().items()], captured


@torch.no_grad()
def check_graph(name: str, backend: str, device: str, capture=capture) -> dict:
    operands, call = PROBLEMS[name]

    def placed(exact: Tensors) -> Tensors:
        return {n: (x.float() if x.is_floating_point() else x.clone()).to(device) for n, x in exact.items()}

    buffers, worst, same = placed(operands()), 0.0, True
    replay, captured = capture(lambda: call(backend, **buffers))
    for _ in range(REPLAYS):
        exact = operands()
        eager = placed(exact)
        for n, x in eager.items():
            buffers[n].copy_(x)
        replay()
        same = same and all(torch.equal(captured[n], x) for n, x in call(backend, **eager).items())
        worst = max(worst, error(captured, call("reference", **exact)))
    row = {"part": "graph", "case": name, "implementation": backend, "replays": REPLAYS, "error": worst}
    return row | {"same_bits": same, "status": "ok" if same and worst <= TOLERANCE else "WRONG"}


def check(backend: str) -> dict:
    began = time.perf_counter()
    cases, worst, misses = self_check(backend)
    row = {"part": "build", "case": f"{cases} problems", "implementation": backend, "error": worst, "misses": misses}
    return row | {"took": round(time.perf_counter() - began, 1), "status": "WRONG" if misses else "ok"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.checks", description=__doc__)
    parser.add_argument("backend")
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--device", default="cuda", help="of --graph")
    options = parser.parse_args()
    torch.manual_seed(1)
    how = capture if options.device == "cuda" else call_again
    wrong = False
    for name in PROBLEMS if options.graph else ("",):
        row = check_graph(name, options.backend, options.device, how) if name else check(options.backend)
        store.save(row)
        wrong = wrong or row["status"] != "ok"
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
