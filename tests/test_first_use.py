"""The first use of the library: nothing is printed if it was built before, and one line if it has to be compiled. These
tests compile a stand-in in processes of their own. The self-check before the tests compiles the real sources that way.
"""

from __future__ import annotations

import os
import shutil
import signal
import sysconfig

import pytest
from processes import ANSWER, NOTICE, finished, libraries, run_python, stand_in_source, start_python

from deltamem_kernels.backends.native import build

pytestmark = pytest.mark.slow


def test_the_first_use_compiles_and_prints_one_line(stand_in, tmp_path):
    """The second process prints nothing."""
    for said in ([NOTICE], []):
        out, err = run_python(ANSWER, stand_in, tmp_path)
        assert (out, err.splitlines()) == ("42\n", said)
        assert len(libraries(tmp_path)) == 1


def test_two_processes_may_compile_at_the_same_time(stand_in, tmp_path):
    """Each ends with the library, and one file remains."""
    both = [start_python(ANSWER, stand_in, tmp_path) for _ in range(2)]
    for out, err in [finished(p) for p in both]:
        assert out == "42\n"
        assert err.splitlines() in ([NOTICE], [])  # the other may have finished before
    assert len(libraries(tmp_path)) == 1


def test_threads_compile_only_once(stand_in, tmp_path):
    program = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from deltamem_kernels.backends.native import library\n"
        "together = threading.Barrier(8)\n"
        "work = lambda _: (together.wait(), library.load('cpu').answer())[1]\n"
        "with ThreadPoolExecutor(8) as pool: print(*pool.map(work, range(8)))\n"
    )
    out, err = run_python(program, stand_in, tmp_path)
    assert out.split() == ["42"] * 8
    assert err.splitlines() == [NOTICE]


def test_a_killed_compilation_does_not_block_the_next(stand_in, tmp_path):
    """It leaves its own folder, but no lock and no partial library."""
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


def test_a_broken_library_is_rebuilt_after_it_is_removed(stand_in, stand_in_library, tmp_path):
    path = tmp_path / "deltamem_kernels" / stand_in_library.name
    path.parent.mkdir()
    path.write_bytes(stand_in_library.read_bytes()[:100])
    process = start_python(ANSWER, stand_in, tmp_path)
    _, err = process.communicate()
    assert process.returncode != 0
    assert f"BuildError: {path.name} does not load" in err
    path.unlink()
    assert run_python(ANSWER, stand_in, tmp_path)[0] == "42\n"


def test_changed_sources_are_recompiled(stand_in, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(stand_in, changed)
    main = changed / "csrc" / build.SOURCES[0]
    cache = tmp_path / "cache"
    cache.mkdir()
    for answer in (42, 43):
        main.write_text(stand_in_source(answer))
        assert run_python(ANSWER, changed, cache)[0] == f"{answer}\n"
    assert len(libraries(cache)) == 2


def test_a_library_for_another_torch_is_rebuilt_and_the_line_says_why(stand_in, tmp_path):
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
    """In the same process, as in a notebook after the compiler was installed. A compiler may fail when torch asks for
    its version, or on the sources."""
    wrong = tmp_path / "c++"
    right = shutil.which(os.environ.get("CXX", "c++").split()[0])
    answer = f'case "$*" in *-v*) exec {right} "$@";; esac; ' if answers_to_version else ""
    wrong.write_text(f"#!/bin/sh\n{answer}echo 'the compiler is on strike' >&2; exit 1\n")
    wrong.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    program = (
        "import os\n"
        "from deltamem_kernels.backends.native import library\n"
        "try: library.load('cpu')\n"
        "except library.BuildError as error: print(str(error).split(':')[0])\n"
        f"os.environ['CXX'] = {right!r}\n"
        "print(library.load('cpu').answer())\n"
    )
    out, err = run_python(program, stand_in, cache, CXX=str(wrong))
    assert out.splitlines() == ["compiling it failed", "42"], err
    assert err.splitlines().count(NOTICE) == 2  # torch may have more to say about such a compiler
    assert len(libraries(cache)) == 1
