"""`cpu`: the C++ kernels for CPU tensors, vectorised over the rows of a state, threads over sequences and heads."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ... import operands as records
from ..base import Backend, Decoded, Gradients
from ..reference.projection import project_backward
from ..reference.segments import segment_mean_backward
from ..scan_choice import choose_scan
from . import library


class CpuBackend(Backend):
    """Calls the library's functions. The backward of a projection and of segment means is plain PyTorch."""

    name = "cpu"

    def unavailable_reason(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPU tensors, not on {device.type}"
        return library.missing("cpu")

    def load(self) -> None:
        library.load("cpu")

    @property
    def kernels(self) -> ModuleType:
        return library.loaded("cpu")

    def scan(self, operands: records.ScanOperands, save: bool) -> records.ScanResult:
        return records.ScanResult(*self.kernels.scan(operands, save, _chunked(operands)))

    def scan_backward(
        self, operands: records.ScanOperands, checkpoints: Tensor, cotangents: records.ScanCotangents, needs: list[bool]
    ) -> Gradients:
        return self.kernels.scan_backward(operands, checkpoints, cotangents, needs, _chunked(operands))

    def step(self, operands: records.StepOperands) -> None:
        self.kernels.step(operands)

    def correct(self, operands: records.CorrectionOperands, out: Tensor | None) -> Tensor:
        return self.kernels.correct(operands, out)

    def correct_backward(self, operands: records.CorrectionOperands, d_out: Tensor, needs: list[bool]) -> Gradients:
        return self.kernels.correct_backward(operands, d_out, needs)

    def project(self, operands: records.ProjectionOperands) -> records.Projected:
        return records.Projected(*self.kernels.project(operands))

    def project_backward(self, adjoint: records.ProjectionAdjoint, needs: list[bool]) -> Gradients:
        return project_backward(adjoint, needs)

    def decode(self, operands: records.DecodeOperands) -> Decoded:
        return Decoded(*self.kernels.decode(operands))

    def segment_mean(self, operands: records.SegmentOperands) -> tuple[Tensor, Tensor]:
        return self.kernels.segment_mean(operands)

    segment_mean_backward = staticmethod(segment_mean_backward)


def _chunked(operands: records.ScanOperands) -> bool:
    return choose_scan("cpu", *operands.q.shape[1:]).chunked
