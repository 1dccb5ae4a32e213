"""delta_update over whole sequences, forward and forward + backward: ours, upstream's and other implementations."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from deltamem_kernels import backends, delta_update
from deltamem_kernels.backends.scan_choice import force_scan

from ..availability import compiler_why_not, sequence_backend_why_not
from ..compiling import compiled
from ..inputs import memory_operands
from ..registry import Implementation, Operation, Shape, Tensors, with_gradients

GRADIENTS_OF = ("q", "k", "v", "beta")
COMPILED_BLOCK = 32
LOOP_TOKENS = 8192
"""Longest sequence for implementations that loop over tokens in Python, which take minutes for more."""


def forward_inputs(shape: Shape) -> Tensors:
    return memory_operands(shape)


def training_inputs(shape: Shape) -> Tensors:
    operands = memory_operands(shape)
    generator = torch.Generator().manual_seed(3)
    d_reads = torch.randn(operands["q"].shape, generator=generator)
    d_final_state = torch.randn(shape.batch, shape.heads, shape.rank, shape.rank, generator=generator)
    cotangents = {"d_reads": d_reads.to(shape.dtype), "d_final_state": d_final_state}
    return operands | {name: cotangent.to(shape.device) for name, cotangent in cotangents.items()}


def forward_bytes(shape: Shape) -> int:
    """Return the bytes of q, k, v and beta, which are read, and of the reads and the final state, which are written."""
    tokens_and_heads = shape.batch * shape.tokens * shape.heads
    numbers = 4 * shape.rank + (shape.rank if shape.gates == "row" else 1)
    state = max(4, shape.dtype.itemsize) * shape.batch * shape.heads * shape.rank**2
    return tokens_and_heads * numbers * shape.dtype.itemsize + state


def training_bytes(shape: Shape) -> int:
    """Return the bytes of the forward, and of cotangents (sizes of the outputs) and gradients (sizes of the inputs)."""
    return 2 * forward_bytes(shape)


def _gates(beta: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return keep, erase and write, each `[B, T, H, R]`."""
    if shape.gates == "head":
        beta = beta.unsqueeze(-1).expand(*beta.shape, shape.rank)
    if shape.mode == "no_lambda":
        return torch.ones_like(beta), beta, beta
    keep = 1.0 - beta
    return keep, keep * beta if shape.mode == "lambda_outside" else beta, beta


# Ours


def _ours(backend: str) -> Callable[[Tensors, Shape], Tensors]:
    def run(inputs: Tensors, shape: Shape) -> Tensors:
        operands = (inputs[name] for name in GRADIENTS_OF)
        return delta_update(*operands, mode=shape.mode, backend=backend)._asdict()

    return run


def _oracle(inputs: Tensors, shape: Shape) -> Tensors:
    """Compute the expected outputs: with the reference, or for long sequences with the C++ kernel that tests check."""
    return _ours("reference" if shape.tokens <= LOOP_TOKENS else "cpu")(inputs, shape)


def _loop_why_not(shape: Shape) -> str | None:
    return f"run up to {LOOP_TOKENS} tokens" if shape.tokens > LOOP_TOKENS else None


# Upstream (declare-lab/delta-Mem): its own functions if the package `deltamem` can be imported


@functools.cache
def _upstream(module: str, attribute: str) -> Callable | None:
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError:
        return None


def _rewritten_loop(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    """Loop over tokens with the same arithmetic, in the same order, as upstream's loop. Operands are `[B, T, R]`."""
    reads = []
    for t in range(q.shape[1]):
        query, key, value = q[:, t], k[:, t], v[:, t]
        reads.append(torch.einsum("bij,bj->bi", state, query))
        predicted = torch.einsum("bij,bj->bi", state, key)
        written = value.unsqueeze(-1) * key.unsqueeze(1)
        erased = predicted.unsqueeze(-1) * key.unsqueeze(1)
        kept = keep[:, t].unsqueeze(-1) * state
        state = kept - erase[:, t].unsqueeze(-1) * erased + write[:, t].unsqueeze(-1) * written
    return state, torch.stack(reads, dim=1)


def _upstream_torch_loop() -> Callable:
    attention = _upstream("deltamem.core.delta_impl", "DeltaMemAttention")
    return functools.partial(attention._memory_affine_scan_torch, None) if attention else _rewritten_loop  # noqa: SLF001


def _in_upstream_layout(loop: Callable[[], Callable]) -> Callable[[Tensors, Shape], Tensors]:
    """Call an upstream function, which folds heads into the batch and keeps the state in the operands' dtype."""

    def run(inputs: Tensors, shape: Shape) -> Tensors:
        operands = (inputs["q"], inputs["k"], inputs["v"], *_gates(inputs["beta"], shape))
        rows, sizes = shape.batch * shape.heads, (shape.batch, shape.heads, shape.tokens, shape.rank)
        folded = [x.transpose(1, 2).reshape(rows, shape.tokens, shape.rank) for x in operands]
        state, reads = loop()(folded[0].new_zeros(rows, shape.rank, shape.rank), *folded)
        return {"reads": reads.view(sizes).transpose(1, 2), "final_state": state.view(*sizes[:2], *state.shape[1:])}

    return run


def _upstream_triton_why_not(shape: Shape) -> str | None:
    if shape.device != "cuda":
        return "needs a CUDA device (--device cuda)"
    if _upstream("deltamem.kernels.affine_scan", "triton_affine_scan") is None:
        return "needs upstream's package `deltamem` (declare-lab/delta-Mem) on PYTHONPATH"
    return None


# flash-linear-attention: reads after the write, takes the logarithm of the decay, and keeps the state as key x value


@functools.cache
def _fla() -> Callable | None:
    try:
        return importlib.import_module("fla.ops.gated_delta_rule").fused_recurrent_gated_delta_rule
    except ImportError:
        return None


def _fla_why_not(shape: Shape) -> str | None:
    if shape.device != "cuda":
        return "needs a CUDA device (--device cuda)"
    if shape.gates != "head" or shape.mode != "lambda_outside":
        return "supports only --mode lambda_outside --gates head"
    return None if _fla() else "needs the package flash-linear-attention"


def _fla_prepare(inputs: Tensors) -> Tensors:
    """Shift the queries by one token to the left: fla's read after token t's write is our read of token t + 1."""
    q = inputs["q"]
    shifted = torch.cat([q[:, 1:], torch.zeros_like(q[:, :1])], dim=1)
    others = {name: inputs[name] for name in ("k", "v", "beta")}
    return others | {"q": shifted, "log_decay": torch.log1p(-inputs["beta"])}


def _fla_run(inputs: Tensors, shape: Shape) -> Tensors:
    reads, final_state = _fla()(
        q=inputs["q"],
        k=inputs["k"],
        v=inputs["v"],
        g=inputs["log_decay"],
        beta=inputs["beta"],
        scale=1.0,
        output_final_state=True,
    )
    return {"reads": reads, "final_state": final_state}


def _fla_present(outputs: Tensors) -> Tensors:
    reads = outputs["reads"]
    first_read = torch.zeros_like(reads[:, :1])  # of the initial state, which is zero
    shifted = torch.cat([first_read, reads[:, :-1]], dim=1)
    return {"reads": shifted, "final_state": outputs["final_state"].transpose(-1, -2)}


# torch.compile. Thousands of unrolled tokens do not compile in reasonable time. A block of 32 tokens that is compiled
# once and called T / 32 times does, and takes no longer per token than a larger block.


def _token_block(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, erase: Tensor, write: Tensor
) -> tuple[Tensor, Tensor]:
    reads = []
    for t in range(q.shape[1]):
        key = k[:, t].unsqueeze(-2)
        reads.append((state * q[:, t].unsqueeze(-2)).sum(-1))
        row = write[:, t] * v[:, t] - erase[:, t] * (state * key).sum(-1)
        state = keep[:, t].unsqueeze(-1) * state + row.unsqueeze(-1) * key
    return state, torch.stack(reads, dim=1)


def _compiled_run(inputs: Tensors, shape: Shape) -> Tensors:
    dtype = torch.promote_types(shape.dtype, torch.float32)
    operands = (inputs["q"], inputs["k"], inputs["v"], *_gates(inputs["beta"], shape))
    sizes = (shape.batch, shape.heads, shape.rank, shape.rank)
    # The initial state requires gradients like the later states, so that the first block does not recompile.
    state = torch.zeros(sizes, dtype=dtype, device=shape.device, requires_grad=torch.is_grad_enabled())
    reads = []
    for block in zip(*(_token_blocks(operand.to(dtype)) for operand in operands), strict=True):
        state, block_reads = compiled(_token_block)(state, *block)
        reads.append(block_reads)
    return {"reads": torch.cat(reads, dim=1).to(shape.dtype), "final_state": state}


def _token_blocks(operand: Tensor) -> tuple[Tensor, ...]:
    """Split `[B, T, H, R]` into T/32 blocks `[B, 32, H, R]` whose strides do not depend on T, to avoid recompiling."""
    blocks = operand.unflatten(1, (-1, COMPILED_BLOCK)).transpose(0, 1)
    return blocks.clone(memory_format=torch.contiguous_format).unbind()


def _compiled_why_not(shape: Shape) -> str | None:
    if shape.tokens > LOOP_TOKENS:
        return _loop_why_not(shape)
    if shape.tokens % COMPILED_BLOCK:
        return f"needs a multiple of {COMPILED_BLOCK} tokens"
    return compiler_why_not(shape)


def _implementations() -> tuple[Implementation, ...]:
    ours = tuple(
        Implementation(f"ours ({name})", _ours(name), functools.partial(sequence_backend_why_not, name))
        for name in backends()
    )
    own = _upstream("deltamem.core.delta_impl", "DeltaMemAttention")
    forced = tuple(
        Implementation(
            f"{name}, {way}",
            _force_scan(_ours(name), way == "chunked"),
            functools.partial(sequence_backend_why_not, name),
        )
        for name in ("triton", "cpu")
        for way in ("plain", "chunked")
    )
    return (
        *ours,
        *forced,
        Implementation(
            "upstream-torch",
            _in_upstream_layout(_upstream_torch_loop),
            _loop_why_not,
            note="upstream's own loop" if own else "a rewrite of upstream's loop: its package is not installed",
        ),
        Implementation(
            "upstream-triton",
            _in_upstream_layout(lambda: _upstream("deltamem.kernels.affine_scan", "triton_affine_scan")),
            _upstream_triton_why_not,
            note="upstream's own kernel",
        ),
        Implementation(
            "reference-compiled",
            _compiled_run,
            _compiled_why_not,
            note=f"torch.compile of a loop over {COMPILED_BLOCK} tokens, called T/{COMPILED_BLOCK} times",
            slow_start=True,
        ),
        Implementation(
            "fla-recurrent", _fla_run, _fla_why_not, prepare=_fla_prepare, present=_fla_present,
            note="shifting the queries and the logarithm of the decay are not timed",
        ),
    )  # fmt: skip


def _force_scan(run: Callable[[Tensors, Shape], Tensors], chunked: bool) -> Callable[[Tensors, Shape], Tensors]:
    def forced(inputs: Tensors, shape: Shape) -> Tensors:
        with force_scan(chunked):
            return run(inputs, shape)

    return forced


def _training(implementation: Implementation) -> Implementation:
    run = with_gradients(implementation.run, GRADIENTS_OF)
    if implementation.name.endswith((", plain", ", chunked")):  # backward chooses between the scans as well
        run = _force_scan(run, implementation.name.endswith(", chunked"))
    if implementation.name == "fla-recurrent":
        return replace(implementation, run=run, why_not=lambda shape: "has no backward")
    return replace(implementation, run=run)


FORWARD = Operation(
    name="delta_update forward",
    inputs=forward_inputs,
    oracle=_oracle,
    bytes_moved=forward_bytes,
    implementations=_implementations(),
    baseline="upstream-torch",
)
TRAINING = Operation(
    name="delta_update forward+backward",
    inputs=training_inputs,
    oracle=with_gradients(_oracle, GRADIENTS_OF),
    bytes_moved=training_bytes,
    implementations=tuple(_training(implementation) for implementation in FORWARD.implementations),
    baseline=FORWARD.baseline,
    gradients_of=GRADIENTS_OF,
)
OPERATIONS = (FORWARD, TRAINING)
