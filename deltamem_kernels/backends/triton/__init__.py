"""The Triton backend. Triton itself is imported on the first call, not before."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch
from torch import Tensor

MINIMUM_CAPABILITY = (8, 0)


def delta_update_forward(*operands) -> tuple[Tensor, Tensor, Tensor]:
    """reads, final_state and checkpoints, as in backends/reference.py."""
    from . import delta_update

    return delta_update.delta_update_forward(*operands)


def delta_update_backward(*operands) -> list[Tensor | None]:
    """As in backends/reference.py."""
    from . import delta_update

    return delta_update.delta_update_backward(*operands)


def delta_step(*operands) -> None:
    """As in backends/reference.py."""
    from . import step

    step.delta_step(*operands)


def correct(*operands) -> Tensor:
    """As in backends/reference_correction.py, in one launch."""
    from . import correction

    return correction.correct(*operands)


def correct_backward(*operands) -> list[Tensor | None]:
    """As in backends/reference_correction.py, in at most two launches and the sums of what they leave."""
    from . import correction

    return correction.correct_backward(*operands)


def memory_projection_forward(*operands) -> tuple[Tensor, ...]:
    """As in backends/reference_projection.py."""
    from . import memory_projection

    return memory_projection.memory_projection_forward(*operands)


def memory_projection_backward(*operands) -> list[Tensor | None]:
    """As in backends/reference_projection.py."""
    from . import memory_projection

    return memory_projection.memory_projection_backward(*operands)


def memory_prefill_forward(*operands) -> tuple[Tensor, ...]:
    """As in backends/composed.py, in a launch less where the projection makes the chunks' maps."""
    from . import prefill

    return prefill.memory_prefill_forward(*operands)


def memory_decode(*operands) -> tuple[Tensor, Tensor]:
    """As in backends/composed.py, in two launches, one where nothing is corrected."""
    from . import decode

    return decode.memory_decode(*operands)


def segment_mean_forward(*operands) -> tuple[Tensor, Tensor]:
    """As in backends/reference_projection.py."""
    from . import segments

    return segments.segment_mean_forward(*operands)


def segment_mean_backward(*operands) -> Tensor:
    """As in backends/reference_projection.py."""
    from . import segments

    return segments.segment_mean_backward(*operands)


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, in a sentence; None where they can."""
    if device.type not in ("cpu", "cuda"):
        return f"the Triton kernels run on NVIDIA and AMD GPUs, not on {device.type} tensors"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    wanted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
    if device.type == "cpu" and not wanted:
        return "Triton runs on CPU tensors only with TRITON_INTERPRET=1 in the environment"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no GPU"
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < MINIMUM_CAPABILITY:
            return "the Triton kernels need compute capability {}.{}, this GPU has {}.{}".format(
                *MINIMUM_CAPABILITY, *capability
            )
    try:
        return _mixed_interpretation(device, wanted)
    except ImportError as error:
        return f"triton cannot be imported: {error}"


def _mixed_interpretation(device: torch.device, wanted: bool) -> str | None:
    """Triton decides for each function, when it is defined, whether it will be interpreted or compiled."""
    import triton
    import triton.language as tl

    loaded = [module for name, module in sys.modules.items() if name.startswith(f"{__name__}.")]
    kernels = [x for module in loaded for name, x in vars(module).items() if name.endswith("_kernel")]
    interpreted = {not isinstance(function, triton.JITFunction) for function in (tl.sum, *kernels)}
    if not kernels:
        interpreted.add(wanted)
    if len(interpreted) == 2 or (device.type == "cpu" and False in interpreted):
        return "TRITON_INTERPRET changed after triton or these kernels were loaded; set it before the first import"
    return None
