"""The choice of a backend, and what happens when the chosen one fails."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .base import Backend
from .eager import eager
from .native import BuildError, CpuBackend, CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), CudaBackend(), CpuBackend(), ReferenceBackend())
}
NAMES = tuple(BACKENDS)

_PREFERENCE = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
_chosen: dict[tuple[str, torch.device], Backend] = {}
"""The result of `choose` for each name and device: a backend that was chosen once stays chosen."""
_lock = threading.Lock()


class BackendUnavailableError(RuntimeError, ValueError):
    """A backend requested by name cannot run here. The message gives the reason."""


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and if not, the reason. True if it can."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def backends() -> dict[str, BackendStatus]:
    """Return, for each backend's name, whether it can run on this machine, and the reason if it cannot. Nothing is
    compiled."""
    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    cpu = torch.device("cpu")
    devices = {"triton": gpu or cpu, "cuda": gpu or cpu, "cpu": cpu, "reference": cpu}
    reasons = {name: BACKENDS[name].unavailable_reason(device) for name, device in devices.items()}
    return {name: BackendStatus(reason is None, reason or "") for name, reason in reasons.items()}


def choose(requested: str, device: torch.device) -> Backend:
    """Return the backend that runs on tensors of this device: the requested one, else the one that the environment
    variable DELTAMEM_BACKEND names, else the first available of triton, cuda, reference (GPU) or cpu, reference (CPU).

    Raises:
        ValueError: there is no backend of this name.
        BackendUnavailableError: the backend of this name cannot run here.
    """
    name = requested or os.environ.get("DELTAMEM_BACKEND", "")
    backend = _chosen.get((name, device))
    if backend is None:
        origin = "backend" if requested else "DELTAMEM_BACKEND"
        backend = _named(name, device, origin) if name else _best(device)
        _chosen[name, device] = backend
        _enable_fast_path(backend)
    return backend


def _enable_fast_path(backend: Backend) -> None:
    """Enable the fast path once `cpu` is chosen, unless CPU tensors get another backend by default because `cpu` could
    not be loaded before."""
    default = _chosen.get(("", torch.device("cpu")), backend)
    if isinstance(backend, CpuBackend) and default is backend:
        eager.enable(backend.kernels)


def _named(name: str, device: torch.device, origin: str) -> Backend:
    if name not in NAMES:
        raise ValueError(f"{origin} must be one of {', '.join(NAMES)}, got {name!r}")
    reason = _load(name, device)
    if reason is not None:
        raise BackendUnavailableError(f"{origin} {name!r} cannot run on {device}: {reason}")
    return BACKENDS[name]


def _best(device: torch.device) -> Backend:
    preference = _PREFERENCE.get(device.type, ("reference",))
    backend, refusals = _first_available(preference, device)
    if refusals:
        warnings.warn(f"deltamem_kernels: {refusals}", stacklevel=2)  # once: the choice is remembered
    if backend.name == "triton":
        return TritonWithFallback(backend, device, preference[1:])
    return backend


def _first_available(names: tuple[str, ...], device: torch.device) -> tuple[Backend, str]:
    """Return the first backend that can run, and why those before it cannot."""
    refusals: list[str] = []
    for name in names:
        reason = _load(name, device)
        if reason is None:
            return BACKENDS[name], "; ".join(refusals)
        refusals.append(f"backend {name!r} cannot run on {device}: {reason}")
    return BACKENDS["reference"], "; ".join(refusals)


def _load(name: str, device: torch.device) -> str | None:
    """Load a backend. Return the reason if it cannot run on this device."""
    reason = BACKENDS[name].unavailable_reason(device)
    if reason is None:
        try:
            BACKENDS[name].load()  # may compile: a failure belongs here and not into the middle of a call
        except BuildError as error:
            reason = str(error)
    return reason


def _guarded(method: str, unfinished: str | None = None) -> Callable[..., Any]:
    """Make a method of `TritonWithFallback`. `unfinished` names a call that another backend cannot finish."""

    def call(self: TritonWithFallback, *arguments: Any) -> Any:
        return self.run(method, arguments, unfinished)

    return call


class TritonWithFallback(Backend):
    """Triton, chosen because it comes first and not by name. Triton compiles a kernel when it is first launched. If the
    installed release, or the GPU, cannot, the next backend takes over for good, with one warning that names the cause.

    Any Exception counts, because Triton, its compiler and the driver have no common type of error and the arguments
    were checked before. Two exceptions are raised as they are: out of memory, and an error during a CUDA graph's
    capture.
    """

    name = "triton"

    def __init__(self, triton: Backend, device: torch.device, others: tuple[str, ...]) -> None:
        self._triton = self._current = triton
        self._device, self._others = device, others

    def unavailable_reason(self, device: torch.device) -> str | None:
        return self._current.unavailable_reason(device)

    scan = _guarded("scan")
    step = _guarded("step")
    correct = _guarded("correct")
    correct_backward = _guarded("correct_backward")
    project = _guarded("project")
    project_backward = _guarded("project_backward")
    segment_mean = _guarded("segment_mean")
    segment_mean_backward = _guarded("segment_mean_backward")
    prefill = _guarded("prefill")
    decode = _guarded("decode", unfinished="memory_decode")  # the pool may already have been stepped

    def scan_backward(self, operands, *arguments):
        # With a mask, triton's checkpoints count the tokens that the mask leaves; other backends count all tokens.
        unfinished = None if operands.mask is None else "the backward of a masked delta_update"
        return self.run("scan_backward", (operands, *arguments), unfinished)

    def run(self, method: str, arguments: tuple, unfinished: str | None) -> Any:
        """Call a method of Triton, or of the backend that took over."""
        if self._current is self._triton:
            try:
                return getattr(self._triton, method)(*arguments)
            except Exception as error:
                if _is_temporary(error):
                    raise
                self._take_over(error)
                if unfinished is not None:
                    raise RuntimeError(
                        f"deltamem_kernels: 'triton' failed in the middle of {unfinished}, which another backend "
                        "cannot finish: repeat it from the states and inputs it began with"
                    ) from error
        return getattr(self._current, method)(*arguments)

    def _take_over(self, error: Exception) -> None:
        with _lock:
            if self._current is not self._triton:  # another thread did it
                return
            self._current, refusals = _first_available(self._others, self._device)
        warnings.warn(
            f"deltamem_kernels: backend 'triton' failed on {self._device}, {self._current.name!r} takes over: "
            f"{type(error).__name__}: {error}" + (refusals and f"; {refusals}"),
            stacklevel=4,
        )


def _is_temporary(error: Exception) -> bool:
    """Return True for an error that is not the backend's fault. Triton has no type for a full memory: it raises a
    RuntimeError with the driver's message."""
    full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    return full or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
