"""The build recipe of the compiled libraries, "cpu" and "cuda": sources, flags, names and places.

setup.py loads this file by its path, without the package. It must not import the package, and torch only inside
functions.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]
SOURCES = ("bindings/library.cpp", "cpu/baseline.cpp", "cpu/avx2.cpp", "cpu/avx512.cpp")
CUDA_SOURCES = (
    *("bindings/cuda.cpp", "bindings/cuda_layer.cpp"),
    *("cuda/scan_forward.cu", "cuda/scan_backward.cu", "cuda/chunk_scan.cu", "cuda/step.cu"),
    *("cuda/projection.cu", "cuda/correction.cu", "cuda/correction_backward.cu"),
)
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")


def source_root() -> Path:
    """Return csrc/: inside an installed package, or next to the package in a checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def compile_flags() -> list[str]:
    # Contracted multiply-adds would make a result depend on how the compiler arranges the surrounding code.
    flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
    return flags + (["-fopenmp"] if sys.platform == "linux" else [])


def cuda_archs() -> tuple[str, ...] | None:
    """Return the architectures that DELTAMEM_CUDA_ARCHS names, such as "80;90", or None if it is not set."""
    names = os.environ.get("DELTAMEM_CUDA_ARCHS", "").replace(",", ";").replace(" ", ";").replace(".", "").split(";")
    archs = {name for name in names if name}
    for arch in archs:
        if not arch.rstrip("af").isdigit():
            raise ValueError(f"DELTAMEM_CUDA_ARCHS must be numbers like 80;90;120, got {arch!r}")
    return tuple(sorted(archs, key=lambda arch: int(arch.rstrip("af")))) or None


def nvcc_flags(archs: tuple[str, ...]) -> list[str]:
    """Return nvcc's flags: machine code for each architecture, and PTX of the newest for later ones."""
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    return ["-O3", "-fmad=false", "-Xcompiler=-fvisibility=hidden", *codes]


def link_flags() -> list[str]:
    return ["-fopenmp"] if sys.platform == "linux" else []


def library_name(kind: str = "cpu", archs: tuple[str, ...] = ()) -> str:
    """Return the library's name. It contains torch's release and a digest of the sources, the flags and torch, so that
    a library built from anything else has another name and is not loaded. archs: for a library that is built only for
    these GPUs."""
    import torch

    digest = hashlib.sha256()
    for path in sorted(source_root().rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.relative_to(source_root()).as_posix().encode() + b"\0" + path.read_bytes())
    flags = compile_flags() if kind == "cpu" else (compile_flags(), nvcc_flags(archs or CUDA_ARCHS), archs)
    digest.update(repr((flags, torch.__version__, platform.machine(), sysconfig.get_config_var("SOABI"))).encode())
    release = "".join(c if c.isalnum() else "_" for c in torch.__version__)
    return f"_{kind}_torch_{release}_{digest.hexdigest()[:12]}"


def built_ahead(name: str) -> Path:
    """Return the path where setup.py puts the library."""
    return _PACKAGE / (name + sysconfig.get_config_var("EXT_SUFFIX"))


def built_for_another(kind: str = "cpu") -> str | None:
    """Return the torch release of a library that was built ahead for another torch or from other sources, or None."""
    for path in sorted(_PACKAGE.glob(f"_{kind}_torch_*")):
        return path.name.split(".")[0].removeprefix(f"_{kind}_torch_").rsplit("_", 1)[0].replace("_", ".")
    return None


def missing_tool(kind: str = "cpu") -> str | None:
    """Return what is missing to compile the library here, or None."""
    if sys.platform == "win32":
        return f"the {kind.upper()} kernels are not built on Windows"
    if platform.machine() not in ("x86_64", "aarch64", "arm64"):
        return f"the {kind.upper()} kernels are not built for {platform.machine()}"
    if kind == "cuda" and nvcc() is None:
        return "no CUDA compiler (nvcc is not on PATH; install the CUDA toolkit of torch's release, or set CUDA_HOME)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler!r} is not on PATH; install one, g++ 9 or newer, or set CXX)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python headers (install python3-dev)"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch's build tools do not import: {error}"
    if not source_root().is_dir():
        return f"the sources are missing ({source_root().name}/ is not next to the package or inside it)"
    return None


def nvcc() -> str | None:
    """Return the path of the CUDA compiler that torch would use, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for path in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and os.access(path, os.X_OK):
            return path
    return None
