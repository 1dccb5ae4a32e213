"""The compilation of one kernel for an architecture, and the resources that it uses."""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from deltamem_kernels.backends.triton.launch import Launch

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
"""The architectures of the report; 90 is sm_90."""
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


class Row(NamedTuple):
    """What a kernel uses."""

    kernel: str
    rank: int
    arch: int
    registers: int
    stack: int
    """Bytes per thread. Spilled registers are stored here."""
    spill_stores: int
    """The number of instructions; likewise spill_loads."""
    spill_loads: int
    shared: int
    """Bytes per program, as the launch requests them."""
    loops: tuple[int, ...]
    """Instructions of each innermost loop, the longest first. One iteration is a token (backward has two such loops,
    one that runs the tokens again and one that goes back) or a map. Short loops search for a sequence."""

    @property
    def spills(self) -> bool:
        return self.stack + self.spill_stores + self.spill_loads > 0


def row(name: str, rank: int, arch: int, launch: Launch, loops: bool) -> Row:
    """Compile the kernel as the launch would run it on sm_<arch>. Without `loops`, which need a disassembly, there are
    none in the row.

    Raises:
        RuntimeError: the kernels are interpreted.
    """
    import triton

    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("the report compiles the kernels: run it without TRITON_INTERPRET")
    cubin, shared = compile_kernel(launch.kernel, launch.keywords, arch)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        resources = _run("cuobjdump", "--dump-resource-usage", str(path))
        registers, stack = (int(re.findall(rf"{x}:(\d+)", resources)[0]) for x in ("REG", "STACK"))
        # Spills are on the stack: without a stack there is nothing to count.
        assembly = _run("nvdisasm", "--print-code", str(path)) if loops or stack else ""
    stores, loads = (len(re.findall(rf"\b{x}\b", assembly)) for x in ("STL", "LDL"))
    return Row(name, rank, arch, registers, stack, stores, loads, shared, innermost_loops(assembly))


def compile_kernel(kernel: Any, arguments: dict[str, Any], arch: int) -> tuple[bytes, int]:
    """Return the cubin that a launch with these arguments would run on sm_<arch>, and its shared memory.

    Raises:
        TypeError: the kernel does not take an argument. A launch raises too, but the interpreter does not.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unknown = arguments.keys() - {parameter.name for parameter in kernel.params} - set(OPTIONS)
    if unknown:
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


def innermost_loops(assembly: str) -> tuple[int, ...]:
    """Return the instructions of each innermost loop, from a label to a jump back to it, the longest first."""
    count = 0
    labels: dict[str, int] = {}
    loops = []
    for line in assembly.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = count
        if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            count += 1
            jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if jump and labels.get(jump[1], count) < count - 1:  # a kernel ends with a jump to itself
                loops.append((labels[jump[1]], count))
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)]
    return tuple(sorted((b - a for a, b in inner), reverse=True))


def _run(tool: str, *arguments: str) -> str:
    """Run one of the tools in Triton's wheel."""
    import triton

    path = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
