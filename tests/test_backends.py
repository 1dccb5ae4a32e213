"""Which backend runs and why, and how the compiled library comes to be: without a word where it was built before, with
one line where it has to be compiled, and with a reason where it cannot be had.

Compiling the kernels takes long, so it is done once here. How the library is built, kept and refused is shown with a
stand-in of a few lines in place of csrc/, in processes of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from problems import MODES, cotangents_for, make

import deltamem_kernels
from deltamem_kernels import BackendStatus, BackendUnavailableError, delta_update
from deltamem_kernels.backends import build, choose, extension, reference
from deltamem_kernels.compat import triton_affine_scan

package = sys.modules["deltamem_kernels.backends"]  # as an attribute of the package, that name is the public function

CPU = torch.device("cpu")
NAMES = ("triton", "cuda", "cpu", "reference")
ON_THIS_GPU = torch.device("cuda") if torch.cuda.is_available() else CPU
STAND_IN = r"""
#include <Python.h>
#define JOINED(a, b) a##b
#define INIT(name) JOINED(PyInit_, name)
static PyObject* answer(PyObject*, PyObject*) { return PyLong_FromLong(ANSWER); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "stand_in", "", -1, methods};
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)(void) { return PyModule_Create(&module); }
"""


# The choice


def test_backends_are_the_four():
    found = deltamem_kernels.backends()
    assert tuple(found) == NAMES
    for name, status in found.items():
        assert type(status) is BackendStatus
        available, reason = status
        assert (available, reason) == (status.available, status.reason)
        assert type(available) is bool
        assert bool(status) is available
        assert type(reason) is str
        assert (reason == "") is available, f"{name}: a reason where and only where it cannot run"


def test_cpu_and_reference_run_everywhere():
    found = deltamem_kernels.backends()
    assert found["cpu"] == (True, "")
    assert found["reference"] == (True, "")


@pytest.mark.parametrize("name", NAMES)
def test_a_status_means_what_it_says(name):
    """What is said to run, runs; what is not, is refused with the same reason."""
    device = ON_THIS_GPU if name in ("triton", "cuda") else CPU
    x = torch.rand(1, 2, 1, 4, device=device)
    status = deltamem_kernels.backends()[name]
    if status:
        assert torch.isfinite(delta_update(x, x, x, x, backend=name).reads).all()
    else:
        with pytest.raises(BackendUnavailableError) as info:
            delta_update(x, x, x, x, backend=name)
        assert str(info.value).startswith(f"backend {name!r} cannot run on {device.type}")
        assert str(info.value).endswith(status.reason)


def test_an_unavailable_backend_is_both_kinds_of_error():
    """ValueError, as for every argument that does not fit, and RuntimeError, as torch has it for devices."""
    assert issubclass(BackendUnavailableError, ValueError)
    assert issubclass(BackendUnavailableError, RuntimeError)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The backends that calls went to, in order."""
    seen: list[str] = []
    monkeypatch.delenv("DELTAMEM_BACKEND", raising=False)
    for name, module in (("cpu", extension), ("reference", reference)):
        for function in ("delta_update_forward", "delta_update_backward"):
            original = getattr(module, function)

            def spy(*operands, name=name, original=original):
                seen.append(name)
                return original(*operands)

            monkeypatch.setattr(module, function, spy)
    return seen


def call(backend: str | None = None) -> None:
    x = torch.rand(1, 2, 1, 4, requires_grad=True)
    delta_update(x, x, x, x, backend=backend).reads.sum().backward()


def test_cpu_is_chosen_for_cpu_tensors(calls):
    assert choose("", CPU) is extension
    call()
    assert calls == ["cpu", "cpu"]


@pytest.mark.parametrize(("name", "module"), [("cpu", extension), ("reference", reference)])
def test_a_name_is_obeyed(calls, name, module):
    assert choose(name, CPU) is module
    call(name)
    assert calls == [name, name]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_environment_sets_the_default(calls, monkeypatch, name):
    """At each call, not once: also where another backend has been chosen before. An argument overrides it."""
    call()
    monkeypatch.setenv("DELTAMEM_BACKEND", name)
    call()
    other = "reference" if name == "cpu" else "cpu"
    call(other)
    x = torch.rand(1, 2, 4)
    triton_affine_scan(torch.rand(1, 4, 4), x, x, x, x, x, x)
    monkeypatch.setenv("DELTAMEM_BACKEND", "")
    call()
    assert calls == ["cpu", "cpu", name, name, other, other, name, "cpu", "cpu"]


def test_reference_for_devices_without_kernels(calls):
    for device in ("meta", "mps", "xpu"):
        assert choose("", torch.device(device)) is reference


def test_a_backend_that_cannot_be_had_is_named_once(calls, monkeypatch):
    """In a warning, since the next one is slower; and not at every call."""

    def library() -> None:
        raise extension.BuildError("the compiler is on strike")

    monkeypatch.setattr(extension, "library", library)
    monkeypatch.setattr(package, "_chosen", {})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
        call()
    assert [str(w.message) for w in said] == [
        "deltamem_kernels: backend 'cpu' cannot run on cpu: the compiler is on strike"
    ]
    assert calls == ["reference"] * 4
    with pytest.raises(BackendUnavailableError, match="backend 'cpu' cannot run on cpu: the compiler is on strike"):
        call("cpu")
    monkeypatch.setenv("DELTAMEM_BACKEND", "cpu")
    with pytest.raises(BackendUnavailableError, match="DELTAMEM_BACKEND 'cpu' cannot run on cpu: the compiler"):
        call()


# What a library is known by


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of csrc/ that may be changed."""
    copy = tmp_path / "csrc"
    shutil.copytree(build.source_root(), copy)
    monkeypatch.setattr(build, "source_root", lambda: copy)
    return copy


def test_library_name_is_the_same_for_the_same_sources(sources, monkeypatch):
    """Wherever they lie, and whatever else lies there."""
    name = build.library_name()
    (sources / "notes.txt").write_text("no source")
    (sources / "cpu" / "__pycache__").mkdir()
    assert build.library_name() == name
    monkeypatch.undo()
    assert build.library_name() == name


def test_library_name_tells_every_source(sources):
    """One byte of any file, a file more, a file less, a file elsewhere: never the same name twice."""
    files = sorted(x for x in sources.rglob("*") if x.suffix in (".h", ".cpp", ".cu"))
    assert {sources / x for x in (*build.SOURCES, *build.CUDA_SOURCES)} <= set(files)
    names = [build.library_name()]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        names.append(build.library_name())
        path.write_bytes(content)
    assert build.library_name() == names[0]
    (sources / "more.h").write_bytes(b"")
    names.append(build.library_name())
    (sources / "more.h").rename(sources / "cpu" / "more.h")
    names.append(build.library_name())
    files[0].unlink()
    names.append(build.library_name())
    assert len(set(names)) == len(names)


def test_library_name_tells_torch_and_flags(monkeypatch):
    name = build.library_name()
    release = "".join(c if c.isalnum() else "_" for c in torch.__version__)
    assert name.startswith(f"_cpu_torch_{release}_")
    assert name.isidentifier()
    names = {name}
    for version in ("2.11.0", "2.11.0+cu126", "2.11.0.cu126", "2.11.0a0+git0123"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "__version__", version)
            names.add(build.library_name())
    with monkeypatch.context() as patch:
        patch.setattr(build, "compile_flags", lambda: ["-O2"])
        names.add(build.library_name())
    with monkeypatch.context() as patch:
        patch.setattr(build.platform, "machine", lambda: "riscv64")
        names.add(build.library_name())
    assert len(names) == 7


# Refusals in words, in this process


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


# Compiling, in processes of their own


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The package and its sources as they come from the repository, without a library; compiled with less care, in
    less time, which changes no bit."""
    folder = copy_package(tmp_path_factory.mktemp("checkout"), build.source_root())
    recipe = folder / "deltamem_kernels" / "backends" / "build.py"
    text = recipe.read_text()
    assert text.count('"-O3"') >= 1
    recipe.write_text(text.replace('"-O3"', '"-O1"'))
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """The package with a few lines in place of the kernels: compiled in a moment. `library().answer()` is 42."""
    folder = tmp_path_factory.mktemp("stand in")  # spaces in paths, too
    sources = folder / "sources"
    for name in build.SOURCES:
        path = sources / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN.replace("ANSWER", "42") if name == build.SOURCES[0] else "")
    return copy_package(folder, sources)


def copy_package(folder: Path, sources: Path) -> Path:
    here = Path(deltamem_kernels.__file__).parent
    ignored = shutil.ignore_patterns("_*_torch_*", "__pycache__", "csrc")
    shutil.copytree(here, folder / "deltamem_kernels", ignore=ignored)
    shutil.copytree(sources, folder / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def stand_in_library(stand_in, tmp_path_factory) -> Path:
    """The stand-in, compiled."""
    cache = tmp_path_factory.mktemp("whole")
    run_python(ANSWER, stand_in, cache)
    (library,) = libraries(cache)
    return library


ANSWER = "from deltamem_kernels.backends import extension; print(extension.library().answer())"


def start_python(program: str, root: Path, cache: Path, **environment: str) -> subprocess.Popen:
    """A new interpreter that sees the package at root and keeps what it compiles in cache."""
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
    """What it wrote to stdout and stderr."""
    return finished(start_python(program, root, cache, **environment))


def finished(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out, err


def libraries(cache: Path) -> list[Path]:
    """The files of the cache: all of them must be libraries, whole and under their final names."""
    files = [x for x in cache.rglob("*") if not x.is_dir()]
    assert all(x.suffix == ".so" and x.parent == cache / "deltamem_kernels" for x in files), files
    assert [x for x in cache.rglob("*") if x.is_dir()] in ([], [cache / "deltamem_kernels"])
    return files


NOTICE = f"deltamem_kernels: compiling the CPU kernels for torch {torch.__version__}, once"


def test_first_use_compiles_with_one_line(checkout, tmp_path):
    """The second process has nothing to say. Both compute what the reference computes."""
    problem = make(T=70, R=8, mode=MODES[0])
    weights = cotangents_for(problem)
    torch.save((problem.operands, problem.options, weights), tmp_path / "problem.pt")
    expected = problem.forward_backward("cpu", weights)
    program = (
        "import torch, deltamem_kernels as d\n"
        f"operands, options, weights = torch.load({str(tmp_path / 'problem.pt')!r})\n"
        "leaves = [x.requires_grad_() for x in operands.values()]\n"
        "out = d.delta_update(**operands, **options)\n"
        "grads = torch.autograd.grad(out, leaves, list(weights.values()))\n"
        "torch.save([x.detach() for x in (*out, *grads)], 'results.pt')\n"
        "print(d.__file__)\n"
        "print(*(n for n, status in d.backends().items() if status))\n"
    )
    for said in ([NOTICE], []):
        cache = tmp_path / "cache"
        cache.mkdir(exist_ok=True)
        out, err = run_python(program, checkout, cache)
        assert err.splitlines() == said
        where, available = out.splitlines()
        assert Path(where).is_relative_to(checkout)
        assert {"cpu", "reference"} <= set(available.split())
        results = torch.load(cache / "results.pt")
        for name, ours, here in zip(expected, results, expected.values(), strict=True):
            assert torch.equal(ours, here), name  # the same sources and flags: the same bits
        (cache / "results.pt").unlink()
        assert len(libraries(cache)) == 1


def test_two_processes_compile_at_the_same_time(stand_in, tmp_path):
    """Each has the library in the end, and one is kept."""
    both = [start_python(ANSWER, stand_in, tmp_path) for _ in range(2)]
    for out, err in [finished(p) for p in both]:
        assert out == "42\n"
        assert err.splitlines() in ([NOTICE], [])  # nothing, where the other had finished before
    assert len(libraries(tmp_path)) == 1


def test_threads_compile_once(stand_in, tmp_path):
    program = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from deltamem_kernels.backends import extension\n"
        "together = threading.Barrier(8)\n"
        "work = lambda _: (together.wait(), extension.library().answer())[1]\n"
        "with ThreadPoolExecutor(8) as pool: print(*pool.map(work, range(8)))\n"
    )
    out, err = run_python(program, stand_in, tmp_path)
    assert out.split() == ["42"] * 8
    assert err.splitlines() == [NOTICE]


def test_a_killed_compilation_blocks_nobody(stand_in, tmp_path):
    """It leaves a folder of its own, and neither a lock nor half a library."""
    process = start_python(ANSWER, stand_in, tmp_path)
    while not list(tmp_path.rglob("build.ninja")):  # the compiler is at work
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    left = list((tmp_path / "deltamem_kernels").iterdir())
    assert [x.is_dir() for x in left] == [True]
    out, err = run_python(ANSWER, stand_in, tmp_path)
    assert (out, err.splitlines()) == ("42\n", [NOTICE])
    shutil.rmtree(left[0])
    assert len(libraries(tmp_path)) == 1


def test_a_broken_library_is_built_anew_once_it_is_removed(stand_in, stand_in_library, tmp_path):
    path = tmp_path / "deltamem_kernels" / stand_in_library.name
    path.parent.mkdir()
    path.write_bytes(stand_in_library.read_bytes()[:100])
    process = start_python(ANSWER, stand_in, tmp_path)
    _, err = process.communicate()
    assert process.returncode != 0
    assert f"BuildError: {path.name} does not load" in err
    path.unlink()
    assert run_python(ANSWER, stand_in, tmp_path)[0] == "42\n"


def test_changed_sources_are_compiled_anew(stand_in, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(stand_in, changed)
    main = changed / "csrc" / build.SOURCES[0]
    cache = tmp_path / "cache"
    cache.mkdir()
    for answer in ("42", "43"):
        main.write_text(STAND_IN.replace("ANSWER", answer))
        assert run_python(ANSWER, changed, cache)[0] == f"{answer}\n"
    assert len(libraries(cache)) == 2


def test_a_library_for_another_torch_is_replaced_with_a_word(stand_in, tmp_path):
    """Where there is a compiler, it is built anew, and the line says why."""
    installed = tmp_path / "installed"
    shutil.copytree(stand_in, installed)
    other = f"_cpu_torch_2_11_0_0123456789ab{sysconfig.get_config_var('EXT_SUFFIX')}"
    (installed / "deltamem_kernels" / other).write_bytes(b"no library")
    cache = tmp_path / "cache"
    cache.mkdir()
    out, err = run_python(ANSWER, installed, cache)
    assert out == "42\n"
    assert err.splitlines() == [NOTICE.removesuffix(", once") + " (the installed library is for torch 2.11.0), once"]


@pytest.mark.parametrize("answers_to_version", [False, True])
def test_a_failed_compilation_can_be_repeated(stand_in, tmp_path, answers_to_version):
    """In the same process, as a notebook does once the compiler is there. A compiler may fail when torch asks for its
    version, or at the sources."""
    wrong = tmp_path / "c++"
    right = shutil.which(os.environ.get("CXX", "c++").split()[0])
    answer = f'case "$*" in *-v*) exec {right} "$@";; esac; ' if answers_to_version else ""
    wrong.write_text(f"#!/bin/sh\n{answer}echo 'the compiler is on strike' >&2; exit 1\n")
    wrong.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    program = (
        "import os\n"
        "from deltamem_kernels.backends import extension\n"
        "try: extension.library()\n"
        "except extension.BuildError as error: print(str(error).split(':')[0])\n"
        f"os.environ['CXX'] = {right!r}\n"
        "print(extension.library().answer())\n"
    )
    out, err = run_python(program, stand_in, cache, CXX=str(wrong))
    assert out.splitlines() == ["compiling it failed", "42"], err
    assert err.splitlines().count(NOTICE) == 2  # torch may have more to say about such a compiler
    assert len(libraries(cache)) == 1


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
