"""The `cuda` backend without a GPU: why it cannot run, what it would be built from, when it is chosen, and that the
other backends run without it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deltamem_kernels
from deltamem_kernels import BackendUnavailableError, delta_update
from deltamem_kernels.backends import choose, select
from deltamem_kernels.backends.native import BuildError, build, library
from deltamem_kernels.backends.select import BACKENDS
from deltamem_kernels.operands import StepOperands

GPU = torch.device("cuda", 0)
CALLS = {"scan": (None, False), "scan_backward": (SimpleNamespace(mask=None), None, None, []), "step": (None,)}
"""Methods of a backend and arguments that a stand-in does not read."""


# Why it cannot run


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A torch with CUDA and a GPU of compute capability 9.0, an nvcc, and nothing compiled yet."""
    root = build.source_root()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(build, "nvcc", lambda: "/opt/nvcc")
    monkeypatch.setattr(build, "_PACKAGE", tmp_path / "deltamem_kernels")
    monkeypatch.setattr(build, "source_root", lambda: root)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("DELTAMEM_CUDA_ARCHS", raising=False)
    library.missing.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.missing.cache_clear()


def test_with_a_gpu_and_nvcc_it_can_be_built(gpu):
    assert BACKENDS["cuda"].unavailable_reason(GPU) is None


def test_a_torch_without_cuda_is_named(gpu):
    gpu.setattr(torch.version, "cuda", None)
    assert BACKENDS["cuda"].unavailable_reason(GPU) == f"this torch {torch.__version__} is built without CUDA"


def test_without_a_gpu_it_cannot_run(gpu):
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKENDS["cuda"].unavailable_reason(torch.device("cpu")) == "torch sees no GPU"


def test_it_does_not_run_on_cpu_tensors(gpu):
    assert BACKENDS["cuda"].unavailable_reason(torch.device("cpu")) == "it runs on CUDA tensors, not on cpu"


def test_a_gpu_that_is_too_old_is_named(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "need compute capability 8.0, this GPU has 7.5" in BACKENDS["cuda"].unavailable_reason(GPU)


def test_without_nvcc_it_cannot_be_built(gpu):
    gpu.setattr(build, "nvcc", lambda: None)
    assert BACKENDS["cuda"].unavailable_reason(GPU).startswith("no CUDA compiler (nvcc is not on PATH")


def test_architectures_that_do_not_exist_are_named(gpu):
    gpu.setenv("DELTAMEM_CUDA_ARCHS", "hopper")
    assert (
        BACKENDS["cuda"].unavailable_reason(GPU) == "DELTAMEM_CUDA_ARCHS must be numbers like 80;90;120, got 'hopper'"
    )


def test_a_built_library_needs_no_nvcc(gpu):
    """Ahead, for all architectures, or in the cache, for the GPUs of this machine."""
    gpu.setattr(build, "nvcc", lambda: None)
    ahead, here = library.places("cuda")
    assert ahead[0] == build.library_name("cuda")
    assert here[0] == build.library_name("cuda", ("90",))
    for _, path in (ahead, here):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        library.missing.cache_clear()
        assert BACKENDS["cuda"].unavailable_reason(GPU) is None
        path.unlink()


def test_a_library_for_another_torch_is_named(gpu):
    gpu.setattr(build, "nvcc", lambda: None)
    path = build.built_ahead("_cuda_torch_2_11_0_0123456789ab")
    path.parent.mkdir()
    path.write_bytes(b"")
    assert BACKENDS["cuda"].unavailable_reason(GPU).startswith("it was built for torch 2.11.0, not for this torch")


def test_a_failed_compilation_raises_with_one_notice(gpu, capfd, tmp_path):
    wrong = tmp_path / "toolkit" / "bin" / "nvcc"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("#!/bin/sh\necho 'the compiler is on strike' >&2; exit 1\n")
    wrong.chmod(0o755)
    gpu.setattr("torch.utils.cpp_extension.CUDA_HOME", str(wrong.parent.parent))
    with pytest.raises(BuildError, match="compiling it failed"):
        library.loaded("cuda")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("deltamem_kernels")]
    assert said == [f"deltamem_kernels: compiling the CUDA kernels for torch {torch.__version__}, once"]


# What it is built from


def test_architectures_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("DELTAMEM_CUDA_ARCHS", raising=False)
    assert build.cuda_archs() is None
    for text in ("80;120;90", "9.0, 8.0 12.0"):
        monkeypatch.setenv("DELTAMEM_CUDA_ARCHS", text)
        assert build.cuda_archs() == ("80", "90", "120")
    assert [x for x in build.nvcc_flags(build.cuda_archs()) if "arch" in x] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    monkeypatch.setenv("DELTAMEM_CUDA_ARCHS", "hopper")
    with pytest.raises(ValueError, match="DELTAMEM_CUDA_ARCHS must be numbers like 80;90;120, got 'hopper'"):
        build.cuda_archs()


def test_library_names_depend_on_the_architectures():
    names = {build.library_name(), build.library_name("cuda")}
    names |= {build.library_name("cuda", archs) for archs in (("80",), ("90",), ("80", "90"), build.CUDA_ARCHS)}
    assert len(names) == 6


def test_kernels_include_no_torch_header():
    for path in (path for folder in ("core", "cpu", "cuda") for path in (build.source_root() / folder).iterdir()):
        if path.is_file():
            included = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not [x for x in included if any(word in x for word in ("torch", "ATen", "c10", "bindings"))], path


@pytest.mark.slow
@pytest.mark.parametrize(("wanted", "said"), [("", "cuda not compiled ahead: torch"), ("0", "DELTAMEM_BUILD_CUDA=0")])
def test_setup_without_cuda_says_so(wanted, said):
    done = setup_py(wanted)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr


@pytest.mark.slow
def test_setup_raises_if_requested_cuda_kernels_cannot_be_built():
    done = setup_py("1")
    assert done.returncode != 0
    assert f"DELTAMEM_BUILD_CUDA=1, but torch {torch.__version__} is built without CUDA" in done.stderr


def setup_py(wanted: str) -> subprocess.CompletedProcess:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA: setup.py compiles")
    root = Path(__file__).parent.parent
    environment = os.environ | {"DELTAMEM_BUILD_CUDA": wanted}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


# When it is chosen


class StandIn:
    """A backend that records its calls, or fails."""

    def __init__(self, name: str, calls: list[str], reasons: dict[str, str | None]) -> None:
        self.name, self.calls, self.reasons = name, calls, reasons
        for method in CALLS:
            setattr(self, method, self.run)

    def run(self, *operands) -> str:
        self.calls.append(self.name)
        return self.name

    def fail(self, method: str, error: BaseException) -> None:
        def run(*operands):
            self.calls.append(self.name)
            raise error

        setattr(self, method, run)

    def unavailable_reason(self, device: torch.device) -> str | None:
        return self.reasons[self.name]

    def load(self) -> None:
        pass


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Stand-ins for the backends of a GPU, each with its reason not to run."""
    calls: list[str] = []
    reasons: dict[str, str | None] = {"triton": None, "cuda": None}
    stand_ins = {name: StandIn(name, calls, reasons) for name in reasons}
    monkeypatch.delenv("DELTAMEM_BACKEND", raising=False)
    monkeypatch.setattr(select, "_chosen", {})
    monkeypatch.setattr(select, "BACKENDS", BACKENDS | stand_ins)
    return SimpleNamespace(calls=calls, reasons=reasons, patch=monkeypatch, **stand_ins)


def messages(work) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in said]


def run(method: str, name: str = "") -> object:
    return getattr(choose(name, GPU), method)(*CALLS[method])


def run_all() -> None:
    for method in CALLS:
        run(method)


def test_triton_is_preferred_to_cuda_and_cuda_to_the_reference(on_a_gpu):
    assert messages(run_all) == []
    on_a_gpu.reasons["triton"] = "there is none"
    select._chosen.clear()
    assert messages(run_all) == ["deltamem_kernels: backend 'triton' cannot run on cuda:0: there is none"]
    assert on_a_gpu.calls == ["triton"] * 3 + ["cuda"] * 3
    on_a_gpu.reasons["cuda"] = "nor this"
    select._chosen.clear()
    assert messages(lambda: choose("", GPU)) == [
        "deltamem_kernels: backend 'triton' cannot run on cuda:0: there is none; "
        "backend 'cuda' cannot run on cuda:0: nor this"
    ]
    assert choose("", GPU) is BACKENDS["reference"]


def test_the_environment_variable_requests_cuda(on_a_gpu):
    on_a_gpu.patch.setenv("DELTAMEM_BACKEND", "cuda")
    assert choose("", GPU) is on_a_gpu.cuda
    select._chosen.clear()
    on_a_gpu.reasons["cuda"] = "it is on strike"
    with pytest.raises(BackendUnavailableError, match="DELTAMEM_BACKEND 'cuda' cannot run on cuda:0: it is on strike"):
        choose("", GPU)


@pytest.mark.parametrize("first", CALLS)
def test_cuda_takes_over_for_good_when_triton_fails(on_a_gpu, first):
    """At the first launch of any kernel, with one warning."""
    on_a_gpu.triton.fail(first, RuntimeError("no sm_130 in ptxas"))

    def work():
        run(first)
        run_all()

    assert messages(work) == [
        "deltamem_kernels: backend 'triton' failed on cuda:0, 'cuda' takes over: RuntimeError: no sm_130 in ptxas"
    ]
    assert on_a_gpu.calls == ["triton"] + ["cuda"] * 4


@pytest.mark.parametrize(
    ("method", "operands", "unfinished"),
    [
        ("decode", (None,), "memory_decode"),
        (
            "scan_backward",
            (SimpleNamespace(mask=torch.ones(1, 2)), None, None, []),
            "the backward of a masked delta_update",
        ),
    ],
)
def test_a_call_that_triton_left_unfinished_is_not_repeated(on_a_gpu, method, operands, unfinished):
    """The pool may have been stepped, and the kept states may count only unmasked tokens. The call raises, and the next
    one runs on the next backend."""
    on_a_gpu.triton.fail(method, ValueError("no"))
    setattr(on_a_gpu.cuda, method, lambda *_: "cuda")
    with (
        pytest.warns(UserWarning, match="'cuda' takes over: ValueError: no"),
        pytest.raises(RuntimeError, match=f"'triton' failed in the middle of {unfinished}, which another backend"),
    ):
        getattr(choose("", GPU), method)(*operands)
    assert getattr(choose("", GPU), method)(*operands) == "cuda"


def test_the_reference_takes_over_if_cuda_cannot(on_a_gpu):
    on_a_gpu.triton.fail("step", RuntimeError("no"))
    on_a_gpu.reasons["cuda"] = "no nvcc"
    backend = choose("", GPU)
    state, x = torch.zeros(1, 1, 2, 2), torch.rand(1, 1, 2)
    out = torch.empty_like(x)
    operands = StepOperands(state, x, x, x, x, None, None, None, None, out, "standard", -1, True)
    said = messages(lambda: backend.step(operands))
    failed = "deltamem_kernels: backend 'triton' failed on cuda:0, 'reference' takes over: RuntimeError: no"
    assert said == [f"{failed}; backend 'cuda' cannot run on cuda:0: no nvcc"]
    assert torch.count_nonzero(state) > 0


def test_triton_requested_by_name_raises_its_own_error(on_a_gpu):
    on_a_gpu.triton.fail("step", RuntimeError("no"))
    for name, environment in (("triton", ""), ("", "triton")):
        on_a_gpu.patch.setenv("DELTAMEM_BACKEND", environment)
        with pytest.raises(RuntimeError, match=r"^no$"):
            run("step", name)


TRITONS_OUT_OF_MEMORY = RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("full"), TRITONS_OUT_OF_MEMORY, KeyboardInterrupt()],
    ids=["torch's memory", "triton's memory", "user"],
)
def test_full_memory_and_interrupts_do_not_change_the_backend(on_a_gpu, error):
    on_a_gpu.triton.fail("step", error)
    with pytest.raises(type(error)):
        run("step")
    assert run("scan") == "triton"


# Its absence


@pytest.mark.slow
def test_the_cpu_backend_needs_no_nvcc():
    """With an empty PATH, the CUDA sources present and the CPU's library compiled before."""
    program = (
        "import torch, deltamem_kernels as d\n"
        "x = torch.rand(1, 70, 2, 4, requires_grad=True)\n"
        "d.delta_update(x, x, x, x).reads.sum().backward()\n"
        "print(d.backends()['cpu'].available, d.backends()['cuda'].reason)\n"
        "try: d.delta_update(x, x, x, x, backend='cuda')\n"
        "except d.BackendUnavailableError as error: print(error)\n"
    )
    library.load("cpu")
    assert (build.source_root() / "cuda" / "scan_forward.cu").exists()
    root = str(Path(deltamem_kernels.__file__).parent.parent)
    environment = {n: x for n, x in os.environ.items() if not n.startswith(("DELTAMEM_", "CUDA_"))}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PATH": "", "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    status, refusal = done.stdout.splitlines()
    assert status.startswith("True ")
    if torch.version.cuda is None:
        reason = f"this torch {torch.__version__} is built without CUDA"
        assert (status, refusal) == (f"True {reason}", f"backend 'cuda' cannot run on cpu: {reason}")


def test_the_emulation_is_not_a_backend():
    import cuda_host

    x = torch.rand(1, 2, 1, 4)
    with cuda_host.installed():
        delta_update(x, x, x, x, backend="cuda")
    assert "cuda-host" not in deltamem_kernels.backends()
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError):
            delta_update(x, x, x, x, backend="cuda")
