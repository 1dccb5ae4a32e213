"""The choice of a backend, and the name of its library."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch

import deltamem_kernels
from deltamem_kernels import BackendStatus, BackendUnavailableError, delta_update
from deltamem_kernels.backends import choose, select
from deltamem_kernels.backends.native import BuildError, build, library
from deltamem_kernels.backends.select import BACKENDS
from deltamem_kernels.compat import triton_affine_scan

CPU = torch.device("cpu")
NAMES = ("triton", "cuda", "cpu", "reference")
ON_THIS_GPU = torch.device("cuda") if torch.cuda.is_available() else CPU
# The choice


def test_backends_lists_four_with_a_reason_for_each_that_cannot_run():
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
def test_a_backend_runs_exactly_if_its_status_is_true(name):
    """A backend that cannot run raises with the reason of its status."""
    device = ON_THIS_GPU if name in ("triton", "cuda") else CPU
    x = torch.rand(1, 2, 1, 4, device=device)
    status = deltamem_kernels.backends()[name]
    if status:
        reads = delta_update(x, x, x, x, backend=name).reads
        assert torch.isfinite(reads).all()
        assert reads[:, 1].all()  # the second token reads what the first one wrote
    else:
        with pytest.raises(BackendUnavailableError) as info:
            delta_update(x, x, x, x, backend=name)
        assert str(info.value).startswith(f"backend {name!r} cannot run on {device.type}")
        assert str(info.value).endswith(status.reason)


def test_an_unavailable_backend_raises_a_value_error_and_a_runtime_error():
    """ValueError as for every argument that does not fit, RuntimeError as torch raises for devices."""
    assert issubclass(BackendUnavailableError, ValueError)
    assert issubclass(BackendUnavailableError, RuntimeError)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The backends that ran, in the order of the calls."""
    seen: list[str] = []
    monkeypatch.delenv("DELTAMEM_BACKEND", raising=False)
    for name in ("cpu", "reference"):
        for method in ("scan", "scan_backward"):
            original = getattr(BACKENDS[name], method)

            def spy(*operands, name=name, original=original):
                seen.append(name)
                return original(*operands)

            monkeypatch.setattr(BACKENDS[name], method, spy)
    return seen


def call(backend: str | None = None) -> None:
    x = torch.rand(1, 2, 1, 4, requires_grad=True)
    delta_update(x, x, x, x, backend=backend).reads.sum().backward()


def test_cpu_is_chosen_for_cpu_tensors(calls):
    assert choose("", CPU) is BACKENDS["cpu"]
    call()
    assert calls == ["cpu", "cpu"]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_requested_by_name_runs(calls, name):
    assert choose(name, CPU) is BACKENDS[name]
    call(name)
    assert calls == [name, name]


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_environment_variable_sets_the_default(calls, monkeypatch, name):
    """It is read at each call, also after another backend was chosen. An argument overrides it."""
    call()
    monkeypatch.setenv("DELTAMEM_BACKEND", name)
    call()
    other = "reference" if name == "cpu" else "cpu"
    call(other)
    x = torch.rand(1, 2, 4, requires_grad=True)
    triton_affine_scan(torch.rand(1, 4, 4), x, x, x, x, x, x)
    monkeypatch.setenv("DELTAMEM_BACKEND", "")
    call()
    assert calls == ["cpu", "cpu", name, name, other, other, name, "cpu", "cpu"]


def test_reference_is_chosen_for_devices_without_kernels(calls):
    for device in ("meta", "mps", "xpu"):
        assert choose("", torch.device(device)) is BACKENDS["reference"]


def test_an_unavailable_backend_is_warned_of_once(calls, monkeypatch):
    """There is a warning, because the next backend is slower, but not at every call."""

    def load(kind: str) -> None:
        raise BuildError("the compiler is on strike")

    monkeypatch.setattr(library, "load", load)
    monkeypatch.setattr(select, "_chosen", {})
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


# The name of a library


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A copy of csrc/ that a test may change."""
    copy = tmp_path / "csrc"
    shutil.copytree(build.source_root(), copy)
    monkeypatch.setattr(build, "source_root", lambda: copy)
    return copy


def test_the_library_name_is_the_same_for_the_same_sources(sources, monkeypatch):
    """Neither their place nor other files matter."""
    name = build.library_name()
    (sources / "notes.txt").write_text("no source")
    (sources / "cpu" / "__pycache__").mkdir()
    assert build.library_name() == name
    monkeypatch.undo()
    assert build.library_name() == name


def test_the_library_name_depends_on_every_source(sources):
    """A changed byte, an added, removed or moved file: each gives another name."""
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


def test_the_library_name_depends_on_torch_and_flags(monkeypatch):
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
