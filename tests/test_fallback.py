"""Without the library: the status, one warning, and the error of a call that names the backend give the reason, and the
next backend runs."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from processes import NOTICE, libraries, run_python
from test_backends import call

import deltamem_kernels
from deltamem_kernels import BackendUnavailableError
from deltamem_kernels.backends import select
from deltamem_kernels.backends.native import BuildError, build, library

# In this process


@pytest.fixture
def nothing_built(tmp_path, monkeypatch) -> Path:
    """A package without a library, an empty cache, no compiler. Returns the package's folder."""
    folder = tmp_path / "deltamem_kernels"
    shutil.copytree(build.source_root(), folder / "csrc")
    monkeypatch.setattr(build, "_PACKAGE", folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "/nonexistent/c++ -O3")
    monkeypatch.setattr(select, "_chosen", {})
    clear_caches()
    yield folder
    monkeypatch.undo()
    clear_caches()


def clear_caches() -> None:
    library.missing.cache_clear()
    library.loaded.cache_clear()


def test_without_a_compiler_the_reason_names_it(nothing_built):
    reason = deltamem_kernels.backends()["cpu"].reason
    assert reason.startswith("no C++ compiler ('/nonexistent/c++' is not on PATH")
    with pytest.raises(BackendUnavailableError) as info:
        call("cpu")
    assert str(info.value) == f"backend 'cpu' cannot run on cpu: {reason}"
    with pytest.warns(UserWarning, match="deltamem_kernels: backend 'cpu' cannot run on cpu: no C") as said:
        call()
    assert len(said) == 1


def test_a_library_for_another_torch_is_not_loaded_without_a_compiler(nothing_built):
    """The message names both releases and what is missing to rebuild."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (nothing_built / f"_cpu_torch_2_11_0_0123456789ab{suffix}").write_bytes(b"no library")
    reason = deltamem_kernels.backends()["cpu"].reason
    assert "built for torch 2.11.0, not for this torch " + torch.__version__ in reason
    assert "no C++ compiler ('/nonexistent/c++'" in reason
    with pytest.raises(BackendUnavailableError, match=r"built for torch 2\.11\.0, not for this torch"):
        call("cpu")


def test_without_sources_the_reason_names_them(nothing_built):
    shutil.rmtree(nothing_built / "csrc")
    build_tool = shutil.which("true") or sys.executable
    os.environ["CXX"] = build_tool  # restored with the rest
    clear_caches()
    assert deltamem_kernels.backends()["cpu"].reason.startswith("the sources are missing (csrc/ is not next to")


def test_a_processor_without_kernels_is_named(nothing_built, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert deltamem_kernels.backends()["cpu"].reason == "the CPU kernels are not built for riscv64"


def test_a_built_library_needs_no_compiler(nothing_built, monkeypatch):
    """Whether it is in the package or in the cache."""
    for path in (build.built_ahead(build.library_name()), library.cached(build.library_name())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        clear_caches()
        assert deltamem_kernels.backends()["cpu"] == (True, "")
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["package", "cache"])
@pytest.mark.parametrize("content", ["empty", "text", "truncated"])
def test_a_broken_library_is_named_and_kept(nothing_built, stand_in_library, place, content):
    """The message names the file and says what to do."""
    whole = stand_in_library.read_bytes()
    name = build.library_name()
    path = build.built_ahead(name) if place == "package" else library.cached(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes({"empty": b"", "text": b"no library", "truncated": whole[:100]}[content])
    with pytest.raises(BuildError) as info:
        library.load("cpu")
    assert path.name in str(info.value)
    assert "does not load" in str(info.value)
    assert "remove it and it is rebuilt" in str(info.value)
    with pytest.warns(UserWarning, match=f"backend 'cpu' cannot run on cpu: {path.name} does not load"):
        call()
    with pytest.raises(BackendUnavailableError, match="does not load"):
        call("cpu")


# In processes of their own


FALLBACK = """
import warnings
import torch
import deltamem_kernels as d

x = torch.rand(1, 70, 2, 4, requires_grad=True)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        out = d.delta_update(x, x, x, x)
        (grad,) = torch.autograd.grad(out.reads.sum(), x)
same = d.delta_update(x, x, x, x, backend="reference")
assert torch.equal(out.reads, same.reads) and torch.equal(out.final_state, same.final_state)
assert torch.equal(grad, torch.autograd.grad(same.reads.sum(), x)[0])
for warning in said:
    print("warned:", *str(warning.message).split())
try:
    d.delta_update(x, x, x, x, backend="cpu")
except d.BackendUnavailableError as error:
    print("refused:", *str(error).split())
print("status:", *d.backends()["cpu"])
"""


def fallback(said: str) -> tuple[str, str, str]:
    """Return the reason given by the only warning, by the error and by the status."""
    cannot = "backend 'cpu' cannot run on cpu: "
    labels = (f"warned: deltamem_kernels: {cannot}", f"refused: {cannot}", "status: ")
    lines = said.splitlines()
    assert len(lines) == len(labels), said
    for line, label in zip(lines, labels, strict=True):
        assert line.startswith(label), said
    warned, refused, status = (x.removeprefix(y) for x, y in zip(lines, labels, strict=True))
    return warned, refused, status


@pytest.mark.slow
def test_the_message_repeats_what_the_compiler_said(stand_in, tmp_path):
    """Here the sources do not compile."""
    broken = tmp_path / "broken"
    shutil.copytree(stand_in, broken)
    (broken / "csrc" / build.SOURCES[0]).write_text('#error "this cannot be compiled"\n')
    cache = tmp_path / "cache"
    cache.mkdir()
    warned, refused, _ = fallback(run_python(FALLBACK, broken, cache)[0])
    for said in (warned, refused):
        assert said.startswith("compiling it failed: ")
        assert "this cannot be compiled" in said
    assert libraries(cache) == []


@pytest.mark.slow
def test_the_reference_takes_over_without_a_compiler(checkout, tmp_path):
    out, err = run_python(FALLBACK, checkout, tmp_path, CXX="/nonexistent")
    warned, refused, status = fallback(out)
    assert warned == refused == status.removeprefix("False ")
    assert warned.startswith("no C++ compiler ('/nonexistent' is not on PATH")
    assert err == ""
    assert libraries(tmp_path) == []


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without:
    \"\"\"Finds all modules but some, as where they are not installed.\"\"\"

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in MODULES else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
def test_the_package_imports_without_triton_ninja_and_compilers(checkout, tmp_path):
    """Import probes nothing. A call finds out what is missing and says so."""
    program = WITHOUT.replace("MODULES", "('triton', 'ninja')") + FALLBACK
    program += "print('triton:', d.backends()['triton'].reason)\n"
    out, err = run_python(program, checkout, tmp_path, PATH=str(tmp_path), CXX="c++")
    *lines, triton = out.splitlines()
    warned, refused, status = fallback("\n".join(lines))
    assert warned == refused == status.removeprefix("False ")
    assert warned.startswith("no C++ compiler ('c++' is not on PATH")
    assert err == ""
    assert triton.startswith("triton: ")
    assert triton != "triton: "


@pytest.mark.slow
def test_the_reference_takes_over_without_setuptools(checkout, tmp_path):
    """torch imports it to compile. Python brings none since 3.12."""
    out, err = run_python(WITHOUT.replace("MODULES", "('setuptools',)") + FALLBACK, checkout, tmp_path)
    warned, refused, status = fallback(out)
    assert warned == refused == status.removeprefix("False ")
    assert "No module named 'setuptools'" in warned
    assert err == ""


@pytest.mark.slow
def test_the_reference_takes_over_without_ninja(stand_in, tmp_path):
    """There is a compiler, so the lack of ninja shows only when the library is compiled. The environment's scripts,
    where ninja is, are found without being on PATH; here they are hidden."""
    hide = (
        "import sysconfig\n"
        "get_path = sysconfig.get_path\n"
        f"sysconfig.get_path = lambda name, *_: {str(tmp_path)!r} if name == 'scripts' else get_path(name, *_)\n"
    )
    tools, cache = tmp_path / "tools", tmp_path / "cache"
    tools.mkdir()
    cache.mkdir()
    for tool in ("c++", "as", "ld", "which"):
        if (found := shutil.which(tool)) is not None:
            (tools / tool).symlink_to(found)
    out, err = run_python(hide + FALLBACK, stand_in, cache, PATH=str(tools), CXX="c++")
    warned, refused, _ = fallback(out)
    assert warned == refused
    assert warned.startswith("compiling it failed: Ninja is required")
    assert set(err.splitlines()) == {NOTICE}


@pytest.mark.slow
def test_the_reference_takes_over_if_the_cache_cannot_be_written(stand_in, tmp_path):
    """A file has its name."""
    (tmp_path / "file").write_text("")
    out, err = run_python(FALLBACK, stand_in, tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    warned, refused, _ = fallback(out)
    assert warned == refused
    assert warned.startswith("compiling it failed: ")
    assert str(tmp_path / "file") in warned
    assert set(err.splitlines()) == {NOTICE}


def test_import_loads_no_compiler_and_no_gpu(checkout, tmp_path):
    program = (
        "import sys, torch, deltamem_kernels\n"
        "from deltamem_kernels import compat, testing\n"
        "lazy = ('triton', 'torch.utils.cpp_extension', 'setuptools', 'numpy.testing', 'pytest')\n"
        "print([m for m in lazy if m in sys.modules], torch.cuda.is_initialized())\n"
    )
    out, err = run_python(program, checkout, tmp_path)
    assert (out, err) == ("[] False\n", "")
    assert libraries(tmp_path) == []


@pytest.mark.slow
def test_asking_for_the_backends_compiles_nothing(checkout, tmp_path):
    program = "import deltamem_kernels; print(deltamem_kernels.backends()['cpu'])"
    out, err = run_python(program, checkout, tmp_path)
    assert (out, err) == ("BackendStatus(available=True, reason='')\n", "")
    assert libraries(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("module", ["compat", "backends.native.library", "operands", "testing"])
def test_every_module_can_be_imported_first(checkout, tmp_path, module):
    assert run_python(f"import deltamem_kernels.{module}", checkout, tmp_path) == ("", "")
