"""How the library comes to be: without a word where it was built before, with one line where it has to be compiled.
Shown with a stand-in in processes of their own; the self-check that runs before the tests compiles the real sources so.
"""

from __future__ import annotations

import os
import shutil
import signal
import sysconfig

import pytest
from processes import ANSWER, NOTICE, STAND_IN, finished, libraries, run_python, start_python

from deltamem_kernels.backends import build


def test_first_use_compiles_with_one_line(stand_in, tmp_path):
    """The second process has nothing to say."""
    for said in ([NOTICE], []):
        out, err = run_python(ANSWER, stand_in, tmp_path)
        assert (out, err.splitlines()) == ("42\n", said)
        assert len(libraries(tmp_path)) == 1


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
