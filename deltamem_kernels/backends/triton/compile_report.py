"""Registers, spills and inner loops of the kernels, compiled ahead of time, and what time they imply: no GPU is needed.

`python -m deltamem_kernels.backends.triton.compile_report` prints both tables, and exits with 1 on a spill.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import torch

from ..reference import CHECKPOINT_INTERVAL

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}

ARCHS = (80, 90, 100, 120)
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
    """Bytes a program: what its launch asks for."""
    loops: tuple[int, ...]
    """Instructions of each loop that has no other inside, the longest first: one turn is a token (backward has two such
    loops, to run the tokens again and to go back) or a map; short ones look for a sequence."""

    @property
    def spills(self) -> bool:
        return self.stack + self.spill_stores + self.spill_loads > 0


def report() -> list[Row]:
    """The kernels of all operations, for each arch and usual rank."""
    from . import compile_cases

    return compile_cases.scan_report() + compile_cases.layer_report() + compile_cases.correction_report()


def row(name: str, rank: int, arch: int, kernel, arguments: dict, loops: bool) -> Row:
    """Of a kernel as a launch with these arguments would run it on sm_<arch>. Without `loops`, which take a look at the
    instructions, there are none. Needs Triton, and TRITON_INTERPRET unset."""
    import triton

    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("the report compiles the kernels: run it without TRITON_INTERPRET")
    return Row(name, rank, arch, *_usage(*_compile(kernel, arguments, arch), loops))


def _compile(kernel, arguments: dict, arch: int) -> tuple[bytes, int]:
    """The cubin that a launch with these arguments would run on sm_<arch>, and its shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unknown = arguments.keys() - {parameter.name for parameter in kernel.params} - set(OPTIONS)
    if unknown:  # a launch refuses them, the interpreter does not
        raise TypeError(f"{kernel.fn.__name__} has no arguments {', '.join(sorted(unknown))}")
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
        elif isinstance(value, float):
            signature[name] = "fp32"
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


def _usage(cubin: bytes, shared: int, loops: bool) -> tuple[int, int, int, int, int, tuple[int, ...]]:
    """What a Row has from `registers` on, by the tools in Triton's wheel; shared memory as given: the cubin does not
    tell."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = _run("cuobjdump", "--dump-resource-usage", str(path))
        registers, stack = (int(re.search(rf"{x}:(\d+)", resources)[1]) for x in ("REG", "STACK"))
        # What spills lies on the stack: without one there is nothing to count.
        assembly = _run("nvdisasm", "--print-code", str(path)) if loops or stack else ""
    stores, loads = (len(re.findall(rf"\b{x}\b", assembly)) for x in ("STL", "LDL"))
    return registers, stack, stores, loads, shared, _loops(assembly)


def _loops(assembly: str) -> tuple[int, ...]:
    """Instructions of each innermost loop: from a label to a jump back to it."""
    count, labels, loops = 0, {}, []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            count += 1
            jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if jump and labels.get(jump[1], count) < count - 1:  # the end of a kernel is a jump to itself
                loops.append((labels[jump[1]], count))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return tuple(sorted((b - a for a, b in inner), reverse=True))


def _run(tool: str, *arguments: str) -> str:
    import triton

    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


CLOCK_GHZ, BYTES_PER_SECOND, SCHEDULERS, LATENCY = 1.98, 4.3e12, 4 * 132, 4
"""Of an H200: its highest clock, a measured copy, the warps that can start an instruction in the same cycle, and the
cycles from one fused multiply-add to one that waits for it."""


class Estimate(NamedTuple):
    """For one sequence of one head in 16 bits, on paper: microseconds without launches."""

    rank: int
    tokens: int
    chain: int
    """Cycles a token's dependent operations take: a dot product, the change it makes, the state after it."""
    instructions: int
    """Of one warp a token; it starts one a cycle at most."""
    plain: float
    chunked: float
    byte_floor: float


def estimate(rows: list[Row], tokens: int = 8192) -> list[Estimate]:
    """Of the forward scan, from the rows of one arch. A warp needs whatever is more, the chain or its instructions; and
    with more warps than schedulers, they take turns."""
    from .chunked import GROUP
    from .launch import LANES, tiling

    loops = {(row.kernel, row.rank): row.loops[0] for row in rows if row.loops}
    estimates = []
    for rank in sorted({row.rank for row in rows if row.kernel == "forward"}):
        chain = (rank + 2) * LATENCY
        token, virtual, fold = (loops[x, rank] for x in ("forward", "maps", "fold"))
        chunks = tokens // CHECKPOINT_INTERVAL
        warps_of_maps = chunks * -(-(rank + 1) // tiling(rank + 1, rank)["HEADS"])
        maps = max(chain, virtual, virtual * warps_of_maps / SCHEDULERS)
        folds = min(chunks, 2 * GROUP + chunks // GROUP) * fold
        # With more than one group, each virtual row goes through all maps once more.
        warps_of_fold = (rank + 1) * rank * rank / LANES
        folds = max(folds, (chunks > GROUP) * chunks * fold * warps_of_fold / SCHEDULERS)
        plain = tokens * max(chain, token)
        chunked = CHECKPOINT_INTERVAL * (maps + max(chain, token, token * chunks / SCHEDULERS)) + folds
        floor = tokens * 5 * rank * 2 / BYTES_PER_SECOND
        microseconds = [cycles / (CLOCK_GHZ * 1e3) for cycles in (plain, chunked)]
        estimates.append(Estimate(rank, tokens, chain, token, *microseconds, floor * 1e6))
    return estimates


def main() -> int:
    rows = report()
    print(f"{'kernel':22}{'rank':>6}{'arch':>8}{'registers':>11}{'stack':>7}{'spills st/ld':>14}{'shared':>8}  loops")
    for row in rows:
        spills = f"{row.spill_stores}/{row.spill_loads}"
        arch, loops = f"sm_{row.arch}", " ".join(map(str, row.loops))
        print(f"{row.kernel:22}{row.rank:>6}{arch:>8}{row.registers:>11}{row.stack:>7}{spills:>14}", end="")
        print(f"{row.shared:>8}  {loops}")
    print("\nOn paper, not run: forward, sm_90, B = H = 1, 16 bits; cycles a token, then microseconds without launches")
    print(f"{'rank':>6}{'T':>8}{'chain':>8}{'instructions':>14}{'plain':>10}{'chunked':>10}{'byte floor':>12}")
    for tokens in (256, 8192, 1 << 20):
        for x in estimate([row for row in rows if row.arch == 90], tokens):
            times = f"{x.plain:>10.1f}{x.chunked:>10.1f}{x.byte_floor:>12.2f}"
            print(f"{x.rank:>6}{x.tokens:>8}{x.chain:>8}{x.instructions:>14}{times}")
    return int(any(row.spills for row in rows))


if __name__ == "__main__":
    sys.exit(main())
