"""The backends, and the one place where one is chosen.

Each is a module with the functions of `reference`: the same names, arguments and results. Besides,
`unavailable_reason(device)` says in a sentence why it cannot run on tensors of that device, or None.
"""

from __future__ import annotations

import os
import threading
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from . import cuda, extension, reference, triton

_MODULES = {"triton": triton, "cuda": cuda, "cpu": extension, "reference": reference}
NAMES = tuple(_MODULES)

_ORDER = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
_chosen: dict[tuple[str, torch.device], ModuleType] = {}
"""What `choose` found, by name and device: a backend that runs once goes on running."""
_lock = threading.Lock()


# Looking a name up in os.environ takes 0.8 µs, most of it to encode the name: a tenth of a decoding step.
_environment = getattr(os.environ, "_data", os.environ)
_KEY = os.environ.encodekey("DELTAMEM_BACKEND") if _environment is not os.environ else "DELTAMEM_BACKEND"


class BackendUnavailableError(RuntimeError, ValueError):
    """A backend asked for by name cannot run here; the message says why."""


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine, and if not, why. True where it can."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


def backends() -> dict[str, BackendStatus]:
    """For each backend's name: whether it can run on this machine and, if not, the reason. Nothing is compiled."""
    gpu = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    cpu = torch.device("cpu")
    devices = {"triton": gpu or cpu, "cuda": gpu or cpu, "cpu": cpu, "reference": cpu}
    reasons = {name: unavailable_reason(name, device) for name, device in devices.items()}
    return {name: BackendStatus(reason is None, reason or "") for name, reason in reasons.items()}


def unavailable_reason(name: str, device: torch.device) -> str | None:
    """Why the backend cannot run on tensors of this device, or None."""
    if name == "reference":
        return None
    return _MODULES[name].unavailable_reason(device)


def choose(requested: str, device: torch.device) -> ModuleType:
    """The module that runs on this device: the one requested, else the one DELTAMEM_BACKEND names, else the first
    that can of triton, cuda, reference (GPU) or cpu, reference (CPU)."""
    name = requested or (os.environ["DELTAMEM_BACKEND"] if _KEY in _environment else "")
    module = _chosen.get((name, device))
    if module is None:
        origin = "backend" if requested else "DELTAMEM_BACKEND"
        module = _named(name, device, origin) if name else _best(device)
        _chosen[name, device] = module
    return module


def _named(name: str, device: torch.device, origin: str) -> ModuleType:
    if name not in NAMES:
        raise ValueError(f"{origin} must be one of {', '.join(NAMES)}, got {name!r}")
    reason = unavailable_reason(name, device)
    try:
        if reason is None:
            return _module(name)
    except extension.BuildError as error:
        reason = str(error)
    raise BackendUnavailableError(f"{origin} {name!r} cannot run on {device}: {reason}")


def _best(device: torch.device) -> ModuleType:
    order = _ORDER.get(device.type, ("reference",))
    module, refusals = _first(order, device)
    if refusals:  # said once: what runs is slower
        warnings.warn(f"deltamem_kernels: {refusals}", stacklevel=2)
    if order[0] == "triton" and module is _MODULES["triton"]:
        return _UntilItFails(module, device, order[1:])  # type: ignore[return-value]
    return module


def _first(order: tuple[str, ...], device: torch.device) -> tuple[ModuleType, str]:
    """The first that can be had, and why those before it cannot."""
    refusals: list[str] = []
    for name in order:
        reason = unavailable_reason(name, device)
        if reason is None:
            try:
                return _module(name), "; ".join(refusals)
            except extension.BuildError as error:
                reason = str(error)
        refusals.append(f"backend {name!r} cannot run on {device}: {reason}")
    return reference, "; ".join(refusals)


class _UntilItFails:
    """Triton where nobody asked for it by name. It compiles at a kernel's first launch: if a release of it, or the GPU,
    cannot, the next backend takes over for good, with one warning that names the cause.

    Any Exception of any call counts but one that passes (a full memory, a CUDA graph that is being captured and cannot
    take in a first launch), which is no fault of the backend: what Triton, its compiler and the driver raise has no
    common type, and arguments were checked before. What is no Exception passes through, such as KeyboardInterrupt, and
    so does whatever the next backend raises."""

    def __init__(self, module: ModuleType, device: torch.device, others: tuple[str, ...]) -> None:
        self._fragile = self._module = module
        self._device, self._others = device, others

    def __getattr__(self, function: str):
        return lambda *operands: self._run(function, operands)

    def _run(self, function: str, operands: tuple):
        if self._module is self._fragile:
            try:
                return getattr(self._fragile, function)(*operands)
            except Exception as error:  # whatever Triton, its compiler or the driver can come up with
                if _passes(error):
                    raise
                self._take_over(error)
                if _half_done(function, operands):
                    raise RuntimeError(
                        f"deltamem_kernels: 'triton' failed in the middle of {function}, which another backend cannot "
                        "finish: repeat it from the states and inputs it began with"
                    ) from error
        return getattr(self._module, function)(*operands)

    def _take_over(self, error: Exception) -> None:
        with _lock:
            if self._module is not self._fragile:  # another thread was faster
                return
            self._module, refusals = _first(self._others, self._device)
        name = next(name for name, module in _MODULES.items() if module is self._module)
        warnings.warn(
            f"deltamem_kernels: backend 'triton' failed on {self._device}, {name!r} takes over: "
            f"{type(error).__name__}: {error}" + (refusals and f"; {refusals}"),
            stacklevel=4,
        )


def _passes(error: Exception) -> bool:
    """Triton has no type for a full memory: it raises a RuntimeError with the driver's words."""
    full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
    return full or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def _half_done(function: str, operands: tuple) -> bool:
    """Whether another backend would go on from what triton left: a pool that may have been stepped already, or states
    kept by a forward that counted its chunks from the first token of a mask (the tenth operand)."""
    return function == "memory_decode" or (
        function == "delta_update_backward" and len(operands) > 9 and operands[9] is not None
    )


def _module(name: str) -> ModuleType:
    if name in ("cpu", "cuda"):
        _MODULES[name].library()  # compiled on first use: a failure belongs here, not in the middle of a call
    return _MODULES[name]
