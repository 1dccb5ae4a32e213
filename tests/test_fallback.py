"""Where the library cannot be had: the reason in words, in the status, in one warning and in the error of who asked for
it by name; everything else goes on."""

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
from deltamem_kernels.backends import build, extension

package = sys.modules["deltamem_kernels.backends"]  # as an attribute of the package, that name is the public function

# In this process


@pytest.fixture
def nothing_built(tmp_path, monkeypatch) -> Path:
    """A package without a library, an empty cache, no compiler. Returns the package's folder."""
    folder = tmp_path / "deltamem_kernels"
    shutil.copytree(build.source_root(), folder / "csrc")
    monkeypatch.setattr(build, "_PACKAGE", folder)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "/nonexistent/c++ -O3")
    monkeypatch.setattr(package, "_chosen", {})
    clear_caches()
    yield folder
    monkeypatch.undo()
    clear_caches()


def clear_caches() -> None:
    extension._missing.cache_clear()
    extension._library.cache_clear()


def test_no_compiler(nothing_built):
    reason = deltamem_kernels.backends()["cpu"].reason
    assert reason.startswith("no C++ compiler ('/nonexistent/c++' is not on PATH")
    with pytest.raises(BackendUnavailableError) as info:
        call("cpu")
    assert str(info.value) == f"backend 'cpu' cannot run on cpu: {reason}"
    with pytest.warns(UserWarning, match="deltamem_kernels: backend 'cpu' cannot run on cpu: no C") as said:
        call()
    assert len(said) == 1


def test_a_library_for_another_torch_and_no_compiler(nothing_built):
    """Not loaded, whatever it is: the message names both releases and what is lacking."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    (nothing_built / f"_cpu_torch_2_11_0_0123456789ab{suffix}").write_bytes(b"no library")
    reason = deltamem_kernels.backends()["cpu"].reason
    assert "built for torch 2.11.0, not for this torch " + torch.__version__ in reason
    assert "no C++ compiler ('/nonexistent/c++'" in reason
    with pytest.raises(BackendUnavailableError, match=r"built for torch 2\.11\.0, not for this torch"):
        call("cpu")


def test_no_sources(nothing_built):
    shutil.rmtree(nothing_built / "csrc")
    build_tool = shutil.which("true") or sys.executable
    os.environ["CXX"] = build_tool  # restored with the rest
    clear_caches()
    assert deltamem_kernels.backends()["cpu"].reason.startswith("the sources are missing (csrc/ is not beside")


def test_a_processor_without_kernels(nothing_built, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert deltamem_kernels.backends()["cpu"].reason == "the CPU kernels are not built for riscv64"


def test_a_built_library_needs_no_compiler(nothing_built, monkeypatch):
    """Neither ahead, in the package, nor in the cache."""
    for path in (build.built_ahead(build.library_name()), extension._cached(build.library_name())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        clear_caches()
        assert deltamem_kernels.backends()["cpu"] == (True, "")
        path.unlink()


@pytest.mark.parametrize("place", ["package", "cache"])
@pytest.mark.parametrize("content", ["empty", "text", "truncated"])
def test_a_broken_library_is_named(nothing_built, stand_in_library, place, content):
    """It is not removed behind the user's back; the message says which file it is and what to do."""
    whole = stand_in_library.read_bytes()
    name = build.library_name()
    path = build.built_ahead(name) if place == "package" else extension._cached(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes({"empty": b"", "text": b"no library", "truncated": whole[:100]}[content])
    with pytest.raises(extension.BuildError) as info:
        extension.library()
    assert path.name in str(info.value)
    assert "does not load" in str(info.value)
    assert "remove it and it is built anew" in str(info.value)
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
    """The cause in the only warning, in the error, and in the status."""
    cannot = "backend 'cpu' cannot run on cpu: "
    labels = (f"warned: deltamem_kernels: {cannot}", f"refused: {cannot}", "status: ")
    lines = said.splitlines()
    assert len(lines) == len(labels), said
    for line, label in zip(lines, labels, strict=True):
        assert line.startswith(label), said
    warned, refused, status = (x.removeprefix(y) for x, y in zip(lines, labels, strict=True))
    return warned, refused, status


def test_the_compilers_words_are_handed_on(stand_in, tmp_path):
    """Where the sources do not compile, the message says what the compiler said."""
    broken = tmp_path / "broken"
    shutil.copytree(stand_in, broken)
    (broken / "csrc" / build.SOURCES[0]).write_text('#error "nobody can compile this"\n')
    cache = tmp_path / "cache"
    cache.mkdir()
    warned, refused, _ = fallback(run_python(FALLBACK, broken, cache)[0])
    for said in (warned, refused):
        assert said.startswith("compiling it failed: ")
        assert "nobody can compile this" in said
    assert libraries(cache) == []


def test_fallback_without_a_compiler(checkout, tmp_path):
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


def test_import_without_triton_ninja_and_compilers(checkout, tmp_path):
    """Nothing is probed at import; a call finds out and says what is lacking."""
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


def test_fallback_without_setuptools(checkout, tmp_path):
    """torch imports it to compile. Python brings none since 3.12."""
    out, err = run_python(WITHOUT.replace("MODULES", "('setuptools',)") + FALLBACK, checkout, tmp_path)
    warned, refused, status = fallback(out)
    assert warned == refused == status.removeprefix("False ")
    assert "No module named 'setuptools'" in warned
    assert err == ""


def test_fallback_without_ninja(stand_in, tmp_path):
    """There is a compiler, so the library seems to be at hand until it is compiled: the reason is in words all the
    same. Scripts of the environment, where ninja lies, are found without being on PATH: here they are elsewhere."""
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


def test_fallback_where_the_cache_cannot_be_written(stand_in, tmp_path):
    """The place is a file."""
    (tmp_path / "file").write_text("")
    out, err = run_python(FALLBACK, stand_in, tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    warned, refused, _ = fallback(out)
    assert warned == refused
    assert warned.startswith("compiling it failed: ")
    assert str(tmp_path / "file") in warned
    assert set(err.splitlines()) == {NOTICE}


def test_import_touches_nothing(checkout, tmp_path):
    """No triton, no compiler, no GPU context: import is quick, and what is not used is not needed."""
    program = (
        "import sys, torch, deltamem_kernels\n"
        "from deltamem_kernels import compat\n"
        "lazy = ('triton', 'torch.utils.cpp_extension', 'setuptools', 'numpy.testing')\n"
        "print([m for m in lazy if m in sys.modules], torch.cuda.is_initialized())\n"
    )
    out, err = run_python(program, checkout, tmp_path)
    assert (out, err) == ("[] False\n", "")
    assert libraries(tmp_path) == []


def test_backends_compiles_nothing(checkout, tmp_path):
    program = "import deltamem_kernels; print(deltamem_kernels.backends()['cpu'])"
    out, err = run_python(program, checkout, tmp_path)
    assert (out, err) == ("BackendStatus(available=True, reason='')\n", "")
    assert libraries(tmp_path) == []


@pytest.mark.parametrize("module", ["compat", "backends.extension"])
def test_every_module_can_be_imported_first(checkout, tmp_path, module):
    assert run_python(f"import deltamem_kernels.{module}", checkout, tmp_path) == ("", "")
