"""The backend: each operation is imported on its first call."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from ..base import Backend
from ..native import BuildError

MINIMUM_CAPABILITY = (8, 0)
Method = TypeVar("Method", bound=Callable[..., Any])


def operation(module: str, method: Method) -> Method:
    """Return a method like `method` of Backend that calls the function of its name in `module`."""

    def call(_backend: Backend, *operands: object) -> object:
        return getattr(importlib.import_module(module, __package__), method.__name__)(*operands)

    return cast(Method, call)


class TritonBackend(Backend):
    """Launches the kernels."""

    name = "triton"

    scan = operation(".scan.forward", Backend.scan)
    scan_backward = operation(".scan.backward", Backend.scan_backward)
    step = operation(".scan.step", Backend.step)
    correct = operation(".layer.correction", Backend.correct)
    correct_backward = operation(".layer.correction", Backend.correct_backward)
    project = operation(".layer.projection", Backend.project)
    project_backward = operation(".layer.projection", Backend.project_backward)
    prefill = operation(".layer.prefill", Backend.prefill)
    decode = operation(".layer.decode", Backend.decode)
    segment_mean = operation(".layer.segment_mean", Backend.segment_mean)
    segment_mean_backward = operation(".layer.segment_mean", Backend.segment_mean_backward)

    def unavailable_reason(self, device: torch.device) -> str | None:
        if device.type not in ("cpu", "cuda"):
            return f"the Triton kernels run on NVIDIA and AMD GPUs, not on {device.type} tensors"
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
        if device.type == "cpu" and not interpreted:
            return "Triton runs on CPU tensors only with TRITON_INTERPRET=1 in the environment"
        if device.type == "cuda":
            if not torch.cuda.is_available():
                return "torch sees no GPU"
            capability = torch.cuda.get_device_capability(device)
            if torch.version.hip is None and capability < MINIMUM_CAPABILITY:
                return "the Triton kernels need compute capability {}.{}, this GPU has {}.{}".format(
                    *MINIMUM_CAPABILITY, *capability
                )
        return _mixed_interpretation(device, interpreted)

    def load(self) -> None:
        try:
            importlib.import_module("triton")
        except ImportError as error:
            raise BuildError(f"triton cannot be imported: {error}") from error


def _mixed_interpretation(device: torch.device, interpreted: bool) -> str | None:
    """Return a reason if some functions are interpreted and others are compiled, or if `device` needs the other kind.
    Triton decides for each function when it is defined, Triton's own functions included."""
    if "triton.language" not in sys.modules:
        return None
    import triton
    from triton.runtime import KernelInterface

    loaded = [module for name, module in sys.modules.items() if name.startswith(f"{__package__}.")]
    functions = [x for module in loaded for x in vars(module).values() if isinstance(x, KernelInterface)]
    kinds = {not isinstance(function, triton.JITFunction) for function in (triton.language.sum, *functions)}
    if not functions:
        kinds.add(interpreted)
    if len(kinds) == 2 or (device.type == "cpu" and False in kinds):
        return "TRITON_INTERPRET changed after triton or these kernels were loaded; set it before the first import"
    return None
