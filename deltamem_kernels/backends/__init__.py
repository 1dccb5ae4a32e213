"""The backends, and the one place where one is chosen.

Each is a module with the functions of `reference`: the same names, arguments and results. Besides,
`unavailable_reason(device)` says in a sentence why it cannot run on tensors of that device, or None.
"""

from __future__ import annotations

import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from . import extension, reference, triton

NAMES = ("triton", "cuda", "cpu", "reference")

_ORDER = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpu", "reference")}
_chosen: dict[tuple[str, torch.device], ModuleType] = {}
"""What `choose` found, by name and device: a backend that runs once goes on running."""


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
    if name == "cuda":
        return "this version has no CUDA C++ kernels"
    return (triton if name == "triton" else extension).unavailable_reason(device)


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
    """A backend that could not be had is named once, in a warning: the next one is slower."""
    for name in _ORDER.get(device.type, ("reference",)):
        reason = unavailable_reason(name, device)
        if reason is None:
            try:
                return _module(name)
            except extension.BuildError as error:
                reason = str(error)
        if name == _ORDER[device.type][0]:
            warnings.warn(f"deltamem_kernels: backend {name!r} cannot run on {device}: {reason}", stacklevel=2)
    return reference


def _module(name: str) -> ModuleType:
    if name == "cpu":
        extension.library()  # compiled on first use: a failure belongs here, not in the middle of a call
        return extension
    return triton if name == "triton" else reference
