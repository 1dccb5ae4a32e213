"""Every test that takes `implementation` runs on each backend of this machine. Without a GPU, Triton's kernels run in
its interpreter, and the CUDA kernels run on threads. Inputs are random, new on every run; `--seed` repeats a run."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is loaded: several test processes share the cores

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import cuda_host
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are loaded

from deltamem_kernels.backends.native import build, library
from deltamem_kernels.backends.scan_choice import force_scan
from deltamem_kernels.testing import ROUNDING

CUDA = torch.cuda.is_available()
pytest_plugins = ("processes", "upstream_stand_in")


@dataclass(frozen=True)
class Implementation:
    """A backend, and for `cpu` the instruction set it uses."""

    name: str
    backend: str
    device: str = "cpu"
    isa: str | None = None
    slow: bool = False
    """Interpreted, or run on threads: a token takes milliseconds."""
    chunked: bool = False
    """Every scan runs in parallel chunks."""
    chunk: int = 64

    def __str__(self) -> str:
        return self.name

    @property
    def rounding(self) -> dict[torch.dtype, float]:
        """The error of rounding once, in last bits. Triton's interpreter truncates bfloat16, where GPUs round."""
        return ROUNDING | ({torch.bfloat16: 1.0} if self.backend == "triton" and self.slow else {})


def implementations() -> list[Implementation]:
    cpu = [Implementation(f"cpu-{isa}", "cpu", isa=isa) for isa in library.load("cpu").isas()]
    triton = (
        Implementation("triton", "triton", "cuda")
        if CUDA
        else Implementation("triton-interpreted", "triton", slow=True)
    )
    cuda = Implementation("cuda", "cuda", "cuda") if CUDA else Implementation("cuda-host", "cuda", slow=True)
    cpu.append(replace(cpu[0], name=cpu[0].name + "-chunked", chunked=True))
    chunked = replace(triton, name=triton.name + "-chunked", chunked=True, chunk=4)
    return [Implementation("reference", "reference", "cuda" if CUDA else "cpu"), *cpu, triton, chunked, cuda]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of the random inputs")


def pytest_report_header(config: pytest.Config) -> list[str]:
    nvcc = build.nvcc() or "no nvcc: the CUDA kernels run here on threads and are not compiled for a GPU"
    return [f"random inputs: --seed {config.getoption('--seed')}", f"CUDA compiler: {nvcc}"]


LONGEST = ("test_cuda.py", "test_triton_compile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files that take longest first: each is the work of one process (pytest-xdist's loadfile)."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Choose the implementations of a test by its markers. Without `quick`, the slow ones make a slow test."""
    if "implementation" not in metafunc.fixturenames:
        return
    marked = metafunc.definition.get_closest_marker
    chosen = [x for x in implementations() if marked("each_scan") or not x.chunked]
    if marked("one_isa") and not marked("each_isa"):
        widest = library.load("cpu").isas()[0]
        chosen = [x for x in chosen if x.isa in (None, widest)]
    slow = () if marked("quick") else pytest.mark.slow
    parameters = [pytest.param(x, marks=slow if x.slow else ()) for x in chosen]
    metafunc.parametrize("implementation", parameters, ids=str, indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    chosen = request.param
    with contextlib.ExitStack() as stack:
        if chosen.isa is not None:
            kernels = library.load("cpu")
            stack.callback(kernels.use_isa, kernels.isa())
            kernels.use_isa(chosen.isa)
        if chosen.name == "cuda-host":
            stack.enter_context(cuda_host.installed())
        if chosen.chunked:
            stack.enter_context(force_scan(chunked=True))
        if chosen.chunked and chosen.backend == "triton":
            stack.enter_context(small_chunks(chosen.chunk))
        yield chosen


@contextlib.contextmanager
def small_chunks(tokens: int = 4, group: int = 2, programs: int = 3) -> Iterator[None]:
    """Shorten the chunks of the Triton kernels, so that short sequences have several groups of chunks, and backward's
    programs take several turns."""
    from deltamem_kernels.backends.triton.scan import sizes
    from deltamem_kernels.operands import scan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "CHECKPOINT_INTERVAL", tokens)
        patch.setattr(sizes, "CHUNK", tokens)
        patch.setattr(sizes, "GROUP", group)
        patch.setattr(sizes, "HISTORY_BYTES", programs * tokens * 8 * 8 * 4)
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched."""
    from deltamem_kernels.backends.triton import launch

    seen: list[str] = []
    start = launch.start
    monkeypatch.setattr(launch, "start", lambda each: (seen.append(each.kernel.fn.__name__), start(each)))
    return seen


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Each test has its own inputs, whatever ran before it."""
    torch.manual_seed(request.config.getoption("--seed") + sum(map(ord, request.node.nodeid)))
