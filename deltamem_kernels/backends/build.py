"""What the compiled library is built from, and where it lies. setup.py loads this file by its path, without the
package: it must import nothing of it, and torch only inside functions."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = (
    *("bindings.cpp", "bindings_correction.cpp", "bindings_projection.cpp"),
    *("cpu/baseline.cpp", "cpu/avx2.cpp", "cpu/avx512.cpp"),
)


def source_root() -> Path:
    """csrc/, inside an installed package or beside the package in a checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def compile_flags() -> list[str]:
    # Contraction would make a result depend on how the compiler arranged the code around it.
    flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
    return flags + (["-fopenmp"] if sys.platform == "linux" else [])


def link_flags() -> list[str]:
    return ["-fopenmp"] if sys.platform == "linux" else []


def library_name() -> str:
    """The name tells what the library was built from: torch's release and a digest of sources, flags and torch. One
    built from anything else has another name, and is not loaded."""
    import torch

    digest = hashlib.sha256()
    for path in sorted(source_root().rglob("*")):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.relative_to(source_root()).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update(
        repr((compile_flags(), torch.__version__, platform.machine(), sysconfig.get_config_var("SOABI"))).encode()
    )
    release = "".join(c if c.isalnum() else "_" for c in torch.__version__)
    return f"_cpu_torch_{release}_{digest.hexdigest()[:12]}"


def built_ahead(name: str) -> Path:
    """Where setup.py puts the library."""
    return _PACKAGE / (name + sysconfig.get_config_var("EXT_SUFFIX"))


def built_for_another() -> str | None:
    """The torch release of a library that was built ahead, but not for the torch and the sources here."""
    for path in sorted(_PACKAGE.glob("_cpu_torch_*")):
        return path.name.split(".")[0].removeprefix("_cpu_torch_").rsplit("_", 1)[0].replace("_", ".")
    return None


def missing_tool() -> str | None:
    """What is lacking to compile the library here, or None."""
    if sys.platform == "win32":
        return "the CPU kernels are not built on Windows"
    if platform.machine() not in ("x86_64", "aarch64", "arm64"):
        return f"the CPU kernels are not built for {platform.machine()}"
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
        return f"the sources are missing ({source_root().name}/ is not beside or inside the package)"
    return None
