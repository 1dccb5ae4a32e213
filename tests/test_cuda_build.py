"""The `cuda` backend without a GPU: what it says, what it would be built from, when it is chosen, and that nobody else
minds its absence."""

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
from deltamem_kernels.backends import build, choose, cuda, extension, reference

package = sys.modules["deltamem_kernels.backends"]
GPU = torch.device("cuda", 0)
FUNCTIONS = ("delta_update_forward", "delta_update_backward", "delta_step")


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
    extension._missing.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    extension._missing.cache_clear()


def test_it_can_be_built(gpu):
    assert cuda.unavailable_reason(GPU) is None


def test_a_torch_without_cuda(gpu):
    gpu.setattr(torch.version, "cuda", None)
    assert cuda.unavailable_reason(GPU) == f"this torch {torch.__version__} is built without CUDA"


def test_no_gpu(gpu):
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable_reason(torch.device("cpu")) == "torch sees no GPU"


def test_tensors_elsewhere(gpu):
    assert cuda.unavailable_reason(torch.device("cpu")) == "it runs on CUDA tensors, not on cpu"


def test_a_gpu_that_is_too_old(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "need compute capability 8.0, this GPU has 7.5" in cuda.unavailable_reason(GPU)


def test_no_nvcc(gpu):
    gpu.setattr(build, "nvcc", lambda: None)
    assert cuda.unavailable_reason(GPU).startswith("no CUDA compiler (nvcc is not on PATH")


def test_architectures_that_are_none(gpu):
    gpu.setenv("DELTAMEM_CUDA_ARCHS", "hopper")
    assert cuda.unavailable_reason(GPU) == "DELTAMEM_CUDA_ARCHS must be numbers like 80;90;120, got 'hopper'"


def test_a_built_library_needs_no_nvcc(gpu):
    """Ahead, for all architectures, or in the cache, for the GPUs of this machine."""
    gpu.setattr(build, "nvcc", lambda: None)
    ahead, here = extension._places("cuda")
    assert ahead[0] == build.library_name("cuda")
    assert here[0] == build.library_name("cuda", ("90",))
    for _, path in (ahead, here):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        extension._missing.cache_clear()
        assert cuda.unavailable_reason(GPU) is None
        path.unlink()


def test_a_library_for_another_torch(gpu):
    gpu.setattr(build, "nvcc", lambda: None)
    path = build.built_ahead("_cuda_torch_2_11_0_0123456789ab")
    path.parent.mkdir()
    path.write_bytes(b"")
    assert cuda.unavailable_reason(GPU).startswith("it was built for torch 2.11.0, not for this torch")


def test_a_failed_compilation_is_told_in_words(gpu, capfd, tmp_path):
    """One notice, and what the compiler said."""
    wrong = tmp_path / "toolkit" / "bin" / "nvcc"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("#!/bin/sh\necho 'the compiler is on strike' >&2; exit 1\n")
    wrong.chmod(0o755)
    gpu.setattr("torch.utils.cpp_extension.CUDA_HOME", str(wrong.parent.parent))
    with pytest.raises(extension.BuildError, match="compiling it failed"):
        extension._library("cuda")
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("deltamem_kernels")]
    assert said == [f"deltamem_kernels: compiling the CUDA kernels for torch {torch.__version__}, once"]


# What it is built from


def test_architectures(monkeypatch):
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


def test_names_tell_architectures():
    names = {build.library_name(), build.library_name("cuda")}
    names |= {build.library_name("cuda", archs) for archs in (("80",), ("90",), ("80", "90"), build.CUDA_ARCHS)}
    assert len(names) == 6


def test_kernels_hold_no_torch_header():
    for path in (path for folder in ("core", "cpu", "cuda") for path in (build.source_root() / folder).iterdir()):
        if path.is_file():
            included = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not [x for x in included if any(word in x for word in ("torch", "ATen", "c10", "bindings"))], path


@pytest.mark.parametrize(("wanted", "said"), [("", "cuda not compiled ahead: torch"), ("0", "DELTAMEM_BUILD_CUDA=0")])
def test_setup_without_cuda(wanted, said):
    done = setup_py(wanted)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr


def test_setup_refuses_to_leave_out_what_was_asked_for():
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


class Module(SimpleNamespace):
    """A backend that notes its calls, or fails."""

    def __init__(self, name: str, calls: list[str], error: Exception | None = None) -> None:
        def run(*operands):
            calls.append(name)
            if error is not None:
                raise error
            return name

        super().__init__(**dict.fromkeys(FUNCTIONS, run), library=lambda: None)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Stand-ins for the backends of a GPU, each with its reason not to run."""
    calls: list[str] = []
    reasons: dict[str, str | None] = {"triton": None, "cuda": None}
    modules = {name: Module(name, calls) for name in reasons}
    monkeypatch.delenv("DELTAMEM_BACKEND", raising=False)
    monkeypatch.setattr(package, "_chosen", {})
    monkeypatch.setattr(package, "_MODULES", package._MODULES | modules)
    monkeypatch.setattr(package, "unavailable_reason", lambda name, device: reasons.get(name))
    return SimpleNamespace(calls=calls, reasons=reasons, modules=modules, patch=monkeypatch)


def messages(work) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        work()
    return [str(w.message) for w in said]


def call() -> None:
    for function in FUNCTIONS:
        getattr(choose("", GPU), function)()


def test_triton_then_cuda_then_reference(on_a_gpu):
    assert messages(call) == []
    on_a_gpu.reasons["triton"] = "there is none"
    package._chosen.clear()
    assert messages(call) == ["deltamem_kernels: backend 'triton' cannot run on cuda:0: there is none"]
    assert on_a_gpu.calls == ["triton"] * 3 + ["cuda"] * 3
    on_a_gpu.reasons["cuda"] = "nor this"
    package._chosen.clear()
    assert messages(lambda: choose("", GPU)) == [
        "deltamem_kernels: backend 'triton' cannot run on cuda:0: there is none; "
        "backend 'cuda' cannot run on cuda:0: nor this"
    ]
    assert choose("", GPU) is reference


def test_the_environment_asks_for_cuda(on_a_gpu):
    on_a_gpu.patch.setenv("DELTAMEM_BACKEND", "cuda")
    assert choose("", GPU) is on_a_gpu.modules["cuda"]
    package._chosen.clear()
    on_a_gpu.reasons["cuda"] = "it is on strike"
    with pytest.raises(BackendUnavailableError, match="DELTAMEM_BACKEND 'cuda' cannot run on cuda:0: it is on strike"):
        choose("", GPU)


@pytest.mark.parametrize("first", FUNCTIONS)
def test_where_triton_fails_cuda_takes_over(on_a_gpu, first):
    """At the first launch, whichever it is; for good, and with one warning."""
    error = RuntimeError("no sm_130 in ptxas")
    setattr(on_a_gpu.modules["triton"], first, getattr(Module("triton", on_a_gpu.calls, error), first))

    def work():
        assert getattr(choose("", GPU), first)() == "cuda"
        call()

    assert messages(work) == [
        "deltamem_kernels: backend 'triton' failed on cuda:0, 'cuda' takes over: RuntimeError: no sm_130 in ptxas"
    ]
    assert on_a_gpu.calls == ["triton"] + ["cuda"] * 4


@pytest.mark.parametrize(
    ("function", "operands"), [("memory_decode", ()), ("delta_update_backward", (None,) * 9 + (torch.ones(1, 2),))]
)
def test_what_triton_left_half_done_is_not_done_again(on_a_gpu, function, operands):
    """The pool may have been stepped, and kept states belong to the mask's tokens: an error, then the next backend."""

    def fails(*_):
        raise ValueError("no")

    setattr(on_a_gpu.modules["triton"], function, fails)
    setattr(on_a_gpu.modules["cuda"], function, lambda *_: "cuda")
    with (
        pytest.warns(UserWarning, match="'cuda' takes over: ValueError: no"),
        pytest.raises(RuntimeError, match=f"'triton' failed in the middle of {function}"),
    ):
        getattr(choose("", GPU), function)(*operands)
    assert getattr(choose("", GPU), function)(*operands) == "cuda"


def test_where_cuda_cannot_take_over_the_reference_does(on_a_gpu):
    on_a_gpu.modules["triton"].delta_step = Module("triton", on_a_gpu.calls, RuntimeError("no")).delta_step
    on_a_gpu.reasons["cuda"] = "no nvcc"
    module = choose("", GPU)
    state, x = torch.zeros(1, 1, 2, 2), torch.rand(1, 1, 2)
    operands = (state, x, x, x, x, None, None, None, None, torch.empty_like(x), "standard", -1, True)
    said = messages(lambda: module.delta_step(*operands))
    failed = "deltamem_kernels: backend 'triton' failed on cuda:0, 'reference' takes over: RuntimeError: no"
    assert said == [f"{failed}; backend 'cuda' cannot run on cuda:0: no nvcc"]
    assert torch.count_nonzero(state) > 0


def test_triton_asked_for_by_name_fails_as_it_fails(on_a_gpu):
    on_a_gpu.modules["triton"].delta_step = Module("triton", on_a_gpu.calls, RuntimeError("no")).delta_step
    for name, environment in (("triton", ""), ("", "triton")):
        on_a_gpu.patch.setenv("DELTAMEM_BACKEND", environment)
        with pytest.raises(RuntimeError, match=r"^no$"):
            choose(name, GPU).delta_step()


TRITONS_OUT_OF_MEMORY = RuntimeError("Triton Error [CUDA]: out of memory")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("full"), TRITONS_OUT_OF_MEMORY, KeyboardInterrupt()],
    ids=["torch's memory", "triton's memory", "user"],
)
def test_what_is_no_reason_to_change(on_a_gpu, error):
    on_a_gpu.modules["triton"].delta_step = Module("triton", on_a_gpu.calls, error).delta_step
    with pytest.raises(type(error)):
        choose("", GPU).delta_step()
    assert choose("", GPU).delta_update_forward() == "triton"


# Its absence


def test_the_cpu_does_not_miss_nvcc():
    """With an empty PATH, the CUDA sources present and the CPU's library compiled before."""
    program = (
        "import torch, deltamem_kernels as d\n"
        "x = torch.rand(1, 70, 2, 4, requires_grad=True)\n"
        "d.delta_update(x, x, x, x).reads.sum().backward()\n"
        "print(d.backends()['cpu'].available, d.backends()['cuda'].reason)\n"
        "try: d.delta_update(x, x, x, x, backend='cuda')\n"
        "except d.BackendUnavailableError as error: print(error)\n"
    )
    extension.library()
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


def test_what_runs_on_threads_is_no_backend():
    import cuda_host

    x = torch.rand(1, 2, 1, 4)
    with cuda_host.installed():
        delta_update(x, x, x, x, backend="cuda")
    assert "cuda-host" not in deltamem_kernels.backends()
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError):
            delta_update(x, x, x, x, backend="cuda")
