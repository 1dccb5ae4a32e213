"""Builds the library ahead where torch is at hand (`pip install --no-build-isolation .`). Without torch or a compiler
the package is plain Python, and compiles its sources on first use."""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup

spec = importlib.util.spec_from_file_location(
    "build_recipe", Path(__file__).parent / "deltamem_kernels/backends/build.py"
)
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)


def ahead() -> dict:
    """Extension and command for setuptools, or nothing."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    lacking = recipe.missing_tool()
    if lacking:
        print(f"deltamem_kernels: not compiled ahead: {lacking}", file=sys.stderr)
        return {}
    extension = CppExtension(
        f"deltamem_kernels.{recipe.library_name()}",
        [f"csrc/{source}" for source in recipe.SOURCES],
        extra_compile_args=recipe.compile_flags(),
        extra_link_args=recipe.link_flags(),
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**ahead())
