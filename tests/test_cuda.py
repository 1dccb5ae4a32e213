"""The CUDA kernels beyond the tests of every backend: both forms of the scan around the ends of tiles and chunks,
memory and races under sanitizers, and the code that nvcc compiles for each GPU generation."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cuda_host
import pytest
import torch
from problems import GATES, MODES, NAMES, check

from deltamem_kernels import delta_step, delta_update
from deltamem_kernels.backends.native import build
from deltamem_kernels.operands import CorrectionOperands
from deltamem_kernels.testing import FLOAT32_TOLERANCE, ROUNDING, assert_close_in_norm, scan_problem

EMULATED = SimpleNamespace(backend="cuda", device="cpu", slow=True, rounding=ROUNDING)
pytestmark = pytest.mark.slow
CHUNK = 64


@pytest.fixture(params=[False, True], ids=["plain", "in chunks"])
def form(request):
    with cuda_host.installed(request.param):
        yield request.param


# Both forms of the scan


@pytest.mark.parametrize("T", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("R", [4, 8])
def test_sequences_around_the_ends_of_tiles_and_chunks_are_exact(form, T, R):
    check(scan_problem(B=2, T=T, H=1, R=R, mask=T % 2 == 1, state=T != CHUNK), EMULATED)


@pytest.mark.parametrize("R", [1, 3, 5, 12, 16, 32])
def test_every_rank_is_exact_over_chunks(form, R):
    check(
        scan_problem(B=1, T=CHUNK + 3, H=1, R=R, mode="lambda_outside", decay=True, beta_per_head=True, fenced=True),
        EMULATED,
    )


@pytest.mark.parametrize(("mode", "decay", "beta_per_head", "decay_per_head"), GATES)
def test_every_form_of_the_gates_is_exact_in_chunks(mode, decay, beta_per_head, decay_per_head):
    problem = scan_problem(B=1, T=CHUNK + 6, R=4, mode=mode, decay=decay, beta_per_head=beta_per_head,
                   decay_per_head=decay_per_head, mask=True)  # fmt: skip
    with cuda_host.installed(chunked=True):
        check(problem, EMULATED)


@pytest.mark.parametrize("mode", MODES)
def test_packed_sequences_of_every_length_are_exact_in_chunks(mode):
    """Sequences longer and shorter than a chunk: each runs as it would alone."""
    with cuda_host.installed(chunked=True):
        check(scan_problem(lengths=(0, 130, 3, 0, 64, 65, 1, 0), H=1, R=4, mode=mode, mask=True), EMULATED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_operands_of_one_dtype_have_the_bits_of_mixed_ones_in_chunks(dtype):
    """Operands of one dtype have loads of their own. With v in another dtype the results are the same."""
    problem = scan_problem(B=1, T=CHUNK + 3, H=1, dtype=dtype)
    mixed = problem.to()
    mixed.operands["v"] = mixed.operands["v"].float()
    with cuda_host.installed(chunked=True):
        same, other = problem.run("cuda"), mixed.run("cuda")
    assert torch.equal(same["reads"], other["reads"])
    assert torch.equal(same["final_state"], other["final_state"])


@pytest.mark.parametrize("wanted", [(name,) for name in NAMES] + [("k", "beta", "initial_state")], ids="-".join)
def test_operands_may_be_frozen_in_chunks(wanted):
    problem = scan_problem(B=1, T=CHUNK + 2, H=1, R=4, decay=True, decay_per_head=True)
    weights = problem.cotangents()
    with cuda_host.installed(chunked=True):
        ours = problem.run_with_gradients("cuda", weights, wanted)
    assert_close_in_norm(ours, problem.float64(weights, wanted), FLOAT32_TOLERANCE)


def test_a_sequence_has_the_same_bits_alone_packed_and_in_a_batch(form):
    """With and without what backward needs."""
    q, k, v = (torch.nn.functional.normalize(torch.randn(1, 70, 1, 4), dim=-1) for _ in range(3))
    operands = [q, k, v, torch.rand(1, 70, 1, 4)]

    def run(shape, place):
        parents = [torch.randn(*shape, 1, 4) for _ in operands]
        for parent, x in zip(parents, operands, strict=True):
            parent[place] = x[0]
        return parents

    alone = delta_update(*operands, backend="cuda")
    saved = delta_update(operands[0].clone().requires_grad_(), *operands[1:], backend="cuda")
    batch = delta_update(*run((3, 70), 1), backend="cuda")
    bounds = torch.tensor([0, 5, 75, 140])
    packed = delta_update(*run((1, 140), (0, slice(5, 75))), cu_seqlens=bounds, backend="cuda")
    for reads, state in (
        (saved.reads[0], saved.final_state[0]),
        (batch.reads[1], batch.final_state[1]),
        (packed.reads[0, 5:75], packed.final_state[1]),
    ):
        assert torch.equal(reads, alone.reads[0])
        assert torch.equal(state, alone.final_state[0])


def remembering(problem):
    """Return the problem with gates that forget little, so that the state before a chunk still matters at its end."""
    problem.operands["beta"] *= 0.05
    if "decay" in problem.operands:
        problem.operands["decay"] = 1 - 0.03 * problem.operands["decay"]
    return problem


@pytest.mark.parametrize(("mode", "decay", "beta_per_head", "decay_per_head"), GATES)
@pytest.mark.parametrize("R", [4, 7])
def test_a_long_memory_is_exact_over_chunks(form, mode, decay, beta_per_head, decay_per_head, R):
    problem = scan_problem(B=1, T=2 * CHUNK + 3, H=1, R=R, mode=mode, decay=decay, beta_per_head=beta_per_head,
                   decay_per_head=decay_per_head)  # fmt: skip
    check(remembering(problem), EMULATED)


def test_a_long_memory_is_exact_at_rank_16(form):
    check(remembering(scan_problem(B=1, T=2 * CHUNK + 3, H=1, R=16, mode="lambda_outside", decay=True)), EMULATED)


@pytest.mark.parametrize(("T", "chunked"), [(511, False), (512, True)])
def test_long_sequences_run_in_chunks(T, chunked):
    """The bits show which form was chosen. Both are exact."""
    problem = remembering(scan_problem(B=1, T=T, H=1, R=4))
    reads = {}
    for form in (None, False, True):
        with cuda_host.installed(form):
            reads[form] = problem.run("cuda")["reads"]
    assert torch.equal(reads[None], reads[chunked])
    assert not torch.equal(reads[False], reads[True])
    assert_close_in_norm(
        {"reads": reads[None]}, {"reads": problem.to(dtype=torch.float64).run("reference")["reads"]}, FLOAT32_TOLERANCE
    )


def test_slots_outside_of_the_pool_are_pads():
    """The host does not look at values on a GPU, so it cannot raise."""
    x = torch.rand(4, 1, 4)
    pool = torch.rand(3, 1, 4, 4)
    before = pool.clone()
    with cuda_host.installed():
        reads = delta_step(pool, x, x, x, x, state_indices=torch.tensor([7, 1, -2, 3]), backend="cuda")
        drafts = torch.rand(2, 2, 1, 4)
        slots, accepted = torch.tensor([[0, 9], [2, 0]]), torch.tensor([2, 5])
        others = delta_step(before.clone(), drafts, drafts, drafts, drafts, state_indices=slots,
                            num_accepted_tokens=accepted, backend="cuda")  # fmt: skip
    assert torch.count_nonzero(reads[[0, 2, 3]]) == 0
    assert torch.count_nonzero(reads[1]) == 4
    assert torch.equal(pool[[0, 2]], before[[0, 2]])
    assert not torch.equal(pool[1], before[1])
    assert torch.count_nonzero(others) == 0


def test_more_blocks_than_a_gpu_takes_raise():
    """Before anything runs."""
    row = torch.zeros(1, 1).expand(2**34, 1)
    operands = CorrectionOperands(row, row, torch.zeros(1, 1), None, None, None, None, 1.0, 0.0, 0)
    with pytest.raises(ValueError, match="needs 4294967296 blocks for one launch"):
        cuda_host.library().correct(operands, row)


# Sanitizers, on a program of its own

SANITIZERS = {"address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "thread": ["-fsanitize=thread"]}
CHECKS = [Path(__file__).with_name(name) for name in ("cuda_host_check.cpp", "cuda_host_check_layer.cpp")]
KERNELS = [source for source in build.CUDA_SOURCES if source.endswith(".cu")]


class Program:
    """cuda_host_check*.cpp with the kernels of `sources`, built with a sanitizer."""

    def __init__(self, folder: Path, sources: Path, flags: list[str]) -> None:
        self.folder, self.sources = folder, sources
        self.flags = ["g++", "-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off", *flags]
        self.objects = {}

    def build(self) -> Program:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.compile, [*CHECKS, *(self.sources / source for source in KERNELS)]))
        return self

    def compile(self, source: Path) -> None:
        self.objects[source.name] = self.folder / f"{source.name}.o"
        self.call(*self.flags, "-I", self.sources, "-x", "c++", "-c", source, "-o", self.objects[source.name])

    def changed(self, folder: Path, source: str, right: str, wrong: str) -> Program:
        """Return the program with a kernel in which `wrong` replaces `right`."""
        copy = folder / "csrc"
        shutil.copytree(self.sources, copy)
        path = copy / source
        text = path.read_text()
        assert text.count(right) == 1
        path.write_text(text.replace(right, wrong))
        other = Program(folder, copy, [])
        other.flags, other.objects = self.flags, dict(self.objects)
        other.compile(copy / "cuda" / "scan_forward.cu")
        return other

    def run(self, seed: int) -> subprocess.CompletedProcess:
        program = self.folder / "check"
        self.call(*self.flags, *self.objects.values(), "-o", program, "-pthread")
        # ThreadSanitizer of older compilers cannot cope with how far newer kernels scatter addresses.
        fixed = ["setarch", "-R"]
        usable = shutil.which("setarch") and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
        command = [*(fixed if usable else []), str(program), str(seed)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    @staticmethod
    def call(*command: object) -> None:
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=SANITIZERS)
def sanitized(request, tmp_path_factory) -> tuple[str, Program]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, Program(folder, build.source_root(), SANITIZERS[request.param]).build()


def test_sanitizers_find_nothing(sanitized, request):
    _, program = sanitized
    done = program.run(request.config.getoption("--seed") % 2**31)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.endswith("right\n")


PLANTED = {
    "address": ("cuda/scan_forward.cu", "store(read, out.reads, offset(", "store(read, out.reads, 1 + offset("),
    "thread": ("cuda/scan_tiles.h", "      scan(i);\n    }\n    __syncthreads();\n", "      scan(i);\n    }\n"),
}
REPORTS = {"address": "AddressSanitizer: heap-buffer-overflow", "thread": "ThreadSanitizer: data race"}


def test_sanitizers_find_what_was_planted(sanitized, tmp_path):
    """A write one number past the reads, and tiles that are passed on without waiting."""
    name, program = sanitized
    done = program.changed(tmp_path, *PLANTED[name]).run(0)
    assert done.returncode != 0
    assert REPORTS[name] in done.stderr
    assert "forward_kernel" in done.stderr


# nvcc, where there is one: the header of the run says so

EVERY_RANK = build.CUDA_ARCHS[:1]  # on the others those that δ-mem uses, in a third of the time
RESOURCES = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[tuple[str, int, bool, int, int, int]]:
    """Kernel, rank (0: any), whether it is float32, architecture, bytes spilled and registers, for every kernel."""
    nvcc = build.nvcc()
    if nvcc is None:
        pytest.skip("no nvcc here: the CUDA kernels were not compiled for any GPU")
    folder = tmp_path_factory.mktemp("nvcc")
    flags = ["-std=c++17", "-Xptxas=-v", "-Werror=all-warnings"]

    def compile_one(task: tuple[str, str]) -> str:
        source, arch = task
        # What runs on the host is the same for all, and compiled with every rank alone.
        some = ["-c"] if arch in EVERY_RANK else ["-fatbin", "-DDELTAMEM_USUAL_RANKS"]
        command = [nvcc, *flags, *some, *build.nvcc_flags((arch,)), str(build.source_root() / source)]
        done = subprocess.run(
            [*command, "-o", str(folder / f"{Path(source).stem}_{arch}.o")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    tasks = sorted(
        itertools.product(KERNELS, build.CUDA_ARCHS), key=lambda task: "backward" not in task[0]
    )  # longest first
    with ThreadPoolExecutor(2) as pool:
        said = "\n".join(pool.map(compile_one, tasks))
    rows = []
    for name, arch, _, stores, loads, registers in RESOURCES.findall(said):
        kernel = re.search(r"(forward|backward|step|maps|fold|project|correct|adjoint)_kernel", name).group(1)
        number, rank = re.search(r"_kernelI([fd]?)(?:Li(\d+))?E", name).groups()
        rows.append((kernel, int(rank or 0), number != "d", int(arch), int(stores) + int(loads), int(registers)))
    return rows


@pytest.mark.parametrize("arch", build.CUDA_ARCHS)
def test_no_kernel_spills_registers(compiled, arch):
    """At the ranks that δ-mem's architecture uses."""
    usual = [row for row in compiled if row[1] in (0, 4, 8, 16) and row[2] and row[3] == int(arch)]
    by_rank = ("forward", "backward", "step", "maps", "maps", "fold", "fold")
    assert sorted(row[0] for row in usual) == sorted((*(3 * by_rank), "project", "correct", "adjoint"))
    for row in usual:
        print(row)
    assert not [row for row in usual if row[4] > 0]


def test_every_kernel_is_compiled(compiled):
    kernels = ("forward", "backward", "step")
    layer = {(kernel, 0, single) for kernel in ("project", "correct", "adjoint") for single in (True, False)}
    usual = {(kernel, rank, True) for kernel in kernels for rank in (4, 8, 16)} | layer
    others = {(kernel, rank, True) for kernel in kernels for rank in (32, 64, 128)}
    others |= {(kernel, rank, False) for kernel in kernels for rank in (32, 128)}
    for arch in build.CUDA_ARCHS:
        wanted = usual | others if arch in EVERY_RANK else usual
        assert wanted <= {row[:3] for row in compiled if row[3] == int(arch)}
