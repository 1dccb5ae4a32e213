"""The compiled libraries of csrc/: loaded if they were built ahead, else compiled on first use into torch's cache."""

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
from torch._appdirs import user_cache_dir  # noqa: PLC2701 (torch.utils.cpp_extension has it too, but needs setuptools)

from . import build

_lock = threading.Lock()


class BuildError(RuntimeError):
    """The library could not be compiled or loaded. The message gives the reason."""


def load(kind: str) -> ModuleType:
    """Return the module of the library `kind`, "cpu" or "cuda". The first call may compile: the CPU kernels for about a
    minute of two cores, the CUDA kernels for half of that.

    Raises:
        BuildError: it cannot be compiled or loaded.
    """
    with _lock:
        return loaded(kind)


@functools.cache
def missing(kind: str) -> str | None:
    """Return what is lacking to load or compile the library, or None."""
    if any(path.exists() for _, path in places(kind)):
        return None
    lacking = build.missing_tool(kind)
    other = build.built_for_another(kind)
    if lacking and other:
        return f"it was built for torch {other}, not for this torch {torch.__version__}, and to rebuild it: {lacking}"
    return lacking


@functools.cache
def loaded(kind: str) -> ModuleType:
    """As `load`, without the lock: for calls after the first."""
    return _found(kind)


def _found(kind: str) -> ModuleType:
    for name, path in places(kind):
        if path.exists():
            return _load(name, path)
    lacking = build.missing_tool(kind)
    if lacking:
        raise BuildError(lacking)
    return _load(name, _compile(kind, name))


def places(kind: str) -> list[tuple[str, Path]]:
    """Names and paths of the library that was built ahead, and of the one in the cache. For CUDA the latter is only for
    the GPUs of this machine."""
    ahead = build.library_name(kind)
    here = ahead if kind == "cpu" else build.library_name(kind, _archs())
    return [(ahead, build.built_ahead(ahead)), (here, cached(here))]


def _archs() -> tuple[str, ...]:
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return build.cuda_archs() or tuple(f"{major}{minor}" for major, minor in sorted(found)) or build.CUDA_ARCHS


def cached(name: str) -> Path:
    """Return the library's path in torch's cache."""
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
        raise BuildError(f"{path.name} does not load: {error}; remove it and it is rebuilt") from error
    return module


def _compile(kind: str, name: str) -> Path:
    """Compile next to the cache and move the result there in one step. A killed process leaves no lock and no partial
    library, and of two processes that compile at once each ends with a complete one."""
    target = cached(name)
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
    except Exception as error:  # compilers, ninja and torch's build tools have no common type of error
        raise BuildError(f"compiling it failed: {error}") from error
    return target
