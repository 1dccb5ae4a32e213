"""`cuda`: the CUDA kernels for NVIDIA GPUs, which need no Triton. A thread keeps a state row in registers.

Segment means are plain PyTorch here, and so are the backward of a projection and the correction's sums over all rows,
which are matrix products (cuBLAS).
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ... import operands as records
from ..base import Backend, Gradients, plain_torch
from ..reference import segments
from ..reference.correction import RowGradients, gradients
from ..reference.projection import project_backward
from ..scan_choice import chunked_from
from . import library

MINIMUM_CAPABILITY = (8, 0)


class CudaBackend(Backend):
    """Calls the library's functions."""

    name = "cuda"

    def unavailable_reason(self, device: torch.device) -> str | None:
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
            return library.missing("cuda")
        except ValueError as error:  # DELTAMEM_CUDA_ARCHS
            return str(error)

    def load(self) -> None:
        library.load("cuda")

    @property
    def kernels(self) -> ModuleType:
        return library.loaded("cuda")

    def scan(self, operands: records.ScanOperands, save: bool) -> records.ScanResult:
        return records.ScanResult(*self.kernels.scan(operands, save, chunked_from(operands.q.shape[-1])))

    def scan_backward(
        self, operands: records.ScanOperands, checkpoints: Tensor, cotangents: records.ScanCotangents, needs: list[bool]
    ) -> Gradients:
        limit = chunked_from(operands.q.shape[-1])
        return self.kernels.scan_backward(operands, checkpoints, cotangents, needs, limit)

    def step(self, operands: records.StepOperands) -> None:
        """Slots are not read back: one outside of the pool is treated as the pad."""
        self.kernels.step(operands)

    def correct(self, operands: records.CorrectionOperands, out: Tensor | None) -> Tensor:
        return self.kernels.correct(operands, out)

    def correct_backward(self, operands: records.CorrectionOperands, d_out: Tensor, needs: list[bool]) -> Gradients:
        return _correct_backward(self.kernels, operands, d_out, needs)

    def project(self, operands: records.ProjectionOperands) -> records.Projected:
        return records.Projected(*self.kernels.project(operands))

    def project_backward(self, adjoint: records.ProjectionAdjoint, needs: list[bool]) -> Gradients:
        return project_backward(adjoint, needs)

    def segment_mean(self, operands: records.SegmentOperands) -> tuple[Tensor, Tensor]:
        return segments.segment_mean(operands)

    segment_mean_backward = staticmethod(segments.segment_mean_backward)


@plain_torch
def _correct_backward(
    kernels: ModuleType, operands: records.CorrectionOperands, d_out: Tensor, needs: list[bool]
) -> Gradients:
    norm_weight = operands.norm_weight
    g, d_base, d_reads, d_norm = kernels.correct_adjoint(operands, d_out, needs)
    if d_norm is not None and norm_weight is not None:
        d_norm = d_norm.view(-1, norm_weight.shape[0]).sum(0)
    if g is None:
        g, d_base = d_out, d_out.clone() if needs[0] else None  # an operator never returns an operand
    d_base = g if d_base is None else d_base
    return gradients(operands, RowGradients(d_base, g, d_reads, d_norm), needs)
