"""Registers and spills of the kernels, compiled ahead of time: no GPU is needed.

`python -m deltamem_kernels.backends.triton.compile_report` prints the table, and exits with 1 on a spill.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Row(NamedTuple):
    kernel: str
    rank: int
    arch: int
    registers: int
    stack: int
    """Bytes a thread; what spills lies here."""
    spill_stores: int
    """Instructions, as are spill_loads."""
    spill_loads: int
    shared: int
    """Bytes a program."""

    @property
    def spills(self) -> bool:
        return self.stack + self.spill_stores + self.spill_loads > 0


def report(
    archs: tuple[int, ...] = (80, 90, 100, 120),
    ranks: tuple[int, ...] = (4, 8, 16),
    heads: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    mode: str = "standard",
    free_decay: bool = False,
    per_head: bool = False,
    mask: bool = False,
    cu_seqlens: bool = False,
) -> list[Row]:
    """The kernels for each arch (90 is sm_90) and rank: forward with saved states, backward with all gradients, a step
    with all it can be given (there is none in mode "affine", masked or packed); the operands in `dtype`, the state in
    the dtype of the arithmetic. Needs Triton, and TRITON_INTERPRET unset."""
    import triton

    from . import delta_update, step

    if not isinstance(delta_update.delta_update_forward_kernel, triton.JITFunction):
        raise RuntimeError("the report compiles the kernels: run it without TRITON_INTERPRET")
    rows = []
    for rank in ranks:
        operands = _operands(rank, heads, dtype, mode, free_decay, per_head, mask, cu_seqlens)
        _, forward = delta_update.forward_arguments(*operands, mode, True)
        needs = [x is not None for x in operands[:7]]
        _, backward = delta_update.backward_arguments(
            forward["p_reads"], forward["p_final"], *operands, forward["p_checkpoints"], mode, needs
        )
        kernels = [
            ("forward", delta_update.delta_update_forward_kernel, forward),
            ("backward", delta_update.delta_update_backward_kernel, backward),
        ]
        if mode != "affine" and not mask and not cu_seqlens:
            q, k, v, beta, decay, _, state = operands[:7]
            slots = torch.zeros(q.shape[:2], dtype=torch.int32)
            states = state.new_empty(*q.shape, rank)
            _, one = step.step_arguments(
                state, q, k, v, beta, decay, slots, slots[:, 0], states, q, mode, pad_slot_id=-1, update_state=True
            )
            kernels.append(("step", step.delta_step_kernel, one))
        rows += [
            Row(name, rank, arch, *_usage(*_compile(kernel, arguments, arch)))
            for arch in archs
            for name, kernel, arguments in kernels
        ]
    return rows


def layer_report(
    archs: tuple[int, ...] = (80, 90, 100, 120),
    ranks: tuple[int, ...] = (4, 8, 16),
    heads: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype = torch.float32,
    free_decay: bool = True,
    per_head: bool = False,
    mask: bool = True,
) -> list[Row]:
    """The kernels of memory_projection (many tokens, few, and what backward launches) and of segment_mean."""
    import triton

    from . import memory_projection, projection, segments

    if not isinstance(projection.memory_projection_kernel, triton.JITFunction):
        raise RuntimeError("the report compiles the kernels: run it without TRITON_INTERPRET")
    B, T, D, M = 1, 128, 256, 4
    rows = []
    for rank in ranks:
        H = heads
        gates = H if per_head else H * rank
        weights = [torch.empty(n, D, dtype=weight_dtype) for n in (3 * H * rank, gates, gates)]
        biases = [w[:, 0] for w in weights]
        kernels = []
        for name, tokens in (("projection", T), ("projection of a token", 1)):
            operands = (*weights[:2], biases[1], *((weights[2], biases[2]) if free_decay else (None, None)), H, True)
            kernel, _, forward = memory_projection.forward_arguments(torch.empty(B, tokens, D, dtype=dtype), *operands)
            kernels.append((name, kernel, forward))
        results = [kernels[0][2][f"p_{name}"] for name in ("q", "k", "v", "beta", "decay")]
        saved = [results[0], results[1], *results[3:], kernels[0][2]["p_norms"]]
        cotangents = results if free_decay else [*results[:4], None]
        _, adjoint = memory_projection.adjoint_arguments(*cotangents, *saved)
        kernels.append(("projection adjoint", projection.memory_projection_adjoint_kernel, adjoint))
        _, to_x = memory_projection.input_arguments(adjoint["p_dprojected"], weights[: 2 + free_decay], dtype)
        kernels.append(("projection to x", projection.memory_projection_input_kernel, to_x))
        x, ids = torch.empty(B, T, D, dtype=dtype), torch.zeros(B, T, dtype=torch.int64)
        tokens = torch.ones(B, T, dtype=torch.bool) if mask else None
        _, means = segments.forward_arguments(x, ids, M, tokens)
        kernels.append(("segments", segments.segment_mean_kernel, means))
        _, to_x = segments.backward_arguments(means["p_means"], ids, means["p_counts"], tokens)
        kernels.append(("segments backward", segments.segment_mean_backward_kernel, to_x))
        rows += [
            Row(name, rank, arch, *_usage(*_compile(kernel, arguments, arch)))
            for arch in archs
            for name, kernel, arguments in (kernels if rank == ranks[0] else kernels[:3])  # the others know no rank
        ]
    return rows


def _operands(rank, heads, dtype, mode, free_decay, per_head, mask, cu_seqlens) -> list[torch.Tensor | None]:
    """Operands of the ops in their order; only dtypes, shapes and strides matter."""
    B, T = 1, 128
    q, k, v = (torch.empty(B, T, heads, rank, dtype=dtype) for _ in range(3))
    beta, decay, write = (q[..., 0] if per_head else q for _ in range(3))
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return [
        q,
        k,
        v,
        beta,
        decay if free_decay or mode == "affine" else None,
        write if mode == "affine" else None,
        torch.empty(B, heads, rank, rank, dtype=state_dtype),
        torch.ones(B, T, dtype=torch.bool) if mask else None,
        torch.zeros(B + 1, dtype=torch.int32) if cu_seqlens else None,
    ]


def _compile(kernel, arguments: dict, arch: int) -> tuple[bytes, int]:
    """The cubin that a launch with these arguments would run on sm_<arch>, and its shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if specialized:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if specialized and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={name: arguments[name] for name in OPTIONS},
    )
    return compiled.asm["cubin"], compiled.metadata.shared


def _usage(cubin: bytes, shared: int) -> tuple[int, int, int, int, int]:
    """Registers, stack, spill stores and spill loads, by the tools in Triton's wheel; and shared memory, as given:
    a launch brings it, the cubin does not tell."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = _run("cuobjdump", "--dump-resource-usage", str(path))
        assembly = _run("nvdisasm", "--print-code", str(path))
    registers, stack = (int(re.search(rf"{x}:(\d+)", resources)[1]) for x in ("REG", "STACK"))
    stores, loads = (len(re.findall(rf"\b{x}\b", assembly)) for x in ("STL", "LDL"))
    return registers, stack, stores, loads, shared


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    rows = report() + layer_report()
    print(f"{'kernel':22}{'rank':>6}{'arch':>8}{'registers':>11}{'stack':>7}{'spills st/ld':>14}{'shared':>8}")
    for row in rows:
        spills = f"{row.spill_stores}/{row.spill_loads}"
        arch = f"sm_{row.arch}"
        print(f"{row.kernel:22}{row.rank:>6}{arch:>8}{row.registers:>11}{row.stack:>7}{spills:>14}{row.shared:>8}")
    return int(any(row.spills for row in rows))


if __name__ == "__main__":
    sys.exit(main())
