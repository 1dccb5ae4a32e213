"""Fixtures for tests that need a process of their own: the package in a folder without a library, and a stand-in for
csrc/ that compiles in a moment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltamem_kernels
from deltamem_kernels.backends.eager import FUNCTIONS
from deltamem_kernels.backends.native import build

STAND_IN = r"""
#include <Python.h>
#define JOINED(a, b) a##b
#define INIT(name) JOINED(PyInit_, name)
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, EAGER {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "stand_in", "", -1, methods};
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)(void) { return PyModule_Create(&module); }
"""

EAGER = "".join(f'{{"eager_{name}", answer, METH_NOARGS, ""}}, ' for name in FUNCTIONS)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory) -> Path:
    """The package and its sources as in the repository, without a library."""
    return copy_package(tmp_path_factory.mktemp("checkout"), build.source_root())


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Path:
    """The package with a few lines in place of the kernels. `library.load("cpu").answer()` is 42."""
    folder = tmp_path_factory.mktemp("stand in")  # spaces in paths, too
    sources = folder / "sources"
    for name in build.SOURCES:
        path = sources / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stand_in_source(42) if name == build.SOURCES[0] else "")
    return copy_package(folder, sources)


def stand_in_source(answer: int) -> str:
    return STAND_IN.replace("ANSWER", str(answer)).replace("EAGER", EAGER)


def copy_package(folder: Path, sources: Path) -> Path:
    here = Path(deltamem_kernels.__file__).parent
    ignored = shutil.ignore_patterns("_*_torch_*", "__pycache__", "csrc")
    shutil.copytree(here, folder / "deltamem_kernels", ignore=ignored)
    shutil.copytree(sources, folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def stand_in_library(stand_in, tmp_path_factory) -> Path:
    """The stand-in, compiled."""
    cache = tmp_path_factory.mktemp("whole")
    run_python(ANSWER, stand_in, cache)
    (library,) = libraries(cache)
    return library


ANSWER = "from deltamem_kernels.backends.native import library; print(library.load('cpu').answer())"


def start_python(program: str, root: Path, cache: Path, **environment: str) -> subprocess.Popen:
    """Start a new interpreter that sees the package at root and compiles into cache."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("DELTAMEM_", "TRITON_", "PYTHON"))}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=cache,
        env=inherited | {"PYTHONPATH": str(root), "TORCH_EXTENSIONS_DIR": str(cache)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_python(program: str, root: Path, cache: Path, **environment: str) -> tuple[str, str]:
    """Return what the program wrote to stdout and stderr."""
    return finished(start_python(program, root, cache, **environment))


def finished(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


def libraries(cache: Path) -> list[Path]:
    """Return the files of the cache. All of them must be libraries under their final names."""
    files = [x for x in cache.rglob("*") if not x.is_dir()]
    assert all(x.suffix == ".so" and x.parent == cache / "deltamem_kernels" for x in files), files
    assert [x for x in cache.rglob("*") if x.is_dir()] in ([], [cache / "deltamem_kernels"])
    return files


NOTICE = f"deltamem_kernels: compiling the CPU kernels for torch {torch.__version__}, once"
