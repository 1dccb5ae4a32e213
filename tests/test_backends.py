"""Which backend runs and why, and what its library is known by."""

from __future__ import annotations

import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

import deltamem_kernels
from deltamem_kernels import BackendStatus, BackendUnavailableError, delta_update
from deltamem_kernels.backends import build, choose, extension, reference
from deltamem_kernels.compat import triton_affine_scan

package = sys.modules["deltamem_kernels.backends"]  # as an attribute of the package, that name is the public function

CPU = torch.device("cpu")
NAMES = ("triton", "cuda", "cpu", "reference")
ON_THIS_GPU = torch.device("cuda") if torch.cuda.is_available() else CPU
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
