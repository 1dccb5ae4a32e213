"""Compile the libraries at install time if torch is importable (`pip install --no-build-isolation .`).

Without torch or a compiler the package installs as plain Python and compiles its sources on first use.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup

spec = importlib.util.spec_from_file_location(
    "build_recipe", Path(__file__).parent / "deltamem_kernels/backends/native/build.py"
)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


def build_options() -> dict:
    """Return setuptools' arguments for the extensions that can be compiled now."""
    build_cuda = os.environ.get("DELTAMEM_BUILD_CUDA", "")
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        if build_cuda == "1":
            raise
        return {}
    extensions = []
    if not report_if_skipped("cpu", recipe.missing_tool()):
        extensions.append(
            CppExtension(
                f"deltamem_kernels.{recipe.library_name()}",
                [f"csrc/{source}" for source in recipe.SOURCES],
                extra_compile_args=recipe.compile_flags(),
                extra_link_args=recipe.link_flags(),
            )
        )
    without_cuda = None if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    reason = "DELTAMEM_BUILD_CUDA=0" if build_cuda == "0" else without_cuda or recipe.missing_tool("cuda")
    if reason and build_cuda == "1":
        raise SystemExit(f"deltamem_kernels: DELTAMEM_BUILD_CUDA=1, but {reason}")
    if not report_if_skipped("cuda", reason):
        archs = recipe.cuda_archs() or recipe.CUDA_ARCHS
        extensions.append(
            CUDAExtension(
                f"deltamem_kernels.{recipe.library_name('cuda')}",
                [f"csrc/{source}" for source in recipe.CUDA_SOURCES],
                extra_compile_args={"cxx": recipe.compile_flags(), "nvcc": recipe.nvcc_flags(archs)},
                extra_link_args=recipe.link_flags(),
            )
        )
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}} if extensions else {}


def report_if_skipped(kind: str, reason: str | None) -> bool:
    """Print why a library is not compiled now, if there is a reason."""
    if reason:
        print(f"deltamem_kernels: {kind} not compiled ahead: {reason}", file=sys.stderr)
    return bool(reason)


setup(**build_options())
