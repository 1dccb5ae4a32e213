"""Every test that takes `implementation` runs on each backend that this machine has; where there is no GPU, Triton's
kernels in its interpreter, and CUDA's played on threads. Inputs are random and fresh on every run; `--seed` repeats
one."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import cuda_host
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are loaded

from deltamem_kernels.backends import build, extension

CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Implementation:
    """A backend, and for `cpu` the instruction set it uses."""

    name: str
    backend: str
    device: str = "cpu"
    isa: str | None = None
    slow: bool = False  # interpreted, or played on threads: a token costs milliseconds

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
    return [Implementation("reference", "reference", "cuda" if CUDA else "cpu"), *cpu, triton, cuda]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=random.SystemRandom().randrange(2**31), help="of the random inputs")


def pytest_report_header(config: pytest.Config) -> list[str]:
    nvcc = build.nvcc() or "no nvcc: the CUDA kernels run here on threads and are not compiled for a GPU"
    return [f"random inputs: --seed {config.getoption('--seed')}", f"CUDA compiler: {nvcc}"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", implementations(), ids=str, indirect=True)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    chosen = request.param
    if chosen.name == "cuda-host":
        with cuda_host.installed():
            yield chosen
        return
    if chosen.isa is None:
        yield chosen
        return
    library = extension.library()
    before = library.isa()
    library.use_isa(chosen.isa)
    yield chosen
    library.use_isa(before)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Each test has its own inputs, whatever ran before it."""
    torch.manual_seed(request.config.getoption("--seed") + sum(map(ord, request.node.nodeid)))
