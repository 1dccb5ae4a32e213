"""Build the CUDA kernels with the C++ compiler, run on threads (csrc/cuda/host_emulation.h), for CPU tensors.

It is not a backend that users can select: `installed` puts it in the place of "cuda" during a test.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import cpp_extension

from deltamem_kernels.backends import select
from deltamem_kernels.backends.native import CudaBackend, build
from deltamem_kernels.backends.native import library as libraries
from deltamem_kernels.backends.scan_choice import force_scan

FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-DDELTAMEM_CUDA_HOST", "-Wno-unknown-pragmas", "-Wno-psabi"]


@functools.cache
def library() -> ModuleType:
    """Compiled once for these sources and this torch, about half a minute of two cores."""
    digest = hashlib.sha256(repr((build.library_name("cuda"), FLAGS)).encode()).hexdigest()[:12]
    name = f"_cuda_host_{digest}"
    path = libraries.cached(name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            cpp_extension.load(
                name, wrapped(Path(folder)), extra_cflags=FLAGS, build_directory=folder, is_python_module=False
            )
            os.replace(Path(folder) / f"{name}.so", path)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrapped(folder: Path) -> list[str]:
    """The sources under names that no compiler takes for CUDA."""
    files = []
    for source in build.CUDA_SOURCES:
        file = folder / (Path(source).stem + ".cpp")
        file.write_text(f'#include "{build.source_root() / source}"\n')
        files.append(str(file))
    return files


class EmulatedCudaBackend(CudaBackend):
    """The backend "cuda" with the kernels that run on threads."""

    @property
    def kernels(self) -> ModuleType:
        return library()


@contextlib.contextmanager
def installed(chunked: bool | None = None) -> Iterator[None]:
    """Use the emulation as the backend "cuda" of CPU tensors. chunked: whether scans run in chunks; None for the usual
    choice."""
    with contextlib.nullcontext() if chunked is None else force_scan(chunked), pytest.MonkeyPatch.context() as patch:
        patch.setitem(select._chosen, ("cuda", torch.device("cpu")), EmulatedCudaBackend())
        yield
