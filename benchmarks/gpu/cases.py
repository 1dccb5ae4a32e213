"""What is timed, and in which variants. Operations and implementations are those of `python -m benchmarks`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..registry import Implementation, Operation, Shape, Tensors

bf16, f32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Variant:
    """An implementation, optionally with a switch: a context that is held during each of its calls.

    `Variant("ours (triton)", "unrolled", lambda: mock.patch.object(module, "UNROLL", 3))` times the implementation with
    one of a module's constants changed; `mock.patch.dict(os.environ, NAME="1")` changes an environment variable. The
    switch has to change what is launched: a compiled kernel that does not depend on it is used again.
    """

    implementation: str
    label: str = ""
    switch: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def of(self, operation: Operation) -> Implementation:
        found = next(each for each in operation.implementations if each.name == self.implementation)
        if not self.label:
            return found

        def run(inputs: Tensors, shape: Shape) -> Tensors:
            with self.switch():
                return found.run(inputs, shape)

        return replace(found, name=f"{found.name}, {self.label}", run=run)


@dataclass(frozen=True)
class Case:
    """The first variant is the one that the others' times are divided by."""

    part: str
    name: str
    operation: str
    shape: Shape
    variants: tuple[Variant, ...]
    seconds: int = 25
    """The limit of the case's process, with its start and the compilation of what is not compiled yet."""


def variants(*names: str) -> tuple[Variant, ...]:
    return tuple(map(Variant, names))


SCAN = variants("ours (triton)", "ours (cuda)", "upstream-triton")
CALL = variants("ours (triton)", "ours (cuda)", "ours (triton), 16-bit weights", "ours (cuda), 16-bit weights")
LAYER = variants("frozen", "with memory (triton)", "with memory (cuda)")
IN_PLACE = variants("ours (triton) in place", "ours (cuda) in place", "ours (triton)", "ours (cuda)")
FORWARD, TRAINING = "delta_update forward", "delta_update forward+backward"
PREFILL, DECODE = "memory_prefill Qwen3-4B", "memory_decode Qwen3-4B"
SMALL_LAYER = "layer SmolLM2-135M"
QUERY, OUTPUT = "attention_correction_norm_rope Qwen3-4B q", "attention_correction Qwen3-4B o"

CASES = (
    Case("scan", "forward, bfloat16", FORWARD, Shape(8192, dtype=bf16), (*SCAN, *variants("triton, plain")), 30),
    Case("scan", "forward, float32", FORWARD, Shape(8192, dtype=f32), SCAN),
    Case("scan", "forward and backward, bfloat16", TRAINING, Shape(8192, dtype=bf16), SCAN, 30),
    Case("scan", "forward and backward, float32", TRAINING, Shape(8192, dtype=f32), SCAN, 30),
    Case("prefill", "memory, H=1", PREFILL, Shape(8192, dtype=bf16), CALL, 30),
    Case("prefill", "memory, H=4", PREFILL, Shape(8192, heads=4, dtype=bf16), CALL, 30),
    Case("prefill", "layer", "layer Qwen3-4B", Shape(8192, dtype=bf16), LAYER, 50),
    Case("decode", "memory, N=1", DECODE, Shape(1, dtype=bf16), CALL, 20),
    Case("decode", "memory, N=256", DECODE, Shape(1, 256, dtype=bf16), CALL, 20),
    Case("decode", "layer, N=1", "layer Qwen3-4B", Shape(1, dtype=bf16), LAYER, 20),
    Case("decode", "layer, N=256", "layer Qwen3-4B", Shape(1, 256, dtype=bf16), LAYER, 40),
    Case("correct", "q with norm and rotary", QUERY, Shape(8192, dtype=bf16), (*IN_PLACE, *variants("pytorch")), 20),
    Case("correct", "o", OUTPUT, Shape(8192, dtype=bf16), (*IN_PLACE, *variants("addmm in place")), 20),
)


def rehearsed(case: Case) -> Case:
    """Return the case as a CPU can run it: smaller, with the backends of a CPU in place of those of a GPU."""
    shape = replace(case.shape, tokens=min(case.shape.tokens, 16), batch=min(case.shape.batch, 2))
    names = [v.implementation.replace("triton", "cpu").replace("cuda", "reference") for v in case.variants]
    renamed = [replace(v, implementation=name) for v, name in zip(case.variants, names, strict=True)]
    ours = tuple(v for v in renamed if v.implementation != "upstream-cpu")
    return replace(case, operation=case.operation.replace("layer Qwen3-4B", SMALL_LAYER), shape=shape, variants=ours)
