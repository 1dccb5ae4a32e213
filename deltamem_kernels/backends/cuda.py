"""`cuda`, the backend for NVIDIA GPUs that needs no Triton: csrc/cuda/, a state row in each thread's registers.

Segment means and the backward passes of the projection and the correction have no kernels here: they are the
reference's, plain PyTorch on the GPU.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from . import composed, extension
from .reference import correct_backward, memory_projection_backward, segment_mean_backward, segment_mean_forward

__all__ = [
    "correct",
    "correct_backward",
    "delta_step",
    "delta_update_backward",
    "delta_update_forward",
    "memory_decode",
    "memory_projection_backward",
    "memory_projection_forward",
    "segment_mean_backward",
    "segment_mean_forward",
]

MINIMUM_CAPABILITY = (8, 0)


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of this device, or None (they may have to be compiled first)."""
    if torch.version.cuda is None:
        return f"this torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if device.type != "cuda":
        return f"it runs on CUDA tensors, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return "the CUDA kernels need compute capability {}.{}, this GPU has {}.{}".format(
            *MINIMUM_CAPABILITY, *capability
        )
    try:
        return extension._missing("cuda")
    except ValueError as error:  # DELTAMEM_CUDA_ARCHS
        return str(error)


def library() -> ModuleType:
    """The library's module. The first call may compile, about half a minute of two cores."""
    return extension.library("cuda")


def delta_update_forward(*operands):
    """See `reference.delta_update_forward`."""
    return extension._library("cuda").forward(*operands)


def delta_update_backward(*operands):
    """See `reference.delta_update_backward`."""
    return extension._library("cuda").backward(*operands)


def delta_step(*operands):
    """See `reference.delta_step`. A slot outside of the pool is treated as the pad: values are not looked at."""
    extension._library("cuda").step(*operands)


def correct(*operands):
    """See `reference.correct`."""
    return extension._library("cuda").correct(*operands)


def memory_projection_forward(*operands):
    """See `reference.memory_projection_forward`."""
    return extension._library("cuda").memory_projection(*operands)


def memory_decode(*operands):
    """See `composed.memory_decode`."""
    return composed.memory_decode(sys.modules[__name__], *operands)
