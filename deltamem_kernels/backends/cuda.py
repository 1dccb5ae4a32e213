"""`cuda`, the backend for NVIDIA GPUs that needs no Triton: csrc/cuda/, a state row in each thread's registers.

Plain PyTorch here, as in the reference, are segment means, and backward what cuBLAS is for: the products of the
projection, beside whose `[T, D]` tensors the rest of its backward moves next to nothing, and those over all rows of the
correction, whose gradients row by row are a kernel's.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

from . import composed, extension
from .arithmetic import as_kernel
from .reference import memory_projection_backward, segment_mean_backward, segment_mean_forward
from .reference_correction import gradients
from .scan import chunked_from

__all__ = [
    "correct",
    "correct_backward",
    "delta_step",
    "delta_update_backward",
    "delta_update_forward",
    "memory_decode",
    "memory_prefill_forward",
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


def _kernels() -> ModuleType:
    return extension._library("cuda")


def delta_update_forward(*operands):
    """See `reference.delta_update_forward`."""
    return _kernels().forward(*operands, chunked_from(operands[0].shape[-1]))


def delta_update_backward(*operands):
    """See `reference.delta_update_backward`."""
    return _kernels().backward(*operands, chunked_from(operands[2].shape[-1]))


def delta_step(*operands):
    """See `reference.delta_step`. A slot outside of the pool is treated as the pad: values are not looked at."""
    _kernels().step(*operands)


def correct(*operands):
    """See `reference.correct`."""
    return _kernels().correct(*operands)


@as_kernel
def correct_backward(d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, needs):
    """See `reference.correct_backward`."""
    g, d_base, d_reads, d_norm = _kernels().correct_adjoint(
        d_out, base, reads, weight, gain, norm_weight, cos, sin, scale, norm_eps, head_dim, needs
    )
    d_norm = None if d_norm is None else d_norm.view(-1, norm_weight.shape[0]).sum(0)
    if g is None:
        g, d_base = d_out, d_out.clone() if needs[0] else None  # what an operator returns is never an operand
    d_base = g if d_base is None else d_base
    return gradients(d_base, g, d_reads, d_norm, reads, weight, gain, norm_weight, scale, needs)


def memory_projection_forward(*operands):
    """See `reference.memory_projection_forward`."""
    return _kernels().memory_projection(*operands)


def memory_decode(*operands):
    """See `composed.memory_decode`."""
    return composed.memory_decode(sys.modules[__name__], *operands)


def memory_prefill_forward(*operands):
    """See `composed.memory_prefill_forward`."""
    return composed.memory_prefill_forward(sys.modules[__name__], *operands)
