"""The compiled library (csrc/): loaded if it was built ahead, else compiled on first use into torch's cache.

`cpu` is its backend for CPU tensors: vectorised over the rows of a state, threads over sequences and heads.
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

from . import build
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
    return _missing()


def library() -> ModuleType:
    """The library's module. The first call may compile, about 15 seconds of two cores."""
    with _lock:
        return _library()


def delta_update_forward(*operands):
    """See `reference.delta_update_forward`."""
    return _library().forward(*operands, choose_scan("cpu", *operands[0].shape[1:]).chunked)


def delta_update_backward(*operands):
    """See `reference.delta_update_backward`."""
    return _library().backward(*operands, choose_scan("cpu", *operands[2].shape[1:]).chunked)


def delta_step(*operands):
    """See `reference.delta_step`."""
    _library().step(*operands)


def correct(*operands):
    """See `reference.correct`."""
    return _library().correct(*operands)


def correct_backward(*operands):
    """See `reference.correct_backward`."""
    return _library().correct_backward(*operands)


def memory_projection_forward(*operands):
    """See `reference.memory_projection_forward`."""
    return _library().memory_projection(*operands)


def segment_mean_forward(*operands):
    """See `reference.segment_mean_forward`."""
    return _library().segment_mean(*operands)


@functools.cache
def _missing() -> str | None:
    if build.built_ahead(build.library_name()).exists() or _cached(build.library_name()).exists():
        return None
    lacking = build.missing_tool()
    other = build.built_for_another()
    if lacking and other:
        return (
            f"it was built for torch {other}, not for this torch {torch.__version__}, and to build it anew: {lacking}"
        )
    return lacking


@functools.cache
def _library() -> ModuleType:
    name = build.library_name()
    for path in (build.built_ahead(name), _cached(name)):
        if path.exists():
            return _load(name, path)
    lacking = build.missing_tool()
    if lacking:
        raise BuildError(lacking)
    return _load(name, _compile(name))


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


def _compile(name: str) -> Path:
    """Compiles beside the cache and moves the result there in one step: a process that is killed leaves no lock and
    no half a library, and two that compile at once both end with a whole one."""
    target = _cached(name)
    other = build.built_for_another()
    why = f" (the installed library is for torch {other})" if other else ""
    print(f"deltamem_kernels: compiling the CPU kernels for torch {torch.__version__}{why}, once", file=sys.stderr)
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
                [str(build.source_root() / source) for source in build.SOURCES],
                extra_cflags=build.compile_flags(),
                extra_ldflags=build.link_flags(),
                build_directory=folder,
                is_python_module=False,
                is_standalone=False,
                verbose=False,
            )
            os.replace(Path(folder) / f"{name}.so", target)
    except Exception as error:  # whatever a compiler, ninja or torch's build machinery can come up with
        raise BuildError(f"compiling it failed: {error}") from error
    return target
