"""`python -m benchmarks.gpu.graph`: captures delta_step and a decoding layer in CUDA graphs and replays them, with
states, indices, pads and operands changed in place between the replays. Each replay must have the bits of the eager
call, and be right against float64."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deltamem_kernels import attention_correction, delta_step, memory_decode

from .cases import TOLERANCE, _normal, _scan, error

Buffers = dict[str, Tensor]
Capture = Callable[[Callable[[], object]], Callable[[], object]]
ROWS, SLOTS, HEADS, RANK, WIDTH, HEAD_DIM = 8, 13, 2, 8, 128, 32
REPLAYS = 4


@dataclass(frozen=True)
class Case:
    """`fresh` makes new contents for all buffers, in float64 on the CPU; `call` works on the buffers in place, and what
    it leaves in those of `results` counts."""

    name: str
    fresh: Callable[[], Buffers]
    call: Callable[[str, Buffers], None]
    results: tuple[str, ...]


def _slots(*shape: int) -> Tensor:
    """Another slot for each, and a pad in about every fourth place; in the first replays too there is one."""
    slots = torch.randperm(SLOTS * 4)[: ROWS * (shape[1] if len(shape) > 1 else 1)].view(shape)
    pads = torch.rand(ROWS) < 0.25
    pads[torch.randint(ROWS, ())] = True
    slots[pads] = -1
    return slots


def _fresh_step(T: int) -> Buffers:
    made = {n: x if T > 1 else x[:, 0] for n, x in _scan(ROWS, T, HEADS, RANK).items()}
    made["state_indices"] = _slots(ROWS, T) if T > 1 else _slots(ROWS)
    if T > 1:
        made["num_accepted_tokens"] = torch.randint(1, T + 1, (ROWS,))
    return made | {"state": _normal(SLOTS * 4, HEADS, RANK, RANK), "out": torch.zeros_like(made["q"])}


def _call_step(backend: str, given: Buffers) -> None:
    delta_step(**given, backend=backend)


def _fresh_states_aside() -> Buffers:
    return _fresh_step(3) | {"intermediate_states": torch.zeros(ROWS, 3, HEADS, RANK, RANK, dtype=torch.float64)}


def _call_states_aside(backend: str, given: Buffers) -> None:
    first = given["state_indices"][:, 0]
    rest = {n: x for n, x in given.items() if n not in ("state_indices", "num_accepted_tokens")}
    delta_step(**rest, state_indices=first, update_state=False, backend=backend)


def _fresh_layer() -> Buffers:
    memory = HEADS * RANK
    weights = {"qkv_weight": _normal(3 * memory, WIDTH), "beta_weight": _normal(memory, WIDTH)}
    made = {n: x / WIDTH**0.5 for n, x in weights.items()} | {"beta_bias": _normal(memory)}
    made |= {"x": _normal(ROWS, WIDTH), "base": _normal(ROWS, WIDTH), "output": _normal(ROWS, WIDTH)}
    made |= {"delta_weight": _normal(WIDTH, memory), "delta_o": _normal(WIDTH, memory)}
    made |= {"cos": _normal(ROWS, HEAD_DIM).cos(), "sin": _normal(ROWS, HEAD_DIM).sin()}
    made |= {"norm_weight": _normal(HEAD_DIM), "state_indices": _slots(ROWS)}
    return made | {"state": _normal(SLOTS * 4, HEADS, RANK, RANK), "out": torch.zeros_like(made["base"])}


def _call_layer(backend: str, given: Buffers) -> None:
    """All that a decoding layer calls: before attention, and on what o_proj gave."""
    operands = {n: x for n, x in given.items() if n not in ("output", "delta_o")}
    reads, _ = memory_decode(**operands, heads=HEADS, scale=2.0, head_dim=HEAD_DIM, backend=backend)
    output = given["output"]
    attention_correction(output, reads, given["delta_o"], 2.0, out=output, backend=backend)


CASES = (
    Case("delta_step", lambda: _fresh_step(1), _call_step, ("out", "state")),
    Case("delta_step, a slot for each draft", lambda: _fresh_step(3), _call_step, ("out", "state")),
    Case("delta_step, states aside", _fresh_states_aside, _call_states_aside, ("out", "state", "intermediate_states")),
    Case("decoding layer", _fresh_layer, _call_layer, ("out", "output", "state")),
)


def capture_cuda(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a CUDA graph of the call, after it has run aside."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def check(case: Case, backend: str, device: str, capture: Capture) -> list[dict]:
    """A row for each replay. Everything of a row but its verdict is a reason for it."""

    def like_buffers(fresh: Buffers) -> Buffers:
        return {n: (x.float() if x.is_floating_point() else x.int()).to(device) for n, x in fresh.items()}

    with torch.no_grad():
        buffers = like_buffers(case.fresh())
        replay = capture(lambda: case.call(backend, buffers))
        rows = []
        for turn in range(REPLAYS):
            fresh = case.fresh()
            eager, exact = like_buffers(fresh), {n: x.clone() for n, x in fresh.items()}
            for name, x in eager.items():
                buffers[name].copy_(x)
            replay()
            case.call(backend, eager)
            case.call("reference", exact)
            off = error(buffers, {n: exact[n] for n in case.results})
            same = all(torch.equal(buffers[n], eager[n]) for n in case.results)
            row = {"case": case.name, "backend": backend, "replay": turn, "error": off, "bits_of_the_eager_call": same}
            rows.append(row | {"status": "ok" if same and off <= TOLERANCE else "WRONG"})
    return rows


def main(arguments: list[str] | None = None, capture: Capture | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.graph", description=__doc__)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--device", default="cuda", help="cpu: the call itself takes the place of the replay")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    capture = capture or (capture_cuda if options.device == "cuda" else lambda call: call)
    rows = []
    for case in CASES:
        here = check(case, options.backend, options.device, capture)
        rows += here
        print(f"{case.name}: {', '.join(row['status'] for row in here)}", flush=True)
    if options.rows:
        options.rows.write_text(json.dumps({"rows": rows}))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
