"""Every test that takes `implementation` runs on each backend that this machine has; where there is no GPU, Triton's
kernels in its interpreter, and CUDA's played on threads. Inputs are random and fresh on every run; `--seed` repeats
one."""

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

from deltamem_kernels.backends import build, extension
from deltamem_kernels.backends.scan import force_scan

CUDA = torch.cuda.is_available()
pytest_plugins = ("processes",)


@dataclass(frozen=True)
class Implementation:
    """A backend, and for `cpu` the instruction set it uses."""

    name: str
    backend: str
    device: str = "cpu"
    isa: str | None = None
    slow: bool = False  # interpreted, or played on threads: a token costs milliseconds
    chunked: bool = False  # every scan in chunks side by side
    chunk: int = 64

    def __str__(self) -> str:
        return self.name


def implementations() -> list[Implementation]:
    cpu = [Implementation(f"cpu-{isa}", "cpu", isa=isa) for isa in extension.library().isas()]
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


SCANNING = (
    "test_parity",
    "test_autograd",
    "test_same_bits",
    "test_resources",
    "test_reference",
)  # where it makes a difference how a scan runs
LAYER = tuple(
    f"test_{x}"
    for x in ("attention_correction", "correction_norm_rope", "memory_projection", "memory_layer", "segment_mean")
)
OF_A_VECTOR = ("width", "length", "gate", "dtype", "16_bit", "head", "rank", "nan", "parity")
"""In the names of the layer's tests: what may depend on how many numbers a vector has runs on each instruction set."""
LONGEST = ("test_cuda.py", "test_triton_compile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: each is one process' work (pytest-xdist's loadfile)."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        scans = metafunc.module.__name__ in SCANNING
        chosen = [x for x in implementations() if scans or not x.chunked]
        if metafunc.module.__name__ in LAYER and not any(x in metafunc.function.__name__ for x in OF_A_VECTOR):
            widest = extension.library().isas()[0]
            chosen = [x for x in chosen if x.isa in (None, widest)]
        metafunc.parametrize("implementation", chosen, ids=str, indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    chosen = request.param
    with contextlib.ExitStack() as stack:
        if chosen.isa is not None:
            library = extension.library()
            stack.callback(library.use_isa, library.isa())
            library.use_isa(chosen.isa)
        if chosen.name == "cuda-host":
            stack.enter_context(cuda_host.installed())
        if chosen.chunked:
            stack.enter_context(force_scan(chunked=True))
        if chosen.chunked and chosen.backend == "triton":
            stack.enter_context(small_chunks(chosen.chunk))
        yield chosen


@contextlib.contextmanager
def small_chunks(tokens: int = 4, group: int = 2, programs: int = 3) -> Iterator[None]:
    """Chunks of few tokens, so that short sequences have many and more than one group, and backward's programs have
    several turns."""
    from deltamem_kernels.backends.triton import chunked, delta_update, launch
    from deltamem_kernels.ops import delta_update as operator

    with pytest.MonkeyPatch.context() as patch:
        for module in (operator, delta_update, launch):
            patch.setattr(module, "CHECKPOINT_INTERVAL", tokens)
        patch.setattr(chunked, "GROUP", group)
        patch.setattr(delta_update, "HISTORY_BYTES", programs * tokens * 8 * 8 * 4)
        yield


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Each test has its own inputs, whatever ran before it."""
    torch.manual_seed(request.config.getoption("--seed") + sum(map(ord, request.node.nodeid)))
