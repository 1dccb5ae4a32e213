"""The compiled libraries (csrc/): loaded if they were built ahead, else compiled on first use into torch's cache.

This is `cpu`, the backend for CPU tensors: vectorised over the rows of a state, threads over sequences and heads.
cuda.py has its library from here too.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path
from types import ModuleType

import torch
from torch._appdirs import user_cache_dir  # torch.utils.cpp_extension, which knows it too, needs setuptools

from . import build, composed
from .reference_projection import memory_projection_backward as memory_projection_backward
from .reference_projection import segment_mean_backward as segment_mean_backward
from .scan import choose_scan

_lock = threading.Lock()


class BuildError(RuntimeError):
    """The library could not be compiled or loaded; the message says why."""


def unavailable_reason(device: torch.device) -> str | None:
    """Why the `cpu` backend cannot run on tensors of this device, or None (it may have to be compiled first)."""
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    return _missing("cpu")


def library(kind: str = "cpu") -> ModuleType:
    """The library's module. The first call may compile: the CPU's about a minute of two cores, CUDA's half of that."""
    with _lock:
        return _library(kind)


def delta_update_forward(*operands):
    """See `reference.delta_update_forward`."""
    return _library("cpu").forward(*operands, choose_scan("cpu", *operands[0].shape[1:]).chunked)


def delta_update_backward(*operands):
    """See `reference.delta_update_backward`."""
    return _library("cpu").backward(*operands, choose_scan("cpu", *operands[2].shape[1:]).chunked)


def delta_step(*operands):
    """See `reference.delta_step`."""
    _library("cpu").step(*operands)


def correct(*operands):
    """See `reference.correct`."""
    return _library("cpu").correct(*operands)


def correct_backward(*operands):
    """See `reference.correct_backward`."""
    return _library("cpu").correct_backward(*operands)


def memory_projection_forward(*operands):
    """See `reference.memory_projection_forward`."""
    return _library("cpu").memory_projection(*operands)


def memory_decode(*operands):
    """See `composed.memory_decode`."""
    return _library("cpu").memory_decode(*operands)


def memory_prefill_forward(*operands):
    """See `composed.memory_prefill_forward`."""
    return composed.memory_prefill_forward(sys.modules[__name__], *operands)


def segment_mean_forward(*operands):
    """See `reference.segment_mean_forward`."""
    return _library("cpu").segment_mean(*operands)


@functools.cache
def _missing(kind: str) -> str | None:
    if any(path.exists() for _, path in _places(kind)):
        return None
    lacking = build.missing_tool(kind)
    other = build.built_for_another(kind)
    if lacking and other:
        return (
            f"it was built for torch {other}, not for this torch {torch.__version__}, and to build it anew: {lacking}"
        )
    return lacking


def fingerprint(operands: tuple) -> bytes | None:
    """None: the library's own (csrc/bindings/fingerprint.cpp) takes this one's place once it is in use."""
    return None


@functools.cache
def _library(kind: str) -> ModuleType:
    module = _found(kind)
    if kind == "cpu":
        global fingerprint
        fingerprint = module.fingerprint
    return module


def _found(kind: str) -> ModuleType:
    for name, path in _places(kind):
        if path.exists():
            return _load(name, path)
    lacking = build.missing_tool(kind)
    if lacking:
        raise BuildError(lacking)
    return _load(name, _compile(kind, name))


def _places(kind: str) -> list[tuple[str, Path]]:
    """The library built ahead, and that of the cache. For CUDA the latter is for the GPUs of this machine alone."""
    ahead = build.library_name(kind)
    here = ahead if kind == "cpu" else build.library_name(kind, _archs())
    return [(ahead, build.built_ahead(ahead)), (here, _cached(here))]


def _archs() -> tuple[str, ...]:
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return build.cuda_archs() or tuple(f"{major}{minor}" for major, minor in sorted(found)) or build.CUDA_ARCHS


def _cached(name: str) -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or user_cache_dir(appname="torch_extensions")
    return Path(root) / "deltamem_kernels" / (name + sysconfig.get_config_var("EXT_SUFFIX"))


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(f"{path.name} does not load: {error}; remove it and it is built anew") from error
    return module


def _compile(kind: str, name: str) -> Path:
    """Compiles beside the cache and moves the result there in one step: a process that is killed leaves no lock and
    no half a library, and two that compile at once both end with a whole one."""
    target = _cached(name)
    other = build.built_for_another(kind)
    why = f" (the installed library is for torch {other})" if other else ""
    print(
        f"deltamem_kernels: compiling the {kind.upper()} kernels for torch {torch.__version__}{why}, once",
        file=sys.stderr,
    )
    scripts = sysconfig.get_path("scripts")  # where pip puts ninja, also when the environment is not activated
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), scripts])
    try:
        from torch.utils import cpp_extension

        # After a failure torch would give the library another name.
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            cpp_extension.load(
                name,
                [str(build.source_root() / x) for x in (build.SOURCES if kind == "cpu" else build.CUDA_SOURCES)],
                extra_cflags=build.compile_flags(),
                extra_cuda_cflags=[] if kind == "cpu" else build.nvcc_flags(_archs()),
                extra_ldflags=build.link_flags(),
                with_cuda=kind == "cuda",
                build_directory=folder,
                is_python_module=False,
                is_standalone=False,
                verbose=False,
            )
            os.replace(Path(folder) / f"{name}.so", target)
    except Exception as error:  # whatever a compiler, ninja or torch's build machinery can come up with
        raise BuildError(f"compiling it failed: {error}") from error
    return target
